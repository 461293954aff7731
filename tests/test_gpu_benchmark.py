"""benchmarks/gpu.py measures nothing without a GPU; its logic runs, with kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent
SCRIPT, PAGE = ROOT / "benchmarks" / "gpu.py", ROOT / "benchmarks" / "gpu_page.py"
#: Made up.
RESULTS: dict[str, Any] = {
    "device": "NVIDIA X1",
    "versions": {"torch": "2.13.0"},
    "ceilings": {"copy_bytes_per_second": 4.2e12, "bf16_operations_per_second": 7e14},
    "layers": 4,
    "missing": ["decode x, batch 64: no time left"],
    "rows": [
        {"name": "linear bf16, 1 rows", "us": 40.0, "fraction": 0.9},
        {"name": "linear int8, 1 rows", "us": 20.0, "fraction": 0.8},
        {"name": "rounding to int8", "us": 500.0, "fraction": 0.5},
        {"name": "decode torch.compile bf16, batch 1, 128 tokens", "ms": 1.5, "ms_of_32": 10.0, "fraction": 0.8,
         "kernels": 41, "peak_bytes": 3_250_000_000},
        {"name": "decode qpass int8, int8 cache, batch 1, 128 tokens", "ms": 1.0, "ms_of_32": 6.25, "fraction": 0.7},
        {"name": "decode qpass int8, batch 1, 8192 tokens", "ms": 1.2, "ms_of_32": 8.0, "fraction": 0.7},
        {"name": "decode qpass int8, batch 8, 64 tokens", "ms": 1.2, "ms_of_32": 8.0, "fraction": 0.7},
    ],
}  # fmt: skip


def run(*arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    wanted = "linear int8|attention int8|bf16, |rounding|decode qpass int8, int8 cache|prompt qpass int8,"
    found = run("--device", "cpu", "--tiny", "--only", wanted, "--json", str(path))
    assert found.returncode == 0, found.stderr[-2000:]
    results = json.loads(path.read_text())
    names = {row["name"].split()[0] for row in results["rows"]}
    assert names == {"linear", "attention", "rounding", "decode", "prompt"}
    assert not results["missing"]
    assert all(row["fraction"] > 0 for row in results["rows"])
    run("--device", "cpu", "--tiny", "--only", "linear", "--json", str(path))
    more = json.loads(path.read_text())["rows"]
    assert more[: len(results["rows"])] == results["rows"], "what was measured is not measured again"
    assert len(more) > len(results["rows"])


def test_results_of_another_device_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RESULTS))
    found = run("--device", "cpu", "--tiny", "--json", str(path))
    assert found.returncode != 0
    assert "holds results of NVIDIA X1 with other versions, sources or layers: give another --json" in found.stderr
    assert json.loads(path.read_text()) == RESULTS


def written(tmp_path: Path, results: dict[str, Any]) -> str:
    """The page, to which results were written."""
    page, path = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text("before\n<!-- gpu -->\nnot yet measured\n<!-- /gpu -->\nafter\n")
    path.write_text(json.dumps(results))
    found = run(str(path), str(page), script=PAGE)
    assert found.returncode == 0, found.stderr[-2000:]
    return page.read_text()


def test_the_page_gets_the_tables(tmp_path: Path) -> None:
    lines = written(tmp_path, RESULTS).splitlines()
    assert lines[:4] == ["before", "<!-- gpu -->", "![tokens a second](decode_gpu.svg)", ""]
    assert lines[4].startswith("NVIDIA X1, torch 2.13.0; a copy moves 4.20 TB/s")
    assert lines[4].endswith("Milliseconds of 32 layers are counted from 4, of which kernels and GB are.")
    assert "| linear bf16, 1 rows | 0.040 |  | 0.90 |  |  |" in lines
    assert "| linear int8, 1 rows | 0.020 | 2.00 | 0.80 |  |  |" in lines
    assert "| decode torch.compile bf16, batch 1, 128 tokens | 10.000 |  | 0.80 | 41 | 3.2 |" in lines
    assert "| decode qpass int8, int8 cache, batch 1, 128 tokens | 6.250 | 1.60 | 0.70 |  |  |" in lines
    assert "| rounding to int8 | 0.500 |  | 0.50 |  |  |" in lines
    assert lines[-3:] == ["Not measured: decode x, batch 64.", "<!-- /gpu -->", "after"]


def test_the_chart_is_of_one_sequence_behind_few_tokens(tmp_path: Path) -> None:
    written(tmp_path, RESULTS)
    drawn = [t.text for t in ElementTree.parse(tmp_path / "decode_gpu.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert drawn == [
        "tokens a second, batch 1, 128 tokens, NVIDIA X1",
        "torch.compile bf16",
        "100",
        "qpass int8, int8 cache",
        "160",
    ]


def test_without_a_decode_step_there_is_no_chart(tmp_path: Path) -> None:
    text = written(tmp_path, RESULTS | {"rows": RESULTS["rows"][:2]})
    assert "svg" not in text
    assert not (tmp_path / "decode_gpu.svg").exists()


def test_the_page_of_performance_has_a_place_for_them() -> None:
    assert "<!-- gpu -->" in (ROOT / "docs/performance.md").read_text()


def test_on_the_cpu_only_its_logic_runs() -> None:
    found = run("--device", "cpu")
    assert found.returncode != 0
    assert "on the CPU it runs with --tiny and TRITON_INTERPRET=1" in found.stderr

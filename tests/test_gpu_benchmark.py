"""benchmarks/gpu.py measures nothing without a GPU; its logic runs, with kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
RESULTS = {
    "device": "NVIDIA H200", "versions": {"torch": "2.13.0"},
    "ceilings": {"copy_bytes_per_second": 4.2e12, "bf16_operations_per_second": 7e14},
    "missing": ["decode x, batch 64: no time left"], "rows": [{"name": "linear int8, 1 rows", "us": 20.0, "fraction": 0.8},
    {"name": "decode qpass int8, batch 1", "ms": 1.0, "ms_of_32": 6.5, "fraction": 0.7}],
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    wanted = "int8|bf16, |rounding"
    found = run("--device", "cpu", "--tiny", "--only", wanted, "--json", str(path))
    assert found.returncode == 0, found.stderr[-2000:]
    results = json.loads(path.read_text())
    names = {row["name"].split()[0] for row in results["rows"]}
    assert names == {"linear", "attention", "rounding", "decode", "prompt"}
    assert not results["missing"]
    assert all(row["fraction"] > 0 for row in results["rows"])


def test_the_page_gets_the_tables(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text("before\n<!-- gpu -->\nnot yet measured\n<!-- /gpu -->\nafter\n")
    results.write_text(json.dumps(RESULTS))
    found = run("--json", str(results), "--page", str(page))
    assert found.returncode == 0, found.stderr[-2000:]
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\nNVIDIA H200, torch 2.13.0; a copy moves 4.20 TB/s")
    assert "| linear int8, 1 rows | 0.020 | 0.80 |\n| decode qpass int8, batch 1 | 6.500 | 0.70 |" in text
    assert text.endswith("Not measured: decode x, batch 64.\n<!-- /gpu -->\nafter\n")


def test_the_page_of_performance_has_a_place_for_them() -> None:
    assert "<!-- gpu -->" in (ROOT / "docs/performance.md").read_text()


def test_on_the_cpu_only_its_logic_runs() -> None:
    found = run("--device", "cpu")
    assert found.returncode != 0
    assert "on the CPU it runs with --tiny and TRITON_INTERPRET=1" in found.stderr

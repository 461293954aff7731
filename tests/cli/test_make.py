"""quantize, verify, export, generate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import qpass
from tests.cli.conftest import TINYPY, Command


def test_quantize_verify_and_export(command: Command, tmp_path: Path) -> None:
    made = json.loads(command("quantize", TINYPY, tmp_path / "a", "--recipe", "int8", "--json").out)
    checked = json.loads(command("verify", tmp_path / "a", "--json").out)
    assert made == checked
    served = command("export", tmp_path / "a", tmp_path / "served", "--json")
    assert served.status == 0
    assert json.loads(served.out)["quantized"]
    scales = ("--kv", "fp8_e4m3:static", "--calibration", TINYPY / "calibration.txt")
    with_scales = command("export", tmp_path / "a", tmp_path / "served", *scales)
    assert with_scales.status == 0
    assert "kv_cache_scheme" in (tmp_path / "served" / "config.json").read_text()
    assert command("export", tmp_path / "a", tmp_path / "served", *scales[:2]).status == 2


@pytest.mark.parametrize("recipe", ["int8", "int4:g32:asym", "nf4"])
def test_a_dry_run_knows_the_size_and_writes_nothing(recipe: str, command: Command, tmp_path: Path) -> None:
    ended = command("quantize", TINYPY, tmp_path / "a", "--recipe", recipe, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    real = json.loads(command("quantize", TINYPY, tmp_path / "a", "--recipe", recipe, "--json").out)
    tensors = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors"))
    found = json.loads(ended.out)
    assert found["artifact_bytes"] == pytest.approx(tensors, rel=0.01)
    assert found["artifact_bytes"] < real["bytes"]
    assert found["memory_bytes"] > found["artifact_bytes"]
    assert found["total_seconds"] > 0


def test_a_dry_run_with_data_counts_what_calibration_does(command: Command, tmp_path: Path) -> None:
    given = ("--recipe", "int4", "--calibration", TINYPY / "calibration.txt", "--dry-run", "--json")
    found = json.loads(command("quantize", TINYPY, tmp_path / "a", *given).out)
    assert set(found["seconds"]) > {"rounding", "calibration", "giving out bits"}
    assert not list(tmp_path.iterdir())


def test_generate_writes_what_transformers_generate_does(command: Command, artifact: Path) -> None:
    prompt = "def write(self, data):\n    if self.closed:\n"
    ended = command("generate", artifact, prompt, "-n", 12, "--inner", "eager", "--json")
    found = json.loads(ended.out)
    model = qpass.load(artifact, inner="eager")
    ids = AutoTokenizer.from_pretrained(artifact)(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert found["tokens"] == wanted
    shown = command("generate", artifact, prompt, "-n", 12, "--inner", "eager")
    assert shown.out.rstrip("\n") == found["text"].rstrip("\n")
    assert "12 tokens" in shown.err


@pytest.mark.long
def test_the_same_seed_draws_the_same(command: Command) -> None:
    def drawn(seed: int) -> str:
        options = ("-n", 8, "--inner", "eager", "--temperature", 1.0, "--seed", seed)
        return command("generate", TINYPY, "import", "--recipe", "int8", *options).out

    assert drawn(1) == drawn(1) != drawn(2)


def test_generate_reads_a_pipe() -> None:
    code = f"from qpass.cli import main; main(['generate', {str(TINYPY)!r}, '-n', '3', '--inner', 'eager', '--json'])"
    ended = subprocess.run([sys.executable, "-c", code], input="import os\n", capture_output=True, text=True)
    assert len(json.loads(ended.stdout)["tokens"]) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Interrupted at several moments: status 130, no traceback, and the target is not there, or whole."""
    target = tmp_path / "a"
    code = f"from qpass.cli import main; main(['quantize', {str(TINYPY)!r}, {str(target)!r}])"
    for moment in ("imported", "begun"):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import qpass.cli; print('imported', flush=True); {code}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        while moment == "begun" and not (tmp_path / "a.unfinished").exists() and process.poll() is None:
            time.sleep(0.001)
        if moment == "imported":
            time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode in (130, 0)
        assert "Traceback" not in errors
        if target.exists():
            qpass.verify(target)
        assert {p.name for p in tmp_path.iterdir()} <= {"a", "a.unfinished"}


@pytest.mark.long
def test_warmup_fills_the_caches_that_a_fresh_process_reads(
    command: Command, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold it compiles for many seconds; from then on most of that is gone. Twice the same finds nothing to do."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first, second = (json.loads(command("warmup", artifact, "--context", 16, "--json").out) for _ in range(2))
    for run in (first["filled"], first["warm"]):
        assert 0 < run["imported"] < run["loaded"] < run["first"] < run["steady"]
    compiled = [run["steady"] - run["loaded"] for run in (first["filled"], first["warm"], second["filled"])]
    assert compiled[1] < 0.7 * compiled[0]
    assert compiled[2] < 0.7 * compiled[0]
    assert any(tmp_path.iterdir())


def test_warmup_is_of_artifacts(command: Command) -> None:
    ended = command("warmup", TINYPY)
    assert ended.status == 2
    assert "qpass quantize" in ended.err

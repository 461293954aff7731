"""eval, compare, blame, bench: what is printed is what the library says, and limits end in exit statuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.measuring.compare import compare
from qpass.texts import read_windows
from tests.cli.conftest import DATA, SHORT, TINYPY, Command

COMPARED = ("--inner", "eager", "--context", "16", "--steps", "4", *SHORT)


def float_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINYPY, dtype="auto").eval()


def test_eval_says_what_evaluate_says(command: Command) -> None:
    ended = command("eval", TINYPY, "--data", DATA, "--recipe", "int3:g32", "--json", *SHORT)
    windows = read_windows(DATA, AutoTokenizer.from_pretrained(TINYPY), 64, 2)
    model = qpass.quantize(float_model(), "int3:g32", inner="eager")
    wanted = qpass.evaluate(model, float_model(), windows)
    assert ended.status == 0
    assert json.loads(ended.out)["kl"] == pytest.approx(wanted.kl, rel=1e-4)
    assert json.loads(ended.out)["tokens"] == wanted.tokens == 2 * 63


@pytest.mark.parametrize(
    ("limits", "status", "says"),
    [
        (("--max-kl", "1", "--min-top1", ".5"), 0, ""),
        (("--max-kl", "1e-6"), 1, "is above 1e-06"),
        (("--min-top1", "0.9999"), 1, "is below 0.9999"),
        (("--max-kl", "1e-6", "--min-top1", "0.9999"), 1, "; top-1"),
    ],
    ids=["within", "KL", "top-1", "both"],
)
def test_a_limit_that_does_not_hold_ends_with_1(
    limits: tuple[str, ...], status: int, says: str, artifact: Path, command: Command
) -> None:
    ended = command("eval", artifact, "--reference", TINYPY, "--data", DATA, *SHORT, *limits)
    assert (ended.status, says in ended.err) == (status, True)
    assert "KL" in ended.out, "the numbers are printed whatever comes of them"


@pytest.mark.parametrize("left", [[], ["ffn a.weight stays in float: because"]], ids=["none", "one site"])
def test_strict_ends_with_1_where_a_site_stays_in_float(
    left: list[str], artifact: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `qpass.testing` says of the model, behind the numbers."""
    monkeypatch.setattr("qpass.testing.left_in_float", lambda model: left)
    given = ("eval", artifact, "--reference", TINYPY, "--data", DATA, *SHORT)
    ended = command(*given, "--strict")
    assert (ended.status, ended.err) == ((1, f"qpass: {left[0]}\n") if left else (0, ""))
    assert "KL" in ended.out
    assert command(*given).status == 0


def test_json_is_json_even_where_a_number_is_none(command: Command) -> None:
    """One window has no standard error."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    ended = command("eval", TINYPY, "--data", DATA, "--window", "64", "--windows", "1", "--json")
    assert json.loads(ended.out, parse_constant=refuse)["kl_standard_error"] is None


@pytest.mark.long
def test_a_recipe_measures_what_its_artifact_does(command: Command, tmp_path: Path) -> None:
    """In the type that the checkpoint is stored in, with the same limits."""
    assert command("quantize", TINYPY, tmp_path / "a", "--recipe", "int3:g32").status == 0
    by_recipe = command("eval", TINYPY, "--data", DATA, "--recipe", "int3:g32", "--json", *SHORT)
    by_artifact = command("eval", tmp_path / "a", "--reference", TINYPY, "--data", DATA, "--json", *SHORT)
    assert json.loads(by_recipe.out) == json.loads(by_artifact.out)
    assert command("diff", TINYPY, tmp_path / "a", "--recipe", "int3:g32", "--exit-code").status == 0


def test_kept_logits_stand_for_the_float_model(command: Command, tmp_path: Path, artifact: Path) -> None:
    kept = tmp_path / "logits.safetensors"
    first = command("eval", TINYPY, "--data", DATA, "--reference", kept, "--json", *SHORT)
    assert kept.stat().st_size > 2 * 64 * 4096 * 4
    again = command("eval", TINYPY, "--data", DATA, "--reference", kept, "--json", *SHORT)
    without = command("eval", TINYPY, "--data", DATA, "--json", *SHORT)
    assert json.loads(first.out)["kl"] == json.loads(again.out)["kl"] == pytest.approx(json.loads(without.out)["kl"])
    assert command("eval", artifact, "--data", DATA, "--reference", kept, *SHORT).status == 0
    other = command("eval", TINYPY, "--data", DATA, "--reference", kept, "--window", "32", "--windows", "2")
    assert other.status == 2
    assert "other windows" in other.err


@pytest.mark.long
def test_compare_measures_each_recipe_and_the_float_model(command: Command, tmp_path: Path) -> None:
    """A recipe that fails is named; the others are kept, and the next call takes them as they are."""
    compared = ("compare", TINYPY, "--data", DATA, "--folder", tmp_path / "kept", *COMPARED, "--recipes")
    failed = command(*compared, "int8,int3:g32,int8+kv=int8:g512")
    assert failed.status == 2
    assert "int8+kv=int8:g512:" in failed.err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.json")}
    found = json.loads(command(*compared, "int8,int3:g32", "--json").out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir() if path in kept} == kept
    assert [row["recipe"] for row in found["rows"]] == ["float", "int8", "int3:g32"]
    floats, int8, int3 = found["rows"]
    assert floats["evaluation"]["kl"] == 0 < int8["evaluation"]["kl"] < int3["evaluation"]["kl"]
    assert floats["bytes"] == sum(p.nbytes for p in float_model().parameters()) > int8["bytes"] > int3["bytes"]
    assert found["frontier"] == ["int8", "int3:g32"]
    assert all(row["peak_rss"] > 100e6 and row["tokens_per_second"] > 0 for row in found["rows"])
    assert all(row["kl_low"] <= row["evaluation"]["kl"] <= row["kl_high"] for row in found["rows"])
    page = command(*compared, "int8,int3:g32", "-o", tmp_path / "page.html")
    assert page.status == 0
    assert "A int8  B int3:g32" in command(*compared, "int8,int3:g32").out
    assert "recipes compared" in (tmp_path / "page.html").read_text()


@pytest.mark.long
def test_compare_goes_on_after_a_kill(tmp_path: Path) -> None:
    """What was measured before is not measured again."""
    arguments = [
        "compare",
        str(TINYPY),
        "--data",
        DATA,
        "--recipes",
        "int8,nf4,int4",
        "--folder",
        str(tmp_path),
        *COMPARED,
    ]
    code = f"from qpass.cli import main; main({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    found = compare(TINYPY, ["int8", "nf4", "int4"], DATA, folder=tmp_path, inner="eager", context=16, steps=4, window=64,
                    windows=2)  # fmt: skip
    assert len(found.rows) == 4
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_bench_times_the_float_model_and_each_recipe(command: Command, artifact: Path) -> None:
    short = ("--context", "16", "--steps", "4", "--inner", "eager")
    ended = command("bench", TINYPY, "--recipes", "int4+kv=int8", "--json", *short)
    rows = {row["recipe"]: row for row in json.loads(ended.out)["rows"]}
    assert list(rows) == ["float", "int4+kv=int8"]
    assert rows["float"]["weight_bytes"] > 2 * rows["int4+kv=int8"]["weight_bytes"]
    assert rows["float"]["cache_bytes"] > 1.8 * rows["int4+kv=int8"]["cache_bytes"]
    assert "times artifact" in command("bench", artifact, *short).out

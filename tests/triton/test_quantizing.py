"""Floats to codes, scales and zero points: to the bit those of qpass.numerics."""

from __future__ import annotations

import pytest
import torch

import qpass
from qpass.numerics import quantize
from qpass.ops.triton import operators
from qpass.spec import parse_spec
from tests.triton.compiling import Launch, launches  # noqa: F401  a fixture
from tests.triton.test_linear import TOLERANCE, random

SPECS = ["int8", "int8:asym", "int8:g16", "int4:g32", "int4:g32:asym", "int4:channel:asym", "int4:channel:asym:scale=fp16",
         "int8:scale=bf16", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3:channel", "fp8_e5m2:g16"]  # fmt: skip
OTHERS = ["nf4:g32", "int3:g32", "mxfp8", "int8:tensor", "int8:g7", "int4:g32:zero=float"]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the kernel."""
    calls: list[int] = []
    made = operators._quantize
    monkeypatch.setattr(operators, "_quantize", lambda *given: calls.append(1) or made(*given))  # type: ignore[func-returns-value]
    return calls


@pytest.mark.parametrize("text", [*SPECS, *OTHERS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [77, 128])
def test_quantize_is_the_reference_to_the_bit(
    text: str, dtype: torch.dtype, columns: int, device: str, poisoned: None, written: list[int]
) -> None:
    x = random(3, 4, columns) * torch.logspace(-30, 4, columns)
    x[0, 0] = 0
    x[0, 1, :32] = torch.tensor([2.5, -0.5, 1.5, 127.0] * 8)  # ties
    x[0, 2] = torch.linspace(-600, 600, columns)
    x[0, 3] = torch.linspace(-0.02, 0.02, columns)  # subnormals of fp8
    x[1, 0] = 1e-42
    x = x.to(dtype)
    expected = [p for p in quantize(x, parse_spec(text)).parts if p is not None]
    found = operators.quantize(x.to(device), text)
    assert bool(written) == (text in SPECS)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours.cpu().float(), theirs.float())


@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "fp8_e4m3:channel", "fp8_e4m3"])
def test_what_is_no_number_spoils_its_block_only(text: str, device: str) -> None:
    x = random(3, 64)
    x[1, 5] = float("nan")
    parts = operators.quantize(x.to(device), text)
    stored = dict(zip(parse_spec(text).stored_parts, parts, strict=True))
    back = operators.dequantize(*(stored.get(i) for i in range(4)), 64, text, torch.float32).cpu()  # type: ignore[arg-type]
    assert bool(back[1, 5].isnan())
    assert bool(back[[0, 2]].isfinite().all())


def test_a_scale_that_overflows_is_refused(device: str) -> None:
    x = random(2, 64)
    x[0, 0] = float("inf")
    with pytest.raises(qpass.QpassError, match="overflows"):
        operators.quantize(x.to(device), "int8")


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(
    "capability", [80, pytest.param(89, marks=pytest.mark.long), pytest.param(90, marks=pytest.mark.long)]
)
def test_it_compiles(text: str, capability: int, launches: list[Launch]) -> None:  # noqa: F811
    operators.quantize(torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16), text)
    code = launches[0].compiled(capability)
    assert code.spills == 0
    if text != "fp8_e4m3" and text != "fp8_e5m2":
        assert "div.rn.f32" in code.ptx  # to the nearest, as torch divides
        assert "div.full" not in code.ptx
    assert "0f4B400000" in code.ptx  # what rounds is not folded away

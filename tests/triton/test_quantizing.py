"""Floats to codes, scales and zero points: to the bit those of qpass.numerics."""

from __future__ import annotations

import pytest
import torch

import qpass
from qpass.numerics import quantize
from qpass.ops.triton import operators, writing
from qpass.spec import parse_spec
from tests.triton.compiling import Launch, launches  # noqa: F401  a fixture
from tests.triton.test_linear import TOLERANCE, random

SPECS = ["int8", "int8:asym", "int8:g16", "int4:g32", "int4:g32:asym", "int4:channel:asym", "int4:channel:asym:scale=fp16",
         "int8:scale=bf16", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3:channel", "fp8_e5m2:g16", "nf4:g32", "nf4:channel", "nf4:g16:dq",
         "fp4_e2m1", "mxfp4", "mxfp4:rceil", "mxfp8", "mxfp8:rceil", "int2:g32:asym", "int3:g32:asym:scale=fp16", "int5:g16:asym",
         "int6:g8", "int2:g32:zero=float:scale=fp16", "int4:g32:zero=float"]  # fmt: skip
OTHERS = ["int8:tensor", "int8:g7", "nvfp4", "int4:t4"]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the kernel."""
    calls: list[int] = []
    made = writing._quantize
    monkeypatch.setattr(writing, "_quantize", lambda *given: calls.append(1) or made(*given))  # type: ignore[func-returns-value]
    return calls


@pytest.mark.parametrize("text", [*SPECS, *OTHERS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [77, 128])
def test_quantize_is_the_reference_to_the_bit(
    text: str, dtype: torch.dtype, columns: int, device: str, poisoned: None, written: list[int]
) -> None:
    x = random(3, 4, columns) * torch.logspace(-30, 4, columns)
    x[2] = random(4, columns, seed=1)  # blocks of numbers of one size
    x[0, 0] = 0
    x[0, 1, :32] = torch.tensor([2.5, -0.5, 1.5, 127.0] * 8)  # ties
    x[0, 2] = torch.linspace(-600, 600, columns)
    x[0, 3] = torch.linspace(-0.02, 0.02, columns)  # subnormals of fp8
    x[1, 0] = 1e-42
    x[1, 1] = 5 + random(columns, seed=2) * 1e-6  # a float zero point would be beyond float16
    x = x.to(dtype)
    expected = [p for p in quantize(x, parse_spec(text)).parts if p is not None]
    found = operators.quantize(x.to(device), text)
    assert bool(written) == (text in SPECS)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours.cpu().float(), theirs.float())


@pytest.mark.parametrize("text", ["nf4:g32", "fp4_e2m1", "mxfp4"])
def test_ties_of_a_codebook(text: str, device: str) -> None:
    """The largest of a block gives a scale of 1; the rest lies in the middle between two values, or next to it."""
    spec = parse_spec(text)
    assert spec.format.codebook is not None
    grid = torch.tensor(sorted(set(spec.format.codebook)))
    middles = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (-10.0, 10.0)]
    x = torch.cat([middles, *near, -middles, torch.tensor([0.0, -0.0])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).view(-1, 31)
    x = torch.cat([x, torch.full((len(x), 1), spec.format.qmax)], 1)
    expected = quantize(x, spec)
    found = operators.quantize(x.to(device), text)
    assert torch.equal(found[0].cpu(), expected.data)


@pytest.mark.parametrize("text", ["int8:static", "fp8_e4m3:static"])
def test_scales_that_are_given(text: str, device: str, written: list[int]) -> None:
    """A scale for each head and channel."""
    x, scale = random(2, 3, 5, 48), torch.rand(1, 3, 1, 48) + 0.01
    expected = quantize(x, parse_spec(text), static_scale=scale)
    (found,) = operators.quantize(x.to(device), text, scale.to(device))
    assert torch.equal(found.cpu().float(), expected.data.float())
    assert written


@pytest.mark.parametrize(
    "text", ["int8", "int4:g32:asym", "fp8_e4m3:channel", "fp8_e4m3", "nf4:g32", "nf4:g32:dq", "mxfp8"]
)
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
    if parse_spec(text).format.codebook is None:
        assert "0f4B400000" in code.ptx  # what rounds is not folded away

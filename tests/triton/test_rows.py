"""Rows of stored codes to floats: to the bit those of qpass.numerics."""

from __future__ import annotations

import pytest
import torch

from qpass.numerics import dequantize
from qpass.ops.triton import operators
from qpass.spec import parse_spec
from tests.triton.test_linear import FUSED_SPECS, weight

SPECS = ["int8", "int8:tensor", "int8:g48:asym", "int6", "int5:g20", "int5:g4:asym", "int4:g32:asym", "int4:g7",
         "int4:tensor:asym", "int4:g64:zero=float", "int4:g40:scale=fp16", "int3:g24", "int3:g32:asym", "int2:g16:asym",
         "int2:g32:zero=float:scale=fp16", "nf4", "nf4:g32:dq", "nf4:g8:scale=bf16", "fp4_e2m1", "mxfp8", "mxfp4", "nvfp4",
         "fp8_e4m3", "fp8_e4m3:channel", "fp8_e5m2:g16", "bf16", "fp32"]  # fmt: skip


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("shape", [(5, 77), (2, 2500), pytest.param((5, 1), marks=pytest.mark.long)], ids=str)
def test_rows_are_those_of_the_reference(
    text: str, dtype: torch.dtype, shape: tuple[int, int], device: str, poisoned: None
) -> None:
    stored, values = weight(*shape, text, device)
    columns, spec = values.shape[1], parse_spec(text)
    expected = dequantize(stored.map(torch.Tensor.cpu), spec, columns, dtype)
    ids = torch.tensor([[1, shape[0] - 1], [0, 1]], dtype=torch.int32, device=device).T
    assert torch.equal(operators.dequantize(*stored.parts, columns, text, dtype).cpu(), expected)
    rows = operators.embedding(ids, *stored.parts, columns, text, dtype)
    assert torch.equal(rows.cpu(), expected[ids.cpu().long()])


@pytest.mark.parametrize("text", ["int8", "fp8_e4m3", "fp8_e5m2", "int4:g32:asym:rotated", "int2:t4:zero=float"])
def test_of_a_cache(text: str, device: str) -> None:
    """[B, H, S, columns]; NaN comes back, formats of a cache only too."""
    spec = parse_spec(text)
    x = torch.randn(2, 3, 8, 64)
    if spec.format.kind == "float8":
        x[0, 0, 0, :2] = torch.tensor([float("nan"), -float("nan")])
    stored = torch.ops.qpass.quantize(x, text)
    parts = [None] * 4
    for slot, part in zip(spec.stored_parts, stored, strict=True):
        parts[slot] = part  # type: ignore[call-overload]
    expected = torch.ops.qpass.dequantize(*parts, 64, text, torch.float32)
    found = operators.dequantize(*(None if p is None else p.to(device) for p in parts), 64, text, torch.float32)
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [-1, 41])
def test_an_index_outside_of_the_table_gives_nan(index: int, device: str) -> None:
    stored, _ = weight(41, 64, "int8", device)
    found = operators.embedding(torch.tensor([3, index], device=device), *stored.parts, 64, "int8", torch.float32)
    assert bool(found[0].isfinite().all())
    assert bool(found[1].isnan().all())


@pytest.mark.parametrize("text", FUSED_SPECS)
def test_every_code(text: str, device: str) -> None:
    """All bytes as weights of the fused kernel, a column at a time: what it multiplies is exact but for the type."""
    spec = parse_spec(text)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    columns = 512 * 8 // spec.format.bits
    stored, _ = weight(1, columns, text, device)
    data = codes.view(stored.data.dtype)
    if spec.format.name == "fp8_e4m3" or spec.format.name == "mxfp8":
        data = torch.where((codes & 0x7F) == 0x7F, 0, codes).to(torch.uint8).view(data.dtype)  # without NaN
    if spec.format.name == "fp8_e5m2":
        data = torch.where((codes & 0x7C) == 0x7C, 0, codes).to(torch.uint8).view(data.dtype)
    parts = (data[None].to(device), *stored.parts[1:])
    values = operators.dequantize(*parts, columns, text, torch.float32).cpu()[0]
    for start in range(0, 256, 64):  # 64 rows, each of which takes one column
        x = torch.zeros(64, columns, dtype=torch.bfloat16)
        x[torch.arange(64), start + torch.arange(64)] = 1
        found = operators.linear(x.to(device), *parts, None, text).cpu()[:, 0].float()
        torch.testing.assert_close(found, values[start : start + 64], rtol=2.0**-7, atol=1e-30)

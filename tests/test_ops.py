"""torch.ops.qpass: each operator against float64, its fake against its result, for every format and activation type."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import qpass.ops
from qpass.numerics import dequantize, quantize
from qpass.quantized import Quantized
from qpass.spec import parse_spec

SPECS = ["int8", "int8:asym", "int6", "int5", "int4:g32:asym", "int3:g32", "int2:g32:asym", "nf4:g32:dq", "fp4_e2m1", "mxfp8",
         "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e5m2:channel", "bf16", "int8:tensor"]  # fmt: skip
specs = pytest.mark.parametrize("text", SPECS)
#: Relative float error of a product of some hundred terms, and of its rounding to the type.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def stored(rows: int, columns: int, text: str, seed: int = 0) -> Quantized:
    return quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), parse_spec(text))


def checks(text: str) -> tuple[str, ...]:
    """opcheck compares inputs before and after a call, which torch cannot do for 8-bit floats."""
    small = ("test_faketensor", "test_aot_dispatch_dynamic")
    return small if any(f in text for f in ("fp8", "fp4")) else (*small, "test_schema")


@specs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_linear(text: str, dtype: torch.dtype, lead: tuple[int, ...], bias: bool) -> None:
    columns = 77  # no multiple of any group or packing unit
    q, x = (
        stored(33, columns, text),
        torch.randn(columns, *reversed(lead)).to(dtype).permute(*reversed(range(len(lead) + 1))),
    )
    b = torch.randn(33) if bias else None
    out = torch.ops.qpass.linear(x, *q.parts, b, text)
    expected = F.linear(
        x.double(), dequantize(q, parse_spec(text), columns).double(), None if b is None else b.double()
    )
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[dtype]
    if lead == (2, 3) and dtype == torch.float32:
        torch.library.opcheck(torch.ops.qpass.linear.default, (x, *q.parts, b, text), test_utils=checks(text))


@specs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_embedding_gathers_then_dequantizes(text: str, dtype: torch.dtype) -> None:
    q, indices = stored(41, 77, text), torch.tensor([[3, 7], [40, 7], [0, 1]]).t()
    out = torch.ops.qpass.embedding(indices, *q.parts, 77, text, dtype)
    assert torch.equal(out, dequantize(q, parse_spec(text), 77, dtype)[indices])
    torch.library.opcheck(
        torch.ops.qpass.embedding.default, (indices, *q.parts, 77, text, dtype), test_utils=checks(text)
    )


@specs
def test_quantize_and_dequantize(text: str) -> None:
    x = torch.randn(2, 5, 3, 77).transpose(1, 2)  # as keys are: heads moved before tokens
    parts = torch.ops.qpass.quantize(x, text)
    q = quantize(x, parse_spec(text))
    present = [p for p in q.parts if p is not None]
    assert len(parts) == len(present)
    for ours, theirs in zip(parts, present, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours.float(), theirs.float())
    out = torch.ops.qpass.dequantize(*q.parts, 77, text, torch.float32)
    assert torch.equal(out, dequantize(q, parse_spec(text), 77))
    torch.library.opcheck(torch.ops.qpass.quantize.default, (x, text), test_utils="test_faketensor")
    torch.library.opcheck(
        torch.ops.qpass.dequantize.default, (*q.parts, 77, text, torch.float32), test_utils=checks(text)
    )


@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "fp8_e4m3", "mxfp8"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention(text: str, heads: tuple[int, int], mask: str) -> None:
    query_heads, key_heads = heads
    length, size, v_size = 6, 40, 24
    q = torch.randn(2, 6, query_heads, size).transpose(1, 2)
    k = quantize(torch.randn(2, key_heads, length, size), parse_spec(text))
    v = quantize(torch.randn(2, key_heads, length, v_size), parse_spec(text))
    kept = torch.rand(2, 1, 6, length) > 0.3
    kept[..., 0] = True
    given = {"bool": kept, "float": torch.where(kept, 0.0, -9.0)}.get(mask)
    args = (q, *k.parts, text, *v.parts, v_size, text, given, mask == "causal", 0.2)
    out = torch.ops.qpass.attention(*args)
    keys, values = (
        dequantize(t, parse_spec(text), n).double().repeat_interleave(query_heads // key_heads, 1)
        for t, n in ((k, size), (v, v_size))
    )
    scores = q.double() @ keys.transpose(-1, -2) * 0.2
    if mask == "bool":
        scores = scores.masked_fill(~kept, -torch.inf)
    elif mask == "float":
        scores = scores + given
    elif mask == "causal":
        scores = scores.masked_fill(torch.ones(6, length, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ values, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(torch.ops.qpass.attention.default, args, test_utils=checks(text))


def test_cache_positions() -> None:
    positions = torch.ops.qpass.cache_positions(torch.tensor(5), 3, 8)
    assert positions.tolist() == [5, 6, 7]
    with pytest.raises(qpass.QpassError, match="cache of 8 tokens is too short"):
        torch.ops.qpass.cache_positions(torch.tensor(6), 3, 8)

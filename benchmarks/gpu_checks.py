"""Whether the kernels compute what they should, against float64; what benchmarks/gpu.py does before it measures."""

from __future__ import annotations

import torch
from gpu_shape import TOLERANCE, Shape, stored_on
from torch import Tensor
from torch.nn import functional as F

from qpass.numerics import dequantize, quantize
from qpass.ops import cache_reference, reference
from qpass.ops.around import Around
from qpass.ops.triton import operators
from qpass.packing import as_bytes
from qpass.spec import parse_spec


def check_linear(
    text: str, rows: int, dtype: torch.dtype, device: str, outputs: int, columns: int, seed: int, around: bool = False
) -> float:
    """Error of the operator by the largest result, against float64; its output held NaN before. `around`: with a norm before, a
    gate and a residual behind, of twice as many rows of the weight."""
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    stored = stored_on(device, 2 * outputs if around else outputs, columns, text, seed)
    x, norm, residual = random(rows, columns), random(columns), random(rows, outputs)
    rest = Around(norm, 1e-5, None, "silu", residual) if around else Around()
    found = operators.linear(x, *stored.parts, None, text, *vars(rest).values()).double()
    y = x.double()
    if around:
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
    expected = F.linear(y, dequantize(stored, parse_spec(text), columns).double())
    if around:
        first, second = expected.chunk(2, -1)
        expected = F.silu(first) * second + residual.double()
    return float((found - expected).abs().max() / expected.abs().max())


def check_append(text: str, batch: int, new: int, shape: Shape, device: str, seed: int) -> str:
    """What is wrong with new tokens of a cache: their codes, anything beside them, or the length; "" if nothing is."""
    generator, start = torch.Generator().manual_seed(seed), 7
    spec, size = parse_spec(text), (batch, shape.key_heads, new, shape.head)
    q, k, v = (
        torch.randn(batch, heads, new, shape.head, generator=generator).bfloat16().to(device)
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    phase = torch.rand(1, 1, new, shape.head, generator=generator) * 6
    cos, sin = (x.bfloat16().to(device) for x in (phase.cos(), phase.sin()))
    like = [as_bytes(p) for p in reference.quantized_like(q.new_empty(size), text)]
    caches = [[p.new_full((*p.shape[:2], 32, p.shape[3]), 77) for p in like] for _ in range(2)]
    length = torch.tensor(start, device=device)
    before, _, keys = operators.append_rotated(*caches, length, q, k, v, cos, sin, text, text)
    exact = cache_reference.rotated(k.double(), cos.double(), sin.double())
    if (int(before), int(length)) != (start, start + new):
        return f"the length was {int(before)} and is {int(length)}"
    if float((keys - exact).abs().max() / exact.abs().max()) > TOLERANCE[torch.bfloat16]:
        return "the rotated keys"
    for cache, states in zip(caches, (keys, v), strict=True):
        for part, codes in zip(cache, [p for p in quantize(states, spec).parts if p is not None], strict=True):
            expected = torch.full_like(part, 77)
            expected[:, :, start : start + new] = as_bytes(codes)
            if not torch.equal(part, expected):
                return "the codes"
    return ""


def check_attention(text: str, queries: int, tokens: int, shape: Shape, device: str, seed: int) -> float:
    """The same of attention, behind a mask that hides the end of the cache."""
    generator = torch.Generator().manual_seed(seed)
    spec = parse_spec(text)
    k, v = (
        quantize(torch.randn(2, shape.key_heads, tokens, shape.head, generator=generator), spec).map(
            lambda p: p.to(device)
        )
        for _ in range(2)
    )
    q = torch.randn(2, shape.heads, queries, shape.head, generator=generator).bfloat16().to(device)
    seen = (torch.arange(tokens, device=device) < max(1, tokens * 2 // 3)).expand(1, 1, queries, tokens)
    found = operators.attention(q, *k.parts, text, *v.parts, shape.head, text, seen, False, None).double()
    keys, values = (dequantize(x, spec, shape.head).double() for x in (k, v))
    expected = F.scaled_dot_product_attention(q.double(), keys, values, attn_mask=seen, enable_gqa=True)
    return float((found - expected).abs().max() / expected.abs().max())


def check_rows(text: str, dtype: torch.dtype, columns: int, device: str, seed: int) -> float:
    """The same of rows of a table that is picked from."""
    generator = torch.Generator(device).manual_seed(seed)
    stored = stored_on(device, 50, columns, text, seed)
    ids = torch.randint(0, 50, (3, 7), generator=generator, device=device)
    found = operators.embedding(ids, *stored.parts, columns, text, dtype).double()
    expected = dequantize(stored, parse_spec(text), columns).double()[ids]
    return float((found - expected).abs().max() / expected.abs().max())


def check_pair(text: str, rows: int, outputs: int, columns: int, device: str, seed: int) -> float:
    """The same of a product of codes, with the codes of its input as they are."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, device=device).bfloat16()
    bias = torch.randn(outputs, generator=generator, device=device)
    stored, spec = stored_on(device, outputs, columns, text, seed), parse_spec(text)
    codes, scale, *rest = torch.ops.qpass.quantize_input(x, None, None, str(spec.activations))
    zero = rest[0] if rest else None
    found = torch.ops.qpass.integer_linear(codes, scale, zero, *stored.parts, bias, text, x.dtype).double()
    values = codes.double() if zero is None else codes.double() - zero.double()
    expected = F.linear(values * scale.double(), dequantize(stored, spec, columns).double(), bias.double())
    return float((found - expected).abs().max() / expected.abs().max())


def check_rounding(text: str, columns: int, device: str, seed: int) -> str:
    """What is wrong with codes that are made of many rows; "" if nothing is. The reference is qpass/numerics.py on the CPU."""
    x = torch.randn(2, 3, 40, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    found = torch.ops.qpass.quantize(x.to(device), text, None)
    expected = [p for p in quantize(x, parse_spec(text)).parts if p is not None]
    same = all(torch.equal(as_bytes(a).cpu(), as_bytes(b)) for a, b in zip(found, expected, strict=True))
    return "" if same else "the codes"

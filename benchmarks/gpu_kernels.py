"""Kernels by themselves, as benchmarks/gpu.py times them."""

from __future__ import annotations

import statistics

import torch
from gpu_shape import WRITTEN_OUT, Shape, one, seconds_of, stored_on
from torch import Tensor
from torch.nn import functional as F

from qpass.numerics import quantize
from qpass.ops.triton import operators
from qpass.spec import parse_spec
from qpass.weights import quantize_weight


def ceilings(shape: Shape, device: str) -> dict[str, float]:
    """Bytes a second of a copy, read and written; operations a second of a bfloat16 product."""
    size = shape.hidden * shape.ffn * 8
    a = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    n = min(8192, shape.hidden * 2)
    x, w = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy = seconds_of([lambda: b.copy_(a)], device, shape.repeats)
    product = seconds_of([lambda: torch.mm(x, w)], device, shape.repeats)
    return {"copy_bytes_per_second": 2 * size / copy, "bf16_operations_per_second": 2 * n**3 / product}


def time_linear(text: str, rows: int, shape: Shape, device: str) -> tuple[float, int]:
    """Seconds of one product with [ffn, hidden], and the bytes of its weight; "bf16": torch's own; WRITTEN_OUT:
    int8 as the sum that Inductor makes a kernel of."""
    xs = torch.randn(rows, shape.hidden, dtype=torch.bfloat16, device=device)
    if text == "bf16":
        floats = [
            torch.randn(shape.ffn, shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(shape.copies)
        ]
        return seconds_of([lambda w=w: F.linear(xs, w) for w in floats], device, shape.repeats), floats[0].nbytes
    spec = "int8" if text == WRITTEN_OUT else text
    weights = [stored_on(device, shape.ffn, shape.hidden, spec, seed) for seed in range(min(2, shape.copies))]
    while len(weights) < shape.copies:
        weights.append(weights[len(weights) % 2].map(torch.clone))
    product = _written_out if text == WRITTEN_OUT else lambda *parts: operators.linear(*parts, None, spec)
    calls = [lambda w=w: product(xs, *w.parts) for w in weights]
    return seconds_of(calls, device, shape.repeats), weights[0].nbytes


@torch.compile
def _written_out(x: Tensor, data: Tensor, scale: Tensor, *_: None) -> Tensor:
    """As sites/written.py has it: [1, K] and codes [N, K] -> [1, N]."""
    return ((x.float().unsqueeze(-2) * data.float()).sum(-1) * scale.view(-1)).to(x.dtype)


def time_attention(text: str, tokens: int, shape: Shape, device: str) -> tuple[float, int]:
    """Seconds of one query over so many tokens, and the bytes of the cache; "bf16": the best of torch's kernels."""
    q = torch.randn(1, shape.heads, 1, shape.head, dtype=torch.bfloat16, device=device)
    size = (1, shape.key_heads, tokens, shape.head)
    if text == "bf16":
        k, v = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
        return min(_float_attentions(q, k, v, shape, device)), k.nbytes + v.nbytes
    spec = parse_spec(text)
    k, v = (quantize(torch.randn(size, device=device), spec) for _ in range(2))
    call = lambda: operators.attention(q, *k.parts, text, *v.parts, shape.head, text, None, False, None)  # noqa: E731
    return seconds_of([call], device, shape.repeats), k.nbytes + v.nbytes


def _float_attentions(q: Tensor, k: Tensor, v: Tensor, shape: Shape, device: str) -> list[float]:
    """Of each of torch's ways that takes these, heads grouped or joined to rows of one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, queries, width = q.shape
    joined = q.view(batch, k.shape[1], heads // k.shape[1] * queries, width)
    found = []
    for way in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        for query, grouped in ((q, True), (joined, False)):
            call = lambda query=query, grouped=grouped: F.scaled_dot_product_attention(query, k, v, enable_gqa=grouped)  # noqa: E731
            try:
                with sdpa_kernel(way):
                    found.append(seconds_of([call], device, shape.repeats))
            except RuntimeError:  # not for these shapes, or not here
                continue
    return found


def time_quantization(text: str, shape: Shape, device: str) -> tuple[float, int]:
    """Seconds of rounding a bfloat16 weight that lies there, and its bytes."""
    weight = torch.randn(shape.ffn, shape.hidden, dtype=torch.bfloat16, device=device)
    spec = parse_spec(text)

    def wait() -> None:
        quantize_weight(weight, spec)
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    return statistics.median(one(wait) for _ in range(3)), weight.nbytes

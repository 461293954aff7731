"""A few queries against a quantized cache, against the reference in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qpass.numerics import quantize
from qpass.ops import cache_reference
from qpass.ops.triton import caches, operators, workspace
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from tests.triton.test_linear import random, weight

SPECS = [
    "int8",
    "int8:asym",
    "int8:g16",
    "fp8_e4m3",
    "fp8_e5m2:channel",
    "int4:g32:asym",
    "int4:channel:asym:rotated",
    "nf4:g32",
    "mxfp8",
]
#: Of the largest result: rounding of keys, weights and values to the type.
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
Floats = tuple[Tensor | None, ...]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that reach the kernel."""
    calls: list[int] = []
    attend = caches._attend
    monkeypatch.setattr(caches, "_attend", lambda *given: calls.append(1) or attend(*given))  # type: ignore[func-returns-value]
    return calls


def cache(shape: tuple[int, ...], text: str, seed: int = 0) -> Quantized:
    return quantize(random(*shape, seed=seed), parse_spec(text))


def on(device: str, things: Any) -> Any:
    return tuple(t.to(device) if isinstance(t, Tensor) else t for t in things)


def check(q: Tensor, k: Quantized, v: Quantized, text: str, columns: int, device: str, mask: Tensor | None = None,
          causal: bool = False, extra: tuple[Any, ...] = ()) -> None:  # fmt: skip
    """extra: k_first, v_first, k_last, v_last, start, soft_cap, sinks."""
    arguments = (*k.parts, text, *v.parts, columns, text, mask, causal, None, *extra)
    found = operators.attention(q.to(device), *on(device, arguments))
    expected = cache_reference.attention(q.float(), *arguments).nan_to_num(0)  # a query that sees nothing gives zeros
    assert (found.dtype, found.shape) == (q.dtype, expected.shape)
    error = (found.cpu().float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert float(error) <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "queries", "columns"),
    [(1, 1, (64, 64)), (70, 1, (40, 48)), pytest.param(600, 3, (128, 64), marks=pytest.mark.long)],
)
def test_attention(
    text: str, dtype: torch.dtype, tokens: int, queries: int, columns: tuple[int, int], device: str, served: list[int],
    poisoned: None,
) -> None:  # fmt: skip
    """Masks of either kind, of each head or for all, and the tokens that are there as floats."""
    k, v = cache((2, 2, tokens, columns[0]), text), cache((2, 2, tokens, columns[1]), text, 1)
    q = random(2, 6, queries, columns[0], seed=2).to(dtype)
    kept = torch.rand(2, 1, queries, tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    by_head = torch.where(kept, 0.0, -torch.inf) + random(1, 6, 1, tokens, seed=4)
    new_k, new_v = (random(2, 2, 2, n, seed=5).to(dtype) for n in columns)
    floats: Floats = (new_k[:, :, :1], new_v[:, :, :1], new_k, new_v, torch.tensor(tokens // 2))
    check(q, k, v, text, columns[1], device)
    check(q, k, v, text, columns[1], device, by_head)
    check(q, k, v, text, columns[1], device, kept, extra=(None, None, *floats[2:]))
    check(q, k, v, text, columns[1], device, kept[:1, :, :1], extra=floats)
    assert len(served) == 4


#: Formats of keys and values with scales of channels and 32 tokens.
SHARED = [
    ("int4:t32:zero=float:scale=fp16", "int4:g32:zero=float:scale=fp16"), ("int4:t32:zero=float", "int8"),
    ("int8:t32", "int4:channel:zero=float:scale=bf16"), ("int8:t32:zero=float:scale=bf16", "nf4:g32"),
]  # fmt: skip


@pytest.mark.parametrize(("k_text", "v_text"), SHARED, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [(64, 64), (40, 96)], ids=str)
def test_scales_of_channels_over_tokens(
    k_text: str,
    v_text: str,
    dtype: torch.dtype,
    columns: tuple[int, int],
    device: str,
    served: list[int],
    poisoned: None,
) -> None:
    """Keys far from zero, in some channels only; masks that begin in the middle of a group; with a window and the first tokens
    as floats."""
    tokens = 160
    far = random(1, 2, 1, columns[0], seed=7) * 2
    k = quantize(random(2, 2, tokens, columns[0]) + far, parse_spec(k_text))
    v = cache((2, 2, tokens, columns[1]), v_text, 1)
    q = random(2, 6, 1, columns[0], seed=2).to(dtype)
    place = torch.arange(tokens)
    masks = [
        None,
        ((place >= 45) & (place < 117))[None, None, None],
        torch.where(place < 70, 0.0, -torch.inf)[None, None, None],
    ]
    new = tuple(random(2, 2, n, c, seed=5).to(dtype) for n in (1, 64) for c in columns)
    for mask in masks:
        for floats in ((), (*new, torch.tensor(64))):
            arguments = (*k.parts, k_text, *v.parts, columns[1], v_text, mask, False, None, *floats)
            found = operators.attention(q.to(device), *on(device, arguments))
            expected = cache_reference.attention(q.float(), *arguments)
            assert float((found.cpu().float() - expected).abs().max() / expected.abs().max()) <= TOLERANCE[dtype]
    assert len(served) == 6


def test_integer_zero_points_of_tokens_together_are_left_to_the_reference(device: str, served: list[int]) -> None:
    text = "int4:t32:asym"
    k, v = cache((1, 2, 64, 64), text), cache((1, 2, 64, 64), "int8", 1)
    q = random(1, 2, 1, 64, seed=2).bfloat16()
    arguments = (*k.parts, text, *v.parts, 64, "int8", None, False, None)
    assert operators.attention(q.to(device), *on(device, arguments)).shape == q.shape
    assert not served


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_causal_capped_and_with_sinks(dtype: torch.dtype, device: str, served: list[int]) -> None:
    k, v = cache((1, 2, 40, 64), "int8"), cache((1, 2, 40, 64), "int8", 1)
    q = random(1, 4, 5, 64, seed=2).to(dtype)
    nothing = (None,) * 5
    seen = torch.ones(1, 1, 5, 40, dtype=torch.bool)
    seen[0, 0, 1] = False
    check(q, k, v, "int8", 64, device, causal=True)
    check(q, k, v, "int8", 64, device, seen, extra=(*nothing, 2.0, None))
    check(q, k, v, "int8", 64, device, seen, extra=(*nothing, 0.0, random(4, seed=6)))
    check(q, k, v, "int8", 64, device, seen, extra=(*nothing, 3.0, random(4, seed=6)))
    assert len(served) == 4


def test_new_tokens_as_they_come_out_of_a_linear(device: str, served: list[int]) -> None:
    """Sequences apart, in the result of q, k and v together."""
    k, v = cache((3, 2, 70, 64), "int8"), cache((3, 2, 70, 48), "int8", 1)
    joined = random(3, 1, 8 + 2 * 64 + 2 * 48, seed=5).bfloat16()
    new_k = joined[..., 8 : 8 + 128].unflatten(-1, (2, 64)).transpose(1, 2)
    new_v = joined[..., 8 + 128 :].unflatten(-1, (2, 48)).transpose(1, 2)
    assert caches._heads_in_a_row(new_v) is new_v
    check(
        random(3, 4, 1, 64, seed=2).bfloat16(),
        k,
        v,
        "int8",
        48,
        device,
        extra=(None, None, new_k, new_v, torch.tensor(69)),
    )
    assert served


@pytest.mark.parametrize("text", ["int8:static", "fp8_e4m3:static"])
def test_static_scales_of_channels(text: str, device: str, served: list[int]) -> None:
    spec, scale = parse_spec(text), torch.rand(1, 2, 1, 64) / 40 + 0.01
    k, v = (Quantized(quantize(random(2, 2, 70, 64, seed=i), spec, static_scale=scale).data, scale) for i in range(2))
    new = random(2, 2, 1, 64, seed=5).bfloat16()
    check(
        random(2, 4, 1, 64, seed=2).bfloat16(), k, v, text, 64, device, extra=(None, None, new, new, torch.tensor(69))
    )
    assert served


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_only_the_part_that_is_seen_is_read(mask: str, device: str, served: list[int]) -> None:
    """Beyond the last token of a cache that is not full, and before a window, lies what would spoil any sum."""
    k, v = cache((1, 2, 600, 64), "int8"), cache((1, 2, 600, 64), "int8", 1)
    seen = torch.zeros(1, 1, 1, 600, dtype=torch.bool)
    seen[..., 130:301] = True
    for half in (k, v):
        assert half.scale is not None
        half.scale[:, :, ~seen[0, 0, 0]] = float("nan")
    q = random(1, 4, 1, 64, seed=2).bfloat16()
    given = seen if mask == "bool" else torch.where(seen, 0.0, -torch.inf).bfloat16()
    found = operators.attention(q.to(device), *on(device, (*k.parts, "int8", *v.parts, 64, "int8", given, False, None)))
    part_k, part_v = (half.map(lambda p: p[:, :, 130:301]) for half in (k, v))
    expected = cache_reference.attention(q.float(), *part_k.parts, "int8", *part_v.parts, 64, "int8", None, False, None)
    torch.testing.assert_close(found.cpu().float(), expected, rtol=1e-2, atol=1e-2)
    assert served


def test_the_filled_part_of_a_longer_cache(device: str, served: list[int]) -> None:
    """Tokens behind each other, heads apart: nothing is copied. Other layouts are."""
    stored = cache((2, 3, 100, 64), "int8")
    part = stored.map(lambda p: p[:, :, :70])
    q = random(2, 6, 1, 64, seed=2).bfloat16()
    for same in (part, part.map(lambda p: p.transpose(1, 2).contiguous().transpose(1, 2)), part.map(Tensor.contiguous)):
        check(q, same, same, "int8", 64, device)
    assert len(served) == 3


@pytest.mark.parametrize("floats", [False, True], ids=["stored", "and floats"])
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 2000), (3, 2, 700)])
def test_the_last_program_joins_the_parts(
    batch: int, heads: int, tokens: int, floats: bool, device: str, served: list[int], poisoned: None
) -> None:
    """In a fixed order, and it leaves the counters at 0 for whoever is next: calls repeat to the bit, others between them."""
    k, v = (cache((batch, heads, tokens, 64), "int8", seed) for seed in range(2))
    q = random(batch, 4 * heads, 1, 64, seed=2).bfloat16()
    new = random(batch, heads, 1, 64, seed=5).bfloat16()
    extra = (None, None, new, new, torch.tensor(tokens - 1)) if floats else ()
    check(q, k, v, "int8", 64, device, extra=extra)
    arguments = on(device, (*k.parts, "int8", *v.parts, 64, "int8", None, False, None, *extra))
    results = []
    weights = weight(37, 2048, "int8", device)[0].parts  # of a product that is shared in the same way
    for _ in range(3):
        results.append(operators.attention(q.to(device), *arguments))
        operators.linear(random(1, 2048).bfloat16().to(device), *weights, None, "int8")
    assert all(torch.equal(result, results[0]) for result in results)
    counters = workspace._made[results[0].device]
    assert counters.next_in_ring > 0
    assert not counters.ring.any()


@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_no_number(where: str, device: str) -> None:
    q, k = random(1, 2, 2, 64, seed=2), random(1, 2, 70, 64)
    (q if where == "query" else k)[0, 0, 1, 5] = float("nan")
    stored, v = quantize(k, parse_spec("fp8_e4m3")), cache((1, 2, 70, 64), "fp8_e4m3", 1)
    arguments = on(device, (*stored.parts, "fp8_e4m3", *v.parts, 64, "fp8_e4m3", None, False, None))
    bad = operators.attention(q.bfloat16().to(device), *arguments).isnan().any(-1)
    assert bad.tolist() == [[[where == "key", True], [False, False]]]


@pytest.mark.parametrize(
    ("text", "queries", "dtype"),
    [("int3:g32", 1, torch.bfloat16), ("int8", 40, torch.bfloat16), ("int8", 1, torch.float32)],
)
def test_the_reference_serves_the_rest(
    text: str, queries: int, dtype: torch.dtype, device: str, served: list[int]
) -> None:
    k = cache((1, 2, 70, 64), text).map(lambda p: p.to(device))
    q = random(1, 4, queries, 64, seed=2).to(dtype).to(device)
    arguments = (*k.parts, text, *k.parts, 64, text, None, False, None)
    assert torch.equal(operators.attention(q, *arguments), cache_reference.attention(q, *arguments))
    assert not served

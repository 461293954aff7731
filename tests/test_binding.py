"""Operators called without Python: what is like an earlier call, and only that, gives what the checked call gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import qpass
from qpass.numerics import quantize
from qpass.ops import cache_reference, reference
from qpass.ops.cpu import build
from qpass.ops.cpu.build import REFERENCE, use_isa
from qpass.ops.cpu.library import bind
from qpass.packing import as_bytes
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from tests.isas import isas

SPECS = ["int8", "int8:g48:asym", "int8:tensor", "int4:g32:asym", "int4:g128", "int3:g24", "nf4:g32:dq", "nvfp4", "mxfp4",
         "fp8_e4m3", "fp8_e4m3:channel", "bf16", "fp32"]  # fmt: skip
CACHES = ["int8", "int4:g32:asym", "fp8_e4m3", "int8:tensor", "fp32", "bf16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=isas())
def isa(request: pytest.FixtureRequest, exact_products: None) -> Iterator[str]:
    with use_isa(request.param), qpass.set_compute(None):
        assert bind() is None
        yield request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def goes_to_python(call: Callable[[], Tensor]) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return any(e.key.endswith("_checked") for e in profile.key_averages())


def linear(x: Tensor, stored: Quantized, bias: Tensor | None, text: str) -> Tensor:
    return torch.ops.qpass.linear(x, *stored.parts, bias, text)


def checked(x: Tensor, stored: Quantized, bias: Tensor | None, text: str) -> Tensor:
    return torch.ops.qpass.linear_checked(x, *stored.parts, bias, text)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_after_the_first(text: str, dtype: torch.dtype) -> None:
    first, second = (quantize(random(37, 192, seed=s), parse_spec(text)) for s in (0, 1))
    bias = random(37, seed=2)
    linear(random(2, 192).to(dtype), first, None, text)
    for x in (random(192), random(1, 192), random(3, 2, 192)):
        x = x.to(dtype)
        for stored in (first, second):  # another weight of the same layout
            for added in (None, bias, bias.to(dtype)):
                assert torch.equal(linear(x, stored, added, text), checked(x, stored, added, text))
                assert linear(x, stored, added, text).shape == (*x.shape[:-1], 37)
    assert not goes_to_python(lambda: linear(random(1, 192).to(dtype), second, bias, text))


@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "fp32"])
def test_what_is_unlike_goes_to_python(text: str) -> None:
    stored, x = quantize(random(37, 192), parse_spec(text)), random(4, 192)
    linear(x, stored, None, text)
    assert not goes_to_python(lambda: linear(x, stored, None, text))
    apart = stored.map(lambda p: p.repeat_interleave(2, 0)[::2])
    calls = {
        "columns of x apart": (x.T.contiguous().T, stored, None),
        "x of float64": (x.double(), stored, None),
        "no rows": (x[:0], stored, None),
        "fewer rows of the weight": (x, stored.map(lambda p: p[:20]), None),
        "rows of the weight apart": (x, apart, None),
        "a bias for each row": (x, stored, random(4, 37)),
    }
    for name, (given, parts, bias) in calls.items():
        call = lambda given=given, parts=parts, bias=bias: linear(given, parts, bias, text)  # noqa: E731
        assert torch.equal(call(), checked(given, parts, bias, text)), name
    assert goes_to_python(lambda: linear(x, apart, None, text))
    with pytest.raises(RuntimeError):
        linear(random(4, 300), stored, None, text)


def test_wide_inputs_go_through_tiles(isa: str) -> None:
    stored, x = quantize(random(37, 192), parse_spec("int8")), random(1100, 192)
    linear(x[:1], stored, None, "int8")
    assert goes_to_python(lambda: linear(x, stored, None, "int8"))
    torch.testing.assert_close(
        linear(x, stored, None, "int8").double(),
        x.double() @ qpass.numerics.dequantize(stored, parse_spec("int8"), 192).double().T,
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


def test_another_way_to_compute_is_seen_at_once() -> None:
    stored, x = quantize(random(37, 192), parse_spec("int4:g32")), random(1, 192)
    rounded = linear(x, stored, None, "int4:g32")
    assert torch.equal(linear(x, stored, None, "int4:g32"), rounded)
    with qpass.set_compute("float"):
        exact = linear(x, stored, None, "int4:g32")
        assert not torch.equal(exact, rounded)
        assert torch.equal(linear(x, stored, None, "int4:g32"), exact)
    assert torch.equal(linear(x, stored, None, "int4:g32"), rounded)
    with use_isa(REFERENCE):
        for _ in range(2):
            assert goes_to_python(lambda: linear(x, stored, None, "int4:g32"))


def test_without_a_compiler_calls_go_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    build.binding.cache_clear()
    try:
        assert bind() == "no C++ compiler"
    finally:
        build.binding.cache_clear()


def attention(
    name: str, q: Tensor, k: Quantized, v: Quantized, text: str, mask: Tensor | None, *rest: object
) -> Tensor:
    return getattr(torch.ops.qpass, name)(q, *k.parts, text, *v.parts, 40, text, mask, *rest)


@pytest.mark.parametrize("text", CACHES)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_attention_after_the_first(text: str, queries: int, dtype: torch.dtype) -> None:
    spec = parse_spec(text)
    q, keep = random(2, 6, queries, 48, seed=2).to(dtype), random(2, 6, queries, 70, seed=3) > 0
    k, v = (quantize(random(2, 2, 100, d, seed=d), spec) for d in (48, 40))
    k, v = (x.map(lambda p: p[:, :, :70] if p.shape[2] == 100 else p) for x in (k, v))  # the filled part of a cache
    masks = [None, keep, keep[:1, :1], keep[:, :, :1], keep[0, 0], keep[0, 0, 0], torch.where(keep, 0.0, -1.0),
             keep.transpose(0, 1).contiguous().transpose(0, 1)]  # fmt: skip
    for mask in masks:
        for rest in ((False, None), (True, 0.3)):
            given = (q, k, v, text, mask, *rest)
            attention("attention", *given)
            assert torch.equal(attention("attention", *given), attention("attention_checked", *given))
            assert not goes_to_python(lambda given=given: attention("attention", *given))


@pytest.mark.parametrize("text", ["int8", "fp32"])
def test_attention_unlike_an_earlier_one(text: str) -> None:
    k = quantize(random(1, 2, 70, 40), parse_spec(text))
    q = random(1, 6, 1, 40, seed=2)
    attention("attention", q, k, k, text, None, False, None)
    for other in (
        q.bfloat16(),
        q.transpose(1, 2).contiguous().transpose(1, 2),
        random(1, 6, 20, 40),
        random(1, 6, 2, 40),
    ):
        given = (other, k, k, text, None, False, None)
        for _ in range(2):
            assert torch.equal(attention("attention", *given), attention("attention_checked", *given))
    with pytest.raises(RuntimeError):
        attention("attention", q, k, k, text, torch.ones(1, 1, 1, 71, dtype=torch.bool), False, None)


def in_a_frame(text: str, width: int, seed: int) -> tuple[list[Tensor | None], Tensor | None]:
    """Keys or values [2, 2, 70, width] stored to `text`: the four parts as attention takes them, and their static scale."""
    x, static = random(2, 2, 70, width, seed=seed), random(1, 2, 1, width, seed=9).abs() / 50 + 0.01
    static_scale = static if "static" in text else None
    parts: list[Tensor | None] = [None, static_scale, None, None]
    for slot, part in zip(parse_spec(text).stored_parts, torch.ops.qpass.quantize(x, text, static_scale), strict=True):
        parts[slot] = part
    return parts, static_scale


@pytest.mark.parametrize(
    "text", ["int8:rotated", "int4:g16:asym:rotated", "int8:static", "fp8_e4m3:static", "int4:g16:asym"]
)
@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_were_rotated_or_scaled_before_they_were_stored(text: str, queries: int, dtype: torch.dtype) -> None:
    """Against float64 on what was stored; the first and the last tokens are there as floats too. Without Python, but for many
    queries."""
    (k, _), (v, _) = in_a_frame(text, 48, 0), in_a_frame(text, 40, 1)
    q = random(2, 6, queries, 48, seed=2).to(dtype)
    first, last = ([random(2, 2, n, d, seed=n).to(dtype) for d in (48, 40)] for n in (2, queries))
    start = torch.tensor(70 - queries)
    call = (q, *k, text, *v, 40, text, None, False, None, *first, *last, start, 0.0, None)
    out = torch.ops.qpass.attention(*call)
    expected = cache_reference.attention(*(x.double() if x is q else x for x in call))
    near = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.double(), expected.double(), **near)
    assert torch.equal(torch.ops.qpass.attention(*call), torch.ops.qpass.attention_checked(*call))
    assert goes_to_python(lambda: torch.ops.qpass.attention(*call)) == (queries > 7)


WRITTEN = ["int8", "int8:g16:asym", "int4:g16:asym", "int4:g16:asym:rotated", "int2:g16:zero=float:scale=fp16", "fp8_e4m3",
           "int4:t32:zero=float:scale=fp16", "int8:static", "fp8_e5m2:static"]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_after_the_first(text: str, dtype: torch.dtype) -> None:
    """The parts are those of the reference, to the bit; a rotation's last bit may turn a code."""
    static = (random(1, 3, 1, 48, seed=9).abs() / 50 + 0.01) if "static" in text else None
    for seed in range(3):
        x = (3 * random(2, 3, 40, 48, seed=seed)).to(dtype)
        x[0, 1, 2] = 0
        parts = torch.ops.qpass.quantize(x, text, static)
        assert goes_to_python(lambda x=x: torch.ops.qpass.quantize(x, text, static)) is False
        for mine, wanted in zip(parts, reference.quantize(x, text, static), strict=True):
            assert (mine.dtype, mine.shape) == (wanted.dtype, wanted.shape)
            if "rotated" in text and mine.is_floating_point():
                torch.testing.assert_close(mine, wanted)
            else:
                same = (mine.float() == wanted.float()).float().mean()
                assert float(same) > 0.999 if "rotated" in text else same == 1
    bad = random(2, 3, 40, 48).to(dtype)
    bad[1, 2, 3, 4] = torch.nan
    for mine, wanted in zip(
        torch.ops.qpass.quantize(bad, text, static), reference.quantize(bad, text, static), strict=True
    ):
        torch.testing.assert_close(mine.float(), wanted.float(), equal_nan=True)
    if dtype == torch.float32 and "static" not in text and text[:3] == "int":
        bad[1, 2, 3, 4] = torch.inf
        with pytest.raises(RuntimeError, match="QpassError: a scale of up to inf"):
            torch.ops.qpass.quantize(bad, text)


@pytest.mark.parametrize(
    "text", ["int8", "int4:g16:asym", "fp8_e4m3", "nf4:g16", "int4:channel:asym:rotated", "int8:static"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_behind_those_of_a_cache(text: str, dtype: torch.dtype) -> None:
    """Written where they belong and nowhere else, in the codes that quantize gives."""
    keys, values = random(2, 3, 7, 32).to(dtype), random(2, 3, 7, 64, seed=1).to(dtype)
    k_scale, v_scale = ((random(1, 3, 1, d, seed=2).abs() + 1) / 100 if "static" in text else None for d in (32, 64))
    expected = [[as_bytes(p) for p in reference.quantize(x, text, s)] for x, s in ((keys, k_scale), (values, v_scale))]
    k, v = ([torch.full((*p.shape[:2], 9, p.shape[3]), 77, dtype=p.dtype) for p in parts] for parts in expected)
    length = torch.tensor(0)
    for start in range(7):
        token = (keys[:, :, start : start + 1].contiguous(), values[:, :, start : start + 1].contiguous())

        def append(token: tuple[Tensor, Tensor] = token) -> Tensor:
            return torch.ops.qpass.append(k, v, length, *token, text, text, k_scale, v_scale)

        before = append() if start < 6 else None
        if start == 6 and text != "nf4:g16":  # which no kernel writes
            assert goes_to_python(append) is False
        elif start == 6:
            append()
        assert before is None or int(before) == start
        assert int(length) == start + 1
    for parts, wanted in ((k, expected[0]), (v, expected[1])):
        for part, codes in zip(parts, wanted, strict=True):
            written = part[:, :, :7].float()
            if "rotated" in text and codes.is_floating_point():
                torch.testing.assert_close(written, codes)
            else:
                assert (
                    (written == codes.float()).float().mean() > 0.99
                    if "rotated" in text
                    else torch.equal(written, codes.float())
                )
            assert (part[:, :, 7:].float() == 77).all()


@pytest.mark.parametrize("spec", ["int2:t32:zero=float:scale=fp16", "int4:t32:asym", "int8", "int8:static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "strided"])
def test_one_token_behind_those_of_a_window(spec: str, dtype: torch.dtype, in_order: bool) -> None:
    """The last tokens as they came, the first, and codes of what left the window; through Python only where a block does."""
    window, capacity, firsts, v_spec = 32, 128, 2, "int4:g32:zero=float:scale=fp16"
    keys, values = random(2, 3, capacity, 32).to(dtype), random(2, 3, capacity, 64, seed=1).to(dtype)
    scale = (random(1, 3, 1, 32, seed=2).abs() + 1) / 100 if "static" in spec else None
    expected = [[as_bytes(p) for p in reference.quantize(x, s, t)]
                for x, s, t in ((keys, spec, scale), (values, v_spec, None))]  # fmt: skip
    k, v = ([torch.zeros_like(p) for p in parts] for parts in expected)
    floats = [x.new_zeros((2, 3, n, x.shape[3])) for n in (window + 32, firsts) for x in (keys, values)]
    length = torch.tensor(0)
    for t in range(capacity):
        token = [x[:, :, t : t + 1].contiguous() if in_order else x[:, :, t : t + 1] for x in (keys, values)]

        def append(token: list[Tensor] = token) -> Tensor:
            return torch.ops.qpass.append_residual(k, v, floats, length, *token, spec, v_spec, scale)

        start = max(t + 1 - window, 0) // 32 * 32
        leaves = start > max(t - window, 0) // 32 * 32
        if t % 7 == 0 and t >= firsts:
            assert goes_to_python(append) == leaves
        else:
            assert int(append()) == start
        assert int(length) == t + 1
        for last, x in zip(floats, (keys, values), strict=False):
            assert torch.equal(last[:, :, : t + 1 - start], x[:, :, start : t + 1])
    for first, x in zip(floats[2:], (keys, values), strict=True):
        assert torch.equal(first, x[:, :, :firsts])
    for parts, wanted in ((k, expected[0]), (v, expected[1])):
        for part, codes in zip(parts, wanted, strict=True):
            n = start * codes.shape[2] // capacity
            assert torch.equal(part[:, :, :n].float(), codes[:, :, :n].float())
            assert not part[:, :, n:].any()
    with pytest.raises(RuntimeError, match="KV cache of 128 tokens is too short: it holds 128 and 1 more arrive"):
        append()


def test_a_full_cache_is_left_as_it_is() -> None:
    k, v = ([torch.zeros(1, 1, 4, 8, dtype=torch.int8), torch.zeros(1, 1, 4, 1)] for _ in range(2))
    length = torch.tensor(3)
    with pytest.raises(
        RuntimeError, match="QpassError: KV cache of 4 tokens is too short: it holds 3 and 2 more arrive"
    ):
        torch.ops.qpass.append(k, v, length, random(1, 1, 2, 8), random(1, 1, 2, 8), "int8", "int8")
    assert int(length) == 3
    assert not any(part.any() for part in (*k, *v))

"""The CPU kernels, on the instruction sets that this machine runs (isas.py), against float64; how they are built and chosen."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qpass
from qpass.compute import compute_of, int8_by_default
from qpass.numerics import dequantize, quantize
from qpass.ops import reference
from qpass.ops.cpu import build
from qpass.ops.cpu.build import ISAS, Kernels, Missing, available_isas, use_isa
from qpass.ops.cpu.library import c_functions
from qpass.ops.cpu.matrix import SpecStruct
from qpass.ops.cpu.weights import compare_weight, round_weight
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from qpass.weights import quantize_weight
from tests.isas import isas

SPECS = ["int8", "int4:g64:zero=float", "int2:g32:zero=float:scale=fp16", "int8:g48:asym", "int8:tensor", "int6",
         "int5:g20", "int4:g32:asym", "int4:g128", "int4:channel", "int4:g7",
         "int4:g40:scale=fp16", "int3:g24", "int2:g16:asym", "nf4", "nf4:g32:dq", "nf4:g8:scale=bf16", "fp4_e2m1", "mxfp8",
         "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e4m3:channel", "fp8_e5m2:g16", "bf16", "fp16", "fp32"]  # fmt: skip
specs = pytest.mark.parametrize("text", SPECS)
#: What the kernel that quantizes serves.
WRITTEN = ["int8", "int8:asym", "int8:g16", "int4:g32", "int4:g7:asym", "int4:channel:asym", "fp8_e4m3", "fp8_e4m3:channel",
           "fp8_e5m2", "fp8_e5m2:g16"]  # fmt: skip
CACHES = ["int8", "int4:g32:asym", "fp8_e4m3", "fp8_e5m2:channel", "int8:tensor", "mxfp8", "bf16", "int3:g32"]
with qpass.set_compute("int8"):
    INT8_PRODUCTS = [s for s in (*SPECS, "int8:g32:scale=fp16", "int6:g8:asym", "int5:g32:asym:scale=fp16", "int5:g192")
                     if compute_of(parse_spec(s)) == "int8"]  # fmt: skip
#: Of the largest result: rounding of the sums, and of the result to its type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True, params=isas())
def isa(request: pytest.FixtureRequest, exact_products: None) -> Iterator[str]:
    with use_isa(request.param), qpass.set_compute(None):
        yield request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(rows: int, columns: int, text: str) -> tuple[Quantized, Tensor]:
    """(stored, float64 values)"""
    columns = max(columns, parse_spec(text).group_size) if parse_spec(text).format.scale == "float" else columns
    stored = quantize(random(rows, columns), parse_spec(text))
    return stored, dequantize(stored, parse_spec(text), columns).double()


# --- linear -----------------------------------------------------------------------------------------------------------


@specs
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("columns", [77, 1100])
def test_float_products(text: str, rows: int, columns: int) -> None:
    """40 rows go through tiles on AVX2; 1100 columns are more than are taken at once."""
    stored, values = weight(37, columns, text)
    x, bias = random(rows, values.shape[1], seed=1), random(37, seed=2)
    with qpass.set_compute("float"):
        found = torch.ops.qpass.linear(x, *stored.parts, bias, text)
    expected = F.linear(x.double(), values, bias.double())
    assert float((found - expected).abs().max()) <= TOLERANCE[torch.float32] * float(expected.abs().max())


def int8_bound(x: Tensor, values: Tensor, text: str) -> Tensor:
    """[M, K], [N, K] -> [M, N]: half a step of each activation times its weight, plus what nf4's table loses."""
    groups = F.pad(x.double(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    step = (groups.abs().amax(-1, keepdim=True) / 127).expand_as(groups).flatten(1)[:, : x.shape[1]]
    bound = step / 2 @ values.abs().T
    if text.startswith("nf4"):
        spec = parse_spec(text)
        largest = (
            F.pad(values.abs(), (0, -values.shape[1] % spec.group_size)).unflatten(1, (-1, spec.group_size)).amax(-1)
        )
        scales = largest.repeat_interleave(spec.group_size, 1)[:, : x.shape[1]]  # of each weight: nf4 reaches 1
        bound = bound + (x.double().abs() + step / 2) @ (scales / 254).T
    return bound


@pytest.mark.parametrize("text", INT8_PRODUCTS)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("columns", [8, 77, 1100])
def test_int8_products_stay_within_their_bound(text: str, rows: int, columns: int) -> None:
    stored, values = weight(37, columns, text)
    x = random(rows, values.shape[1], seed=1)
    with qpass.set_compute("int8"):
        found = torch.ops.qpass.linear(x, *stored.parts, None, text)
    expected = x.double() @ values.T
    error = (found - expected).abs()
    assert bool((error <= int8_bound(x, values, text) * 1.0001 + 1e-5 * expected.abs().max()).all())
    assert float(error.max()) > 1e-5 * float(expected.abs().max())  # it is not the float product


@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "nf4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_half_precision_activations(text: str, dtype: torch.dtype, rows: int) -> None:
    stored, values = weight(37, 256, text)
    x = random(rows, 256, seed=1).to(dtype)
    with qpass.set_compute("float"):
        found = torch.ops.qpass.linear(x, *stored.parts, None, text)
    expected = x.double() @ values.T
    assert found.dtype == dtype
    assert float((found - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", [(1,), (1, 37), (0, 37)], ids=str)
def test_what_is_added_may_be_broadcast(rows: int, shape: tuple[int, ...]) -> None:
    stored, values = weight(37, 256, "int8")
    x, added = random(rows, 256, seed=1), random(*(rows if n == 0 else n for n in shape), seed=2)
    found = torch.ops.qpass.linear(x, *stored.parts, added, "int8")
    torch.testing.assert_close(found.double(), x.double() @ values.T + added.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "nf4"])
def test_inputs_of_any_layout(text: str) -> None:
    stored, _ = weight(37, 256, text)
    x = random(6, 256, seed=1)
    expected = torch.ops.qpass.linear(x, *stored.parts, None, text)
    memory = torch.empty(6 * 256 + 1)
    misaligned = memory[1:].view(6, 256).copy_(x)
    for same in (x.T.contiguous().T, misaligned, x.view(2, 3, 256), x.repeat(1, 2)[:, :256]):
        found = torch.ops.qpass.linear(same, *stored.parts, None, text)
        assert torch.equal(found.reshape(6, 37), expected)
    torch.testing.assert_close(
        torch.ops.qpass.linear(x[2], *stored.parts, None, text), expected[2], rtol=1e-5, atol=1e-5
    )
    every_other = Quantized(*(None if p is None else p.repeat_interleave(2, 0)[::2] for p in stored.parts))
    assert torch.equal(torch.ops.qpass.linear(x, *every_other.parts, None, text), expected)
    assert torch.ops.qpass.linear(x[:0], *stored.parts, None, text).shape == (0, 37)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_their_row_only(text: str, bad: float) -> None:
    stored, _ = weight(37, 256, text)
    x = random(3, 256, seed=1)
    x[1, 100] = bad
    found = torch.ops.qpass.linear(x, *stored.parts, None, text)
    assert not bool(found[1].isfinite().any())
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("text", ["int8", "int4:g32", "int4:g32:asym", "nf4", "mxfp4", "nvfp4"])
def test_zeros(text: str) -> None:
    spec = parse_spec(text)
    zeros = quantize(torch.zeros(5, 64), spec)
    nothing = 1e-5 if "asym" in text else 0.0  # the zero point's part is subtracted as a float
    assert float(torch.ops.qpass.linear(random(2, 64), *zeros.parts, None, text).abs().max()) <= nothing
    stored, _ = weight(5, 64, text)
    assert not torch.ops.qpass.linear(torch.zeros(2, 64), *stored.parts, None, text).any()
    tiny = torch.full((1, 64), 1e-42)  # subnormal
    assert bool(torch.ops.qpass.linear(tiny, *stored.parts, None, text).isfinite().all())


@pytest.mark.parametrize(("text", "rows"), [("int8", 2), ("int8", 1100), ("int4:g32", 1100), ("nf4:g16", 2)])
def test_inputs_that_require_grad_and_many_of_them(text: str, rows: int) -> None:
    stored, values = weight(5, 64, text)
    x = random(rows, 64, seed=1).requires_grad_()
    found = torch.ops.qpass.linear(x, *stored.parts, torch.ones(5, requires_grad=True), text)
    expected = x.detach().double() @ values.T + 1
    assert bool(((found - expected).abs() <= int8_bound(x.detach(), values, text) + 1e-5).all())


@pytest.mark.parametrize("text", ["int8", "nvfp4", "int4:g32:asym"])
def test_parts_that_are_not_what_the_spec_says(text: str) -> None:
    """Cast by someone, the reference reads them as they are; of another size, it says so."""
    stored, _ = weight(8, 64, text)
    x = random(2, 64, seed=1)
    assert stored.scale is not None
    cast = Quantized(stored.data, stored.scale.to(torch.bfloat16), stored.zero_point, stored.outer_scale)
    found = torch.ops.qpass.linear(x, *cast.parts, None, text)
    torch.testing.assert_close(found, reference.linear(x, *cast.parts, None, text))
    with pytest.raises(RuntimeError):
        torch.ops.qpass.linear(random(2, 128), *stored.parts, None, text)


@pytest.mark.parametrize("text", ["int8", "int4:g32", "nf4"])
def test_threads_change_nothing(text: str) -> None:
    stored, _ = weight(300, 512, text)
    x, before = random(3, 512, seed=1), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.qpass.linear(x, *stored.parts, None, text))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


# --- embedding, quantize, dequantize ----------------------------------------------------------------------------------


@specs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_are_those_of_the_reference(text: str, dtype: torch.dtype) -> None:
    stored, values = weight(41, 77, text)
    columns = values.shape[1]
    ids = torch.tensor([[3, 40], [0, 3]], dtype=torch.int32).T
    expected = dequantize(stored, parse_spec(text), columns, dtype)
    assert torch.equal(torch.ops.qpass.embedding(ids, *stored.parts, columns, text, dtype), expected[ids.long()])
    assert torch.equal(torch.ops.qpass.dequantize(*stored.parts, columns, text, dtype), expected)


@pytest.mark.parametrize("index", [-1, 41])
def test_an_index_outside_of_the_table(index: int) -> None:
    stored, _ = weight(41, 64, "int8")
    with pytest.raises(IndexError, match=f"index {index} in an embedding table of 41 rows"):
        torch.ops.qpass.embedding(torch.tensor([3, index]), *stored.parts, 64, "int8", torch.float32)


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quantize_is_the_reference_to_the_bit(text: str, dtype: torch.dtype) -> None:
    x = random(3, 4, 77) * torch.logspace(-30, 4, 77)
    x[0, 0] = 0
    x[0, 1, :32] = torch.tensor([2.5, -0.5, 1.5, 127.0] * 8)  # ties
    x = x.to(dtype)
    for ours, theirs in zip(torch.ops.qpass.quantize(x, text), reference.quantize(x, text), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def rough(rows: int, columns: int) -> Tensor:
    """Numbers of many sizes, a block of zeros, one so small that its scale vanishes, ties."""
    x = random(rows, columns) * torch.logspace(-2, 3, columns)
    x[0, : columns // 2] = 0
    x[1] *= 1e-41
    x[2, :16] = torch.tensor([2.5, -0.5, 1.5, 7.0] * 4)
    return x


@pytest.mark.parametrize("columns", [False, True], ids=["plain", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", [s for s in SPECS if not parse_spec(s).is_identity] + [
    "int5:g20:asym", "int3:g24:asym", "int6:asym", "int8:tensor:asym", "int4:tensor:asym", "mxfp8:rceil", "mxfp4:rceil", "nf4:dq",
])  # fmt: skip
def test_a_weight_is_rounded_as_the_reference_does_to_the_bit(text: str, dtype: torch.dtype, columns: bool) -> None:
    spec, x = parse_spec(text), rough(9, 77).to(dtype)
    by = torch.rand(1, 77, generator=torch.Generator().manual_seed(1)) + 0.5 if columns else None
    divided = x if by is None else x.float() / by
    expected = quantize(divided, spec)
    found = round_weight(x, spec, torch.aminmax(divided), by)
    assert found is not None
    stored, power = found
    for ours, theirs in zip(stored.parts, expected.parts, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))  # type: ignore[union-attr]
    back = dequantize(expected, spec, 77).double() * (1 if by is None else by.double())
    assert power.signal == pytest.approx(float(x.double().square().sum()), rel=1e-5)
    assert power.noise == pytest.approx(float((x.double() - back).square().sum()), rel=1e-4, abs=1e-12)
    assert compare_weight(x, replace(stored, column_scale=by), spec) == power


@pytest.mark.parametrize("text", ["int8:g32:dq", "int4:g32:dq", "int4:g32:asym:dq", "nf4:g32:dq"])
def test_a_weight_with_scales_in_8_bits_is_that_of_the_reference(text: str) -> None:
    spec, x = parse_spec(text), rough(9, 77)
    for ours, theirs in zip(quantize_weight(x, spec).parts, quantize(x, spec).parts, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "nf4", "fp8_e4m3", "mxfp4", "nvfp4"])
def test_a_weight_that_is_not_finite_is_not_rounded(text: str, value: float) -> None:
    x = random(5, 96)
    x[3, 95] = value
    spec = parse_spec(text)
    assert round_weight(x, spec, (torch.tensor(-1.0), torch.tensor(1.0))) is None


def test_a_weight_whose_scales_overflow_is_not_rounded() -> None:
    assert round_weight(random(5, 96) * 1e8, parse_spec("int8:g32:scale=fp16"), None) is None


@pytest.mark.parametrize("text", ["int8", "int4:g7:asym", "fp8_e4m3:channel", "fp8_e4m3"])
def test_quantize_of_nan_and_infinity(text: str) -> None:
    x = random(3, 77)
    x[1, 5] = float("nan")
    found = torch.ops.qpass.dequantize(*_four(torch.ops.qpass.quantize(x, text), text), 77, text, torch.float32)
    assert bool(found[1, 5].isnan())
    assert bool(found[[0, 2]].isfinite().all())
    x[1, 5] = float("inf")
    if text == "fp8_e4m3":
        assert float(qpass.numerics.fake_quantize(x, parse_spec(text))[1, 5]) == 448
    else:
        with pytest.raises((qpass.QpassError, RuntimeError), match="overflows"):  # through C++, once that is in use
            torch.ops.qpass.quantize(x, text)


def _four(parts: list[Tensor], text: str) -> list[Tensor | None]:
    spec = parse_spec(text)
    there = (True, spec.granularity is not None, spec.has_zero_point, spec.double_quantized)
    rest = iter(parts)
    return [next(rest) if t else None for t in there]


# --- attention --------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor, k: Quantized, v: Quantized, text: str, size: int, mask: Tensor | None, causal: bool = False
) -> Tensor:
    return torch.ops.qpass.attention(q, *k.parts, text, *v.parts, size, text, mask, causal, None)


def expected_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """float64; a query that sees nothing gives zeros."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("text", CACHES)
@pytest.mark.parametrize("tokens", [1, 63, 65, 1500])
@pytest.mark.parametrize("queries", [1, 5, 20])
def test_attention_over_a_cache(text: str, tokens: int, queries: int) -> None:
    spec = parse_spec(text)
    k, v = quantize(random(2, 2, tokens, 40), spec), quantize(random(2, 2, tokens, 36, seed=1), spec)
    q = random(2, 6, queries, 40, seed=2)
    keys, values = dequantize(k, spec, 40), dequantize(v, spec, 36)
    kept = torch.rand(2, 1, queries, tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    kept[0, 0, 0] = False  # one query sees nothing
    by_head = torch.where(kept, 0.0, -torch.inf) + random(1, 6, 1, tokens, seed=4)
    for mask, causal in ((None, False), (None, True), (kept, False), (by_head, False), (kept[:1, :, :1], False)):
        found = attend(q, k, v, text, 36, mask, causal)
        torch.testing.assert_close(
            found.double(), expected_attention(q, keys, values, mask, causal), rtol=1e-4, atol=2e-6
        )


def test_attention_over_the_filled_part_of_a_cache() -> None:
    """Tokens behind each other, heads apart: nothing is copied. Other layouts are."""
    spec = parse_spec("int8")
    stored = quantize(random(2, 3, 100, 40), spec)
    q = random(2, 6, 1, 40, seed=2)
    part = stored.map(lambda p: p[:, :, :70])
    expected = expected_attention(q, *[dequantize(part, spec, 40)] * 2, None)
    for same in (part, part.map(lambda p: p.transpose(1, 2).contiguous().transpose(1, 2)), part.map(Tensor.contiguous)):
        torch.testing.assert_close(attend(q, same, same, "int8", 40, None).double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_of_half_precision(dtype: torch.dtype) -> None:
    spec = parse_spec("int8")
    k = quantize(random(1, 2, 70, 64), spec)
    q = random(1, 4, 3, 64, seed=2).to(dtype)
    found = attend(q, k, k, "int8", 64, None)
    assert found.dtype == dtype
    expected = expected_attention(q, *[dequantize(k, spec, 64)] * 2, None)
    torch.testing.assert_close(found.double(), expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("where", ["query", "key"])
def test_attention_with_nan(where: str) -> None:
    spec = parse_spec("fp8_e4m3")
    q, k = random(1, 2, 2, 64, seed=2), random(1, 2, 70, 64)
    (q if where == "query" else k)[0, 0, 1, 5] = float("nan")
    stored = quantize(k, spec)
    found = attend(q, stored, quantize(random(1, 2, 70, 64), spec), "fp8_e4m3", 64, None)
    bad = found.isnan().any(-1)
    assert bad.tolist() == [[[where == "key", True], [False, False]]]


def test_attention_allocates_no_float_cache() -> None:
    spec, tokens = parse_spec("int8"), 20_000
    k = quantize(random(1, 2, tokens, 64), spec)
    q = random(1, 4, 1, 64)
    attend(q, k, k, "int8", 64, None)
    with torch.profiler.profile(profile_memory=True) as profile:
        attend(q, k, k, "int8", 64, None)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert 0 < allocated < 2 * tokens * 64 * 4 / 100


# --- building and choosing --------------------------------------------------------------------------------------------


def test_the_best_isa_of_the_machine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, expected in (
        ("avx2 fma f16c", "avx2"),
        ("avx2", "portable"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni", "avx512-vnni"),
        ("avx2 fma f16c avx512f", "avx2"),
        ("", "portable"),
    ):
        monkeypatch.setattr(build, "cpu_features", lambda features=features: frozenset(features.split()))
        monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
        assert available_isas()[0] == expected
        assert available_isas()[-1] == "portable"
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert available_isas() == ["portable"]
    with pytest.raises(qpass.QpassError, match="this machine cannot run 'avx2'; it can run portable"), use_isa("avx2"):
        pass


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "kernels.cpp").write_text('int told(); extern "C" int answer() { return told(); }')
    (source / "other.cpp").write_text("int told() { return 42; }")
    monkeypatch.setattr(build, "_SOURCES", source)
    monkeypatch.setattr(build, "_KERNELS", ("kernels.cpp", "other.cpp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return source


PORTABLE = ISAS[-1]


def compiler() -> str:
    found = build.find_compiler()
    assert found is not None
    return found


def test_a_library_is_compiled_once_and_again_when_its_source_changes(small_source: Path) -> None:
    first, second = build.build(PORTABLE, compiler()), build.build(PORTABLE, compiler())
    assert isinstance(first, Kernels)
    assert isinstance(second, Kernels)
    assert first.library.answer() == 42
    assert first.path == second.path
    assert first.path.parent.name == "qpass"
    (small_source / "other.cpp").write_text("int told() { return 43; }")
    third = build.build(PORTABLE, compiler())
    assert isinstance(third, Kernels)
    assert (third.path != first.path, third.library.answer()) == (True, 43)


def test_a_cache_folder_that_cannot_be_written(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a folder should be")
    found = build.build(PORTABLE, compiler())
    assert isinstance(found, Kernels)
    assert found.library.answer() == 42
    assert tmp_path not in found.path.parents


def test_several_processes_build_at_once(small_source: Path, tmp_path: Path) -> None:
    """One of them compiles, the others wait."""
    counting, log = tmp_path / "cxx", tmp_path / "log"
    counting.write_text(f'#!/bin/sh\necho "$1" >> {log}\nexec {compiler()} "$@"\n')
    counting.chmod(0o755)
    program = (
        "import sys; from pathlib import Path; from qpass.ops.cpu import build;"
        f"build._SOURCES = Path({str(small_source)!r}); build._KERNELS = {build._KERNELS};"
        f"print(build.build(build.ISAS[-1], {str(counting)!r}).library.answer())"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in running] == ["42"] * 3
    assert len(list((tmp_path / "cache" / "qpass").glob("*.so"))) == 1
    compiled = sorted(line for line in log.read_text().splitlines() if line.startswith(str(small_source)))
    assert compiled == [str(small_source / name) for name in build._KERNELS]


def test_source_that_does_not_compile(small_source: Path) -> None:
    (small_source / "kernels.cpp").write_text("this is no C++")
    found = build.build(PORTABLE, compiler())
    assert isinstance(found, Missing)
    assert "error" in found.reason


@pytest.mark.parametrize("kind", ["no program", "a program that fails"])
def test_a_compiler_that_is_none(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "cxx"
    program.write_text("rubbish" if kind == "no program" else "#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build._load.cache_clear()
    try:
        assert isinstance(build._load("portable"), Missing)
    finally:
        build._load.cache_clear()


def test_without_a_compiler_the_reference_serves_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    build._load.cache_clear()
    build._warn.cache_clear()
    stored, values = weight(5, 64, "int4:g32")
    x = random(2, 64)
    try:
        with pytest.warns(UserWarning, match=r"no C\+\+ compiler.*slow reference.*qpass doctor"):
            found = torch.ops.qpass.linear(x, *stored.parts, None, "int4:g32")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.ops.qpass.linear(x, *stored.parts, None, "int4:g32")
        torch.testing.assert_close(found.double(), x.double() @ values.T, rtol=1e-5, atol=1e-5)
        assert any("slow reference" in p for p in qpass.doctor().problems)
    finally:
        build._load.cache_clear()


def test_doctor_names_what_is_in_use(isa: str) -> None:
    found = qpass.doctor()
    assert found.kernels["isa"] == isa
    assert Path(found.kernels["file"]).is_file()
    assert found.kernels["calls"] == "without Python"
    assert not found.problems or "onnxruntime" in found.problems[0]
    assert isa in str(found)
    assert found.to_json()["isas"] == tuple(available_isas())


def test_set_compute() -> None:
    int4 = parse_spec("int4")
    assert {compute_of(parse_spec(f)) for f in int8_by_default()} == {"int8"}
    assert compute_of(parse_spec("int8")) == compute_of(int4, "cuda") == compute_of(parse_spec("int4:g7")) == "float"
    with qpass.set_compute("int8"):
        assert compute_of(parse_spec("int8")) == "int8"
        assert (
            compute_of(int4, "cuda")
            == compute_of(parse_spec("int4:g7"))
            == compute_of(parse_spec("fp8_e4m3"))
            == "float"
        )
    with qpass.set_compute("float"):
        assert compute_of(int4) == "float"
        with qpass.set_compute(None):
            assert compute_of(int4) == "int8"
        assert compute_of(int4) == "float"
    again = qpass.set_compute("float")
    for _ in range(2):
        with again:
            assert compute_of(int4) == "float"
        assert compute_of(int4) == "int8"
    with pytest.raises(qpass.QpassError, match="compute 'fp16': 'float', 'int8' or None"):
        qpass.set_compute("fp16")  # type: ignore[arg-type]


def test_the_struct_of_a_spec_is_that_of_the_kernels() -> None:
    library = c_functions()
    assert library.qpass_spec_bytes() == ctypes.sizeof(SpecStruct)

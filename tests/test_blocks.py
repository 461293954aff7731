"""MX formats and nvfp4 for weights and activations both: rounded on every device; how GPUs that multiply blocks are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qpass
from qpass import compute
from qpass.compute import compute_of
from qpass.formats import E2M1_VALUES
from qpass.numerics import dequantize, fake_quantize, quantize
from qpass.ops import blocks
from qpass.qtensor import QTensor
from qpass.spec import parse_spec
from qpass.store import fuse
from tests.models import build, hf, logits_of, tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_alone(x: Tensor, text: str) -> Tensor:
    """Each row by itself."""
    rows = [fake_quantize(row.unsqueeze(0), parse_spec(text)) for row in x.flatten(0, -2)]
    return torch.cat(rows).view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [32, 77, 128])
@pytest.mark.parametrize(
    "text",
    [
        "mxfp8@mxfp8",
        "mxfp4@mxfp8",
        "mxfp4@mxfp4",
        "int8@mxfp8",
        "int4:g32:asym@mxfp8:rceil",
        "nvfp4@nvfp4",
        "int8@nvfp4",
    ],
)
def test_input_and_weight_are_rounded(text: str, columns: int, dtype: torch.dtype, exact_products: None) -> None:
    spec = parse_spec(text)
    x, bias = random(2, 3, columns).to(dtype), random(5, seed=2)
    stored = quantize(random(5, columns, seed=1), spec)
    found = torch.ops.qpass.block_linear(x, *stored.parts, bias, text)
    rounded = rounded_alone(x, text.partition("@")[2]).double()
    expected = F.linear(rounded, dequantize(stored, spec, columns).double(), bias.double())
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 8e-3) * expected.abs().max()
    assert not torch.equal(rounded, x.double())


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        *(pytest.param(t, "inductor", marks=pytest.mark.long) for t in ("mxfp8@mxfp8", "nvfp4@nvfp4")),
        ("mxfp4@mxfp8", "eager"),
        ("nvfp4@nvfp4", "eager"),
    ],
)
def test_a_model(text: str, inner: str, exact_products: None) -> None:
    """The compiler meets no scales of 8 bits. The loss is that of the input's rounding on top of the weights'."""
    model = build("llama").eval()
    with torch.no_grad():
        expected = logits_of(model(tokens(), use_cache=False))
        found = [logits_of(qpass.quantize(build("llama").eval(), qpass.Recipe.uniform(t), inner=inner)(tokens(), use_cache=False))
                 for t in (text, text.partition("@")[0])]  # fmt: skip
    with_inputs, alone = (float((y - expected).norm() / expected.norm()) for y in found)
    assert alone < with_inputs < 2 * alone + 0.05


def test_experts() -> None:
    model = qpass.quantize(
        hf("MixtralForCausalLM", num_local_experts=4, num_key_value_heads=2).eval(),
        qpass.Recipe.uniform("mxfp8@mxfp8"),
        inner="eager",
    )
    with torch.no_grad():
        assert torch.isfinite(logits_of(model(tokens(), use_cache=False))).all()


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 5), (256, 12), (300, 3)], ids=str)
def test_scales_in_tiles(shape: tuple[int, int]) -> None:
    """Each where cuBLAS reads it, zeros elsewhere."""
    rows, columns = shape
    scale = torch.randint(1, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide = -(-columns // 4)
    expected = torch.zeros(-(-rows // 128) * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = r // 128 * wide + c // 4
            expected[tile * 512 + r % 128 % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    assert torch.equal(blocks.in_tiles(scale.view(torch.float8_e8m0fnu)).view(torch.uint8), expected)


def in_float64(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What such a GPU computes of codes [M, K] and [K, N], and of scales in tiles."""

    def values(codes: Tensor, scale: Tensor) -> Tensor:
        if codes.dtype == torch.float4_e2m1fn_x2:
            pairs = codes.view(torch.uint8).int()
            codes = torch.tensor(E2M1_VALUES)[torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)]
            assert scale.dtype == torch.float8_e4m3fn
        else:
            assert (codes.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
        block = 16 if scale.dtype == torch.float8_e4m3fn else 32
        rows, wide = codes.shape[0], codes.shape[1] // block
        of_row = torch.empty(rows, wide, dtype=torch.float64)
        flat, across = scale.float().double(), -(-wide // 4)
        for r in range(rows):
            for c in range(wide):
                of_row[r, c] = flat[(r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4]
        return codes.float().double() * of_row.repeat_interleave(block, 1)

    return (values(a, scale_a) @ values(b.t(), scale_b).t()).to(out_dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("text", ["mxfp8@mxfp8", "mxfp8@mxfp4", "mxfp4@mxfp8:rceil", "mxfp4@mxfp4", "nvfp4@nvfp4"])
def test_a_gpu_that_multiplies_blocks_is_given_them(text: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def product(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        calls.append(a)
        return in_float64(a, b, **options)

    monkeypatch.setattr(blocks, "has_block_products", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    x, added = random(2, 130, 96).bfloat16(), random(48, seed=2) if bias else None
    x[0] *= 1000  # a row does not change what becomes of another
    x[1, 3, 7], x[1, 5, 9] = torch.inf, torch.nan
    stored = quantize(random(48, 96, seed=1), parse_spec(text))
    found = torch.ops.qpass.block_linear(x, *stored.parts, added, text)
    assert len(calls) == 1
    for isnan in (found.isnan().any(-1), found.isnan().all(-1)):
        assert torch.equal(isnan, ~x.isfinite().all(-1))
    finite = x.isfinite().all(-1)
    rounded = rounded_alone(x[finite].unsqueeze(0), text.partition("@")[2]).double()
    expected = F.linear(rounded, dequantize(stored, parse_spec(text), 96).double())[0]
    expected = expected if added is None else expected + added.double()
    sizes = expected.abs().amax(-1, keepdim=True)
    assert ((found[finite] - expected).abs() / sizes).max() < 1e-2


@pytest.mark.parametrize("rows", [1, 3, 48])
def test_joined_weights_have_a_scale_each(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of nvfp4: one outer scale for each row of the weight."""
    monkeypatch.setattr(blocks, "has_block_products", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", in_float64)
    spec = parse_spec("nvfp4@nvfp4")
    weights = [quantize(random(16, 64, seed=i) * 10**i, spec) for i in range(3)]
    joined = fuse([QTensor(w, spec, torch.Size((16, 64)), torch.float32) for w in weights])
    x = random(rows, 64).bfloat16()
    found = torch.ops.qpass.block_linear(x, *joined.parts, None, str(spec))
    rounded = rounded_alone(x, "nvfp4").double()
    for ours, weight in zip(found.split(16, 1), weights, strict=True):
        expected = F.linear(rounded, dequantize(weight, spec, 64).double())
        assert (ours - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("text", ["mxfp8", "nvfp4"])
def test_of_no_rows_none_come_back(text: str) -> None:
    assert torch.ops.qpass.round_blocks(torch.empty(0, 32), text).shape == (0, 32)


@pytest.mark.parametrize(
    "case",
    ["mxfp8@nvfp4", "nvfp4@mxfp4", "int8@mxfp8", "few rows of mxfp4@mxfp4", "float32", "odd columns", "odd outputs"],
)
def test_and_nothing_else(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "has_block_products", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("multiplied in blocks"))
    text = case.split()[-1] if "@" in case else "mxfp8@mxfp8"
    k, n = 80 if case == "odd columns" else 96, 40 if case == "odd outputs" else 48
    x = random(3, k).to(torch.float32 if case == "float32" else torch.bfloat16)
    stored = quantize(random(n, k, seed=1), parse_spec(text))
    assert torch.ops.qpass.block_linear(x, *stored.parts, None, text).shape == (3, n)


def test_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"mxfp8@mxfp8": "fp8", "mxfp4@mxfp8": "fp8", "nvfp4@nvfp4": "fp4", "nvfp4": "float", "nvfp4@mxfp8": "float"}
    assert {compute_of(parse_spec(text), "cuda") for text in texts} == {"float"}
    monkeypatch.setattr(compute, "has_block_products", lambda device: True)
    assert {text: compute_of(parse_spec(text), "cuda") for text in texts} == texts

"""Products of fp8: torch's own, which the CPU has too, behind the operator; and where they are not served."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qpass import compute
from qpass.compute import compute_of, multiplies_fp8
from qpass.numerics import dequantize, quantize
from qpass.ops import activations
from qpass.spec import parse_spec
from tests.triton.test_linear import random

PRODUCTS = ["fp8_e4m3:channel@fp8_e4m3:channel", "fp8_e4m3@fp8_e4m3:channel", "fp8_e4m3:tensor@fp8_e4m3:static"]


@pytest.fixture
def on_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices here are taken for GPUs with products of fp8."""
    for module in (compute, activations):
        monkeypatch.setattr(module, "has_fp8_products", lambda device: True)


@pytest.mark.parametrize("text", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 32, 64), (5, 33, 77), (2, 48, 96)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products(text: str, dtype: torch.dtype, shape: tuple[int, int, int], bias: bool, on_ada: None) -> None:
    """Of whole sixteens in bfloat16 by torch's product, of others through floats: the same result."""
    m, n, k = shape
    spec = parse_spec(text)
    assert multiplies_fp8(spec, "cuda")
    x, added = random(2, m, k).to(dtype), random(n, seed=2) if bias else None
    given = torch.tensor(0.01) if spec.activations and spec.activations.static else None
    codes, *scales = torch.ops.qpass.quantize_input(x, given, None, str(spec.activations))
    x_scale = given if given is not None else scales[0]
    weight = quantize(random(n, k, seed=1), parse_spec(text.partition("@")[0]))
    found = torch.ops.qpass.integer_linear(codes, x_scale, None, *weight.parts, added, text, dtype)
    values = dequantize(weight, parse_spec(text.partition("@")[0]), k)
    expected = F.linear(codes.double() * x_scale.double(), values.double(), None if added is None else added.double())
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert float((found - expected).abs().max() / expected.abs().max()) < (8e-3 if dtype == torch.bfloat16 else 1e-5)


def test_what_torch_multiplies(on_ada: None) -> None:
    codes, weight = torch.zeros(4, 64).to(torch.float8_e4m3fn), torch.zeros(32, 64).to(torch.float8_e4m3fn)
    serves = activations.fp8_products_serve
    assert serves(codes, weight, torch.bfloat16)
    assert not serves(codes, weight.to(torch.float8_e5m2), torch.bfloat16)
    assert not serves(codes, weight, torch.float16)
    assert not serves(codes, weight[:31], torch.bfloat16)
    assert not serves(codes[:, :60], weight[:, :60], torch.bfloat16)


def test_what_the_report_says_of_a_gpu(on_ada: None) -> None:
    expected = {"int8": "float", "int4:g32:asym": "float", "fp8_e4m3": "float", "int8@int8": "int8",
                "int4:channel@int8:asym": "int8", "int8:g32@int8": "float",
                "int8@int8:g32": "float", "fp8_e4m3@fp8_e4m3": "float", "fp8_e5m2:channel@fp8_e4m3:channel": "float",
                "fp8_e4m3:g32@fp8_e4m3:channel": "float",
                "mxfp8@fp8_e4m3:channel": "float"} | dict.fromkeys(PRODUCTS, "fp8")  # fmt: skip
    assert {text: compute_of(parse_spec(text), "cuda") for text in expected} == expected


def test_without_such_products_it_is_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_fp8_products", lambda device: False)
    assert {compute_of(parse_spec(text), "cuda") for text in PRODUCTS} == {"float"}
    assert compute_of(parse_spec(PRODUCTS[0])) == "float"

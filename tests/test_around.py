"""What qpass::linear does beside the product: norm, column scales, gate, residual, on every instruction set and without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qpass
from qpass.numerics import dequantize, quantize
from qpass.ops.cpu.build import REFERENCE, use_isa
from qpass.spec import parse_spec
from tests.isas import isas

SPECS = ["int8", "int8:g32:scale=fp16", "int5:g32:asym:scale=fp16", "int4:g32:asym", "nf4", "fp8_e4m3", "int4:g7"]
#: norm, eps, column scale, gate, residual
EVERYTHING = (True, 1e-5, True, "silu", True)
CASES = {
    "norm": (True, 1e-5, False, "", False),
    "norm without a weight": (False, 1e-2, False, "", False),
    "column scale": (False, None, True, "", False),
    "residual": (False, None, False, "", True),
    "silu": (False, None, False, "silu", False),
    "gelu": (False, None, False, "gelu", False),
    "gelu_tanh": (False, None, False, "gelu_tanh", False),
    "everything": EVERYTHING,
}
#: Of the largest result: of one rounding to the type and of float32 sums; torch rounds bfloat16 after each step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True, params=[*isas(), REFERENCE])
def isa(request: pytest.FixtureRequest, exact_products: None) -> Iterator[str]:
    with use_isa(request.param), qpass.set_compute("float"):
        yield request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float | None, columns: Tensor | None,
          gate: str, residual: Tensor | None) -> Tensor:  # fmt: skip
    """In float64, written as a model writes it."""
    x = x.double()
    if eps is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    for factor in (norm, columns):
        x = x if factor is None else x * factor.double()
    y = F.linear(x, weight, None if bias is None else bias.double())
    if gate:
        first, second = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
        act = {"silu": F.silu(first), "gelu": F.gelu(first), "gelu_tanh": F.gelu(first, approximate="tanh")}[gate]
        y = act * second
    return y if residual is None else y + residual.double()


def check(text: str, case: tuple[bool, float | None, bool, str, bool], lead: tuple[int, ...], n: int, k: int,
          dtype: torch.dtype, tolerance: float, bias: bool = True) -> None:  # fmt: skip
    has_norm, eps, has_columns, gate, has_residual = case
    stored = quantize(random(n, k) / k**0.5, parse_spec(text))
    values = dequantize(stored, parse_spec(text), k).double()
    x = (random(*lead, k, seed=1) * 3).to(dtype)
    around = (
        (random(k, seed=2).abs() + 0.5).to(dtype) if has_norm else None,
        eps,
        random(k, seed=3).abs() + 0.5 if has_columns else None,
        gate,
        random(*lead, n // 2 if gate else n, seed=4).to(dtype) if has_residual else None,
    )
    b = random(n, seed=5) if bias else None
    expected = exact(x, values, b, *around)
    for _ in range(2):  # the second call goes without Python, where it can
        found = torch.ops.qpass.linear(x, *stored.parts, b, text, *around)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert found.is_contiguous()
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("text", ["int8", "int4:g32:asym"])
def test_each_part(text: str, case: tuple[bool, float | None, bool, str, bool]) -> None:
    check(text, case, (2, 1), 26, 77, torch.float32, TOLERANCE[torch.float32])


@pytest.mark.parametrize("text", SPECS)
def test_each_format(text: str) -> None:
    check(text, EVERYTHING, (2, 1), 26, 77, torch.float32, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (40,)], ids=str)
def test_each_type_and_number_of_rows(dtype: torch.dtype, lead: tuple[int, ...], isa: str) -> None:
    """40 rows go through tiles on AVX2, and in bfloat16 where the processor multiplies it."""
    in_torch = isa == REFERENCE or lead == (40,)
    check("int8", EVERYTHING, lead, 130, 64, dtype, (3 if in_torch else 1) * TOLERANCE[dtype])


@pytest.mark.parametrize("text", ["int4:g32:asym", "int8:g32:scale=fp16", "nf4"])
@pytest.mark.parametrize("rows", [1, 6, 600])
def test_integer_products(text: str, rows: int) -> None:
    """Activations are rounded to 8 bits after the norm: of a unit's 127ths."""
    with qpass.set_compute("int8"):
        check(text, EVERYTHING, (rows,), 64, 96, torch.float32, 2e-2)


def test_without_a_bias() -> None:
    check("int8", EVERYTHING, (2,), 8, 33, torch.float32, TOLERANCE[torch.float32], bias=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30], ids=str)
def test_a_gate_of_extremes_is_torchs(value: float) -> None:
    stored = quantize(torch.eye(8), parse_spec("fp32"))
    x = torch.ones(1, 8)
    x[0, 0] = value
    for gate, act in (("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda v: F.gelu(v, approximate="tanh"))):
        found = torch.ops.qpass.linear(x, *stored.parts, None, "fp32", None, None, None, gate)
        product = x @ torch.eye(8)
        torch.testing.assert_close(found, act(product[:, :4]) * product[:, 4:], equal_nan=True)  # type: ignore[operator]


def test_a_residual_in_another_layout_is_added_all_the_same() -> None:
    stored = quantize(random(8, 16), parse_spec("int8"))
    x, residual = random(4, 16, seed=1), random(8, 4, seed=2).t()
    found = torch.ops.qpass.linear(x, *stored.parts, None, "int8", None, None, None, "", residual)
    expected = F.linear(x, dequantize(stored, parse_spec("int8"), 16)) + residual
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

"""Sums of integer products become floats in one kernel; and on a GPU the products themselves, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.numerics import dequantize
from qpass.ops.activations import _Sums
from qpass.spec import parse_spec
from tests.triton.compiling import Launch, launches  # noqa: F401  a fixture
from tests.triton.test_linear import random, weight

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def codes(*shape: int, seed: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


BOTH = [(), ("x",), ("w",), ("x", "w")]


@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [(17, 8, torch.bfloat16), (33, 77, torch.float32), (20, 2056, torch.float16)],
    ids=["bfloat16", "float32", "float16"],
)
@pytest.mark.parametrize("one", BOTH, ids="one for all: {}".format)
@pytest.mark.parametrize("zeros", BOTH, ids="zero points: {}".format)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_same_as_float64(
    bias: bool, zeros: tuple[str, ...], one: tuple[str, ...], m: int, n: int, dtype: torch.dtype, device: str, poisoned: None
) -> None:  # fmt: skip
    k, x, w = 40, codes(m, 40, seed=0), codes(n, 40, seed=1)
    of_row, of_column = (1 if "x" in one else m), (1 if "w" in one else n)
    x_scale, scale = random(of_row, seed=2).abs() + 0.1, (random(of_column, seed=3).abs() / 1000 + 1e-4).half()
    x_zero = codes(of_row, seed=4).to(torch.int8) if "x" in zeros else None
    zero = codes(of_column, seed=5).to(torch.int8) if "w" in zeros else None
    added = random(n, seed=6) if bias else None
    parts: list[Any] = [
        (x @ w.T).int(), k, x_scale, x_zero, x.sum(1).int() if zero is not None else None, scale, zero,
        w.sum(1).int() if x_zero is not None else None, added,
    ]  # fmt: skip
    sums = _Sums(*(p.to(device) if isinstance(p, Tensor) else p for p in parts))
    left = x.double() if x_zero is None else x.double() - x_zero.double().unsqueeze(1)
    right = w.double() if zero is None else w.double() - zero.double().unsqueeze(1)
    expected = (left * x_scale.double().unsqueeze(1)) @ (right * scale.double().unsqueeze(1)).T
    expected = expected if added is None else expected + added.double()
    for found in (sums.rescaled(dtype), sums.rescaled_by_kernel(dtype)):
        assert (found.dtype, found.shape) == (dtype, (m, n))
        assert (found.cpu().double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize(
    "text", ["int8@int8", "int8:asym@int8:asym", "int4:channel@int8", "fp8_e4m3:channel@fp8_e4m3:channel"]
)
def test_codes_times_codes(text: str, rows: int, dtype: torch.dtype, device: str) -> None:
    stored, _ = weight(48, 96, text, device)
    spec, x, bias = parse_spec(text), random(rows, 96).to(dtype).to(device), random(48, seed=2).to(device)
    x_codes, scale, *zero = torch.ops.qpass.quantize_input(x, None, None, str(spec.activations))
    found = torch.ops.qpass.integer_linear(x_codes, scale, *(zero or [None]), *stored.parts, bias, text, dtype)
    values = x_codes.double() - zero[0].double() if zero else x_codes.double()
    expected = F.linear(values * scale.double(), dequantize(stored, spec, 96).double(), bias.double())
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert (found - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("zeros", [True, False], ids=["zero points", "none"])
def test_it_compiles(zeros: bool, launches: list[Launch]) -> None:  # noqa: F811
    there = torch.zeros(4096, dtype=torch.int8) if zeros else None
    total = torch.zeros(64, 4096, dtype=torch.int32)
    of_rows, of_columns = (torch.zeros(n, dtype=torch.int32) if zeros else None for n in (64, 4096))
    x_zero = None if there is None else there[:64]
    sums = _Sums(total, 4096, torch.ones(64), x_zero, of_rows, torch.ones(4096), there, of_columns, None)
    sums.rescaled_by_kernel(torch.bfloat16)
    for capability in (80, 90):
        code = launches[0].compiled(capability)
        assert code.count("LDG.E.128") > 0
        assert code.spills == 0

"""What linear does beside the product, in the kernels: norm, column scales, gate, residual; against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.numerics import quantize
from qpass.ops.around import Around
from qpass.ops.triton import operators, workspace
from qpass.spec import parse_spec
from tests.test_around import CASES, EVERYTHING, exact
from tests.triton.test_linear import TOLERANCE, random, weight

SPECS = ["int8", "int8:channel", "int4:g32:asym", "nf4", "int5:g32:asym:scale=fp16", "int3:channel:asym"]
Case = tuple[bool, float | None, bool, str, bool]


def around_of(case: Case, lead: tuple[int, ...], outputs: int, columns: int, dtype: torch.dtype) -> tuple[object, ...]:
    """Random arguments of Around."""
    norm, eps, column_scale, gate, residual = case
    return (
        (random(columns, seed=2).abs() + 0.5).to(dtype) if norm else None,
        eps,
        random(columns, seed=3).abs() + 0.5 if column_scale else None,
        gate,
        random(*lead, outputs // 2 if gate else outputs, seed=4).to(dtype) if residual else None,
    )


def check(text: str, case: Case, lead: tuple[int, ...], outputs: int, columns: int, dtype: torch.dtype, device: str,
          bias: bool = True) -> None:  # fmt: skip
    stored, values = weight(outputs, columns, text, device)
    columns = values.shape[1]
    x = (random(*lead, columns, seed=1) * 3 / columns**0.5).to(dtype)
    around = around_of(case, lead, outputs, columns, dtype)
    added = random(outputs, seed=5) if bias else None
    expected = exact(x, values, added, *around)  # type: ignore[arg-type]
    there = [a.to(device) if isinstance(a, Tensor) else a for a in (x, *stored.parts, added, text, *around)]
    found = operators.linear(*there)  # type: ignore[arg-type]
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert found.is_contiguous()
    factors = 2 if case[3] else 1  # a gate multiplies two results
    assert (found.cpu().double() - expected).abs().max() <= factors * TOLERANCE[dtype] * expected.abs().max()


@pytest.fixture
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done in torch."""
    for name in ("before", "after"):
        monkeypatch.setattr(Around, name, None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("text", SPECS)
def test_each_format(text: str, case: Case, device: str, poisoned: None, in_kernels: None) -> None:
    check(text, case, (2, 1), 70, 96, torch.bfloat16, device)


FEW, MORE = [(), (5,), (2, 4)], [(9,), (3, 20)]


@pytest.mark.parametrize(
    ("dtype", "lead"),
    [(dtype, lead) for dtype in TOLERANCE for lead in (FEW if dtype == torch.float32 else FEW + MORE)],
    ids=str,
)
@pytest.mark.parametrize("text", ["int8", "int3:channel:asym"])
def test_each_type_and_number_of_rows(
    text: str, dtype: torch.dtype, lead: tuple[int, ...], device: str, poisoned: None, in_kernels: None
) -> None:
    check(text, EVERYTHING, lead, 130, 608, dtype, device)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "int5:g32:asym"])
@pytest.mark.parametrize("gate", ["", "silu"], ids=["no gate", "gate"])
def test_programs_that_share_the_columns(text: str, gate: str, device: str, poisoned: None, in_kernels: None) -> None:
    """The last to finish does what comes after; the mean is of the whole row all the same."""
    check(text, (True, 1e-5, True, gate, True), (3,), 74, 2080, torch.bfloat16, device)
    assert not any(made.ring.any() for made in workspace._made.values())


@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize("columns", [32, 5000])
def test_rows_of_any_width_are_normalized(rows: int, columns: int, device: str, poisoned: None) -> None:
    check("int8", (True, 1e-5, False, "", False), (rows,), 9, columns, torch.bfloat16, device)


@pytest.mark.parametrize("case", [EVERYTHING, (False, None, False, "", True)], ids=["everything", "residual"])
@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "int5:g32:asym:scale=fp16"])
def test_rows_that_take_several_launches(text: str, case: Case, device: str, poisoned: None, in_kernels: None) -> None:
    check(text, case, (2, 35), 38, 96, torch.bfloat16, device)


@pytest.mark.parametrize(("text", "lead"), [("int8", (130,)), ("int4:g40", (70,)), ("int4:g40", (1, 2))], ids=str)
def test_wide(text: str, lead: tuple[int, ...], device: str, poisoned: None) -> None:
    """Many rows, or a format that the kernels do not read: around the product in torch, but for the norm."""
    case = (True, 1e-5, True, "silu", True)
    stored, values = weight(38, 80, text, device)
    around = around_of(case, lead, 38, 80, torch.float32)
    x = random(*lead, 80, seed=1)
    found = operators.linear(
        x.to(device), *stored.parts, None, text, *(a.to(device) if isinstance(a, Tensor) else a for a in around)
    )
    expected = exact(x, values, None, *around)  # type: ignore[arg-type]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1e3], ids=["small", "large"])
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("text", ["int4:g32", "int5:g32:asym"])
def test_rows_of_float16_that_a_norm_makes_larger_or_smaller(
    text: str, rows: int, size: float, device: str, in_kernels: None
) -> None:
    """As embeddings are small, and the last layers' inputs large: as exact as rows of size 1."""
    stored, values = weight(70, 2080, text, device)
    x, norm = (size * random(rows, 2080, seed=1)).half(), (random(2080, seed=2).abs() / 50).half()
    there = [a.to(device) if isinstance(a, Tensor) else a for a in (x, *stored.parts, None, text, norm, 1e-12)]
    expected = exact(x, values, None, norm, 1e-12, None, "", None)
    found = operators.linear(*there)  # type: ignore[arg-type]
    assert (found.cpu().double() - expected).abs().max() <= TOLERANCE[torch.float16] * expected.abs().max()


def test_without_a_bias(device: str, in_kernels: None) -> None:
    check("int8", EVERYTHING, (2,), 8, 64, torch.bfloat16, device, bias=False)


def test_what_is_broadcast_is_done_in_torch(device: str) -> None:
    stored, values = weight(8, 64, "int8", device)
    x, residual, norm = random(4, 64, seed=1), random(1, 8, seed=2), random(1, 64, seed=3)
    found = operators.linear(
        x.to(device), *stored.parts, None, "int8", norm.to(device), 1e-5, None, "", residual.to(device)
    )
    expected = exact(x, values, None, norm, 1e-5, None, "", residual)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_layouts_do_not_matter(device: str, in_kernels: None) -> None:
    stored, values = weight(8, 64, "int8", device)
    x, residual, norm = random(4, 64, seed=1).bfloat16(), random(8, 4, seed=2).bfloat16().t(), random(128, seed=3)[::2]
    found = operators.linear(
        x.to(device), *stored.parts, None, "int8", norm.to(device), 1e-5, None, "", residual.to(device)
    )
    expected = exact(x, values, None, norm, 1e-5, None, "", residual)
    assert (found.cpu().double() - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("value", [1e30, -1e30, 60.0, -60.0], ids=str)
def test_a_gate_of_extremes_is_torchs(value: float, device: str) -> None:
    stored = quantize(torch.eye(32), parse_spec("int8:channel")).map(lambda p: p.to(device))
    x = torch.ones(1, 32)
    x[0, 0] = value
    product = (x.bfloat16().double() @ torch.eye(32).double()).float()
    for gate, act in (("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda v: F.gelu(v, approximate="tanh"))):
        found = operators.linear(x.bfloat16().to(device), *stored.parts, None, "int8:channel", None, None, None, gate)
        expected = act(product[:, :16]) * product[:, 16:]  # type: ignore[operator]
        torch.testing.assert_close(found.cpu().float(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 20])
def test_what_is_no_number_stays_in_its_row(rows: int, device: str) -> None:
    stored, _ = weight(36, 256, "int4:g32", device)
    x = random(rows, 256, seed=1).bfloat16()
    x[1, 100] = float("nan")
    found = operators.linear(x.to(device), *stored.parts, None, "int4:g32", None, 1e-5, None, "silu").cpu()
    assert not bool(found[1].isfinite().any())
    assert bool(found[[0, 2]].isfinite().all())

"""QState in eager mode: every write and every rearrangement gives what the same does to the floats, rounded once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qpass.numerics import fake_quantize
from qpass.qstate import QState
from qpass.spec import parse_spec

FORMATS = ["int8", "fp8_e4m3", "int4:g8:asym", "int8:rotated", "int2:g8:zero=float", "mxfp4"]
SHAPE = (1, 2, 6, 32)


def rounded(x: Tensor, spec: str) -> Tensor:
    return fake_quantize(x, parse_spec(spec))


def put(x: Tensor, new: Tensor) -> None:
    x.index_put_((torch.tensor([[0]]), torch.tensor([[0], [1]]), torch.tensor([[1, 4]])), new[0])


def scatter(x: Tensor, new: Tensor) -> None:
    x.scatter_(2, torch.tensor([1, 4])[None, None, :, None].expand(1, 2, 2, 32), new)


def assign(x: Tensor, new: Tensor) -> None:
    x[:, :, 1:3] = new


def assign_by_index(x: Tensor, new: Tensor) -> None:
    x[:, :, torch.tensor([1, 4])] = new


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "index_copy_": lambda x, new: x.index_copy_(2, torch.tensor([1, 4]), new),
    "index_put_": put,
    "scatter_": scatter,
    "slice": assign,
    "indices": assign_by_index,
    "a view of a view": lambda x, new: x.transpose(1, 2)[:, 2:4].copy_(new.transpose(1, 2)),
    "one head": lambda x, new: x.select(1, 1).narrow(1, 0, 2).copy_(new[:, 1]),
    "zero_": lambda x, new: x[:, :, :2].zero_(),
    "one row to many": lambda x, new: x.copy_(new[:, :, :1]),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, :, 1:4],
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1, 3),
    "select": lambda x: x[0],
    "unsqueeze": lambda x: x[:, :, None],
    "roll": lambda x: x.roll(1, 2),
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 0])),
    "expand": lambda x: x.expand(3, -1, -1, -1),
    "clone": lambda x: x.clone(),
    "cat": lambda x: torch.cat([x, x[:, :, :2]], 2),
    "to": lambda x: x.to(torch.bfloat16),
}


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_rounded_and_the_rest_is_kept(write: str, spec: str) -> None:
    torch.manual_seed(0)
    floats, new = torch.randn(SHAPE), torch.randn(1, 2, 2, 32)
    state = QState.of(floats, parse_spec(spec))
    floats = rounded(floats, spec)
    before = [p.data_ptr() for p in state.parts]
    WRITES[write](state, new)
    WRITES[write](floats, rounded(new, spec))
    torch.testing.assert_close(state.dequantize(), floats, rtol=1e-6, atol=1e-6)
    assert [p.data_ptr() for p in state.parts] == before, "in place"


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("read", READS)
def test_what_keeps_rows_stays_stored(read: str, spec: str) -> None:
    torch.manual_seed(0)
    floats = torch.randn(SHAPE)
    out = READS[read](QState.of(floats, parse_spec(spec)))
    expected = READS[read](rounded(floats, spec))
    assert isinstance(out, QState)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(out.dequantize(), expected, rtol=1e-6, atol=1e-6)


WHOLE: dict[str, Callable[[Tensor], object]] = {
    "another axis of the index": lambda x: x.scatter_(2, torch.randint(0, 6, SHAPE), torch.ones(SHAPE)),
    "accumulated": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1, 2, 6, 32), accumulate=True),
    "index_add_": lambda x: x.index_add_(2, torch.tensor([1]), torch.ones(1, 2, 1, 32)),
    "mul_": lambda x: x.mul_(3),
    "fill_": lambda x: x.fill_(2.0),
}


@pytest.mark.parametrize("write", WHOLE)
def test_other_writes_quantize_all_of_it_again(write: str) -> None:
    torch.manual_seed(0)
    state = QState.of(torch.randn(SHAPE), parse_spec("int8"))
    floats = state.dequantize()
    torch.manual_seed(1)
    WHOLE[write](state)
    torch.manual_seed(1)
    WHOLE[write](floats)
    torch.testing.assert_close(state.dequantize(), rounded(floats, "int8"), rtol=1e-6, atol=1e-6)


VIEWS: dict[str, Callable[[Tensor], object]] = {
    "columns": lambda x: x[..., :4].fill_(5),
    "one number": lambda x: x[0, 0, 0, 0].fill_(5),
    "view": lambda x: x.view(2, 6, 32)[:, 1].fill_(5),
    "squeeze": lambda x: x.squeeze(0).zero_(),
    "unflatten": lambda x: x.unflatten(-1, (4, 8))[..., 1, :].zero_(),
    "split": lambda x: [p.mul_(i) for i, p in enumerate(x.split(3, 2))],
    "unbind": lambda x: x.unbind(2)[1].zero_(),
    "out": lambda x: torch.mul(x, 2, out=x),
    "foreach": lambda x: torch._foreach_mul_([x], 0.5),
    "a mask": lambda x: x.masked_fill_(x > 1, 0.0),
    "a scatter that adds": lambda x: x.scatter_(2, torch.ones(1, 2, 1, 1, dtype=torch.long).expand(1, 2, 1, 32),
                                                torch.ones(1, 2, 1, 32), reduce="add"),
    "a scatter of a part": lambda x: x.scatter_(2, torch.ones(1, 2, 1, 1, dtype=torch.long).expand(1, 2, 1, 32),
                                                torch.ones(1, 2, 5, 32)),
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_writes_through_views_reach_the_state(view: str) -> None:
    torch.manual_seed(0)
    state = QState.of(torch.randn(SHAPE), parse_spec("int8"))
    floats = state.dequantize()
    VIEWS[view](state)
    VIEWS[view](floats)
    torch.testing.assert_close(state.dequantize(), floats, rtol=0, atol=float(floats.abs().max()) / 100)


def test_a_mask_of_all_axes_is_an_index() -> None:
    state = QState.of(torch.randn(SHAPE), parse_spec("int8"))
    state[state > 1.0] = 0.0
    assert float(state.dequantize().max()) <= 1.0 + 1e-6


def test_cat_with_an_empty_tensor_of_one_axis() -> None:
    state = QState.of(torch.randn(SHAPE), parse_spec("int8"))
    assert torch.equal(torch.cat([torch.empty(0), state], 2).dequantize(), state.dequantize())


def test_arithmetic_sees_floats() -> None:
    state = QState.of(torch.randn(SHAPE), parse_spec("int8"))
    for out in (state + 1, state.sum(), state @ torch.ones(32, 2), state.transpose(2, 3), state[..., :4]):
        assert not isinstance(out, QState)
    assert torch.equal(state + 1, state.dequantize() + 1)


def test_copies_are_apart_and_saving_keeps_the_parts() -> None:
    state = QState.of(torch.randn(SHAPE), parse_spec("int4:g8:asym"))
    twin = copy.deepcopy(state)
    file = io.BytesIO()
    torch.save({"cache": state}, file)
    file.seek(0)
    loaded = torch.load(file)["cache"]
    state.zero_()
    assert float(state.dequantize().abs().max()) == 0.0
    assert torch.equal(twin.dequantize(), loaded.dequantize())
    assert float(twin.dequantize().abs().max()) > 0
    assert "int4:g8:asym" in repr(twin)
    assert twin.stored_nbytes == sum(p.nbytes for p in twin.parts)

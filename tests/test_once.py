"""A mask that several attentions read is made once; what is written to is read before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace

from qpass.graph.vocabulary import op_name
from qpass.sites.once import keep_readers_apart, share_masks

Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8)
POSITIONS = torch.tensor([3, 4, 5])


def attend(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    stored = (k, None, None, None)
    return torch.ops.qpass.attention.default(q, *stored, "fp32", *stored, 8, "fp32", mask, False, None)  # type: ignore[no-any-return]


def seen(positions: Tensor) -> Tensor:
    return torch.arange(6)[None, None, None] <= positions[None, None, :, None]


def two(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    mask = seen(positions)
    return attend(attend(q, k, mask), k, mask)


def expanded(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    mask = seen(positions)
    return attend(attend(q, k, mask.expand(2, -1, 3, 6)), k, mask.expand(2, 4, 3, 6))


def window_and_all(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    every, window = seen(positions), seen(positions) & ~seen(positions - 2)
    for mask in (every, window, every, window):
        q = attend(q, k, mask)
    return q


def one(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return attend(attend(q, k, seen(positions)), k, None)


def a_mask_each(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return attend(attend(q, k, seen(positions)), k, seen(positions))


def given(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return attend(attend(q, k, positions), k, positions)


def shared(model: Callable[..., Tensor]) -> tuple[GraphModule, int]:
    """After the pass; how many masks are made once."""
    module = symbolic_trace(model)
    share_masks(module)
    return module, sum(op_name(n) == "qpass::once" for n in module.graph.nodes)


@pytest.mark.parametrize(
    ("model", "count"), [(two, 1), (expanded, 1), (window_and_all, 2)], ids=lambda x: getattr(x, "__name__", x)
)
def test_a_mask_of_several_attentions_is_made_once(model: Callable[..., Tensor], count: int) -> None:
    module, found = shared(model)
    assert found == count
    assert torch.equal(module(Q, K, POSITIONS), model(Q, K, POSITIONS))


@pytest.mark.parametrize("model", [one, a_mask_each], ids=lambda x: x.__name__)
def test_a_mask_of_one_attention_stays(model: Callable[..., Tensor]) -> None:
    assert shared(model)[1] == 0


def test_a_mask_that_is_given_stays() -> None:
    assert shared(given)[1] == 0


def test_what_is_made_once_is_a_copy() -> None:
    x = torch.ones(3)
    y = torch.ops.qpass.once(x)
    assert torch.equal(x, y)
    assert x.data_ptr() != y.data_ptr()


# --- what is written to -------------------------------------------------------------------------------------------------


def append(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    return torch.ops.qpass.append.default([k], [v], length, x, x, "fp32", "fp32")  # type: ignore[no-any-return]


def positions_before(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    positions = torch.arange(3) + length
    return append(k, v, length, x) + positions


def positions_after(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    start = append(k, v, length, x)
    return start + torch.arange(3) + length


def written_before(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    length.add_(1)
    return append(k, v, length, x) + length


def nothing_read(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    return append(k, v, length, x)


@pytest.mark.parametrize(
    ("model", "copies"),
    [(positions_before, 1), (positions_after, 0), (written_before, 0), (nothing_read, 0)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_is_written_to_is_read_from_a_copy_before(model: Callable[..., Tensor], copies: int) -> None:
    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        k, v, length, x = torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 4), torch.tensor(2), torch.ones(1, 2, 3, 4)
        return [f(k, v, length, x), k, v, length]

    module = symbolic_trace(model)
    keep_readers_apart(module)
    assert sum(op_name(n) == "qpass::once" for n in module.graph.nodes) == copies
    torch.testing.assert_close(run(module), run(model), rtol=0, atol=0)

"""A mask that several attentions read is made once; what is written to is read before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

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


def changed_before(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    mask = torch.zeros(3, 6)
    mask.masked_fill_(~seen(positions)[0, 0], float("-inf"))
    return attend(attend(q, k, mask), k, mask)


def changed_between(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    mask = seen(positions)
    q = attend(q, k, mask)
    mask.logical_not_()
    return attend(q, k, mask)


def through(
    change: Callable[[GraphModule], None], model: Callable[..., Tensor]
) -> tuple[Callable[..., Tensor], list[str]]:
    """The model, its graph changed as Dynamo captures it; what that calls, once it was called."""
    names: list[str] = []

    def backend(graph_module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        change(graph_module)
        names.extend(op_name(n) for n in graph_module.graph.nodes)
        return graph_module.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend), names


def shared(model: Callable[..., Tensor], third: Tensor = POSITIONS) -> tuple[Tensor, int]:
    """What it gives after the pass; how many masks are made once."""
    compiled, names = through(share_masks, model)
    return compiled(Q, K, third), names.count("qpass::once")


@pytest.mark.parametrize(
    ("model", "count"),
    [(two, 1), (expanded, 1), (window_and_all, 2), (changed_before, 1), (changed_between, 0)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_mask_of_several_attentions_is_made_once(model: Callable[..., Tensor], count: int) -> None:
    result, found = shared(model)
    assert found == count
    torch.testing.assert_close(result, model(Q, K, POSITIONS), rtol=0, atol=0)


@pytest.mark.parametrize("model", [one, a_mask_each], ids=lambda x: x.__name__)
def test_a_mask_of_one_attention_stays(model: Callable[..., Tensor]) -> None:
    assert shared(model)[1] == 0


def test_a_mask_that_is_given_stays() -> None:
    assert shared(given, torch.ones(3, 6).bool())[1] == 0


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


def written_through_a_view(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    length.view(1).add_(1)
    return append(k, v, length, x) + length


def read_through_a_view(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    seen = length.view(1)
    return torch.arange(3) + seen + append(k, v, length, x) + seen


def written_twice(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    positions = torch.arange(3) + length
    return append(k, v, length, x) + append(k, v, length, x) + positions


def nothing_read(k: Tensor, v: Tensor, length: Tensor, x: Tensor) -> Tensor:
    return append(k, v, length, x)


@pytest.mark.parametrize(
    ("model", "copies"),
    [
        (positions_before, 1),
        (positions_after, 0),
        (written_before, 0),
        (written_through_a_view, 0),
        (read_through_a_view, 1),
        (written_twice, 1),
        (nothing_read, 0),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_is_written_to_is_read_from_a_copy_before(model: Callable[..., Tensor], copies: int) -> None:
    def inputs() -> list[Tensor]:
        return [torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 4), torch.tensor(2), torch.ones(1, 2, 3, 4)]

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        given = inputs()
        return [f(*given), *given]

    compiled, names = through(keep_readers_apart, model)
    torch.testing.assert_close(run(compiled), run(model), rtol=0, atol=0)
    assert names.count("qpass::once") == copies

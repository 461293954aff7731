"""Counters are never shared by what may run at the same time; floats of a cache are put in place without a question."""

from __future__ import annotations

import pytest
import torch

from qpass.ops.cache_reference import put_inside
from qpass.ops.triton import workspace

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> workspace._Counters:
    made = workspace._Counters(torch.zeros(100, dtype=torch.int32), torch.zeros(100, dtype=torch.int32))
    monkeypatch.setattr(workspace, "_made", {CPU: made})
    return made


def test_launches_take_turns(fresh: workspace._Counters) -> None:
    starts = [workspace.counters(40, CPU).storage_offset() for _ in range(4)]  # type: ignore[union-attr]
    assert starts == [0, 40, 0, 40]


def test_graphs_keep_theirs_and_get_none_when_they_are_used_up(fresh: workspace._Counters) -> None:
    starts = [part.storage_offset() for _ in range(2) if (part := fresh.take(40, captured=True)) is not None]
    assert starts == [0, 40]
    assert fresh.take(40, captured=True) is None
    assert fresh.take(20, captured=True) is not None


def test_more_than_there_are(fresh: workspace._Counters) -> None:
    assert workspace.counters(workspace._RING + 1, CPU) is None


@pytest.mark.parametrize("start", [0, 3, 6, 8, 11])
def test_floats_are_put_where_a_cache_has_room(start: int) -> None:
    values, last = torch.zeros(2, 3, 8, 4), torch.randn(2, 3, 5, 4)
    positions = torch.arange(5) + start
    inside = positions < 8
    expected = values.index_copy(2, positions[inside], last[:, :, inside])
    put_inside(values, positions, inside, last)
    assert torch.equal(values, expected)

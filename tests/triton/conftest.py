"""Kernels run on a GPU if there is one, otherwise in Triton's interpreter, with TRITON_INTERPRET=1, as
`make test` does: only they are run then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from qpass.ops.triton.triton_private import interpreted, mend_interpreter

if interpreted():
    mend_interpreter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """It sees the items of the whole run: those of other folders stay."""
    if interpreted():
        folder = Path(__file__).parent
        beside = {i for i in items if folder in i.path.parents and "device" not in getattr(i, "fixturenames", ())}
        config.hook.pytest_deselected(items=list(beside))
        items[:] = [item for item in items if item not in beside]


@pytest.fixture
def device() -> str:
    """Where kernels can be run in this process."""
    if torch.cuda.is_available():
        return "cuda"
    if not interpreted():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1, as in make test")
    return "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer, until something is written there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

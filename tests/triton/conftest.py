"""Kernels run on a GPU if there is one, otherwise in Triton's interpreter, with TRITON_INTERPRET=1, as
`make test` does: only they are run then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from qpass.ops.triton.triton_private import interpreted, mend_interpreter

if interpreted():
    mend_interpreter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if interpreted():
        kernels = [item for item in items if "device" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kernels])
        items[:] = kernels


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

"""Kernels run on a GPU if there is one, otherwise in Triton's interpreter: see test_interpreted.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from qpass.ops.triton.triton_private import interpreted, mend_interpreter

if interpreted():
    mend_interpreter()


@pytest.fixture
def device() -> str:
    """Where kernels can be run in this process."""
    if torch.cuda.is_available():
        return "cuda"
    if not interpreted():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1: test_interpreted.py runs it so")
    return "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer, until something is written there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

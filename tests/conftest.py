"""Each test starts with an empty Dynamo cache (models of transformers share code, and its recompilations are limited)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import qpass

os.environ.setdefault("TORCHINDUCTOR_SIZE_ASSERTS", "1")  # Inductor checks here that fakes tell the truth


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Graphs are compared with dequantized weights in float; what int8 activations lose is for test_cpu.py to say."""
    with qpass.set_compute("float"):
        yield


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators of a graph stay calls of their own, so that they are seen."""
    monkeypatch.setattr("qpass.backend.join_calls", lambda graph_module: None)


settings.register_profile("quick", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile("quick")

"""Several threads: calls of one model at once, of different lengths from the first on, and a calibration beside them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import qpass
from tests.models import build, logits_of, tokens

LENGTHS = [3, 5, 7, 9, 11, 4, 6, 8]


def run(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model(ids))


def quantized(family: str = "llama") -> torch.nn.Module:
    return qpass.quantize(build(family), "int4:g16:asym", inner="eager")


@pytest.mark.long
def test_first_calls_of_different_lengths_at_once() -> None:
    model, alone = quantized(), quantized()
    batches = [tokens(2, length, seed=length) for length in LENGTHS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ids: run(model, ids), batches))
    for ids, logits in zip(batches, found, strict=True):
        torch.testing.assert_close(logits, run(alone, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calls", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_eight_threads_give_what_one_gives(calls: int) -> None:
    """To the bit: nothing of one call is seen by another."""
    model = quantized()
    batches = [tokens(2, 9, seed=i) for i in range(8)]
    serial = [run(model, ids) for ids in batches]

    def many(i: int) -> bool:
        return all(torch.equal(run(model, batches[(i + n) % 8]), serial[(i + n) % 8]) for n in range(calls))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, range(8)))


def test_one_thread_calibrates_while_another_serves() -> None:
    """A model that is quantized with data beside one that runs: each is as it would be alone."""
    served, ids = quantized("gpt2"), tokens(2, 9)
    before = run(served, ids)
    data = [tokens(2, 16, seed=i) for i in range(3)]
    with ThreadPoolExecutor(2) as pool:
        work = pool.submit(
            lambda: qpass.quantize(build("llama"), "int4:g16:asym:gptq", calibration=data, inner="eager")
        )
        calls = 0
        while not work.done() or calls < 20:
            assert torch.equal(run(served, ids), before)
            calls += 1
        model = work.result()
    alone = qpass.quantize(build("llama"), "int4:g16:asym:gptq", calibration=data, inner="eager")
    assert torch.equal(run(model, ids), run(alone, ids))


def test_random_numbers_of_the_program_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    qpass.quantize(build_keeping_the_seed(), {**dict.fromkeys(("qkv", "ffn"), "int4:g32:gptq"), "bits": 5.2},
                   calibration=[tokens(4, 24)], inner="eager")  # fmt: skip
    assert torch.equal(torch.randn(3), expected)


def build_keeping_the_seed() -> torch.nn.Module:
    state = torch.get_rng_state()
    model = build("llama")
    torch.set_rng_state(state)
    return model

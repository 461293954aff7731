"""Around a decode step on the CPU: calling the model, `qpass generate`, and the `generate` of transformers, on one model.

    python benchmarks/generate.py --model FOLDER [--recipes int8 int4:g128] [--prompt 120] [--tokens 64] [--rounds 5]
                                  [--json build/generate.json]

The three write in turn, and so see the same machine; medians over the steps of all rounds, the first ones of a text left out.
`calling the model`: the step alone, and the choice of the most likely token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import qpass
from qpass.cache import CACHE_ARGUMENT, KVCache
from qpass.generate import generate

#: Steps of a text that do not count: they read the prompt, and make the graph of a step.
_FIRST = 4


def calling(model: Any, ids: torch.Tensor, count: int) -> Iterator[int]:
    """The tokens that follow `ids` [1, S], by nothing but the model's step."""
    cache = KVCache(model.config, ids.shape[1] + count, None)
    for _ in range(count):
        logits = model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        yield int(ids)


class Clock(StoppingCriteria):
    """Stops nothing, and notes when it was asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def seconds_of(tokens: Iterator[int]) -> list[float]:
    """Of each step."""
    return _between([time.perf_counter() for _ in tokens])


def _between(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)][_FIRST:]


def by_transformers(model: Any, ids: torch.Tensor, count: int) -> list[float]:
    """Seconds of each step of its greedy `generate`, on a cache of the same kind."""
    clock = Clock()
    arguments = {CACHE_ARGUMENT: KVCache(model.config, ids.shape[1] + count, None)}
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False,
                   pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]), **arguments)  # fmt: skip
    return _between(clock.times)


@torch.no_grad()
def rates(model: Any, ids: torch.Tensor, count: int, rounds: int) -> dict[str, float]:
    """Tokens a second of each."""
    ways: dict[str, Callable[[], list[float]]] = {
        "calling the model": lambda: seconds_of(calling(model, ids, count)),
        "qpass generate": lambda: seconds_of(generate(model, ids, count)),
        "transformers generate": lambda: by_transformers(model, ids, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            found = way()
            seconds[name] += found if turn else []  # the first compiles
    return {name: 1 / statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["int8", "int4:g128"])
    parser.add_argument("--prompt", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = {}
    for recipe in args.recipes:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        ids = torch.randint(0, 1000, (1, args.prompt), generator=torch.Generator().manual_seed(1))
        table[recipe] = found = rates(qpass.quantize(model, recipe), ids, args.tokens, args.rounds)
        step = found["calling the model"]
        print(recipe, *(f"{name}: {rate:.1f} tokens/s, {rate / step:.3f}" for name, rate in found.items()), sep="\n  ")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"model": args.model.name, "torch": torch.__version__, "rates": table}, indent=1)
        )


if __name__ == "__main__":
    main()

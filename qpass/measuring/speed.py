"""How fast a model reads a prompt and writes tokens, one sequence at a time, by its bare step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.recipe import Recipe

#: Steps before those that count: the first ones compile and fill the caches of the processor.
WARM = 3


@dataclass(frozen=True)
class Speed:
    """Behind `context` tokens. `prompt_seconds`: reading them, the second time; `step_seconds`: the median step of one token;
    `weight_bytes`, `cache_bytes`: of all weights, and of the cache, which has room for `cache_tokens`."""

    context: int
    prompt_seconds: float
    step_seconds: float
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of the bare step."""
        return 1 / self.step_seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of the prompt."""
        return self.context / self.prompt_seconds

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        rates = {"tokens_per_second": self.tokens_per_second, "prompt_tokens_per_second": self.prompt_tokens_per_second}
        return asdict(self) | rates


@torch.no_grad()
def measure_speed(model: Any, recipe: Recipe | None, context: int = 128, steps: int = 32) -> Speed:
    """Time a causal model of transformers at batch 1, with a static cache in the recipe's format (None: in float).

    Raises `QpassError` for a model that keeps no such cache, or is too short for the context.
    """
    from qpass.cache import CACHE_ARGUMENT, KVCache

    config = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or context + steps
    if context + steps + WARM > longest:
        raise QpassError(f"context {context} and {steps} steps: the model has {longest} positions; take fewer")
    specs = (None, None) if recipe is None or recipe.kv_specs is None else recipe.kv_specs
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(config.get_text_config().vocab_size, (1, context), generator=generator).to(device)
    prompts, times = [], []
    token: Tensor = ids
    cache: Any = None
    length = context + steps + WARM
    for _ in range(2):
        cache = KVCache(config, length, None, *specs)
        start = time.perf_counter()
        token = _next(model, ids, cache, CACHE_ARGUMENT)
        prompts.append(time.perf_counter() - start)
    for _ in track(range(steps + WARM), "qpass: decoding"):
        start = time.perf_counter()
        token = _next(model, token, cache, CACHE_ARGUMENT)
        times.append(time.perf_counter() - start)
    step = statistics.median(times[WARM:])
    return Speed(context, prompts[-1], step, weight_bytes(model), cache.nbytes, length)


def _next(model: Any, ids: Tensor, cache: Any, name: str) -> Tensor:
    """The most likely token [1, 1]; `.item()` waits for a device."""
    token: Tensor = model(ids, use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1:].argmax(-1)
    token.sum().item()
    return token


def weight_bytes(model: Any) -> int:
    """Bytes of all Parameters as they are in memory."""
    params: Sequence[Any] = list(model.parameters())
    return sum(p.stored_nbytes if isinstance(p, QTensor) else p.nbytes for p in params)

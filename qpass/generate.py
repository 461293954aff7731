"""Writing text token by token, with nothing around the model's step: no generation config, no processors, one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qpass.backend import QPass
from qpass.errors import QpassError
from qpass.graph.torch_private import backend_of
from qpass.recipe import Recipe

#: The prompt is read, and a step of one token compiled, before this step.
_ALIKE = 2
#: Lengths of caches are rounded up, so that calls of similar length share their compiled graphs.
_STEP = 64


@torch.no_grad()
def generate(
    model: Any,
    ids: Tensor,
    max_new_tokens: int,
    *,
    recipe: Recipe | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens that a causal model of transformers writes behind `ids` [1, S], until it ends or `max_new_tokens`.

    The model is not to be changed while it writes. `recipe`: gives the format of the cache. `temperature`: 0 takes the most
    likely token, otherwise tokens are drawn with `seed`.
    Raises `QpassError` for more than one sequence, an empty prompt, and a model that is too short.
    """
    from qpass.cache import CACHE_ARGUMENT, KVCache

    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise QpassError(f"generate: ids of shape {list(ids.shape)}; give one sequence of at least a token, [1, S]")
    if max_new_tokens < 1 or temperature < 0:
        raise QpassError(
            f"generate: max_new_tokens={max_new_tokens}, temperature={temperature}: at least 1, and not below 0"
        )
    config = model.config.get_text_config()
    length = ids.shape[1] + max_new_tokens
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise QpassError(
            f"generate: {ids.shape[1]} tokens of prompt and {max_new_tokens} new ones; the model has {longest} positions"
        )
    specs = (None, None) if recipe is None or recipe.kv_specs is None else recipe.kv_specs
    cache = KVCache(model.config, min(longest, -(-length // _STEP) * _STEP), None, *specs)
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    ends = _ends(model)
    for step in range(max_new_tokens):
        with _as_before() if step >= _ALIKE and _is_settled(model, cache) else nullcontext():
            logits = model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
        if temperature:
            ids = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        else:
            ids = logits.argmax(-1, keepdim=True)
        token = int(ids)
        if token in ends:
            return
        yield token


def _is_settled(model: Any, cache: Any) -> bool:
    """Whether a step differs from the last one in nothing but the values of tensors: it is one graph, and no layer counts in
    Python."""
    backend = backend_of(model)
    whole = isinstance(backend, QPass) and backend.captures and not any(c.fragment for c in backend.captures)
    return bool(whole) and not any(hasattr(layer, "cumulative_length_int") for layer in cache.layers)


def _as_before() -> AbstractContextManager[Any]:
    """Calls are served by the graph that served the last such call: of Dynamo's guards, a tenth of a small model's step, only
    those are checked that tell its graphs apart."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)
    return stance


def _ends(model: Any) -> set[int]:
    """The tokens that end a text."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list | tuple) else set() if found is None else {found}


def pieces(tokens: Iterator[int], tokenizer: Any) -> Iterator[str]:
    """The text of tokens as they come; a character of several tokens when its last is there."""
    given: list[int] = []
    shown = ""
    for token in tokens:
        given.append(token)
        text = tokenizer.decode(given, skip_special_tokens=True)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(given, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]

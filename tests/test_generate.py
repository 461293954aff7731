"""generate: the tokens of transformers' own, one at a time, and text that never breaks a character."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qpass
from qpass.errors import QpassError
from qpass.generate import generate, pieces
from tests.models import hf

PROMPT = torch.tensor([[5, 17, 3, 60]])


def llama() -> Any:
    torch.manual_seed(3)
    return hf("LlamaForCausalLM", num_key_value_heads=2, head_dim=32, max_position_embeddings=256).eval()


@pytest.mark.parametrize("recipe", [None, "int8", "int8+kv=int4"])
def test_greedy_tokens_are_those_of_transformers(recipe: str | None) -> None:
    model = llama()
    chosen = None
    if recipe is not None:
        chosen = qpass.recipe.resolve_recipe(recipe)
        model = qpass.quantize(model, recipe, inner="eager")
    ours = list(generate(model, PROMPT, 70, recipe=chosen))
    theirs = model.generate(PROMPT, max_new_tokens=70, min_new_tokens=70, do_sample=False, pad_token_id=0)[0, 4:]
    assert ours == theirs.tolist()[: len(ours)]


def test_texts_of_any_length_after_each_other() -> None:
    """Each has graphs of its own, by the length of its cache, which later steps must not mix up."""
    recipe = qpass.recipe.resolve_recipe("int8+kv=int8")
    model = qpass.quantize(llama(), recipe, inner="eager")
    model.generation_config.eos_token_id = None
    for count in (20, 70, 20):
        theirs = model.generate(PROMPT, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, 4:]
        assert list(generate(model, PROMPT, count, recipe=recipe)) == theirs.tolist()


def test_it_stops_at_the_end_of_the_text() -> None:
    model = llama()
    whole = list(generate(model, PROMPT, 20))
    model.generation_config.eos_token_id = [whole[5], 10**6]
    assert list(generate(model, PROMPT, 20)) == whole[: whole.index(whole[5])]


def test_a_seed_decides_what_is_drawn() -> None:
    model = llama()
    drawn = [list(generate(model, PROMPT, 20, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    state = torch.random.get_rng_state()
    list(generate(model, PROMPT, 3, temperature=1.0))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


@pytest.mark.parametrize(
    ("ids", "count", "says"),
    [
        (PROMPT.repeat(2, 1), 4, "one sequence"), (PROMPT[:, :0], 4, "one sequence"), (PROMPT, 0, "at least 1"),
        (PROMPT, 1000, "positions"),
    ],
    ids=["batch", "empty", "none", "too long"],
)  # fmt: skip
def test_what_cannot_be_written_is_named(ids: torch.Tensor, count: int, says: str) -> None:
    with pytest.raises(QpassError, match=says):
        list(generate(llama(), ids, count))


class Bytes:
    """A token a byte."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "text", ["plain", "naïve ≈ 量化", "🙂🙂", "ends in half 🙂"], ids=["ascii", "wide", "four bytes", "cut"]
)
def test_pieces_never_break_a_character(text: str) -> None:
    content = text.encode()[: -1 if "half" in text else None]
    shown = list(pieces(iter(content), Bytes()))
    assert "".join(shown) == content.decode(errors="replace")
    assert not any("\ufffd" in piece for piece in shown[:-1])

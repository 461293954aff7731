"""Bits given out: the rule against brute force, and without data: by relative errors, each kind as much as another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.backend import QPass
from qpass.bits import LADDER, cheapest
from qpass.spec import parse_spec
from tests.models import build, hf, tokens


def specs(model: nn.Module) -> dict[str, str]:
    return {n: str(p.spec) for n, p in model.named_parameters() if isinstance(p, qpass.QTensor)}


def bits_a_weight(model: nn.Module) -> float:
    """As stored, over all quantized weights."""
    weights = [p for p in model.parameters() if isinstance(p, qpass.QTensor)]
    return 8 * sum(w.stored_nbytes for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("seed", range(8))
def test_bits_are_given_out_as_well_as_by_trying_everything(seed: int) -> None:
    """On convex choices, as those of formats are."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(5, generator=generator) * 10).tolist()
    choices = [[(b, w * 4.0**-b) for b in (2, 3, 4, 6, 8)] for w in weights]
    budget = 22.0
    chosen = cheapest(choices, budget)
    size = sum(choices[i][c][0] for i, c in enumerate(chosen))
    loss = sum(choices[i][c][1] for i, c in enumerate(chosen))
    assert size <= budget
    best = min(
        sum(o[1] for o in options) for options in itertools.product(*choices) if sum(o[0] for o in options) <= budget
    )
    steps = [choices[i][c][1] - choices[i][c + 1][1] for i, c in enumerate(chosen) if c < 4]
    assert loss <= best + max(steps), "within the one step that did not fit"


def test_a_choice_that_costs_more_and_loses_more_is_never_taken() -> None:
    assert cheapest([[(2.0, 1.0), (3.0, 2.0), (4.0, 0.5)]], 3.5) == [0]
    assert cheapest([[(2.0, 1.0), (3.0, 2.0), (4.0, 0.5)]], 4.0) == [2]
    assert cheapest([[(5.0, 1.0), (6.0, 0.5)]], 1.0) == [0], "nothing fits: the smallest"


def model(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
    return hf("LlamaForCausalLM", **(sizes | config)).eval()


@pytest.mark.parametrize("bits", [3.5, 4.5, 5.35, 7.0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_without_data_a_model_has_the_bits_that_were_asked_for(bits: float, tied: bool) -> None:
    recipe = qpass.Recipe.uniform("int4:g32:asym", bits=bits)
    quantized = qpass.quantize(model(tie_word_embeddings=tied), recipe, inner="eager")
    assert bits - 0.6 <= bits_a_weight(quantized) <= bits + 0.01
    assert set(specs(quantized).values()) <= {str(parse_spec(text)) for text in LADDER}


def test_what_one_operator_reads_has_one_format() -> None:
    found = specs(qpass.quantize(model(), "int4", inner="eager"))
    for layer in (0, 1):
        for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            assert len({found[f"model.layers.{layer}.{name}.weight"] for name in names}) == 1


def test_a_kind_with_few_weights_gets_more_bits() -> None:
    """The projections of an attention with one key head are few beside the feed-forward network's."""
    recipe = qpass.Recipe.uniform("int4:g32:asym", bits=4.8)
    found = specs(qpass.quantize(model(intermediate_size=1024), recipe, inner="eager"))
    few, many = (
        parse_spec(found[f"model.layers.0.{n}.weight"]).format.bits for n in ("self_attn.v_proj", "mlp.up_proj")
    )
    assert few > many


def test_the_same_with_torch_compile_programs_and_in_fragments() -> None:
    expected = specs(qpass.quantize(build("llama"), "int4", inner="eager"))
    backend = QPass("int4", inner="eager")
    fast = torch.compile(build("llama"), backend=backend)
    with torch.no_grad():
        fast(tokens())
    assert {s.name: s.format for s in qpass.report(fast).sites if s.format} == expected
    program = torch.export.export(build("nanogpt"), (tokens(),))
    quantized = qpass.quantize(program, "int4")
    assert len({str(n.args[-1]) for n in quantized.graph.nodes if "qpass.linear" in str(n.target)}) > 1


def test_names_in_the_recipe_and_other_formats_are_left_alone() -> None:
    recipe = qpass.Recipe.uniform("int4:g32:asym", embedding="nf4", bits=5, overrides={"*.0.*o_proj*": "int8:channel"})
    found = specs(qpass.quantize(model(), recipe, inner="eager"))
    assert found["model.layers.0.self_attn.o_proj.weight"] == "int8:channel"
    assert found["model.embed_tokens.weight"] == "nf4:g64"


def test_calibration_after_calls_without_data_gives_out_bits_anew() -> None:
    ids, backend = tokens(batch=8, length=32), QPass(qpass.Recipe.uniform("int4:g32:asym", bits=4.7), inner="eager")
    fast = torch.compile(model(), backend=backend)
    with torch.no_grad():
        fast(ids)
        before = {s.name: s.format for s in qpass.report(fast).sites}
        with backend.calibrate():
            fast(ids)
        fast(ids)
    assert {s.name: s.format for s in qpass.report(fast).sites} != before


@torch.no_grad()
def test_a_loaded_model_keeps_its_bits(tmp_path: Path) -> None:
    quantized = qpass.quantize(model(), "int4", inner="eager")
    qpass.save(quantized, tmp_path / "a")
    loaded = qpass.load(tmp_path / "a", inner="eager")
    assert torch.equal(loaded(tokens()).logits, quantized(tokens()).logits)
    assert specs(loaded) == specs(quantized)

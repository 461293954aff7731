"""qpass.blame: each site's share of the KL against brute force, the first bad site, and the recipe that fixes it."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.measuring.blame import Blame
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from tests.models import FAMILIES, build, hf, logits_of, tokens

TINYPY = Path(__file__).parents[2] / "examples" / "tinypy"
OUTLIER = "model.layers.1.mlp.down_proj.weight"


def saying_something(model: nn.Module) -> nn.Module:
    """With weights so large that there is a KL to lose."""
    with torch.no_grad():
        for p in {id(p): p for p in model.parameters() if p.dim() > 1}.values():
            p.mul_(3)
    return model


def family(name: str) -> nn.Module:
    if name in FAMILIES:
        return saying_something(build(name))
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return saying_something(hf("MixtralForCausalLM", **experts).eval())


def quantized(model: nn.Module, recipe: Any, **options: Any) -> Any:
    return qpass.quantize(copy.deepcopy(model), recipe, inner="eager", **options)


@torch.no_grad()
def kl(model: Any, reference: Any, batches: list[Tensor]) -> float:
    """Mean over predicted tokens, by the definition."""
    total = count = 0.0
    for ids in batches:
        p, q = (logits_of(m(ids))[:, :-1].double().log_softmax(-1) for m in (reference, model))
        total, count = total + float((p.exp() * (p - q)).sum()), count + p[..., 0].numel()
    return total / count


def one_by_one(model: nn.Module, reference: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """KL recovered, by a float copy that holds the stored weights: each is put back in turn."""
    copied = copy.deepcopy(reference)
    params = dict(copied.named_parameters())
    stored = {n: p for n, p in model.named_parameters() if isinstance(p, QTensor)}
    with torch.no_grad():
        for name, p in stored.items():
            params[name].copy_(p.dequantize())
        whole, found = kl(copied, reference, batches), {}
        for name, p in stored.items():
            params[name].copy_(dict(reference.named_parameters())[name])
            found[name] = whole - kl(copied, reference, batches)
            params[name].copy_(p.dequantize())
    return found


# --- each site's share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "nanogpt", "flat", "mixtral"])
def test_what_a_site_recovers_is_what_brute_force_finds(name: str) -> None:
    """Tied tables are one site; experts, fused and transposed weights are as any other."""
    reference, batches = family(name), [tokens(2, 12), tokens(2, 12, seed=1)]
    model = quantized(reference, "int4:g32")
    found, expected = qpass.blame(model, reference, batches), one_by_one(model, reference, batches)
    assert found.kl == pytest.approx(qpass.evaluate(model, reference, batches).kl, rel=1e-3)
    assert found.tokens == 2 * 2 * 11
    assert {row.name for row in found.rows} == expected.keys()
    for row in found.rows:
        assert row.kl_recovered == pytest.approx(expected[row.name], abs=1e-3 * found.kl), row.name
        assert row.share == pytest.approx(row.kl_recovered / found.kl)
    recovered = [row.kl_recovered for row in found.rows]
    assert recovered == sorted(recovered, reverse=True)


def test_a_row_says_what_the_site_is() -> None:
    reference, batches = family("gpt2"), [tokens(2, 12)]
    model = quantized(reference, Recipe.uniform("int4:g32", vocab="int8", embedding="int8"))
    row = next(r for r in qpass.blame(model, reference, batches).rows if r.name == "transformer.wte.weight")
    (site,) = (s for s in qpass.report(model).sites if s.name == row.name)
    assert (row.kind, row.format) == (site.kind, site.format) == ("embedding+vocab", "int8:channel")
    assert row.sqnr_db == pytest.approx(site.sqnr_db, abs=0.1)
    assert row.bytes_added == site.bytes_before - site.bytes_after


def test_padding_counts_for_nothing() -> None:
    reference, ids = family("llama"), tokens(2, 12)
    model = quantized(reference, "int4:g32")
    pad = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), pad], 1)
    plain = qpass.blame(model, reference, [ids])
    padded = qpass.blame(model, reference, [{"input_ids": torch.cat([ids, pad], 1), "attention_mask": mask}])
    assert padded.tokens == plain.tokens
    assert [r.name for r in padded.rows] == [r.name for r in plain.rows]
    assert padded.kl == pytest.approx(plain.kl, rel=1e-3)


def test_the_same_call_gives_the_same_and_changes_nothing() -> None:
    reference, batches = family("llama"), [tokens(2, 12)]
    model = quantized(reference, "int4:g32")
    before = [logits_of(m(batches[0])).clone() for m in (model, reference)]
    first, second = (qpass.blame(model, reference, batches) for _ in range(2))
    assert first == second
    assert qpass.blame(model, reference, batches, top=3).rows == first.rows[:3]
    for m, logits in zip((model, reference), before, strict=True):
        assert torch.equal(logits_of(m(batches[0])), logits)


@pytest.mark.parametrize("recipe", ["int8:channel@int8", "int4:g32:asym@int8:g32", "int8@int8:asym"])
def test_quantized_inputs_are_rounded_as_the_model_does(recipe: str) -> None:
    """And restored with the weight: all sites in float together leave nothing."""
    reference, batches = family("nanogpt"), [tokens(2, 12)]
    model = quantized(reference, recipe)
    found = qpass.blame(model, reference, batches)
    assert found.kl == pytest.approx(qpass.evaluate(model, reference, batches).kl, rel=2e-2)
    site = next(r for r in found.rows if r.kind == "ffn")
    restored = quantized(reference, Recipe.uniform(recipe, overrides={site.name: None}))
    assert site.kl_restored == pytest.approx(qpass.evaluate(restored, reference, batches).kl, rel=2e-2)


@pytest.mark.parametrize(
    "recipe",
    [
        "int8:smooth@int8",
        "int8@int8:static",
        *(pytest.param(t, marks=pytest.mark.long) for t in ("int4:g32:awq", "nvfp4@nvfp4")),
        "int4:g32:gptq",
    ],
)
def test_what_calibration_found_is_taken_as_it_is(recipe: str) -> None:
    """Columns that are scaled, static scales, chosen codes."""
    reference, batches = family("qwen3"), [tokens(2, 12)]
    model = quantized(reference, recipe, calibration=[tokens(4, 32, seed=1)])
    found = qpass.blame(model, reference, batches)
    assert found.kl == pytest.approx(qpass.evaluate(model, reference, batches).kl, rel=2e-2)


def test_a_loaded_model_is_blamed_like_the_one_that_was_saved(tmp_path: Path) -> None:
    reference, batches = family("llama"), [tokens(2, 12)]
    model = quantized(reference, "int4:g32")
    qpass.save(model, tmp_path / "out")
    loaded = qpass.load(tmp_path / "out", inner="eager")
    assert qpass.blame(loaded, reference, batches).rows == qpass.blame(model, reference, batches).rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_of_another_type_that_are_not_held_in_float(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float model may be wider than the one that was quantized; above a budget weights are dequantized at each use."""
    reference, batches = family("nanogpt"), [tokens(2, 12)]
    model = quantized(copy.deepcopy(reference).to(dtype), "int4:g32")
    held = qpass.blame(model, reference, batches)
    monkeypatch.setattr(sys.modules["qpass.measuring.blame"], "BUDGET", 0)  # the name in qpass is the function
    assert qpass.blame(model, reference, batches) == held


class Broken(nn.Module):
    """A residual network with graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(97, 64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 97, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        torch._dynamo.graph_break()
        x = x + self.down(torch.relu(self.up(x)))
        torch._dynamo.graph_break()
        return self.head(x + torch.relu(self.second(x)))


@pytest.mark.parametrize("recipe", ["int4:g32", "int8@int8"])
def test_graph_breaks_change_no_numbers(recipe: str) -> None:
    torch.manual_seed(0)
    reference, batches = saying_something(Broken().eval()), [tokens(2, 12)]
    model = quantized(reference, recipe, inputs=batches[0])
    found = qpass.blame(model, reference, batches)
    assert found.kl == pytest.approx(qpass.evaluate(model, reference, batches).kl, rel=2e-2)
    if "@" not in recipe:
        expected = one_by_one(model, reference, batches)
        for row in found.rows:
            assert row.kl_recovered == pytest.approx(expected[row.name], abs=1e-3 * found.kl), row.name


# --- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kv", ["int8", *(pytest.param(t, marks=pytest.mark.long) for t in ("int4:channel", "fp8_e4m3"))]
)
def test_a_cache_is_a_site_of_each_layer(kv: str) -> None:
    """Against qpass.evaluate, and against a cache with one layer in float read the same way."""
    reference, batches = family("llama"), [tokens(2, 96)]
    model = quantized(reference, Recipe.uniform("int8", kv=kv))
    found = qpass.blame(model, reference, batches)
    assert found.kl == pytest.approx(qpass.evaluate(model, reference, batches).kl, rel=1e-3)
    rows = {r.name: r for r in found.rows if r.kind == "kv"}
    for i in (0, 1):

        def chunked(ids: Tensor, i: int = i) -> Tensor:
            cache = qpass.KVCache(reference.config, 96, kv, layers={i: None})
            return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(64, 1)], 1)

        row = rows[f"model.layers.{i}.self_attn.k_proj.weight"]
        assert row.kl_restored == pytest.approx(kl(chunked, reference, batches), rel=1e-3)
        assert row.bytes_added is None


def test_a_cache_that_costs_most_is_fixed_by_the_recipe(tmp_path: Path) -> None:
    reference, batches = family("llama"), [tokens(2, 96)]
    model = quantized(reference, Recipe.uniform("int8", kv="int2:channel"))
    found = qpass.blame(model, reference, batches)
    assert found.fix is not None
    assert [step.name for step in found.fix.steps] == ["kv"]
    assert "kv: int8" in str(found)
    repaired = quantized(reference, read(found, tmp_path))
    after = qpass.evaluate(repaired, reference, batches).kl
    assert after <= 0.2 * found.kl
    assert after == pytest.approx(found.fix.kl, rel=0.05)


# --- what is wrong, and what fixes it -------------------------------------------------------------------------------


def read(found: Blame, folder: Path) -> Recipe:
    """The recipe that is printed."""
    assert found.fix is not None
    (folder / "fix.yaml").write_text(found.fix.recipe)
    return Recipe.from_yaml(folder / "fix.yaml")


@pytest.fixture(scope="module")
def outlier() -> Any:
    """A trained model in which one column of a down_proj is 1000 times as large, and what it multiplies as much smaller."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval()
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.down_proj.weight[:, 5] *= 1000
        mlp.up_proj.weight[5] /= 1000
    return model


@pytest.fixture(scope="module")
def text() -> list[Tensor]:
    return [torch.tensor(np.load(TINYPY / "validation.npy")[:192].astype("int64")).view(2, 96)]


@pytest.mark.parametrize(
    "recipe",
    ["int8:channel", pytest.param("w8a8", marks=pytest.mark.long), Recipe(ffn="int4:channel")],
    ids=["int8:channel", "w8a8", "int4 ffn"],
)
def test_an_outlier_is_ranked_first_and_the_printed_recipe_fixes_it(
    outlier: Any, text: list[Tensor], recipe: Any, tmp_path: Path
) -> None:
    model = quantized(outlier, recipe)
    found = qpass.blame(model, outlier, text)
    assert found.rows[0].name == OUTLIER
    assert found.first_bad is not None
    assert found.first_bad.name == OUTLIER
    assert found.first_bad.error_after > 0.25 > 3 * found.first_bad.error_before / 2
    fix = found.fix
    assert fix is not None
    assert [step.name for step in fix.steps] == [OUTLIER]
    assert f'overrides:\n  "{OUTLIER}": ' in str(found)

    before = qpass.evaluate(model, outlier, text).kl
    repaired = quantized(outlier, read(found, tmp_path))
    after = qpass.evaluate(repaired, outlier, text).kl
    assert after <= 0.2 * before
    assert 1 - after / before == pytest.approx(fix.recovered, abs=0.01)
    more = sum(s.bytes_after for s in qpass.report(repaired).sites) - sum(
        s.bytes_after for s in qpass.report(model).sites
    )
    assert fix.bytes_added == more


def test_an_input_that_is_too_wide_is_left_in_float(text: list[Tensor], tmp_path: Path) -> None:
    """A row of up_proj 1000 times as large makes an outlier of one feature for every token; the weight is not to blame."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval()
    with torch.no_grad():
        mlp = reference.model.layers[1].mlp
        mlp.down_proj.weight[:, 5] /= 1000
        mlp.up_proj.weight[5] *= 1000
    model = quantized(reference, "w8a8")
    found = qpass.blame(model, reference, text)
    assert found.rows[0].name == OUTLIER
    assert found.fix is not None
    (step,) = found.fix.steps
    assert (step.name, step.format, step.bytes_added) == (OUTLIER, "int8:channel", 0)
    repaired = quantized(reference, read(found, tmp_path))
    assert qpass.evaluate(repaired, reference, text).kl <= 0.2 * found.kl


def test_a_site_comes_last_that_the_recipe_names_already(outlier: Any, text: list[Tensor], tmp_path: Path) -> None:
    """An override that matches first is put before one that is there."""
    recipe = Recipe.uniform("int8", overrides={"*.layers.1.*": "int8:channel", "*.layers.0.*": "int8:g32"})
    found = qpass.blame(quantized(outlier, recipe), outlier, text)
    fixed = read(found, tmp_path)
    assert [glob for glob, _ in fixed.overrides] == [OUTLIER, "*.layers.1.*", "*.layers.0.*"]


def test_nothing_is_named_where_little_is_lost(text: list[Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval()
    found = qpass.blame(quantized(reference, "int8"), reference, text)
    assert found.kl < 1e-3
    assert found.first_bad is None
    assert found.fix is None
    assert "no change of formats is worth naming" in str(found)


def test_a_fix_that_does_not_suffice_says_so() -> None:
    """Four bits at every site of a model that has no one bad site."""
    reference, batches = family("llama"), [tokens(2, 12)]
    found = qpass.blame(quantized(reference, "int2:g32"), reference, batches)
    assert found.fix is not None
    if found.fix.recovered < 0.8:
        assert "the best found" in str(found)
    assert found.fix.recovered == pytest.approx(1 - found.fix.kl / found.kl)


@pytest.fixture
def with_nan() -> tuple[nn.Module, nn.Module]:
    reference = family("llama")
    model = quantized(reference, "int8")
    model.model.layers[1].mlp.up_proj.weight.quantized.scale[0] = math.nan
    return reference, model


def test_nan_is_traced_to_the_site_that_makes_it(with_nan: Any, tmp_path: Path) -> None:
    reference, model = with_nan
    found = qpass.blame(model, reference, [tokens(2, 12)])
    name = "model.layers.1.mlp.up_proj.weight"
    assert math.isnan(found.kl)
    assert found.rows[0].name == name
    assert math.isfinite(found.rows[0].kl_restored)
    assert not any(math.isfinite(row.kl_restored) for row in found.rows[1:])
    assert found.first_bad is not None
    assert (found.first_bad.name, found.first_bad.nan) == (name, True)
    assert found.fix is not None
    assert [step.name for step in found.fix.steps] == [name]
    assert f"first NaN: {name}" in str(found)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["kl"] is None


def test_several_sites_that_give_nan_are_all_found(with_nan: Any) -> None:
    """The first hides the second, and no one site restored makes anything finite."""
    reference, model = with_nan
    model.model.layers[0].self_attn.o_proj.weight.quantized.scale[3] = math.nan
    found = qpass.blame(model, reference, [tokens(2, 12)])
    assert not any(math.isfinite(row.kl_restored) for row in found.rows)
    assert found.first_bad is not None
    assert found.first_bad.name == "model.layers.0.self_attn.o_proj.weight"
    assert found.fix is not None
    assert math.isfinite(found.fix.kl)
    assert {step.name for step in found.fix.steps} == {found.first_bad.name, "model.layers.1.mlp.up_proj.weight"}


def test_plain_data_holds_all_that_is_printed(outlier: Any, text: list[Tensor]) -> None:
    found = qpass.blame(quantized(outlier, "int8:channel"), outlier, text, top=2)
    plain = json.loads(json.dumps(found.to_json()))
    assert [row["name"] for row in plain["rows"]] == [row.name for row in found.rows]
    assert plain["fix"]["recipe"] == found.fix.recipe  # type: ignore[union-attr]
    assert set(plain) == {"kl", "tokens", "rows", "first_bad", "fix"}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reference", "ids", "says"),
    [
        ("float", "float", (2, 12), "model holds no quantized weights"),
        ("quantized", "quantized", (2, 12), "of the reference is quantized"),
        ("quantized", "other", (2, 12), r"is .* in the model and .* in the reference"),
        ("quantized", "float", (2, 1), "at least two tokens"),
        ("quantized", "float", None, "at least two tokens"),
        ("quantized", None, (2, 12), "reference is a NoneType"),
    ],
    ids=["float model", "quantized reference", "other reference", "one token", "no batch", "no reference"],
)
def test_what_cannot_be_compared_is_refused(model: str, reference: Any, ids: Any, says: str) -> None:
    floats = family("llama")
    made = {"float": floats, "quantized": quantized(floats, "int8"), "other": family("qwen3"), None: None}
    with pytest.raises(qpass.QpassError, match=says):
        qpass.blame(made[model], made[reference], [] if ids is None else [tokens(*ids)])

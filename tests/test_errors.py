"""Bad input: a clear error whose first line names the site and the fix, and a model that is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from tests.models import build, logits_of, tokens

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def with_value(value: float) -> nn.Module:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter(Q_PROJ)[3, 5] = value
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return build("llama")


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(p is before[n] for n, p in after.items())


#: (model, recipe, first line of the error)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "unknown format": (lambda: build("llama"), "int44", "unknown recipe 'int44': did you mean 'int4'"),
    "unknown preset": (lambda: build("llama"), "in8", "unknown recipe 'in8': did you mean 'int8'"),
    "unknown site": (lambda: build("llama"), {"qvk": "int8"}, "unknown site 'qvk': did you mean 'qkv'"),
    "unknown token": (lambda: build("llama"), "int4:g32:asymm", "unknown part 'asymm': did you mean 'asym'"),
    "no such file": (lambda: build("llama"), "nowhere.yaml", "nowhere.yaml does not exist"),
    "NaN": (lambda: with_value(float("nan")), "int8", f"{Q_PROJ}: the weight holds NaN"),
    "inf": (lambda: with_value(float("inf")), "int8", f"{Q_PROJ}: the weight holds inf"),
    "meta": (on_meta, "int8", "model.embed_tokens.weight: the weight is on the meta device; load"),
    "a name no site has": (
        lambda: build("llama"),
        qpass.Recipe.uniform("int8", overrides={"*.layer.0.*": "bf16"}),
        "'*.layer.0.*': no site has such a name",
    ),
    "one half of a cache": (lambda: build("llama"), {"k": "int8"}, "k and v are one cache"),
    "a cache with one scale": (lambda: build("llama"), {"kv": "int8:tensor"}, "one scale for the whole tensor"),
}


@pytest.mark.parametrize("how", ["quantize", "compile"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, how: str) -> None:
    make, recipe, says = CASES[case]
    model = make()
    before = dict(model.named_parameters())
    if how == "compile" and case == "meta":
        pytest.skip("torch itself refuses to run a model on the meta device with real inputs")

    def attempt() -> object:
        if how == "quantize":
            return qpass.quantize(model, recipe, inner="eager")
        return torch.compile(model, backend=qpass.QPass(recipe, inner="eager"))(tokens())

    with pytest.raises(QpassError) as raised:
        attempt()
    assert says in str(raised.value).splitlines()[0]
    assert unchanged(model, before)
    if case not in ("meta", "NaN", "inf"):
        torch._dynamo.reset()
        with torch.no_grad():
            assert torch.equal(logits_of(model(tokens())), logits_of(build("llama")(tokens())))


def test_a_model_with_no_site() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.ReLU()).eval()
    with pytest.raises(QpassError, match="nothing to quantize"):
        torch.compile(model, backend=qpass.QPass(inner="eager"))(torch.randn(2, 8))
    with pytest.raises(QpassError, match="nothing to quantize"):
        qpass.quantize(model, inputs=torch.randn(2, 8), inner="eager")


def test_a_recipe_for_sites_the_model_lacks() -> None:
    """Kinds are reported; a recipe none of whose kinds is there is an error."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).eval()
    with pytest.raises(QpassError, match="nothing to quantize"):
        qpass.quantize(copy.deepcopy(model), qpass.Recipe(qkv="int8"), inner="eager")
    quantized = qpass.quantize(model, qpass.Recipe(qkv="int8", vocab="int8"), inner="eager")
    assert "the recipe names qkv; the model has none" in qpass.report(quantized).notes


def test_an_already_quantized_model() -> None:
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    weight = model.lm_head.weight
    assert qpass.quantize(model, "int8", inner="eager").lm_head.weight is weight  # a notebook cell run twice
    with pytest.raises(QpassError, match="already quantized"):
        qpass.quantize(model, "int4:g32", inner="eager")
    other = build("llama")  # quantized weights under another backend keep their format
    with torch.no_grad():
        expected = logits_of(copy.deepcopy(model)(tokens()))
        ours = logits_of(torch.compile(model, backend=qpass.QPass("int4:g32", inner="eager"))(tokens()))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert other is not model


class DTensor(torch.Tensor):
    """Stands in for torch.distributed's class of this name."""


def test_a_sharded_weight() -> None:
    model = build("nanogpt")
    model.first.fc.weight = nn.Parameter(model.first.fc.weight.data.as_subclass(DTensor))
    with pytest.raises(QpassError, match=r"first\.fc\.weight: the weight is a DTensor"):
        qpass.quantize(model, inner="eager")


def test_inputs_that_must_be_given() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.linear(a) + b

    with pytest.raises(QpassError, match=r"pass inputs=\.\.\."):
        qpass.quantize(TwoInputs(), inner="eager")
    qpass.quantize(TwoInputs().eval(), inputs=(torch.randn(2, 8), torch.randn(2, 8)), inner="eager")
    with pytest.raises(QpassError, match=r"torch\.nn\.Module"):
        qpass.quantize("a string")  # type: ignore[arg-type]


def test_an_unknown_option() -> None:
    fast = torch.compile(build("nanogpt"), backend=qpass, options={"recipes": "int8"})
    with pytest.raises(QpassError, match="unknown option 'recipes': did you mean 'recipe'"):
        fast(tokens())


@pytest.mark.parametrize("ask", [qpass.report, qpass.diff])
def test_asking_before_anything_was_captured(ask: Callable[[Any], Any]) -> None:
    fast = torch.compile(build("llama"), backend=qpass.QPass(inner="eager"))
    fast.generate(tokens(1), max_new_tokens=2, do_sample=False)  # runs the plain module
    with pytest.raises(QpassError, match=r"nothing was captured yet.*\.generate"):
        ask(fast)


class WithConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 9)
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.mixing.sum(0))


def test_what_stays_in_float_has_a_reason() -> None:
    model = qpass.quantize(WithConvolution().eval(), "int8", inner="eager")
    skipped = {r.name: r.skipped for r in qpass.report(model).sites if r.skipped}
    assert skipped.keys() == {"conv.weight", "mixing"}
    assert "convolution" in str(skipped["conv.weight"])
    assert "sum" in str(skipped["mixing"])


def test_strict_refuses_a_site_that_stays_in_float() -> None:
    model = build("llama")
    model.compile(backend=qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), strict=True, inner="eager"))
    with pytest.raises(QpassError, match=r"k_proj.*stays in float.*strict=True"):
        model(tokens(), use_cache=True)

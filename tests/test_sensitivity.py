"""Bits given out by what the output depends on: the estimate against measured KL, the rule against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.backend import QPass
from qpass.calibration import record
from qpass.module_state import OwnState
from qpass.numerics import fake_quantize
from qpass.sensitivity import Sensitivity, measure
from qpass.spec import parse_spec
from qpass.weights import memory_of
from tests.models import hf, tokens


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    model = hf("LlamaForCausalLM", num_key_value_heads=2, **config).eval()
    with torch.no_grad():
        for p in model.parameters():  # logits that say something, so that there is a KL to lose
            p.mul_(3 if p.dim() > 1 else 1)
    return model


def sensitivities(model: nn.Module, batches: list[Tensor]) -> dict[Any, Sensitivity]:
    runs = record(model, QPass("int4:g32", inner="eager"), batches, OwnState(model))
    return measure(runs)


@torch.no_grad()
def kl(model: Any, reference: Tensor, ids: Tensor) -> float:
    p, q = reference.log_softmax(-1), model(ids).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_estimate_is_about_the_kl_that_rounding_one_weight_costs(tied: bool) -> None:
    """Within a third for each weight, and in nearly their order: it is of second order, and tokens were drawn."""
    model, ids = llama(tie_word_embeddings=tied), tokens(batch=32, length=32)
    reference = model(ids).logits.detach()
    found, spec = sensitivities(model, list(ids.split(8))), parse_spec("int6:g32")
    pairs = []
    for param in model.parameters():
        if param.dim() < 2:
            continue
        estimate, kept = found[memory_of(param)].loss(spec), param.detach().clone()
        with torch.no_grad():
            param.copy_(fake_quantize(param, spec))
            pairs.append((kl(model, reference, ids), estimate))
            param.copy_(kept)
    assert len(pairs) == 15 if tied else 16
    for measured, estimate in pairs:
        assert estimate == pytest.approx(measured, rel=0.33)
    ranks = torch.tensor(pairs).argsort(0).argsort(0).float()
    assert float(torch.corrcoef(ranks.T)[0, 1]) > 0.95


def test_nothing_of_the_model_changes_while_it_is_measured() -> None:
    model, ids = llama(), tokens(batch=4, length=16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sensitivities(model, [ids])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_padding_changes_nothing() -> None:
    ids = tokens(batch=4, length=16)
    pad = torch.zeros(4, 8, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), pad], 1)
    batches: list[Any] = [{"input_ids": torch.cat([ids, pad], 1), "attention_mask": mask}]
    model = llama()
    plain, padded = sensitivities(model, [ids]), sensitivities(model, batches)
    for key, known in plain.items():
        spec = parse_spec("int4:g32")
        assert padded[key].loss(spec) == pytest.approx(known.loss(spec), rel=1.0), "drawn tokens differ"


@torch.no_grad()
def test_a_model_within_its_bits_loses_less_than_one_of_uniform_bits() -> None:
    ids = tokens(batch=32, length=32)
    reference = llama()(ids).logits
    losses, sizes = {}, {}
    for bits, recipe in ((None, qpass.Recipe.uniform("int4:g32:asym:scale=fp16:gptq")),
                         (4.7, qpass.Recipe.uniform("int4:g32:asym:gptq", bits=4.7))):  # fmt: skip
        model = qpass.quantize(llama(), recipe, calibration=list(ids.split(8)), inner="eager")
        with qpass.set_compute("float"):
            losses[bits] = kl(model, reference, ids)
        sizes[bits] = qpass.report(model).resident_quantized
    assert sizes[4.7] <= sizes[None] * 1.02
    assert (
        losses[4.7] < 0.95 * losses[None]
    )  # q, k and v have one format, gate and up too: apart they would gain twice as much
    formats = {s.format for s in qpass.report(model).sites if s.format and s.kind != "embedding"}
    assert len(formats) > 1
    assert all(f.endswith(":gptq") for f in formats)


def test_with_torch_compile_too() -> None:
    ids = tokens(batch=8, length=32)
    backend = QPass(qpass.Recipe.uniform("int4:g32", bits=4.7), inner="eager")
    model = llama()
    fast = torch.compile(model, backend=backend)
    with torch.no_grad(), backend.calibrate():
        fast(ids)
    with torch.no_grad():
        fast(ids)
    formats = {s.format for s in qpass.report(fast).sites if s.format}
    assert len(formats) > 1


class Block(nn.Module):
    """A residual block with a graph break, so that one graph serves all blocks of its class."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.down.weight.mul_(strength)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.blocks = nn.Embedding(97, 64), nn.ModuleList(Block(s) for s in (0.1, 1.0, 20.0))
        self.head, self.value = nn.Linear(64, 97), nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x), self.value(x)


def test_layers_that_share_a_graph_get_bits_of_their_own() -> None:
    """Also those that were only ever seen through the graph of another."""
    ids = tokens(batch=8, length=32)
    model = Blocks().eval()
    backend = QPass(qpass.Recipe.uniform("int4:g32", bits=4.5), inner="eager")
    for block in model.blocks:
        block.compile(backend=backend)
    with torch.no_grad(), backend.calibrate():
        model(ids)
    with torch.no_grad():
        model(ids)
    stored = [backend.store.stats(block.down.weight) for block in model.blocks]  # type: ignore[union-attr, arg-type]
    decided = [backend.decisions.of(block.down.weight) for block in model.blocks]  # type: ignore[union-attr, arg-type]
    for stats, decision in zip(stored, decided, strict=True):
        assert stats is not None
        assert decision is not None
        assert decision.spec is not None
        assert stats.nbytes == pytest.approx(64 * 64 * decision.spec.effective_bits(64) / 8)


def test_what_only_a_second_output_depends_on_gets_bits_too() -> None:
    model = qpass.quantize(
        Blocks().eval(),
        qpass.Recipe.uniform("int4:g32", bits=5),
        calibration=[tokens(batch=8, length=32)],
        inner="eager",
    )
    assert not str(model.value.weight.spec).startswith("int2")


def test_what_the_recipe_names_is_left_alone() -> None:
    """Overrides, and formats that are no integers."""
    recipe = qpass.Recipe.uniform("int4:g32", embedding="fp8_e4m3", bits=5, overrides={"value.*": "int8"})
    model = qpass.quantize(Blocks().eval(), recipe, calibration=[tokens(batch=8, length=32)], inner="eager")
    assert str(model.value.weight.spec) == "int8:channel"
    assert str(model.table.weight.spec) == "fp8_e4m3"


def test_a_calibration_that_fails_leaves_the_backend_as_it_was() -> None:
    ids, backend, model = tokens(batch=2, length=16), QPass("int4", inner="eager"), llama()
    fast = torch.compile(model, backend=backend)
    with pytest.raises(qpass.QpassError, match="no call of the compiled model"), backend.calibrate():
        pass
    with torch.no_grad():
        fast(ids)
    assert not any("gptq" in str(s.format) for s in qpass.report(fast).sites)


def test_hqq_takes_no_bits() -> None:
    with pytest.raises(qpass.QpassError, match="hqq needs a float zero point"):
        qpass.Recipe.uniform("int4:g32:zero=float:hqq", bits=5)


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(qpass.QpassError, match=r"bits=1: a number of bits a weight between 2\.6 and 8\.5"):
        qpass.Recipe.uniform("int4", bits=1)

"""Graphs that a careless rewrite would break: order, in-place writes, identity permutations, computed biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from tests.models import INT8, VOCAB, FusedBlock, build, dequantized_copy, tokens

WIDTH = 64


class Model(nn.Module):
    """Three square linears and whatever `compute` makes of them."""

    def __init__(self, compute: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x.clone())


def touched_in_another_order(m: Model, x: Tensor) -> Tensor:
    h = x.to(m.b.weight.dtype)
    return x + m.c(F.silu(m.a(h)) * m.b(h))


def written_between(m: Model, x: Tensor) -> Tensor:
    gate = m.a(x)
    x.mul_(3.0)
    return x + m.c(F.silu(gate) * m.b(x))


def weight_permuted_into_itself(m: Model, x: Tensor) -> Tensor:
    return F.linear(x, m.w.permute(0, 1)) + F.linear(m.a(x), m.w.transpose(-1, 0).transpose(0, 1))


def weight_transposed(m: Model, x: Tensor) -> Tensor:
    return m.a(x) + F.linear(x, m.w.permute(1, 0))


def bias_that_is_a_linear(m: Model, x: Tensor) -> Tensor:
    return torch.addmm(m.a(x), x, m.w)


def linear_of_a_linear(m: Model, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)))


def weight_written_in_the_graph(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.w.mul_(1.5)
    return m.a(x) + F.linear(x, m.w)


CASES = [touched_in_another_order, written_between, weight_permuted_into_itself, weight_transposed, bias_that_is_a_linear,
         linear_of_a_linear, weight_written_in_the_graph]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_the_function_stays_the_same(case: Callable[[Model, Tensor], Tensor]) -> None:
    """With fp32 as the format nothing is lost, so the result is the float model's; three calls, for what changes state."""
    ours, theirs, x = Model(case).eval(), Model(case).eval(), torch.randn(5, WIDTH)
    fast = torch.compile(ours, backend=qpass.QPass("fp32", inner="eager"))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_sequential_root_is_rewritten() -> None:
    model = qpass.quantize(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).eval(), "int8", inner="eager")
    model(torch.tensor([[1, 2]]))
    assert sum(graph.count("added") for graph in qpass.diff(model).graphs) > 0


def test_attention_dropout_and_training_mode_are_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), dropout_p=0.5 if self.training else 0.0)

    x = torch.randn(2, 5, WIDTH)
    with pytest.raises(qpass.QpassError, match=r"model\.eval"):
        torch.compile(Attention().train(), backend=qpass.QPass(inner="eager"))(x)
    model = Attention().train()
    with pytest.raises(qpass.QpassError, match=r"model\.eval"):
        qpass.quantize(model, inputs=x, inner="eager")
    assert not isinstance(model.qkv.weight, qpass.QTensor)
    torch.compile(Attention().eval(), backend=qpass.QPass(inner="eager"))(x)


def test_a_classifier_of_whole_texts_is_no_vocabulary_projection() -> None:
    """Its two classes are as many as BERT's token types."""
    import transformers

    config = build("bert").config
    model = transformers.BertForSequenceClassification(config).eval()
    quantized = qpass.quantize(model, "int8", inner="eager")
    kinds = {r.name: r.kind for r in qpass.report(quantized).sites}
    assert kinds["classifier.weight"] == "linear"


class ExpertsInALoop(nn.Module):
    """Experts as modules, each called with the tokens that chose it, if there are any: the graph depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block, self.router = nn.Embedding(VOCAB, WIDTH), FusedBlock(), nn.Linear(WIDTH, 8)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 96), nn.SiLU(), nn.Linear(96, WIDTH)) for _ in range(8)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.table(ids))
        flat = x.flatten(0, 1)
        gates, chosen = self.router(flat).softmax(-1).topk(2)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            if row.numel() == 0:
                continue
            y.index_add_(0, row, expert(flat[row]) * gates[row, place, None])
        return self.head(x + y.view_as(x))


def test_experts_in_a_loop_are_quantized_whole() -> None:
    """One call of few tokens does not choose every expert: the others are quantized as their siblings."""
    torch.manual_seed(0)
    model = ExpertsInALoop().eval()
    reference = dequantized_copy(model, lambda name: None if "router" in name else INT8)
    quantized = qpass.quantize(model, "int8", inner="eager")
    ids = tokens(4, 16)
    with torch.no_grad():
        ours, theirs = quantized(ids), reference(ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    rows = {row.name: row for row in qpass.report(quantized).sites}
    assert {row.kind for name, row in rows.items() if "experts" in name} == {"ffn"}
    assert [name for name, row in rows.items() if row.skipped] == ["router.weight"]
    assert rows["table.weight"].kind == "embedding"
    assert rows["head.weight"].kind == "vocab"

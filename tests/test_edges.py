"""Graphs near the edge of what the rules say: each gives the float model's result with fp32 as the format, under its kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from tests.models import build, tokens
from tests.test_rewrites import ExpertsInALoop

D, E, VOCAB = 32, 4, 64


class Net(nn.Module):
    """A table, weights of experts in three forms, three linears, a head; `use` is the model."""

    def __init__(self, use: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.t, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.w = nn.Parameter(torch.randn(E, D, D) / 6)
        self.rows = nn.Parameter(torch.randn(E * 2 * D, D) / 6)
        self.u, self.v, self.o = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D)
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.use(self, ids)


def negative_expert(m: Net, ids: Tensor) -> Tensor:
    return m.head(F.linear(m.t(ids), m.w[-1]) + m.t(ids) @ m.w[-2])


def negative_ids_of_experts(m: Net, ids: Tensor) -> Tensor:
    x = m.t(ids).flatten(0, 1)
    return m.head(torch.bmm(x.unsqueeze(1), m.w[torch.arange(x.shape[0]) % E - E]).squeeze(1))


def every_expert_sees_x(m: Net, ids: Tensor) -> Tensor:
    return m.head((m.t(ids[:1]) @ m.w).sum(0))


def one_token_and_its_experts(m: Net, ids: Tensor) -> Tensor:
    return m.head((m.t(ids[0, :1])[:, None] @ m.w[torch.tensor([2, 0])]).sum(0))


def rows_seen_as_experts(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.o(F.linear(m.t(ids), m.rows.view(E, 2 * D, D)[1])))


def rows_seen_as_experts_turned(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.u(m.t(ids)) @ m.rows.view(E, 2 * D, D)[1])


def negative_indices(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.t.weight[ids - VOCAB])


def arguments_by_name(m: Net, ids: Tensor) -> Tensor:
    x = m.t(ids)
    scores = torch.matmul(input=m.u(torch.reshape(input=x, shape=(-1, D))), other=m.v(x.flatten(0, 1)).T)
    best = torch.topk(input=x, k=2).values.sum().div(other=5.0)
    weights = F.softmax(input=scores.div(other=4.0), dim=-1)
    return m.head(m.o(weights @ m.v(x.flatten(0, 1))) * best)


def biases_of_one_element(m: Net, ids: Tensor) -> Tensor:
    x = m.t(ids).flatten(0, 1)
    gate, up = torch.addmm(m.one, x, m.u.weight.T), torch.addmm(m.one, x, m.v.weight.T)
    return m.head(x + m.o(F.silu(gate) * up))


def rows_from_the_end(m: Net, ids: Tensor) -> Tensor:
    return m.head(F.linear(m.t(ids), m.rows[-D:]))


def a_table_read_twice(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.t(ids) + m.t.weight[: ids.shape[1]] + m.t.weight.mean(0))


CASES = [negative_expert, negative_ids_of_experts, every_expert_sees_x, one_token_and_its_experts, rows_seen_as_experts,
         rows_seen_as_experts_turned, negative_indices, arguments_by_name, biases_of_one_element, rows_from_the_end,
         a_table_read_twice]  # fmt: skip
IDS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", ["compile", "quantize", "export"])
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_the_function_stays_the_same(case: Callable[[Net, Tensor], Tensor], way: str) -> None:
    model = Net(case).eval()
    with torch.no_grad():
        expected = model(IDS)
        if way == "compile":
            fast = torch.compile(model, backend=qpass.QPass("fp32", inner="eager"))
        elif way == "quantize":
            fast = qpass.quantize(model, "fp32", inputs=IDS, inner="eager")
        else:
            fast = qpass.quantize(torch.export.export(model, (IDS,), strict=False), "fp32").module()
        torch.testing.assert_close(fast(IDS), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_none() -> None:
    x, data = torch.randn(3, D), torch.randn(E * D, D)
    out = torch.ops.qpass.experts(x, torch.tensor([1, E, -1]), data, None, None, None, E, "fp32")
    expected = torch.stack([x[0] @ data[D : 2 * D].T, torch.zeros(D), x[2] @ data[-D:].T])
    torch.testing.assert_close(out, expected)
    with pytest.raises(IndexError, match="expert 5 of 4"):
        torch.ops.qpass.experts(x, torch.tensor([1, 5, 0]), data, None, None, None, E, "fp32")


def test_dropout_inside_torchs_attention_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(D, 4, 64, dropout=0.0, batch_first=True)
    layer.self_attn.dropout = 0.5
    with pytest.raises(qpass.QpassError, match=r"model\.eval"):
        torch.compile(layer.train(), backend=qpass.QPass("int8", inner="eager"))(torch.randn(2, 5, D))


def test_linears_of_two_dtypes_are_not_joined() -> None:
    """One inside autocast, one outside: the second is computed in fp32. The kernels do not round the weight of the first."""

    def use(m: Net, ids: Tensor) -> Tensor:
        x = m.t(ids)
        with torch.autocast("cpu", torch.bfloat16):
            gate = m.u(x)
        return x + m.o(F.silu(gate.float()) * m.v(x))

    model = Net(use).eval()
    fast = torch.compile(model, backend=qpass.QPass("fp32", inner="eager"))
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), model(IDS), rtol=1e-2, atol=1e-2)
    assert str(qpass.diff(fast)).count("+ qpass::linear(fp32)") == 3


# --- kinds -------------------------------------------------------------------------------------------------------------


def kinds(use: Callable[[Net, Tensor], Tensor]) -> dict[str, str]:
    fast = torch.compile(Net(use).eval(), backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        fast(IDS)
    return {row.name: row.kind for row in qpass.report(fast).sites if "did not use" not in (row.skipped or "")}


def greedy_step(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.t(ids)[:, -1]).argmax(-1)


def score_of_tokens(m: Net, ids: Tensor) -> Tensor:
    return F.log_softmax(m.head(m.t(ids).view(-1, D)), -1).gather(-1, ids.reshape(-1, 1))


def last_token(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.t(ids[:, -1]))


def unbatched(m: Net, ids: Tensor) -> Tensor:
    return m.head(m.t(ids[0]))


@pytest.mark.parametrize("use", [greedy_step, score_of_tokens, last_token, unbatched], ids=lambda f: f.__name__)
def test_a_head_is_the_vocabulary_projection_whatever_follows(use: Callable[[Net, Tensor], Tensor]) -> None:
    assert kinds(use)["head.weight"] == "vocab"


def test_a_sparse_feed_forward_chooses_no_expert() -> None:
    def use(m: Net, ids: Tensor) -> Tensor:
        x = m.t(ids)
        h = F.relu(m.u(x))
        best = h.topk(8)
        return m.head(x + m.o(torch.zeros_like(h).scatter(-1, best.indices, best.values)))

    found = kinds(use)
    assert (found["u.weight"], found["o.weight"]) == ("ffn", "ffn")


def test_types_of_tokens_are_no_vocabulary() -> None:
    model = transformers.BertForTokenClassification(build("bert").config).eval()
    fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        fast(tokens())
    assert {r.name: r.kind for r in qpass.report(fast).sites}["classifier.weight"] == "linear"


def test_a_second_use_that_reads_the_float_weight_is_named() -> None:
    fast = torch.compile(Net(a_table_read_twice).eval(), backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        fast(IDS)
    assert "t.weight: also used by getitem, mean, which reads the float weight" in str(qpass.report(fast))
    strict = torch.compile(Net(a_table_read_twice).eval(), backend=qpass.QPass("int8", inner="eager", strict=True))
    with pytest.raises(qpass.QpassError, match=r"t\.weight: stays in float, also used by"):
        strict(IDS)


# --- exported programs -------------------------------------------------------------------------------------------------


def test_a_part_without_gradients_is_read_too() -> None:
    def use(m: Net, ids: Tensor) -> Tensor:
        x = m.t(ids)
        with torch.no_grad():
            h = m.u(x)
        return m.head(x + m.o(F.silu(h)))

    model = Net(use).eval()
    quantized = qpass.quantize(torch.export.export(model, (IDS,), strict=False), "fp32", strict=True)
    assert {r.name: r.kind for r in qpass.report(quantized).sites if r.format}["u.weight"] == "ffn"
    torch.testing.assert_close(quantized.module()(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_a_tied_table_of_a_loaded_program_is_one(tmp_path: object) -> None:
    def use(m: Net, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.t(ids)), m.head.weight)

    model = Net(use).eval()
    model.head.weight = model.t.weight
    path = f"{tmp_path}/program.pt2"
    torch.export.save(torch.export.export(model, (IDS,), strict=False), path)
    quantized = qpass.quantize(torch.export.load(path), "int8")
    tables = [name for name in quantized.state_dict if name.startswith(("t.weight", "head.weight"))]
    assert sorted(tables) in (["t.weight_data", "t.weight_scale"], ["head.weight_data", "head.weight_scale"])
    with pytest.raises(qpass.QpassError, match="the program is already quantized"):
        qpass.quantize(quantized, "int8")
    with pytest.raises(qpass.QpassError, match=r"is not what qpass\.quantize returned"):
        qpass.report(torch.export.load(path))


def test_overrides_reach_experts_that_no_token_chose() -> None:
    torch.manual_seed(0)
    recipe = qpass.Recipe.uniform("int8", overrides={"experts.*.0.weight": "int4:g32", "experts.*.2.weight": None})
    model = qpass.quantize(ExpertsInALoop().eval(), recipe, inner="eager")
    with torch.no_grad():
        model(IDS)
    formats = {r.name: r.format for r in qpass.report(model).sites if r.name.startswith("experts")}
    assert {f for n, f in formats.items() if n.endswith(".0.weight")} == {"int4:g32"}
    assert {f for n, f in formats.items() if n.endswith(".2.weight")} == {None}


def test_whole_numbers_are_no_quantized_checkpoint() -> None:
    model = Net(lambda m, ids: m.head(m.t(ids) + m.t(m.positions[:, : ids.shape[1]]))).eval()
    model.positions = nn.Parameter(torch.arange(32)[None], requires_grad=False)
    with torch.no_grad():
        torch.compile(model, backend=qpass.QPass("int8", inner="eager"))(IDS)

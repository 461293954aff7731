"""What stays in float, and whether the reason tells a person what to change."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from tests.models import VOCAB, WIDTH, build, hf, tokens


class Net(nn.Module):
    """A table, one weight that `use` applies in its own way, and a linear that any recipe quantizes."""

    def __init__(self, weight: Tensor, use: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.weight, self.use = nn.Parameter(weight), use

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.use(self.weight, self.table(ids)))


def reasons(model: nn.Module) -> dict[str, str]:
    fast = torch.compile(model.eval(), backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        fast(tokens())
    return {row.name: row.skipped for row in qpass.report(fast).sites if row.skipped}


SQUARE = torch.randn(WIDTH, WIDTH)
CASES: dict[str, tuple[Tensor, Callable[[nn.Parameter, Tensor], Tensor], str]] = {
    "a weight that is computed": (
        SQUARE,
        lambda w, x: F.linear(x, w * 2),
        r"the weight of linear is computed from it by mul",
    ),
    "a masked weight": (
        SQUARE,
        lambda w, x: F.linear(x, w.masked_fill(w < 0, 0.0)),
        r"the weight of linear is computed from it by lt, masked_fill|by masked_fill",
    ),
    "a square of it": (SQUARE, lambda w, x: x @ (w @ w), r"used by matmul as something other than a weight"),
    "a table added": (
        torch.randn(9, WIDTH),
        lambda w, x: x + w,
        r"used by add, which computes no linear and no embedding",
    ),
    "positions by slice": (
        torch.randn(32, WIDTH),
        lambda w, x: x + w[: x.shape[1]],
        r"a table read by slices or constants",
    ),
    "a convolution": (
        torch.randn(WIDTH, 1, 3),
        lambda w, x: F.conv1d(x.mT, w, padding=1, groups=WIDTH).mT,
        r"convolution: no site of a transformer",
    ),
    "written in the graph": (SQUARE, lambda w, x: F.linear(x, w.mul_(1.0)), r"the graph itself writes to this weight"),
    "a few gates": (
        torch.randn(4, WIDTH),
        lambda w, x: x * F.linear(x, w).sigmoid().mean(-1, keepdim=True),
        r"makes a few gates or coefficients",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason_says_what_is_missing(case: str) -> None:
    weight, use, pattern = CASES[case]
    found = reasons(Net(weight, use))
    assert found.keys() == {"weight"}
    assert re.search(pattern, found["weight"]), found


def test_the_same_weight_used_plainly_is_quantized() -> None:
    assert reasons(Net(SQUARE, lambda w, x: F.linear(x, w))) == {}


@pytest.mark.parametrize("kind", ["weight norm", "parametrization"])
def test_parametrized_weights(kind: str) -> None:
    """Named with what to do; once it is removed, the weight is a site."""

    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).mT

    model = build("nanogpt")
    fc = model.first.fc if kind == "weight norm" else model.first.c_proj
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(fc)
    else:
        nn.utils.parametrize.register_parametrization(fc, "weight", Symmetric())
    found = reasons(model)
    assert found
    assert all("torch.nn.utils.parametrize.remove_parametrizations" in reason for reason in found.values()), found
    torch._dynamo.reset()
    nn.utils.parametrize.remove_parametrizations(fc, "weight")
    assert reasons(model) == {}


# --- tied weights ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is also the vocabulary projection, tied in one of the ways that people do."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.table, self.middle = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        if form in ("one Parameter", "two Parameters over one storage"):
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)
            tied = self.table.weight if form == "one Parameter" else nn.Parameter(self.table.weight.data)
            self.head.weight = tied

    def forward(self, ids: Tensor) -> Tensor:
        x, w = torch.tanh(self.middle(self.table(ids))), self.table.weight
        if hasattr(self, "head"):
            return self.head(x)
        spellings = {
            "F.linear": lambda: F.linear(x, w),
            "x @ w.T": lambda: x @ w.T,
            "matmul of a transposition": lambda: torch.matmul(x, w.transpose(0, 1)),
            "einsum": lambda: torch.einsum("bsd,vd->bsv", x, w),
            "w @ x": lambda: (w @ x.mT).mT,
            "cast": lambda: F.linear(x, w.to(x.dtype)),
        }
        return spellings[self.form]()


FORMS = ["one Parameter", "two Parameters over one storage", "F.linear", "x @ w.T", "matmul of a transposition", "einsum",
         "w @ x", "cast"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_tied_tables_are_one_table(form: str) -> None:
    model = qpass.quantize(Tied(form).eval(), "int8", inner="eager", strict=True)
    with torch.no_grad():
        model(tokens())
    report = qpass.report(model)
    tables = [row for row in report.sites if row.kind in ("embedding+vocab", "embedding", "vocab")]
    assert len(tables) == 1
    assert report.resident_quantized == sum(row.bytes_after for row in report.sites)
    if form != "two Parameters over one storage":
        assert tables[0].kind == "embedding+vocab"
    else:
        assert model.head.weight is model.table.weight


# --- states ------------------------------------------------------------------------------------------------------------


def test_the_cache_of_cross_attention_is_written_once() -> None:
    """One row for each attention of the decoder; on the first call and on the next, when the keys are only read."""
    model = hf("T5ForConditionalGeneration", d_model=WIDTH, d_kv=16, d_ff=128, num_layers=1, num_heads=4,
               decoder_start_token_id=1).eval()  # fmt: skip
    fast = torch.compile(model, backend=qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), inner="eager"))
    with torch.no_grad():
        out = fast(input_ids=tokens(), decoder_input_ids=tokens(length=2), use_cache=True)
        for row, reason in zip(_caches(fast), ("the caller owns a float cache", "cross attention"), strict=True):
            assert reason in row
        again = torch.compile(model, backend=qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), inner="eager"))
        again(encoder_outputs=(out.encoder_last_hidden_state,), decoder_input_ids=tokens(length=1),
              past_key_values=out.past_key_values, use_cache=True)  # fmt: skip
    assert sum("cross attention" in row for row in _caches(again)) == 1


def test_what_is_added_to_scores_stays_in_float_and_other_tables_do_not() -> None:
    model = hf("T5ForConditionalGeneration", d_model=WIDTH, d_kv=16, d_ff=128, num_layers=1, num_heads=4).eval()
    fast = torch.compile(model, backend=qpass.QPass("int8:g16", inner="eager", strict=True))
    with torch.no_grad():
        fast(input_ids=tokens(), decoder_input_ids=tokens(length=2))
    tables = {s.name: s for s in qpass.report(fast).sites if "embedding" in s.kind or "relative" in s.name}
    assert tables.pop("shared.weight").format == "int8:g16"
    assert len(tables) == 2, "one of the encoder, one of the decoder"
    assert all("added to attention's scores" in str(s.skipped) for s in tables.values())


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 5, WIDTH)], ids=["2-D", "3-D"])
def test_an_attention_without_heads_is_one_too(shape: tuple[int, ...]) -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).transpose(-1, -2) * 0.1).softmax(-1) @ self.v(x)

    fast = torch.compile(Headless().eval(), backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        fast(torch.randn(shape))
    assert {s.kind for s in qpass.report(fast).sites} == {"qkv"}


def _caches(model: nn.Module) -> list[str]:
    return [str(row.skipped) for row in qpass.report(model).sites if row.kind == "kv"]


def test_the_state_of_a_state_space_layer_is_no_kv_cache() -> None:
    model = hf("MambaForCausalLM", state_size=8, time_step_rank=16).eval()
    fast = torch.compile(
        model, backend=qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), inner="eager", strict=True)
    )
    with torch.no_grad():
        out = model(tokens(), use_cache=True)
        fast(tokens(length=1), cache_params=out.cache_params, use_cache=True)
    states = [row for row in qpass.report(fast).sites if row.kind == "kv"]
    assert states
    assert all("a recurrent state, which is no KV cache" in str(row.skipped) for row in states)
    with pytest.raises(
        qpass.QpassError, match=r"no layer of the model keeps keys and values.*use the model's own cache"
    ):
        qpass.KVCache(model.config, 16)

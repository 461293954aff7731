"""A KV cache that a module keeps becomes a QState: against the float module, with what that writes rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass.qstate import QState
from tests.test_held_caches import FORMATS, HEAD, HEADS, ROOM, WIDTH, Holder, Odd, recipe, rounded


def reference(model: Holder, spec: str) -> Holder:
    """The float module, its buffers and all that it will write rounded."""
    twin = copy.deepcopy(model)
    for name in ("keys", "values"):
        twin.get_buffer(name).copy_(rounded(twin.get_buffer(name), spec))
    write = twin.write
    twin.write = lambda cache, at, new: write(cache, at, rounded(new, spec))  # type: ignore[method-assign]
    return twin


class Growing(nn.Module):
    """Keys and values in plain attributes, joined to the new ones at every call."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.keys, self.values = (torch.randn(1, HEADS, tokens, HEAD) for _ in range(2))
        self.calls = torch.zeros((), dtype=torch.long)
        self.last_width = 0

    def heads(self, x: Tensor) -> list[Tensor]:
        return [m(x).view(1, -1, HEADS, HEAD).transpose(1, 2) for m in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.calls += 1
        self.last_width = x.shape[-1]
        y = F.scaled_dot_product_attention(q, self.keys, self.values)
        return self.o(y.transpose(1, 2).reshape(1, -1, WIDTH))


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("how", ["index_copy", "setitem", "index_put", "slice", "scatter", "roll"])
@torch.no_grad()
def test_buffers(how: str, spec: str) -> None:
    torch.manual_seed(0)
    model = Holder(how).eval()
    expected = reference(model, spec)
    x, at = torch.randn(1, 3, WIDTH), torch.tensor([3, 4, 5])
    quantized = qpass.quantize(model, recipe(spec), inputs=(x, at), inner="eager")
    assert isinstance(quantized.keys, QState)
    torch.testing.assert_close(quantized.keys.dequantize(), expected.keys, rtol=1e-6, atol=1e-6)
    for step in (x, torch.randn(1, 3, WIDTH)):
        torch.testing.assert_close(quantized(step, at), expected(step, at), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantized.values.dequantize(), expected.values, rtol=1e-4, atol=1e-5)
    row = next(r for r in qpass.report(quantized).sites if r.kind == "kv")
    assert row.name == "k.weight"
    assert row.bytes_after == quantized.keys.stored_nbytes + quantized.values.stored_nbytes
    assert row.bytes_before == 2 * HEADS * ROOM * HEAD * 4
    after = [n.text for g in qpass.diff(quantized).graphs for n in g.nodes if n.status == "added"]
    assert sum("qpass::attention" in text for text in after) == 1
    assert not any("read_cache" in text for text in after)


@torch.no_grad()
def test_buffers_compiled_by_inductor() -> None:
    torch.manual_seed(0)
    model = Holder("index_copy").eval()
    expected = reference(model, "int8")
    x, at = torch.randn(1, 3, WIDTH), torch.tensor([3, 4, 5])
    quantized = qpass.quantize(model, recipe("int8"), inputs=(x, at))
    for step in (x, torch.randn(1, 3, WIDTH)):
        torch.testing.assert_close(quantized(step, at), expected(step, at), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 2])
@torch.no_grad()
def test_attributes_that_grow(tokens: int) -> None:
    """Each call gives the module longer keys and values, in stored form; the graph is captured anew once for all lengths."""
    torch.manual_seed(0)
    model = Growing(tokens).eval()
    expected = copy.deepcopy(model)
    expected.keys, expected.values = (rounded(x, "int8") if tokens else x for x in (expected.keys, expected.values))
    heads = expected.heads
    expected.heads = lambda x: [heads(x)[0], *(rounded(y, "int8") for y in heads(x)[1:])]  # type: ignore[method-assign]
    quantized = qpass.quantize(model, recipe("int8"), inputs=(torch.randn(1, 1, WIDTH),), inner="eager")
    for call in range(1, 8):
        x = torch.randn(1, 1, WIDTH)
        torch.testing.assert_close(quantized(x), expected(x), rtol=1e-4, atol=1e-5)
        assert isinstance(quantized.keys, QState)
        assert quantized.keys.shape[2] == tokens + call
    assert len(qpass.diff(quantized).graphs) <= 3


@torch.no_grad()
def test_the_run_that_captures_leaves_no_trace() -> None:
    """Caches, counters and attributes are afterwards what they were, quantized or not."""
    torch.manual_seed(0)
    growing = Growing(2).eval()
    before = growing.keys.clone()
    qpass.quantize(growing, recipe("int8"), inputs=(torch.randn(1, 1, WIDTH),), inner="eager")
    assert int(growing.calls) == 0, "written in place"
    assert growing.last_width == 0, "set"
    torch.testing.assert_close(growing.keys.dequantize(), rounded(before, "int8"))
    for spec in (None, "int8"):
        holder = Holder("index_copy").eval()
        keys = holder.keys.clone()
        floats = qpass.Recipe.uniform("int8", kv=spec)
        qpass.quantize(holder, floats, inputs=(torch.randn(1, 3, WIDTH), torch.arange(3)), inner="eager")
        held = holder.keys.dequantize() if isinstance(holder.keys, QState) else holder.keys
        torch.testing.assert_close(held, rounded(keys, "int8") if spec else keys)


@pytest.mark.parametrize(
    ("kv", "reason"),
    [("int8", "model = qpass.quantize(model, recipe) stores"), (None, "the recipe leaves kv in float")],
)
def test_torch_compile_leaves_the_floats_and_says_so(kv: str | None, reason: str) -> None:
    model = Holder("index_copy").eval()
    backend = qpass.QPass(qpass.Recipe.uniform("int8", kv=kv), inner="eager")
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        fast(torch.randn(1, 3, WIDTH), torch.arange(3))
    row = next(r for r in qpass.report(fast).sites if r.kind == "kv")
    assert reason in str(row.skipped)
    assert not isinstance(model.keys, QState)


@pytest.mark.parametrize(("how", "says"), [("add", "changed by index_add_"), ("part", "part of the last axis")])
def test_what_has_no_quantized_form_stays_in_float(how: str, says: str) -> None:
    model = Odd(how).eval()
    qpass.quantize(model, recipe("int8"), inputs=(torch.randn(1, 3, WIDTH), torch.arange(3)), inner="eager")
    assert not isinstance(model.keys, QState)
    with torch.no_grad():
        model(torch.randn(1, 3, WIDTH), torch.arange(3))
    assert says in str(next(r for r in qpass.report(model).sites if r.kind == "kv").skipped)


@torch.no_grad()
def test_a_state_is_moved_copied_and_loaded_with_its_module() -> None:
    torch.manual_seed(0)
    x, at = torch.randn(1, 3, WIDTH), torch.arange(3)
    model = qpass.quantize(Holder("index_copy").eval(), recipe("int8"), inputs=(x, at), inner="eager")
    out = model(x, at)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert isinstance(saved["keys"], QState)
    model(torch.randn(1, 3, WIDTH), at)
    model.load_state_dict(saved)
    torch.testing.assert_close(model(x, at), out)
    half = model.to(torch.bfloat16)
    assert isinstance(half.keys, QState)
    assert half.keys.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16(), at).float(), out, rtol=0.05, atol=0.05)


class Cleared(Holder):
    """A branch that no capture of the other has seen."""

    def forward(self, x: Tensor, at: Tensor, clear: str = "") -> Tensor:
        if clear == "fill":
            self.keys.fill_(0.5)
        elif clear == "mul":
            self.keys.mul_(0.5)
        elif clear == "columns":
            self.keys[..., :4].zero_()
        elif clear == "part":
            self.keys[..., :4] = 1.0
        return super().forward(x, at)


@pytest.mark.parametrize("clear", ["fill", "mul", "part"])
@torch.no_grad()
def test_writes_of_other_forms_quantize_all_of_it_again(clear: str) -> None:
    torch.manual_seed(0)
    model = Cleared("index_copy").eval()
    x, at = torch.randn(1, 3, WIDTH), torch.tensor([3, 4, 5])
    expected = reference(model, "int8")
    quantized = qpass.quantize(model, recipe("int8"), inputs=(x, at), inner="eager")
    torch.testing.assert_close(quantized(x, at, clear), expected(x, at, clear), rtol=0.02, atol=0.01)
    torch.testing.assert_close(quantized.keys.dequantize(), expected.keys, rtol=0.02, atol=0.01)


@torch.no_grad()
def test_a_write_through_a_view_of_columns_is_refused_not_lost() -> None:
    x, at = torch.randn(1, 3, WIDTH), torch.tensor([3, 4, 5])
    quantized = qpass.quantize(Cleared("index_copy").eval(), recipe("int8"), inputs=(x, at), inner="eager")
    with pytest.raises(qpass.QpassError, match="makes a view of a quantized cache that is written to"):
        quantized(x, at, "columns")


def test_strict_takes_a_cache_that_will_be_quantized() -> None:
    x, at = torch.randn(1, 3, WIDTH), torch.arange(3)
    qpass.quantize(Holder("index_copy").eval(), recipe("int8"), inputs=(x, at), inner="eager", strict=True)


@torch.no_grad()
def test_what_is_refused_leaves_the_cache_as_it_was() -> None:
    model = Holder("index_copy").eval()
    model.o.weight[0, 0] = torch.nan
    keys = model.keys.clone()
    with pytest.raises(qpass.QpassError, match="NaN"):
        qpass.quantize(
            model, qpass.Recipe.uniform("int8", kv="int8"), inputs=(torch.randn(1, 3, WIDTH), torch.arange(3))
        )
    assert torch.equal(model.keys, keys)

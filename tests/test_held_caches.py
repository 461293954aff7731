"""A KV cache that an exported program holds, or takes and gives back: stored as integers, in every way a graph writes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass.numerics import fake_quantize
from qpass.spec import parse_spec

WIDTH, HEADS, HEAD, ROOM = 32, 2, 16, 24
FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2", "int4:g8:asym", "int8:rotated", "int2:g8:zero=float"]


class Holder(nn.Module):
    """One attention whose keys and values lie in buffers, written as `how` says."""

    def __init__(self, how: str, persistent: bool = True) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for name in ("keys", "values"):
            self.register_buffer(name, 0.1 * torch.randn(1, HEADS, ROOM, HEAD), persistent=persistent)

    def write(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        if self.how == "index_copy":
            return cache.index_copy_(2, at, new)
        if self.how == "setitem":
            cache[:, :, at] = new
        elif self.how == "index_put":
            cache.index_put_((torch.tensor([[[0]]]), torch.arange(HEADS)[None, :, None], at[None, None]), new)
        elif self.how == "slice":
            cache[:, :, 3 : 3 + new.shape[2]] = new
        elif self.how == "scatter":
            cache.scatter_(2, at[None, None, :, None].expand(1, HEADS, new.shape[2], HEAD), new)
        elif self.how == "roll":
            cache.copy_(torch.cat([cache[:, :, new.shape[2] :], new], 2))
        return cache

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = (m(x).view(1, -1, HEADS, HEAD).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = self.write(self.keys, at, k), self.write(self.values, at, v)
        mask = torch.arange(ROOM)[None] <= at[:, None] if self.how != "roll" else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(1, -1, WIDTH))


class Joiner(nn.Module):
    """Past keys and values come in, longer ones go out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (m(x).view(1, -1, HEADS, HEAD).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(1, -1, WIDTH)), (k, v)


def rounded(x: Tensor, spec: str) -> Tensor:
    return fake_quantize(x, parse_spec(spec))


def recipe(spec: str) -> qpass.Recipe:
    """The weights as they are."""
    return qpass.Recipe.uniform("fp32", kv=spec)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("how", ["index_copy", "setitem", "index_put", "slice", "scatter", "roll"])
@torch.no_grad()
def test_buffers(how: str, spec: str) -> None:
    """Two calls, the second behind the first, against the float module with its buffers and what is written rounded."""
    torch.manual_seed(0)
    model = Holder(how).eval()
    x, at = torch.randn(1, 3, WIDTH), torch.tensor([3, 4, 5])
    program = torch.export.export(model, (x, at))
    quantized = qpass.quantize(program, recipe(spec))
    names = [n for n in quantized.state_dict if n.startswith(("keys", "values"))]
    assert "keys" not in names
    assert "keys_data" in names
    run = quantized.module()
    for name in ("keys", "values"):
        model.get_buffer(name).copy_(rounded(model.get_buffer(name), spec))
    write = model.write
    model.write = lambda cache, at, new: write(cache, at, rounded(new, spec))  # type: ignore[method-assign]
    for step in (x, torch.randn(1, 3, WIDTH)):
        torch.testing.assert_close(run(step, at), model(step, at), rtol=1e-4, atol=1e-5)
    targets = [str(n.target) for n in quantized.graph.nodes]
    assert sum("qpass.attention" in t for t in targets) == 1
    assert not any("read_cache" in t or "scaled_dot" in t for t in targets)
    row = next(r for r in qpass.report(quantized).sites if r.kind == "kv")
    assert row.name == "k.weight"
    assert row.bytes_before == 2 * HEADS * ROOM * HEAD * 4
    assert row.bytes_after == sum(quantized.state_dict[n].nbytes for n in names)
    assert row.bytes_per_token == row.bytes_after / ROOM


@torch.no_grad()
def test_buffers_that_are_not_saved() -> None:
    model = Holder("index_copy", persistent=False).eval()
    program = torch.export.export(model, (torch.randn(1, 3, WIDTH), torch.arange(3)))
    quantized = qpass.quantize(program, recipe("int8"))
    assert not any(n.startswith("keys") for n in quantized.state_dict)
    assert quantized.constants["keys_data"].dtype == torch.int8
    assert "keys" not in quantized.constants
    quantized.module()(torch.randn(1, 3, WIDTH), torch.arange(3))


@pytest.mark.parametrize("spec", FORMATS)
@torch.no_grad()
def test_a_cache_that_comes_in_and_goes_out(spec: str) -> None:
    """Where a float tensor stood among arguments and results, a list of its parts stands."""
    torch.manual_seed(0)
    model = Joiner().eval()
    past = (torch.randn(1, HEADS, 5, HEAD), torch.randn(1, HEADS, 5, HEAD))
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model, (torch.randn(1, 1, WIDTH), past), dynamic_shapes=(None, ({2: length}, {2: length}))
    )
    quantized = qpass.quantize(program, recipe(spec))
    run = (
        quantized.module(check_guards=False)
        if "check_guards" in program.module.__code__.co_varnames
        else quantized.module()
    )
    held: Any = tuple([_bytes(p) for p in torch.ops.qpass.quantize(t, spec)] for t in past)
    floats = tuple(rounded(t, spec) for t in past)
    for _ in range(3):
        x = torch.randn(1, 1, WIDTH)
        y, held = run(x, held)
        k, v = (rounded(m(x).view(1, -1, HEADS, HEAD).transpose(1, 2), spec) for m in (model.k, model.v))
        floats = tuple(torch.cat(pair, 2) for pair in zip(floats, (k, v), strict=True))
        q = model.q(x).view(1, -1, HEADS, HEAD).transpose(1, 2)
        expected = model.o(F.scaled_dot_product_attention(q, *floats).transpose(1, 2).reshape(1, -1, WIDTH))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert held[0][0].dtype in (torch.int8, torch.uint8)
    assert held[0][0].shape[2] == 8


def _bytes(part: Tensor) -> Tensor:
    return part.view(torch.uint8) if part.dtype.itemsize == 1 and part.is_floating_point() else part


class Odd(Holder):
    """Writes to its buffers in a way that has no quantized form."""

    def write(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        if self.how == "add":
            return cache.index_add_(2, at, new)
        if self.how == "fill":
            cache[:, :, at] = new[..., :1]
            return cache
        cache[:, :, :3, :8] = new[..., :8]
        return cache


@pytest.mark.parametrize(
    ("how", "says"),
    [("add", "changed by index_add_"), ("part", "part of the last axis"), ("fill", "one value to many places")],
)
def test_what_has_no_quantized_form_stays_in_float(how: str, says: str) -> None:
    program = torch.export.export(Odd(how).eval(), (torch.randn(1, 3, WIDTH), torch.arange(3)))
    quantized = qpass.quantize(program, recipe("int8"))
    assert any(says in str(r.skipped) for r in qpass.report(quantized).sites)
    assert "keys" in quantized.state_dict
    with pytest.raises(qpass.QpassError, match=says):
        qpass.quantize(program, recipe("int8"), strict=True)


@pytest.mark.parametrize(
    ("spec", "says"), [("int2", "needs more than a cache"), ("int4:g64", "larger than a head of 16")]
)
def test_formats_that_need_more_than_the_graph(spec: str, says: str) -> None:
    program = torch.export.export(Holder("index_copy").eval(), (torch.randn(1, 3, WIDTH), torch.arange(3)))
    assert any(says in str(r.skipped) for r in qpass.report(qpass.quantize(program, recipe(spec))).sites)


def test_without_kv_in_the_recipe_nothing_changes() -> None:
    program = torch.export.export(Holder("index_copy").eval(), (torch.randn(1, 3, WIDTH), torch.arange(3)))
    assert "keys" in qpass.quantize(program, "int8").state_dict

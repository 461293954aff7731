"""Rotary embedding joins a quantized cache: where it fires, where it does not, and that nothing changes by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass.errors import errors_through_cpp
from qpass.graph.vocabulary import op_name
from qpass.ops import cache_reference
from qpass.ops.cpu.build import REFERENCE, use_isa
from qpass.ops.cpu.library import bind
from tests.models import build, logits_of, tokens

HEADS, KEY_HEADS, WIDTH = 4, 2, 16
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def by_chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1) * sin + cos * x


def the_first_half_negative(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def halves_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-first, second), dim=-1) * sin


def scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return by_slices(x, cos, sin) * 0.5


def some_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = by_slices(x[..., :8], cos[..., :8], sin[..., :8])
    return torch.cat((turned, x[..., 8:]), dim=-1)


def minus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.add(x * cos, torch.cat((-second, first), dim=-1) * sin, alpha=-1)


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = x * cos
    turned += torch.cat((-second, first), dim=-1) * sin
    return turned


FIRES: dict[str, Rotate] = {"slices": by_slices, "chunks": by_chunks}
STAYS: dict[str, Rotate] = {
    "turned the other way": the_first_half_negative, "halves in their place": halves_in_place, "scaled": scaled,
    "some channels": some_channels, "the other sign": minus, "in place": in_place,
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, rotate: Rotate) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotate = rotate
        self.q, self.k, self.v = (nn.Linear(64, n * WIDTH) for n in (HEADS, KEY_HEADS, KEY_HEADS))
        self.o = nn.Linear(HEADS * WIDTH, 64)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: object) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        k, v = cache.layers[0].update(k, v)  # type: ignore[attr-defined]
        mask = torch.arange(k.shape[2]) < 5 + x.shape[1]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("isa", ["", REFERENCE], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*FIRES, *STAYS])
def test_where_it_fires(case: str, dtype: torch.dtype, isa: str, exact_products: None) -> None:
    """The same result, and the same cache, as from the float model with a quantized cache, run eagerly."""
    model = Attention({**FIRES, **STAYS}[case]).to(dtype).eval()
    config = build("llama").config
    caches = [qpass.KVCache(config, 32, "int8") for _ in range(2)]
    backend = qpass.QPass(qpass.Recipe.uniform("fp32", kv="int8"), inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), use_isa(isa) if isa else torch.no_grad():
        for length, seed in ((5, 1), (1, 2), (3, 3)):
            x = tokens(2, length, seed=seed)[..., None] * torch.linspace(-0.02, 0.02, 64)
            angles = torch.rand(2, 1, length, WIDTH, generator=torch.Generator().manual_seed(seed)) * 6
            given = [t.to(dtype) for t in (x, angles.cos(), angles.sin())]
            found, expected = compiled(*given, caches[0]), model(*given, caches[1])
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    names = [op_name(n) for n in backend.captures[-1].after.nodes]
    assert ("qpass::append_rotated" in names) == (case in FIRES)
    assert ("qpass::append" in names) == (case in STAYS)
    for mine, theirs in zip(
        caches[0].layers[0].tensors().values(), caches[1].layers[0].tensors().values(), strict=True
    ):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-5)
        else:
            assert (mine.int() - theirs.int()).abs().max() <= 1
    assert int(caches[0].layers[0].cumulative_length) == 9


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_decode_steps_of_models(family: str) -> None:
    model = build(family).eval()
    compiled = qpass.quantize(build(family).eval(), qpass.Recipe.uniform("fp32", kv="int8"), inner="eager")
    caches = [qpass.KVCache(model.config, 16, "int8") for _ in range(2)]
    with torch.no_grad():
        for length in (5, 1, 1):
            ids = tokens(2, length, seed=length)
            found, expected = (
                logits_of(m(ids, past_key_values=c, use_cache=True))
                for m, c in zip((compiled, model), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    names = [op_name(n) for n in qpass.registry.captured(compiled, "test").captures[-1].after.nodes]
    assert names.count("qpass::append_rotated") == model.config.num_hidden_layers
    assert "qpass::append" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2], ids=["angles for all", "angles for each"])
@pytest.mark.parametrize("length", [1, 4])
def test_the_operator_gives_what_the_reference_gives(dtype: torch.dtype, batch: int, length: int) -> None:
    assert bind() is None
    q, k, v = (torch.randn(2, length, h * WIDTH).unflatten(-1, (h, WIDTH)).transpose(1, 2).to(dtype) for h in (4, 2, 2))
    angles = torch.rand(batch, 1, length, WIDTH) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    results = []
    for function in (torch.ops.qpass.append_rotated, cache_reference.append_rotated):
        parts = [[torch.zeros(2, 2, 12, WIDTH, dtype=torch.int8), torch.zeros(2, 2, 12, 1)] for _ in range(2)]
        count = torch.tensor(3)
        for _ in range(2):  # the second time without Python, where it can
            given = function(*parts, count, q, k, v, cos, sin, "int8", "int8")
        results.append([*given, *parts[0], *parts[1], count])
    assert int(results[0][0]) == 3 + length
    for mine, theirs in zip(*results, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        else:
            assert (mine.int() - theirs.int()).abs().max() <= 1


# --- a cache of floats --------------------------------------------------------------------------------------------------


class Floats(nn.Module):
    """Attention over a cache of floats to which rotated keys, and values, are copied; `change` is what else happens."""

    def __init__(self, rotate: Rotate = by_slices, change: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (
            nn.Linear(64, heads * WIDTH, bias=False) for heads in (HEADS, KEY_HEADS, KEY_HEADS, 4)
        )
        self.rotate, self.change = rotate, change

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (project(x).view(*x.shape[:2], -1, WIDTH).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        keys.index_copy_(2, at, k)
        if self.change == "keys are read between":
            v = v + keys.sum()
        if self.change == "positions change between":
            at.add_(1)
        values.index_copy_(2, at.flip(0) if self.change == "other positions for values" else at, v)
        if self.change == "keys are changed again":
            keys.mul_(0.5)
        mask = torch.arange(keys.shape[2]) <= at[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, None], enable_gqa=True)
        if self.change == "two attentions":
            q = self.rotate(self.q(x + y.mean()).view(*x.shape[:2], -1, WIDTH).transpose(1, 2), cos, sin)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, None], enable_gqa=True)
        y = self.o(y.transpose(1, 2).flatten(2))
        return y + k.sum() if self.change == "rotated keys are read" else y


def of_floats(model: Floats, count: int, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """Results and caches of two calls; whether keys are written as they are rotated."""
    backend = qpass.QPass("int8:channel", inner="eager")
    compiled = torch.compile(model.to(dtype).eval(), backend=backend)
    keys, values = (torch.zeros(2, KEY_HEADS, 12, WIDTH, dtype=dtype) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    results = []
    with torch.no_grad():
        for start in (3, 3 + count):
            x, cos, sin = (
                torch.randn(shape, generator=generator).to(dtype)
                for shape in ((2, count, 64), (1, 1, count, WIDTH), (1, 1, count, WIDTH))
            )
            results.append(compiled(x, keys, values, torch.arange(start, start + count), cos, sin))
    written = any(op_name(n) == "qpass::write_rotated" for n in backend.captures[-1].after.nodes)
    return [*results, keys, values], written


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    ("rotate", "change", "fires"),
    [
        (by_slices, "", True),
        (by_chunks, "", True),
        (the_first_half_negative, "", False),
        (by_slices, "keys are read between", False),
        (by_slices, "other positions for values", False),
        (by_slices, "keys are changed again", False),
        (by_slices, "rotated keys are read", False),
        (by_slices, "positions change between", False),
        (by_slices, "two attentions", True),
    ],
    ids=lambda x: getattr(x, "__name__", x or "plain"),
)
def test_a_cache_of_floats(
    rotate: Rotate, change: str, fires: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, written = of_floats(Floats(rotate, change), count, torch.float32)
    assert written == fires
    monkeypatch.setattr("qpass.sites.rotary._rewrite_floats", lambda *_: None)
    torch._dynamo.reset()
    expected, _ = of_floats(Floats(rotate, change), count, torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_cache_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    found, written = of_floats(Floats(), 1, torch.bfloat16)
    assert written
    monkeypatch.setattr("qpass.sites.rotary._rewrite_floats", lambda *_: None)
    torch._dynamo.reset()
    expected, _ = of_floats(Floats(), 1, torch.bfloat16)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_cache_of_float16_stays() -> None:
    assert not of_floats(Floats(), 1, torch.float16)[1]


@pytest.mark.parametrize("case", ["usual", "strided", "a batch of angles", "bfloat16", "in reverse"])
def test_writing_without_python_gives_what_the_reference_gives(case: str) -> None:
    assert bind() is None
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    k, v = torch.randn(2, KEY_HEADS, 9, WIDTH).to(dtype), torch.randn(2, KEY_HEADS, 9, WIDTH).to(dtype)
    states = [torch.randn(2, heads, 3, WIDTH).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    if case == "strided":
        states = [torch.randn(2, 3, s.shape[1], WIDTH).transpose(1, 2) for s in states]
    cos, sin = (torch.randn(2 if case == "a batch of angles" else 1, 1, 3, WIDTH).to(dtype) for _ in range(2))
    at = torch.tensor([6, 5, 4] if case == "in reverse" else [4, 5, 6])
    caches = [k.clone(), v.clone()]
    expected = cache_reference.write_rotated(*caches, at, *states, cos, sin)
    found = torch.ops.qpass.write_rotated(k, v, at, *states, cos, sin)
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6  # one place of its last bit
    for a, b in zip((found, k, v), (expected, *caches), strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)


@pytest.mark.parametrize("at", [9, -1])
def test_a_position_that_there_is_not_is_refused_and_nothing_is_written(at: int) -> None:
    bind()
    k, v = torch.ones(1, 1, 9, WIDTH), torch.ones(1, 1, 9, WIDTH)
    x, angles = torch.zeros(1, 1, 1, WIDTH), torch.zeros(1, 1, 1, WIDTH)
    with pytest.raises(qpass.QpassError, match=f"no position {at}"), errors_through_cpp():
        torch.ops.qpass.write_rotated(k, v, torch.tensor([at]), x, x, x, angles, angles)
    assert bool((k == 1).all())
    assert bool((v == 1).all())

"""Rotary embedding joins a quantized cache: where it fires, where it does not, and that nothing changes by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.graph.vocabulary import op_name
from qpass.ops import reference
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
    for function in (torch.ops.qpass.append_rotated, reference.append_rotated):
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

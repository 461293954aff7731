"""Grouped queries over a float cache: one operator reads the few heads there are; and when the pass keeps its hands off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

import qpass
from qpass.ops.cpu.build import REFERENCE, use_isa
from tests.models import BLOCKS, build, logits_of, tokens

HEADS, KEY_HEADS, WIDTH = 6, 2, 16
GROUP = HEADS // KEY_HEADS
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, WIDTH)).transpose(1, 2)


def expanded(x: Tensor) -> Tensor:
    """As transformers writes it."""
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, GROUP, s, d).reshape(b, h * GROUP, s, d)


def expanded_views(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(GROUP, dim=1)


def by(repeat: Callable[[Tensor], Tensor], **options: object) -> Compute:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), **options)  # type: ignore[arg-type]


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, expanded(k), expanded(v), attn_mask=mask, scale=0.3)


def other_order(x: Tensor) -> Tensor:
    """Query head h reads key head h % KEY_HEADS."""
    b, h, s, d = x.shape
    return x[:, None].expand(b, GROUP, h, s, d).reshape(b, h * GROUP, s, d)


def written_after_copying(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    copy = expanded(k)
    k.mul_(2.0)
    return F.scaled_dot_product_attention(q, copy, expanded(v)) + k.sum()


def keys_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, expanded(k), other_order(v))


FIRES: dict[str, Compute] = {
    "getitem, expand, reshape": by(expanded),
    "unsqueeze, expand, flatten": by(expanded_views),
    "repeat_interleave": by(interleaved),
    "enable_gqa": by(lambda x: x, enable_gqa=True),
    "causal": by(expanded, is_causal=True),
    "mask and scale": masked,
}
STAYS: dict[str, Compute] = {
    "heads in another order": by(other_order),
    "one of them in another order": keys_alone,
    "keys written after they were copied": written_after_copying,
    "as many key heads as query heads": lambda q, k, v: F.scaled_dot_product_attention(q[:, :KEY_HEADS], k, v),
}


class Model(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(32, h * WIDTH) for h in (HEADS, KEY_HEADS, KEY_HEADS))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(heads(self.q(x), HEADS), heads(self.k(x), KEY_HEADS), heads(self.v(x), KEY_HEADS))


def targets(backend: qpass.QPass) -> list[str]:
    return [str(n.target) for capture in backend.captures for n in capture.after.nodes]


@pytest.mark.parametrize("tokens_", [1, 3, 20], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("name", [*FIRES, *STAYS])
def test_the_function_stays_the_same(name: str, tokens_: int) -> None:
    """20 queries a head go through torch's own attention."""
    model, backend = Model((FIRES | STAYS)[name]).eval(), qpass.QPass("fp32", inner="eager")
    x = torch.randn(2, tokens_, 32)
    with torch.no_grad():
        ours, theirs = torch.compile(model, backend=backend)(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert any("qpass.attention" in t for t in targets(backend)) == (name in FIRES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("isa", [None, REFERENCE])
def test_every_float_type(dtype: torch.dtype, queries: int, isa: str | None) -> None:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    q, k, v = (torch.randn(2, h, s, WIDTH).to(dtype) for h, s in ((HEADS, queries), (KEY_HEADS, 70), (KEY_HEADS, 70)))
    none = (None, None, None)
    with use_isa(isa) if isa else torch.no_grad():
        found = torch.ops.qpass.attention(q, k, *none, name, v, *none, WIDTH, name, None, False, None)
    expected = F.scaled_dot_product_attention(q.double(), interleaved(k.double()), interleaved(v.double()))
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)


def test_a_llama_with_a_float_cache_repeats_no_heads() -> None:
    model, ids = build("llama"), tokens()
    backend = qpass.QPass("int8", inner="eager")
    cache = StaticCache(model.config, max_cache_len=32)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        whole = logits_of(fast(ids, past_key_values=cache, use_cache=True))
        step = logits_of(fast(ids[:, :1], past_key_values=cache, use_cache=True))
    assert whole.isfinite().all()
    assert step.isfinite().all()
    for capture in backend.captures:
        names = [str(n.target) for n in capture.after.nodes]
        assert sum("qpass.attention" in n for n in names) == BLOCKS
        assert not any("scaled_dot_product" in n for n in names)
        assert {edit.pass_name for edit in capture.edits} >= {"share_key_heads"}

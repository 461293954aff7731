"""torch's own attention layers, written out: the same function for every mask and option, and their weights are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 3, 7
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.arange(LENGTH).expand(BATCH, -1) >= torch.tensor([[7], [5], [2]])
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "causal": {"mask": CAUSAL},
    "causal in floats": {"mask": torch.zeros(LENGTH, LENGTH).masked_fill(CAUSAL, float("-inf"))},
    "padding": {"padding": PADDING},
    "causal and padding": {"mask": CAUSAL, "padding": PADDING},
}
masks = pytest.mark.parametrize("mask", MASKS)


class WithMasks(nn.Module):
    """One of torch's layers, with its masks under one name each."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Any:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, attn_mask=mask, key_padding_mask=padding, **self.options)
        return self.layer(x, src_mask=mask, src_key_padding_mask=padding)


def compare(model: nn.Module, **masks: Tensor) -> Any:
    """With fp32 as the format nothing is lost: the compiled model must give what the eager one gives."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    fast = torch.compile(model.eval(), backend=qpass.QPass("fp32", strict=True, inner="eager"))
    with torch.no_grad():
        ours, theirs = fast(x, **masks), model(x, **masks)
    for a, b in zip(
        ours if isinstance(ours, tuple) else (ours,), theirs if isinstance(theirs, tuple) else (theirs,), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return fast


@masks
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output and weights"])
def test_multihead_attention(mask: str, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    fast = compare(WithMasks(layer, need_weights=need_weights), **MASKS[mask])
    assert {r.name: r.kind for r in qpass.report(fast).sites} == {
        "layer.in_proj_weight": "qkv",
        "layer.out_proj.weight": "attn_out",
    }


@masks
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer(mask: str, norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 64, activation=activation, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-3
    )
    fast = compare(WithMasks(layer), **MASKS[mask])
    assert [r.kind for r in qpass.report(fast).sites] == ["qkv", "attn_out", "ffn", "ffn"]


def test_the_size_of_the_batch_may_change() -> None:
    model = WithMasks(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)).eval()
    fast = torch.compile(model, backend=qpass.QPass("fp32", inner="eager"), dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (4, 5), (3, 9)):
            x = torch.randn(batch, length, WIDTH)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_keys_and_values_of_another_width() -> None:
    """kdim and vdim: three weights instead of a packed one."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=16, batch_first=True)

        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.layer(x, k, v, need_weights=False)[0]

    model = Cross().eval()
    x, k, v = torch.randn(2, 5, WIDTH), torch.randn(2, 6, 24), torch.randn(2, 6, 16)
    fast = torch.compile(model, backend=qpass.QPass("fp32", strict=True, inner="eager"))
    with torch.no_grad():
        torch.testing.assert_close(fast(x, k, v), model(x, k, v), rtol=1e-5, atol=1e-5)
    assert [r.kind for r in qpass.report(fast).sites] == ["qkv", "qkv", "qkv", "attn_out"]

"""Low-rank adapters on top of a model: the base is quantized, the adapter stays in float."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import qpass
from tests.models import build, logits_of, tokens

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapter(rank: int, dropout: float = 0.0) -> nn.Module:
    """A llama with a LoRA adapter whose A and B are random, as after training (at first B is zero)."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, lora_dropout=dropout)
    model = peft.get_peft_model(build("llama"), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                param.normal_(std=0.05, generator=generator)
    return model


def kl(a: Tensor, b: Tensor) -> float:
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((log_a.exp() * (log_a - log_b)).sum(-1).mean())


@pytest.mark.parametrize("how", ["compile", "quantize"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "rank", [pytest.param(4, marks=pytest.mark.long), 16, pytest.param(31, marks=pytest.mark.long)]
)
def test_base_quantized_adapter_float(rank: int, dropout: float, how: str) -> None:
    model = with_adapter(rank, dropout)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        expected = logits_of(merged(tokens()))
    if how == "compile":
        fast = torch.compile(model, backend=qpass.QPass("int8", strict=True, inner="eager"))
    else:
        fast = qpass.quantize(model, "int8", strict=True, inner="eager")
    with torch.no_grad():
        found = logits_of(fast(tokens()))
    rows = {r.name: r for r in qpass.report(fast).sites if r.kind != "kv"}
    adapters = {n for n in rows if "lora_" in n}
    assert len(adapters) == 2 * 2 * len(TARGETS)
    assert all("adapter" in str(rows[n].skipped) for n in adapters)
    assert {r.kind for n, r in rows.items() if n not in adapters} == {"embedding", "qkv", "attn_out", "ffn", "vocab"}
    assert not [n for n in rows.keys() - adapters if rows[n].skipped]
    assert 0 < kl(expected, found) < 1e-4


def test_two_linears_in_a_row_are_no_adapter() -> None:
    """The same shape with something nonlinear in between is a feed-forward network beside a linear."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(48, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(torch.relu(self.down(x)))

    model = Beside().eval()
    fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        fast(torch.randn(2, 3, 64))
    assert not [r for r in qpass.report(fast).sites if r.skipped]

"""Modules of one operator, what they give in float64 from what qpass stores, and decode loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import qpass
from qpass.numerics import dequantize
from qpass.spec import QuantSpec
from qpass.weights import quantize_weight

TYPES = {"tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class One(nn.Module):
    """One linear, or one embedding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one_linear(columns: int = 96, rows: int = 40, bias: bool = True) -> One:
    torch.manual_seed(0)
    return One(nn.Linear(columns, rows, bias=bias)).eval()


def one_embedding(rows: int = 50, columns: int = 96) -> One:
    torch.manual_seed(0)
    return One(nn.Embedding(rows, columns)).eval()


class Tied(nn.Module):
    """An embedding and a vocabulary projection of one table."""

    def __init__(self, rows: int = 64, columns: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, columns)
        self.head = nn.Linear(columns, rows, bias=False)
        self.head.weight = self.table.weight

        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def stored(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[N, K] -> what qpass computes with, in float64."""
    return dequantize(quantize_weight(weight.detach(), spec), spec, weight.shape[-1]).double()


def reference(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """By onnx's own evaluator."""
    return ReferenceEvaluator(onnx.load(path)).run(None, feeds)  # type: ignore[return-value]


def empty_cache(session: Any, batch: int = 1) -> dict[str, np.ndarray]:
    """Keys and values of no token."""
    inputs = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), TYPES[i.type]) for i in inputs}


def decode(session: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Logits of a prompt and then of one token at a time, each with the tokens that it is of."""
    takes = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start = empty_cache(session, len(ids)), 0
    while start < ids.shape[1]:
        end = prompt if start == 0 else start + 1
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        given = {n: t.numpy() for n, t in feeds.items() if n in takes}
        out = dict(zip(names, session.run(None, given | cache), strict=True))
        cache = {n.replace("present.", "past_key_values."): v for n, v in out.items() if n.startswith("present.")}
        yield slice(start, end), out["logits"]
        start = end


def float_products() -> Any:
    return qpass.set_compute("float")

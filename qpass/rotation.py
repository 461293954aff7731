"""An orthogonal matrix that spreads what a few channels hold over all of them, before they are quantized."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from qpass.memory import outside_of_graphs


def rotation(columns: int) -> Tensor:
    """[columns, columns] float32: symmetric and orthogonal, so its own inverse.

    Sylvester's Hadamard matrix of the largest power of two that divides `columns`, times (Kronecker) the discrete Hartley
    matrix cos + sin of the odd rest: of 64 or 128 the Hadamard matrix of QuaRot, and no larger entry than sqrt(2 / columns)
    for 80 or 96, which have none of a simple form.
    """
    return torch.from_numpy(_rotation(columns))


@lru_cache(maxsize=64)
def _rotation(columns: int) -> np.ndarray:  # an array: a tensor made while torch traces would be a fake one
    odd = columns
    while odd % 2 == 0:
        odd //= 2
    steps = np.arange(odd)
    angle = 2 * np.pi / odd * (np.outer(steps, steps) % odd)
    matrix = (np.cos(angle) + np.sin(angle)) / odd**0.5
    while len(matrix) < columns:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5, matrix)
    return matrix.astype(np.float32)


def rotate(x: Tensor) -> Tensor:
    """[.., K] -> [.., K] in x's dtype, rotated in float32; again, and it is x."""
    kept = x.device.type == "cuda" and type(x) is Tensor  # a CUDA graph copies nothing from the host
    matrix = _on_gpu(x.shape[-1], x.device) if kept else rotation(x.shape[-1]).to(x.device)
    return (x.float() @ matrix).to(x.dtype)


@lru_cache(maxsize=64)
def _on_gpu(columns: int, device: torch.device) -> Tensor:
    return outside_of_graphs(lambda: rotation(columns).to(device))

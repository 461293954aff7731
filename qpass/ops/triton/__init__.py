"""Triton kernels for GPU tensors: `operators.py` puts them behind torch.ops.qpass, `table.py` says which of them runs when.

Triton is imported at the first call on a GPU tensor. Without it, and for what no kernel takes, the reference serves.
"""

from __future__ import annotations

from qpass.ops.triton import operators as operators

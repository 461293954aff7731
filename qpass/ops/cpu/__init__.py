"""C++ kernels: `build.py` compiles and loads them, `operators.py` and `attention.py` put them behind torch.ops.qpass."""

from __future__ import annotations

from qpass.ops.cpu import operators as operators

"""C++ kernels of the operators: `build.py` compiles and loads them, `operators.py` puts them behind torch.ops.qpass."""

from __future__ import annotations

from qpass.ops.cpu import operators as operators

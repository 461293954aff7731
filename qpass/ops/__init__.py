"""The operators that quantized graphs call: `torch.ops.qpass.*`.

`schemas.py` says what they take; `reference.py`, `cache_reference.py` with `residual.py`, `activations.py` and `blocks.py`
(quantized inputs) what they give, on every device. `around.py` is what a linear does beside its product, `row.py` several of
them as one call, whose weights `bundle.py` holds. `cpu/` has the kernels for CPU tensors, `triton/` those for GPU tensors.
"""

from __future__ import annotations

from qpass.ops import activations as activations
from qpass.ops import blocks as blocks
from qpass.ops import cache_reference as cache_reference
from qpass.ops import cpu as cpu
from qpass.ops import reference as reference
from qpass.ops import row as row
from qpass.ops.schemas import SCHEMAS as SCHEMAS

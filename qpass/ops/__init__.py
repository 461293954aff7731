"""The operators that quantized graphs call: `torch.ops.qpass.*`.

`schemas.py` says what they take, `reference.py` what they give, on every device, `activations.py` and `blocks.py` those for
quantized inputs, `around.py` what a linear does beside its product, `row.py` several of them as one call; `cpu/` has the
kernels for CPU tensors, `triton/` those for GPU tensors.
"""

from __future__ import annotations

from qpass.ops import activations as activations
from qpass.ops import blocks as blocks
from qpass.ops import cpu as cpu
from qpass.ops import reference as reference
from qpass.ops import row as row
from qpass.ops.schemas import SCHEMAS as SCHEMAS

"""The operators that quantized graphs call: `torch.ops.qpass.*`.

`schemas.py` says what they take, `reference.py` what they give, on every device, `activations.py` those for quantized inputs;
`cpu/` has the kernels for CPU tensors, `triton/` those for GPU tensors.
"""

from __future__ import annotations

from qpass.ops import activations as activations
from qpass.ops import cpu as cpu
from qpass.ops import reference as reference
from qpass.ops.schemas import SCHEMAS as SCHEMAS

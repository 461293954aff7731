"""The operators that quantized graphs call: `torch.ops.qpass.*`.

Schemas are here, the float reference in `reference.py`. A faster kernel registers for its device key (CPU, CUDA) behind
the same schema; the reference, registered for all devices, remains for the rest.
"""

from __future__ import annotations

from qpass.ops import reference as reference
from qpass.ops.schemas import SCHEMAS as SCHEMAS

"""qpass: quantizing transformers as a compiler pass.

`torch.compile(model, backend=qpass)` quantizes the weights that it finds in the captured graph; `qpass.quantize(model)`
replaces them. The module itself is the backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qpass.api import diff as diff
from qpass.api import quantize as quantize
from qpass.artifact.checkpoint import quantize_checkpoint as quantize_checkpoint
from qpass.artifact.compressed_tensors import export_compressed_tensors as export_compressed_tensors
from qpass.artifact.load import load as load
from qpass.artifact.load import verify as verify
from qpass.artifact.save import save as save
from qpass.backend import QPass as QPass
from qpass.compute import set_compute as set_compute
from qpass.doctor import doctor as doctor
from qpass.errors import QpassError as QpassError
from qpass.hf import config_class, register
from qpass.measuring.blame import blame as blame
from qpass.measuring.evaluate import evaluate as evaluate
from qpass.planning.memory import MemoryPlan as MemoryPlan
from qpass.planning.memory import plan_memory as plan_memory
from qpass.qtensor import QTensor as QTensor
from qpass.recipe import PRESETS as PRESETS
from qpass.recipe import Recipe as Recipe
from qpass.registry import dynamo_backend
from qpass.seeing.report import report as report
from qpass.spec import QuantSpec as QuantSpec


class _BackendModule(ModuleType):
    """A module that torch.compile can call: `backend=qpass`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return dynamo_backend(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "QpassConfig":  # this needs transformers too
        return config_class()
    if name == "KVCache":  # needs transformers
        from qpass.cache import KVCache

        return KVCache
    raise AttributeError(f"module 'qpass' has no attribute {name!r}")


register()
sys.modules[__name__].__class__ = _BackendModule

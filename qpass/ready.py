"""What a model must be before it is quantized: real float weights, whole, on this process. Everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import QpassError
from qpass.qtensor import QTensor


def check_ready(model: nn.Module, quantized: bool = False) -> None:
    """Raises `QpassError` for offloaded, sharded, meta or already quantized weights; names the first and says what to do.

    `quantized`: weights that qpass has quantized are welcome (a model that is compiled again).
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", None)
        raise QpassError(
            f"{type(model).__name__}: the checkpoint is already quantized ({getattr(method, 'value', method)}); load its "
            "float weights (dequantize=True in its quantization config), or another checkpoint"
        )
    for name, module in model.named_modules():
        if any(getattr(hook, "offload", False) for hook in _hooks(module)):
            raise QpassError(
                f"{name or type(model).__name__}: its weights are offloaded (device_map) and loaded anew for each call; "
                "load the model without device_map, quantize it, then move it"
            )
        if any("FullyShardedDataParallel" in c.__name__ or c.__name__ == "FSDPModule" for c in type(module).__mro__):
            raise QpassError(
                f"{name or type(model).__name__}: sharded by FSDP; quantize the model before it is sharded"
            )
    for name, param in model.named_parameters():
        reason = _unready(param, quantized)
        if reason is not None:
            raise QpassError(f"{name}: {reason}")


def has_hooks(model: Any) -> bool:
    """Whether accelerate moves the inputs of the model's modules from device to device."""
    return isinstance(model, nn.Module) and any(hasattr(module, "_hf_hook") for module in model.modules())


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks of a module; several may be bound in one."""
    hook = getattr(module, "_hf_hook", None)
    yield hook
    yield from getattr(hook, "hooks", ())


def _unready(param: Tensor, quantized: bool) -> str | None:
    if isinstance(param, QTensor):
        return None if quantized else f"the model is already quantized ({param.spec}); start from its float checkpoint"
    kind = next((t for t in (type(param), type(param.data)) if t not in (nn.Parameter, Tensor)), None)
    if kind is not None and kind.__name__ == "DTensor":
        return "the weight is a DTensor (tensor parallel, tp_plan); quantize each rank's local model, before sharding"
    if kind is not None and kind.__module__.split(".")[0] in ("torchao", "bitsandbytes"):
        return f"the weight is quantized already ({kind.__module__.split('.')[0]} {kind.__name__}); start from float weights"
    if param.is_meta:
        return "the weight is on the meta device; load the real weights first"
    if param.dim() > 1 and param.dtype.itemsize == 1 and param.dtype != torch.bool:
        dtype = str(param.dtype).removeprefix("torch.")
        return f"the weight is {dtype}: the checkpoint is already quantized (fp8, MXFP4, ...); start from float weights"
    return None

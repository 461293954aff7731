"""What operators need to launch a kernel: whether it runs there, its file, and constants that lie on the device."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from qpass.memory import outside_of_graphs
from qpass.ops.triton.table import device_of
from qpass.spec import parse_spec

#: Files of kernels, and the kernels that are launched.
KERNELS = {"linear": ("linear_kernel",), "bitstream": ("bitstream_kernel",), "around": ("norm_kernel",),
           "rows": ("rows_kernel",), "attention": ("attention_kernel",), "quantizing": ("quantize_kernel",),
           "appending": ("append_kernel",), "rescaling": ("rescale_kernel",)}  # fmt: skip
#: Types that kernels multiply.
HALVES = (torch.bfloat16, torch.float16)
#: Types that they read and write.
FLOATS = (torch.float32, *HALVES)


@cache
def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def kernels_of(name: str) -> Any:
    """A file of kernels, which imports triton."""
    return importlib.import_module(f"qpass.ops.triton.{name}")


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU that they are for, and where Triton interprets them, on the CPU."""
    if not available() or device.type not in ("cuda", "cpu"):
        return False
    return device_of(device).served if device.type == "cuda" else bool(kernels_of("triton_private").interpreted())


def serves(*tensors: Tensor | None) -> bool:
    """Whether all are where kernels run."""
    first = tensors[0]
    return first is not None and runs_on(first.device) and all(t is None or t.device == first.device for t in tensors)


def permutes_bytes(device: torch.device) -> bool:
    """Whether the device has NVIDIA's prmt."""
    return device.type == "cuda" and device_of(device).capability is not None


def nf4_table(kinds: set[str], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What kernels look nf4 up in where they cannot permute bytes."""
    return _patterns(dtype, device) if "NF4" in kinds and not permutes_bytes(device) else None


Result = TypeVar("Result")
#: Kernels that are not tried again.
failed: set[str] = set()


def attempt(what: str, device: torch.device, call: Callable[[], Result]) -> Result | None:
    """The result of a call that launches a kernel on a device; None if it does not compile or cannot be launched, now or before.

    One warning says so. It is an error where kernels are interpreted, and when memory runs out.
    """
    if what in failed:
        return None
    try:
        # Triton launches on the current one.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if kernels_of("triton_private").interpreted():
            raise
        failed.add(what)
        warnings.warn(f"the GPU kernel for {what} failed and a slower way is taken: {error}", stacklevel=2)
        return None


@cache
def _patterns(dtype: torch.dtype, device: torch.device) -> Tensor:
    patterns = kernels_of("unpacking").nf4_patterns(dtype)
    return outside_of_graphs(lambda: torch.tensor(patterns, dtype=torch.int32, device=device))


@cache
def eights(device: torch.device) -> Tensor:
    """int32 0 .. 7."""
    return outside_of_graphs(lambda: torch.arange(8, dtype=torch.int32, device=device))


@cache
def code_kind(text: str) -> int | None:
    """How rows_kernel reads and quantize_kernel writes codes of a format; None if they do not."""
    rows, fmt = kernels_of("rows"), parse_spec(text).format
    if fmt.kind == "uniform" and fmt.bits in (2, 3, 4, 5, 6, 8):
        return rows.UNIFORM.value
    if fmt.codebook is not None and fmt.bits == 4 and len(fmt.codebook) == 16:
        return rows.CODEBOOK.value
    if fmt.kind == "float8":
        return rows.FLOAT8_E4M3.value if fmt.storage == torch.float8_e4m3fn else rows.FLOAT8_E5M2.value
    return None

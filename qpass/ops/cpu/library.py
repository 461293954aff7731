"""The loaded kernels, what their functions take, and the calls that binding.cpp may serve without Python."""

from __future__ import annotations

import ctypes
from array import array
from functools import cache
from typing import Any

from torch import Tensor

from qpass.compute import ON_CHANGE
from qpass.ops.bundle import ON_GONE
from qpass.ops.cpu.build import Kernels, Missing, binding, kernels
from qpass.ops.cpu.matrix import AroundStruct, Matrix, SpecStruct


@cache
def _functions(found: Kernels) -> Any:
    """The library, told once what its functions take."""
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    matrix = [pointer] * 5 + [size] * 4
    library = found.library
    library.qpass_linear.argtypes = [*matrix, pointer, pointer, pointer, size, small, small, small, pointer, small]
    library.qpass_rows.argtypes = [*matrix, pointer, size, size, pointer, small, small]
    library.qpass_quantize.argtypes = [*matrix, pointer, size, small, pointer, small]
    library.qpass_quantize_weight.argtypes = [*matrix, pointer, small, pointer, small, pointer, small]
    attention = [
        *matrix, *matrix, pointer, pointer, pointer, small, small, ctypes.c_float, pointer, small, pointer, small,
    ]  # fmt: skip
    library.qpass_attention.argtypes = attention
    library.qpass_around_bytes.restype = size
    library.qpass_rows.restype = library.qpass_quantize.restype = library.qpass_quantize_weight.restype = size
    library.qpass_linear.restype = library.qpass_attention.restype = None
    assert library.qpass_spec_bytes() == ctypes.sizeof(SpecStruct)
    assert library.qpass_around_bytes() == ctypes.sizeof(AroundStruct)
    return library


def c_functions() -> Any:
    """The kernels in use, or None if there are none: the reference serves then."""
    found = kernels()
    return _functions(found) if isinstance(found, Kernels) else None


#: The library of binding.cpp, once it is in use.
_bound: list[ctypes.CDLL] = []
_looking: list[ctypes.PyDLL] = []


def bind() -> str | None:
    """From now on calls on CPU tensors that are like an earlier one do without Python (binding.cpp). Gives what prevents it."""
    built = kernels()
    found = built if isinstance(built, Missing) else binding()
    if isinstance(found, Missing):
        return found.reason
    if not _bound:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        found.qpass_remember_linear.argtypes = [pointer, pointer, size, size, size, ctypes.c_int32]
        found.qpass_remember_attention.argtypes = [
            pointer, pointer, size, size, pointer, size, size, pointer, pointer, size, size, size, size, size,
        ]  # fmt: skip
        found.qpass_remember_quantize.argtypes = [pointer, pointer, size, size, pointer, size, size, size, size, size]
        found.qpass_planned_rows.restype = size
        found.qpass_let_go.argtypes = [size]
        found.qpass_layouts.argtypes, found.qpass_layouts.restype = [size], ctypes.c_uint64
        ON_CHANGE.append(found.qpass_forget)
        ON_GONE.append(found.qpass_let_go)
        _bound.append(found)
        looking = ctypes.PyDLL(found._name)  # what it reads does not change meanwhile: it keeps Python's lock
        looking.qpass_first_other.argtypes, looking.qpass_first_other.restype = [pointer, pointer, size, size], size
        _looking.append(looking)
    return None


def planned_rows() -> int:
    """How many rows (qpass::row) of this process were the calls of kernels and nothing else."""
    return sum(int(library.qpass_planned_rows()) for library in _bound)


def can_look() -> bool:
    """Whether `first_other` works: there is a library that calls without Python."""
    return bool(_looking)


def first_other(places: array[int], seen: array[int], start: int) -> int:
    """The first of the 64-bit numbers at these places in memory, from number `start` on, that is not what was seen; -1: none."""
    if not places:
        return -1
    return int(_looking[0].qpass_first_other(places.buffer_info()[0], seen.buffer_info()[0], start, len(places)))


def layouts_of(bundle: Tensor) -> int:
    """A number that stands for the layouts of the tensors in a bundle (ops/bundle.py): types, devices, sizes and strides."""
    return int(_bound[0].qpass_layouts(int(bundle)))


def remember(what: str, kernel: Any, *matrices: Matrix, rest: tuple[int | None, ...]) -> None:
    """Tell binding.cpp, if it is there and asked for this call, what a kernel was called with."""
    for library in _bound:
        stored = [x for m in matrices for x in (m.arguments[0], *m.arguments[-2:])]
        getattr(library, f"qpass_remember_{what}")(ctypes.cast(kernel, ctypes.c_void_p), *stored, *rest)

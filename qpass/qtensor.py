"""QTensor: a quantized weight that stands where a float Parameter stood.

A traceable wrapper subclass: one Dynamo placeholder, two to four inner tensors. In eager mode every operation sees the
dequantized float weight; writing to it (`copy_`, `mul_`, `load_state_dict`) quantizes again, in place.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qpass.algorithms.rounding import InputParts
from qpass.numerics import dequantize
from qpass.observers import Observed
from qpass.quantized import PART_NAMES, Quantized
from qpass.spec import QuantSpec, parse_spec
from qpass.weights import as_rows, check_weight, from_rows, quantize_weight

_PARTS = tuple(f"{name}_part" for name in PART_NAMES)


class Token:
    """An identity that can be referred to weakly without touching the tensor: torch moves no tensor that has weak references."""


@dataclass(frozen=True)
class Outcome:
    """What quantizing a weight gave: signal to noise in dB, the seconds that it took, what calibration saw of its input."""

    sqnr_db: float = math.nan
    seconds: float = 0.0
    observed: Observed | None = None


#: Counts what is set on QTensors; the last count. A call that saw the same one before has the same contents now.
_changes, _last_change = itertools.count(1), [0]


def last_change() -> int:
    """A number that is another one once an attribute of any QTensor was set, of a new one or with contents exchanged. (What is
    written to its `__dict__` past `setattr` is not seen.)"""
    return _last_change[0]


_KEEPING = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class QTensor(Tensor):
    """A weight of logical `shape` and `dtype`, stored as `quantized` according to `spec`.

    `transposed`: the logical weight is [in, out] (GPT-2's Conv1D, `x @ w`); it is stored as [out, in], so that scales
    belong to output rows and groups run along the inputs as everywhere else. Weights of experts (three dimensions) are
    stored as the rows of all experts below each other.
    """

    quantized: Quantized
    spec: QuantSpec
    transposed: bool
    token: Token
    #: In the process that quantized it; a copy from a file knows the signal to noise only.
    outcome: Outcome
    #: The buffer of several weights that this one is a row range of, once an operator reads them together.
    base: Quantized | None

    @staticmethod
    def __new__(
        cls, quantized: Quantized, spec: QuantSpec, shape: torch.Size, dtype: torch.dtype, transposed: bool = False
    ) -> QTensor:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=quantized.data.device, requires_grad=False)

    def __init__(
        self, quantized: Quantized, spec: QuantSpec, shape: torch.Size, dtype: torch.dtype, transposed: bool = False
    ) -> None:
        self.quantized, self.spec, self.transposed = quantized, spec, transposed
        self.outcome, self.base, self.token = Outcome(), None, Token()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        _last_change[0] = next(_changes)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # --- what it is -----------------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight, in its logical shape and (unless given) its own dtype."""
        columns = self.shape[-2 if self.transposed else -1]
        rows = dequantize(self.quantized, self.spec, columns, dtype or self.dtype)
        return from_rows(rows, self.shape, self.transposed)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.quantized.nbytes

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QTensor({list(self.shape)}, {self.spec}, dtype={self.dtype}, device={self.device})"

    # --- what torch asks of a subclass ----------------------------------------------------------------------------

    data_part = property(lambda self: self.quantized.data)
    scale_part = property(lambda self: self.quantized.scale)
    zero_point_part = property(lambda self: self.quantized.zero_point)
    outer_scale_part = property(lambda self: self.quantized.outer_scale)
    column_scale_part = property(lambda self: self.quantized.column_scale)
    input_scale_part = property(lambda self: self.quantized.input_scale)
    input_zero_point_part = property(lambda self: self.quantized.input_zero_point)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype, bool]]:
        names = [n for n, part in zip(_PARTS, self.quantized.all_parts, strict=True) if part is not None]
        return names, (str(self.spec), self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> QTensor:
        spec, dtype, transposed = context
        quantized = Quantized(*(inner.get(n) for n in _PARTS))  # type: ignore[arg-type]
        return QTensor(quantized, parse_spec(spec), outer_size, dtype, transposed)

    @classmethod
    @torch.compiler.disable  # or Dynamo would compile it where a frame around it runs eagerly
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if func in _KEEPING:
            return first._like(first.quantized)
        if func is torch.ops.aten.clone.default:
            return first._like(first.quantized.map(lambda p: p.clone(memory_format=torch.contiguous_format)))
        if func is torch.ops.aten._to_copy.default and (kwargs.get("dtype") or first.dtype).is_floating_point:
            device = kwargs.get("device") or first.device
            moved = first.quantized.map(lambda p: p.to(device, copy=True))
            return first._like(moved, kwargs.get("dtype") or first.dtype)
        if func is torch.ops.aten.copy_.default and isinstance(first, QTensor):
            first._write(args[1])
            return first
        written = [a for a, spec in zip(args, func._schema.arguments, strict=False) if _writes(spec)]
        floats: dict[int, Tensor] = {}

        def to_float(value: Any) -> Any:
            if not isinstance(value, QTensor):
                return value
            return floats.setdefault(id(value), value.dequantize())

        out = func(*tree_map(to_float, args), **tree_map(to_float, kwargs))
        for target in written:
            if isinstance(target, QTensor):
                target._write(floats[id(target)])
                return target
        return out

    def _like(self, quantized: Quantized, dtype: torch.dtype | None = None) -> QTensor:
        like = QTensor(quantized, self.spec, self.shape, dtype or self.dtype, self.transposed)
        like.outcome = self.outcome
        if quantized is self.quantized:
            like.base = self.base
        return like

    def _write(self, source: Tensor) -> None:
        """Take over the values of `source` (float or QTensor) in place; views and users of the parts see them."""
        same = isinstance(source, QTensor) and (source.spec, source.transposed) == (self.spec, self.transposed)
        if same and source.quantized.is_for_the_input_of(self.quantized):  # type: ignore[attr-defined]
            new = source.quantized  # type: ignore[attr-defined]
        else:
            value = source.dequantize() if isinstance(source, QTensor) else source
            stored = as_rows(value.expand(self.shape), self.transposed)
            check_weight(stored, self.spec, "weight written to a QTensor")
            around = InputParts(*self.quantized.around)
            new = quantize_weight(stored, replace(self.spec, algorithms=(), activations=None), around=around)
        for mine, theirs in zip(self.quantized.parts, new.parts, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        self.outcome = Outcome()

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        if id(self) not in memo:
            copy = self._like(self.quantized.map(lambda p: p.clone(memory_format=torch.contiguous_format)))
            memo[id(self)] = _as_parameter(copy) if isinstance(self, torch.nn.Parameter) else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A row range of a larger buffer is saved by itself, not with the whole buffer behind it.
        parts = self.quantized.map(lambda p: p.clone() if p.untyped_storage().nbytes() > p.nbytes else p).all_parts
        state = (parts, str(self.spec), tuple(self.shape), self.dtype, self.transposed, self.outcome.sqnr_db)
        return _rebuild_qtensor, (*state, isinstance(self, torch.nn.Parameter))


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _as_parameter(tensor: QTensor) -> QTensor:
    return torch.nn.Parameter(tensor, requires_grad=False)  # type: ignore[return-value]


def _rebuild_qtensor(
    parts: tuple[Tensor, ...],
    spec: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    transposed: bool,
    sqnr_db: float,
    is_param: bool,
) -> QTensor:
    tensor = QTensor(Quantized(*parts), parse_spec(spec), torch.Size(shape), dtype, transposed)
    tensor.outcome = Outcome(sqnr_db)
    return _as_parameter(tensor) if is_param else tensor


torch.serialization.add_safe_globals([_rebuild_qtensor])

"""QState: a quantized KV cache that stands where a module kept a float tensor.

A traceable wrapper subclass, as QTensor is for weights. What rearranges, joins or overwrites its rows is done to the stored
parts, and nothing else is touched; any other operation sees floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.graph.rows import ALONG, WHOLE, WRITES, keeps_rows
from qpass.packing import as_bytes
from qpass.spec import QuantSpec, parse_spec

_PARTS = ("part0", "part1", "part2", "part3")


class QState(Tensor):
    """A cache of logical `shape` [.., D] and float `dtype`, stored to `spec` as `parts` [.., *] (8-bit floats as bytes)."""

    parts: list[Tensor]
    spec: QuantSpec

    @staticmethod
    def __new__(cls, parts: list[Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> QState:
        shape = (*parts[0].shape[:-1], columns)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device, requires_grad=False)

    def __init__(self, parts: list[Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> None:
        self.parts, self.spec = parts, spec

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, states: Tensor, spec: QuantSpec) -> QState:
        """`states` [.., D] quantized."""
        return cls(quantized(states, spec), spec, states.shape[-1], states.dtype)

    def dequantize(self) -> Tensor:
        """The floats [.., D]."""
        slots: list[Tensor | None] = [None] * 4
        for (slot, dtype), part in zip(self.spec.stored_parts.items(), self.parts, strict=True):
            slots[slot] = part.view(dtype)
        floats: Tensor = torch.ops.qpass.dequantize(*slots, self.shape[-1], str(self.spec), self.dtype)
        return floats

    @property
    def stored_nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(p.nbytes for p in self.parts)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QState({list(self.shape)}, {self.spec}, dtype={self.dtype}, device={self.device})"

    # --- what torch asks of a subclass ----------------------------------------------------------------------------

    part0 = property(lambda self: self.parts[0])
    part1 = property(lambda self: self.parts[1])
    part2 = property(lambda self: self.parts[2])
    part3 = property(lambda self: self.parts[3])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, int, torch.dtype]]:
        return list(_PARTS[: len(self.parts)]), (str(self.spec), self.shape[-1], self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> QState:
        spec, columns, dtype = context
        return QState([inner[n] for n in _PARTS if n in inner], parse_spec(spec), columns, dtype)

    @classmethod
    @torch.compiler.disable  # or Dynamo would compile it where a frame around it runs eagerly
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "cat" and (joined := _cat(*args, **kwargs)) is not None:
            return joined
        target: Any = args[0] if args else None
        if isinstance(target, QState):
            names = [a.name for a in func._schema.arguments]

            def argument(position: int, wanted: str) -> Any:
                if position < len(args):
                    return args[position]
                return kwargs.get(names[position] if position < len(names) else wanted)

            along = name in ALONG and keeps_rows(name, target.dim(), argument)
            if along and (name != "expand" or argument(1, "")[-1] in (-1, target.shape[-1])):
                rest = [[*args[1][:-1], -1], *args[2:]] if name == "expand" else args[1:]
                return target._like([func(p, *rest, **kwargs) for p in target.parts])
            dtype = kwargs.get("dtype") or target.dtype
            if name == "_to_copy" and dtype.is_floating_point:
                moved = [p.to(kwargs.get("device") or p.device, copy=True) for p in target.parts]
                return QState(moved, target.spec, target.shape[-1], dtype)
            in_place = name in WRITES and name.endswith("_") and not kwargs
            if in_place and (name in WHOLE or keeps_rows(name, target.dim(), argument)):
                where = WRITES[name]
                if where is None or isinstance(args[where[0]], Tensor):
                    return target._write(func, name, list(args))
        return on_floats(func, args, kwargs)

    def _like(self, parts: list[Tensor]) -> QState:
        return QState(parts, self.spec, self.shape[-1], self.dtype)

    def _take(self, other: QState) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_(theirs)

    def _write(self, func: Any, name: str, args: list[Any]) -> QState:
        """The same write on each part."""
        where = WRITES[name]
        if where is None:
            for part in self.parts:
                func(part, *args[1:])
            return self
        source = args[where[0]]
        if source.dim() == 0 or source.shape[-1] != self.shape[-1]:  # one value for many columns
            source = source.expand(*source.shape[:-1], self.shape[-1])
        same = isinstance(source, QState) and source.spec == self.spec
        pieces = source.parts if same else quantized(source.to(self.dtype), self.spec)
        for part, piece in zip(self.parts, pieces, strict=True):
            args[where[0]] = piece
            if name == "scatter_":  # one index for all of a row
                index = args[2][..., :1].expand(piece.shape)
                func(part, args[1], index, piece)
            else:
                func(part, *args[1:])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QState:
        return memo.setdefault(id(self), self._like([p.clone() for p in self.parts]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_qstate, ([p.clone() for p in self.parts], str(self.spec), self.shape[-1], self.dtype)


def quantized(states: Tensor, spec: QuantSpec) -> list[Tensor]:
    """[.., D] -> parts [.., *] as they are kept."""
    floats = states.dequantize() if isinstance(states, QState) else states
    return [as_bytes(p) for p in torch.ops.qpass.quantize(floats, str(spec))]


def _cat(tensors: Any, dim: int = 0) -> QState | None:
    """States and floats joined along another axis than the last, in the format of the first state."""
    tensors = [t for t in tensors if t.shape != (0,)]  # torch takes an empty one of one axis
    first = next((t for t in tensors if isinstance(t, QState)), None)
    if first is None or any(isinstance(t, FloatView) for t in tensors) or dim % first.dim() == first.dim() - 1:
        return None
    pieces = [
        t.parts if isinstance(t, QState) and t.spec == first.spec else quantized(t.to(first.dtype), first.spec)
        for t in tensors
    ]
    return first._like([torch.cat(list(parts), dim) for parts in zip(*pieces, strict=True)])


class FloatView(Tensor):
    """A view of a QState that does not keep its rows, as floats: what is written to it is written to the state.

    `steps`: the view operations, with their other arguments, that lead from the state to it.
    """

    state: QState
    steps: tuple[tuple[Any, Any, Any], ...]

    @staticmethod
    def __new__(cls, state: QState, steps: tuple[tuple[Any, Any, Any], ...], like: Tensor) -> FloatView:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=False)

    def __init__(self, state: QState, steps: tuple[tuple[Any, Any, Any], ...], like: Tensor) -> None:
        self.state, self.steps = state, steps

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_floats(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FloatView({list(self.shape)}) of {self.state!r}"


def on_floats(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation as it is on floats. A state that it writes to, be it through a view, is quantized again, all of it."""
    wholes: dict[int, tuple[QState, Tensor]] = {}

    def floats_of(state: QState) -> Tensor:
        if id(state) not in wholes:
            wholes[id(state)] = state, state.dequantize()
        return wholes[id(state)][1]

    def to_float(value: Any) -> Any:
        if isinstance(value, QState):
            return floats_of(value)
        if isinstance(value, FloatView):
            floats = floats_of(value.state)
            for view, more, named in value.steps:
                floats = view(floats, *more, **named)
            return floats
        return value

    out = func(*tree_map(to_float, args), **tree_map(to_float, kwargs))
    schema = func._schema
    given = [
        *zip(schema.arguments, args, strict=False),
        *((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs),
    ]
    written = [
        v for a, value in given if a.alias_info is not None and a.alias_info.is_write for v in tree_leaves(value)
    ]
    for value in written:
        state = value.state if isinstance(value, FloatView) else value
        if isinstance(state, QState):
            state._take(QState.of(wholes[id(state)][1], state.spec))
    if written:
        return written[0] if isinstance(out, Tensor) else None if out is None else out
    first = args[0] if args else None
    is_view = any(r.alias_info is not None for r in schema.returns)
    if is_view and isinstance(first, QState | FloatView) and not _is_fake(first):
        state, steps = (first, ()) if isinstance(first, QState) else (first.state, first.steps)
        return _views(func, args[1:], kwargs, state, steps, out)
    return out


def _views(func: Any, more: Any, named: Any, state: QState, steps: tuple[tuple[Any, Any, Any], ...], out: Any) -> Any:
    """The result, or the list of results, of a view operation as views of the state."""
    if isinstance(out, Tensor):
        return FloatView(state, (*steps, (func, more, named)), out)

    def one(i: int) -> Any:
        return lambda x, *a, **k: func(x, *a, **k)[i]

    return [FloatView(state, (*steps, (one(i), more, named)), x) for i, x in enumerate(out)]


def _is_fake(value: QState | FloatView) -> bool:
    """Whether it is traced: in a graph, writes are seen as such (qpass.sites.state)."""
    parts = value.state.parts if isinstance(value, FloatView) else value.parts
    return hasattr(parts[0], "fake_mode")


def _rebuild_qstate(parts: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> QState:
    return QState(parts, parse_spec(spec), columns, dtype)


torch.serialization.add_safe_globals([_rebuild_qstate])

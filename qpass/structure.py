"""What the graphs of a compiled module take for granted of its modules, looked at in one sweep.

Dynamo guards each attribute that it read, of each module, at each call: for a small language model some thousand guards, which
take as long as a quarter of its linears. They hold as long as nobody writes to the dicts that keep the attributes. CPython counts
such writes, so qpass looks at the counts, and has Dynamo leave those guards out.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import sys
import weakref
from array import array
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from qpass.graph.torch_private import captured_code, forget_code
from qpass.ops.cpu.library import can_look, first_other
from qpass.qtensor import QTensor
from qpass.store import guards_beside_the_lookup

#: Where an object keeps its type, and a dict its version: a number that no dict had before the last write to this one (PEP 509).
_TYPE, _VERSION = 8, 24
#: So it is in CPython up to 3.12, built for 64 bits and without the tracing of references.
_IS_SO = (
    sys.implementation.name == "cpython"
    and sys.version_info < (3, 13)
    and sys.maxsize > 2**32
    and not hasattr(sys, "getobjects")
)
#: After so many changes Dynamo's own guards are kept: they tell states apart, and remember the graphs of each.
MOST_CHANGES = 4
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_STEP = re.compile(r"\._modules\['([^']+)'\]")
_LAST = re.compile(r"\._(modules|parameters|buffers)|\._parameters\['([^']+)'\]|\.(\w+)")


class Structure:
    """The modules below `root`, their QTensors and constants, as they were when graphs were made of them.

    It does not keep `root`, and is kept by the compiled call of `root` alone.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = weakref.ref(root)
        self.changes = 0
        #: Counts up when a write was seen, whatever was written.
        self.writes = 0
        #: What may be a frame of `root` and of nothing else.
        self.frames: set[CodeType] = set()
        self._alone = sum(type(module) is type(root) for module in root.modules()) == 1
        self._forget()

    def _forget(self) -> None:
        self._at: dict[int, int] = {}  # a place in memory -> its number
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]] | None] = []  # and what they held; None: a type
        self._places, self._seen = array("Q"), array("Q")
        self.frames.clear()

    @property
    def is_watched(self) -> bool:
        """Whether a change will be seen."""
        return _IS_SO and self._alone and self.changes < MOST_CHANGES and can_look()

    def holder(self, path: str, value: Any) -> nn.Module | None:
        """The module that keeps `value`, or is it, if it is at this path below the root (as Dynamo writes it) and a part of the
        structure; then `has_changed` will tell if it is not there any more."""
        module = self.root()
        if module is None or not self.is_watched:
            return None
        dicts = [module.__dict__]
        modules = [module]
        while step := _STEP.match(path):
            dicts.append(module._modules)
            child = module._modules.get(step[1])
            if child is None:
                return None
            module, path = child, path[step.end() :]
            modules.append(module)
            dicts.append(module.__dict__)
        last = _LAST.fullmatch(path)
        if not path:
            known = module is value
        elif last is None:
            known = False
        elif last[1]:
            dicts.append(getattr(module, f"_{last[1]}"))
            known = dicts[-1] is value
        elif last[2]:
            dicts.append(module._parameters)
            found = module._parameters.get(last[2], self)
            known = found is value and (value is None or isinstance(value, QTensor))
        else:
            known = last[3] in module.__dict__ and module.__dict__[last[3]] is value and isinstance(value, _CONSTANTS)
        if not known:
            return None
        for each in modules:
            self._watch(id(each) + _TYPE)
            dicts += [_dict_of(base) for base in type(each).__mro__ if base is not object]
        for kept in dicts:
            self._watch(id(kept) + _VERSION, kept)
        return module

    def _watch(self, place: int, kept: dict[Any, Any] | None = None) -> None:
        if place in self._at:
            return
        self._at[place] = len(self._places)
        self._places.append(place)
        self._seen.append(_read(place))
        self._dicts.append(None if kept is None else (kept, {key: _mark(value) for key, value in kept.items()}))

    def has_changed(self) -> bool:
        """Whether graphs that took it for granted do not hold any more. A QTensor may become another of its size and type."""
        start = 0
        while (at := first_other(self._places, self._seen, start)) >= 0:
            watched = self._dicts[at]
            if watched is None or not _holds(*watched):
                self.changes += 1
                self._forget()
                return True
            self.writes += 1
            self._seen[at] = _read(self._places[at])
            start = at + 1
        return False


def _read(place: int) -> int:
    return int(ctypes.c_uint64.from_address(place).value)


def _dict_of(kind: type) -> dict[str, Any]:
    """The dict that a type's `__dict__` shows."""
    kept: dict[str, Any] = gc.get_referents(kind.__dict__)[0]
    return kept


def _mark(value: Any) -> Any:
    """What stands for a value of a dict: it is not kept, where that can be."""
    if isinstance(value, QTensor):
        return _looks(value)
    if isinstance(value, _CONSTANTS):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _looks(value: Tensor) -> tuple[Any, ...]:
    return type(value), value.shape, value.dtype, value.device


def _holds(kept: dict[Any, Any], marks: dict[Any, Any]) -> bool:
    return list(kept) == list(marks) and all(map(_is_same, kept.values(), marks.values()))


def _is_same(value: Any, mark: Any) -> bool:
    if value is mark or (isinstance(mark, weakref.ref) and mark() is value):
        return True
    if isinstance(value, QTensor):
        return bool(_looks(value) == mark)
    return isinstance(value, _CONSTANTS) and type(value) is type(mark) and bool(value == mark)


def watched(
    call: Callable[..., Any], structure: Structure, codes: Callable[[], Sequence[CodeType]]
) -> Callable[..., Any]:
    """A compiled call that is captured anew once the structure has changed. `codes`: what was captured of it."""

    @functools.wraps(call)
    def look_and_call(*args: Any, **kwargs: Any) -> Any:
        if structure.has_changed():
            for code in codes():
                forget_code(code)
        return call(*args, **kwargs)

    return look_and_call


def needed_guards(structure: weakref.ref[Structure], guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are checked at each call: all but those inside of QTensors, and those on the structure."""
    keep, kept = guards_beside_the_lookup(guards), structure()
    if kept is None or captured_code() not in kept.frames:
        return keep
    root = kept.root()
    names = {g.name for g in guards if g.value is root and re.fullmatch(r"\w+(\[\d+\])?", g.name)}
    for i, guard in enumerate(guards):
        name = next((n for n in names if guard.name.startswith(f"{n}.")), None)
        if name is not None and kept.holder(guard.name.removeprefix(name), guard.value) is not None:
            keep[i] = False
    return keep

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
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from qpass.graph.torch_private import captured_code, forget_code
from qpass.ops.bundle import bundle
from qpass.ops.cpu.library import can_look, first_other, layouts_of
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

#: A guard on one of the keys of a dict; and what stands for that dict then.
_KEY, _DICT = re.compile(r"list\(dict\.keys\((.*)\)\)\[\d+\]"), object()


class _Kept:
    """A dict, its keys, and what it held under those of them that matter."""

    def __init__(self, kept: dict[Any, Any]) -> None:
        self.kept, self.keys, self.marks = kept, list(kept), dict[Any, Any]()

    def is_same(self) -> bool:
        """Whether it holds that now."""
        return list(self.kept) == self.keys and all(_is_same(self.kept[key], m) for key, m in self.marks.items())


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
        self._dicts: list[_Kept | None] = []  # None: it is the type of an object
        self._places, self._seen = array("Q"), array("Q")
        self._tensors: dict[int, Tensor] = {}  # Parameters in float, whose contents may be exchanged; by their id
        self._bundle: Tensor | None = None
        self._layouts = 0
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
        modules, on_the_way = [module], list[tuple[dict[str, Any], str]]()
        while step := _STEP.match(path):
            on_the_way += [(module.__dict__, "_modules"), (module._modules, step[1])]
            child = module._modules.get(step[1])
            if child is None:
                return None
            module, path = child, path[step.end() :]
            modules.append(module)
        last, own = _LAST.fullmatch(path), module.__dict__
        if not path:
            known = module is value
        elif last is None:
            known = False
        elif last[1]:
            on_the_way += [(own, f"_{last[1]}"), (own[f"_{last[1]}"], "")]
            known = value is own[f"_{last[1]}"] or value is _DICT
        elif last[2]:
            on_the_way += [(own, "_parameters"), (module._parameters, last[2])]
            found = module._parameters.get(last[2], self)
            known = found is value and (value is None or isinstance(value, nn.Parameter))
            if known and value is not None and not isinstance(value, QTensor):
                self._watch_layout(value)
        else:
            on_the_way.append((own, last[3]))
            known = own.get(last[3], self) is value and isinstance(value, _CONSTANTS)
        if known:
            self._watch_all(modules, on_the_way)
        return module if known else None

    def _watch_layout(self, tensor: Tensor) -> None:
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = tensor
            self._bundle = None

    def settle(self) -> None:
        """From now on changes of layouts are seen too."""
        if self._tensors and self._bundle is None:
            self._bundle = bundle(list(self._tensors.values()))
            self._layouts = layouts_of(self._bundle)

    def _watch_all(self, modules: Sequence[nn.Module], items: Sequence[tuple[dict[str, Any], str]]) -> None:
        for module in modules:
            self._watch(id(module) + _TYPE)
            self._watch(id(module.__dict__) + _VERSION, module.__dict__)
            for base in type(module).__mro__[:-1]:
                kept = _dict_of(base)
                self._watch(id(kept) + _VERSION, kept, kept)
        for kept, name in items:
            self._watch(id(kept) + _VERSION, kept, [name] if name else [])

    def _watch(self, place: int, kept: dict[Any, Any] | None = None, names: Iterable[str] = ()) -> None:
        if place not in self._at:
            self._at[place] = len(self._places)
            self._places.append(place)
            self._seen.append(_read(place))
            self._dicts.append(None if kept is None else _Kept(kept))
        watched = self._dicts[self._at[place]]
        if kept is not None and watched is not None:
            watched.marks |= {name: _mark(kept[name]) for name in names if name not in watched.marks}

    def has_changed(self) -> bool:
        """Whether graphs that took it for granted do not hold any more. A QTensor may become another of its size and type."""
        self.settle()
        same = self._bundle is None or layouts_of(self._bundle) == self._layouts
        start = 0
        while same and (at := first_other(self._places, self._seen, start)) >= 0:
            watched = self._dicts[at]
            same = watched is not None and watched.is_same()
            self.writes += 1
            self._seen[at] = _read(self._places[at])
            start = at + 1
        if not same:
            self.changes += 1
            self._forget()
        return not same


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
        of_key = _KEY.fullmatch(guard.name)
        path = guard.name if of_key is None else of_key[1]
        name = next((n for n in names if path.startswith(f"{n}.")), None)
        if (
            name is not None
            and kept.holder(path.removeprefix(name), guard.value if of_key is None else _DICT) is not None
        ):
            keep[i] = False
    kept.settle()
    return keep

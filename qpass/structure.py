"""What the graphs of a compiled module take for granted of its modules, looked at in one sweep.

Dynamo guards each attribute that it read, of each module, at each call: for a small language model some thousand guards, which
take as long as a quarter of its linears. They hold as long as nobody writes to the dicts that keep the attributes. CPython counts
such writes, so qpass looks at the counts, and has Dynamo leave those guards out.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import re
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qpass.graph.torch_private import captured_code, guard_owner, is_graph_fragment, place_of
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
#: After so many changes Dynamo's own guards are kept: they tell states apart, and it remembers the graphs of each.
MOST_CHANGES = 1
#: An attribute of the root, see Structure.
EPOCH = "_qpass_epoch"
_epochs = itertools.count(1)
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_STEP = re.compile(r"\._modules\['([^']+)'\]")
_LAST = re.compile(r"\._(modules|parameters|buffers)|\._parameters\['([^']+)'\]|\.(\w+)")
#: A guard on one of the keys of a dict; and what stands for that dict then.
_KEY, _DICT = re.compile(r"list\(dict\.keys\((.*)\)\)\[\d+\]"), object()
#: Guards on whether a module has an attribute.
_ASKING = ("NOT_PRESENT_IN_GENERIC_DICT", "HASATTR")
#: In the place of what a dict has not.
_NOTHING = object()
_requires_grad = attrgetter("requires_grad")


class _Kept:
    """A dict, and what it held, or held not, under the keys that matter. `keys`: all of them in order, if that matters."""

    def __init__(self, kept: dict[Any, Any]) -> None:
        self.kept, self.marks = kept, dict[Any, Any]()
        self.keys: list[Any] | None = None

    def is_same(self) -> bool:
        """Whether it holds that now."""
        ordered = self.keys is None or list(self.kept) == self.keys
        return ordered and all(_is_same(self.kept.get(key, _NOTHING), mark) for key, mark in self.marks.items())


class Structure:
    """The modules below `root`, their QTensors and constants, as they were when graphs were made of them.

    It keeps them, and is kept by the compiled call of `root` alone. Graphs that rely on it hold for one value of the attribute
    EPOCH of `root`, which no other module has, and which is another one after a change.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = weakref.ref(root)
        self.changes = 0
        #: Counts up when a write was seen, whatever was written.
        self.writes = 0
        #: The frame that is being captured, if its graph relies on this.
        self.frame: CodeType | None = None
        self._lock = threading.RLock()
        self._forget(root)

    def _forget(self, root: nn.Module) -> None:
        root.__dict__[EPOCH] = next(_epochs)
        self._at: dict[int, int] = {}  # a place in memory -> its number
        self._watched: list[_Kept | nn.Module] = []  # of each place: a dict, or the module whose type it is
        self._places, self._seen = array("Q"), array("Q")
        self._tensors: dict[int, Tensor] = {}  # Parameters in float, whose contents may be exchanged; by their id
        self._bundle: Tensor | None = None
        self._layouts: tuple[Any, ...] = ()

    @property
    def is_watched(self) -> bool:
        """Whether a change will be seen."""
        return _IS_SO and self.changes < MOST_CHANGES and can_look()

    def keepers(
        self, gm: GraphModule, inputs: Sequence[Any], read: Collection[int]
    ) -> dict[int, tuple[nn.Module, str]]:
        """The inputs of a graph being captured that need not be passed: Parameters -> the module that keeps each, and its name
        there. None of a graph that is not all of its call. `read`: inputs that are read as they are; a QTensor is passed there.
        """
        code, found, self.frame = captured_code(), dict[int, tuple[nn.Module, str]](), None
        if code is None or is_graph_fragment(gm):
            return {}
        for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
            fetched = isinstance(value, nn.Parameter) and not (isinstance(value, QTensor) and i in read)
            root, path = (fetched and place_of(node)) or (None, "")
            keeper = self.keeper(path, value) if root is not None and root is self.root() else None
            if keeper is not None:
                found[i], last = keeper, node
        if not found or not guard_owner(last, EPOCH):
            return {}
        self.frame = code
        return found

    def keeper(self, path: str, value: Any, asked: str | None = None) -> tuple[nn.Module, str] | None:
        """The module that keeps `value`, or is it, and the last name of this path below the root (as Dynamo writes it), if it is
        there and a part of the structure; then `has_changed` will tell if it is not there any more. `asked`: whether that module
        has such an attribute matters too."""
        with self._lock:
            return self._keeper(path, value, asked)

    def _keeper(self, path: str, value: Any, asked: str | None) -> tuple[nn.Module, str] | None:
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
        last, own, name = _LAST.fullmatch(path), module.__dict__, ""
        if not path:
            known = module is value
            if asked is not None:
                on_the_way.append((own, asked))
                on_the_way += [(own[name], "") for name in ("_modules", "_parameters", "_buffers")]
        elif last is None:
            known = False
        elif last[1]:
            name = f"_{last[1]}"
            on_the_way += [(own, name), (own[name], "")]
            known = value is own[name] or value is _DICT
        elif last[2]:
            name = last[2]
            on_the_way += [(own, "_parameters"), (module._parameters, name)]
            found = module._parameters.get(name, self)
            plain = type(value) is nn.Parameter and value.layout == torch.strided and not value.is_nested
            known = found is value and (value is None or isinstance(value, QTensor) or plain)
            if known and plain:
                self._watch_layout(value)
        else:
            name = last[3]
            on_the_way.append((own, name))
            known = own.get(name, self) is value and isinstance(value, _CONSTANTS) and name != EPOCH
        if known:
            self._watch_all(modules, on_the_way)
        return (module, name) if known else None

    def _watch_layout(self, tensor: Tensor) -> None:
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = tensor
            self._bundle = None

    def settle(self) -> None:
        """From now on changes of layouts are seen too."""
        with self._lock:
            if self._tensors and self._bundle is None:
                self._bundle = bundle(list(self._tensors.values()))
                self._layouts = self._look()

    def _look(self) -> tuple[Any, ...]:
        if self._bundle is None:
            return ()
        return layouts_of(self._bundle), *map(_requires_grad, self._tensors.values())

    def _watch_all(self, modules: Sequence[nn.Module], items: Sequence[tuple[dict[str, Any], str]]) -> None:
        for module in modules:
            if id(module) + _TYPE not in self._at:
                self._watch(id(module) + _TYPE, module)
                for base in type(module).__mro__[:-1]:
                    kept = _dict_of(base)
                    self._watch_dict(kept, kept, ordered=True)
        for kept, name in items:
            is_own = any(kept is module.__dict__ for module in modules)
            self._watch_dict(kept, [name] if name else [], ordered=not is_own)

    def _watch_dict(self, kept: dict[str, Any], names: Iterable[str], ordered: bool) -> None:
        watched = self._watch(id(kept) + _VERSION, kept)
        watched.marks |= {name: _mark(kept.get(name, _NOTHING)) for name in names if name not in watched.marks}
        if ordered and watched.keys is None:
            watched.keys = list(kept)

    def _watch(self, place: int, of: Any) -> Any:
        if place not in self._at:
            self._at[place] = len(self._places)
            self._watched.append(_Kept(of) if isinstance(of, dict) else of)  # and so nothing that is read goes
            self._seen.append(_read(place))
            self._places.append(place)
        return self._watched[self._at[place]]

    def has_changed(self) -> bool:
        """Whether graphs that took it for granted do not hold any more. A QTensor may become another of its size and type."""
        with self._lock:
            self.settle()
            same = self._look() == self._layouts
            start = 0
            while same and (at := first_other(self._places, self._seen, start)) >= 0:
                watched = self._watched[at]
                same = isinstance(watched, _Kept) and watched.is_same()
                self.writes += 1
                self._seen[at] = _read(self._places[at])
                start = at + 1
            root = self.root()
            if not same and root is not None:
                self.changes += 1
                self._forget(root)
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


def watched(call: Callable[..., Any], structure: Structure) -> Callable[..., Any]:
    """A compiled call that is captured anew once the structure has changed."""

    @functools.wraps(call)
    def look_and_call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # nor traced by another compiler around it
            structure.has_changed()
        return call(*args, **kwargs)

    return look_and_call


def needed_guards(structure: weakref.ref[Structure], guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are checked at each call: all but those inside of QTensors, and those on the structure."""
    keep, kept = guards_beside_the_lookup(guards), structure()
    if kept is None or captured_code() is not kept.frame:
        return keep
    kept.frame = None
    root = kept.root()
    names = {g.name for g in guards if g.value is root and re.fullmatch(r"\w+(\[\d+\])?", g.name)}
    for i, guard in enumerate(guards):
        asked = getattr(guard.orig_guard.create_fn, "keywords", {}).get("attr")
        # Two names of one tensor: of a QTensor no more is watched than what it looks like.
        if guard.guard_type == "DUPLICATE_INPUT" or (guard.guard_type in _ASKING and asked is None):
            continue
        of_key = _KEY.fullmatch(guard.name)
        path = guard.name if of_key is None else of_key[1]
        name = next((n for n in names if path.startswith(f"{n}.")), None)
        value = guard.value if of_key is None else _DICT
        if name is not None and kept.keeper(path.removeprefix(name), value, asked) is not None:
            keep[i] = False
    kept.settle()
    return keep

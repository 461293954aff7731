"""Where a node comes from: the module and the line of the model's code that it was traced at. Names play no part in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Node

#: (dotted path of the module, "file.py:line" without folders); "" for what is not known.
Place = tuple[str, str]

#: In a node's meta: the places of all that it stands for, where a rewrite put one node for several.
STANDS_FOR = "qpass_stands_for"
_ROOT = re.compile(r"^[LG](\[\s*'?[^\]]*?'?\])+\.?")
_CONTAINER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_LINE = re.compile(r'File "([^"]*)", line (\d+)')


def place_of(node: Node) -> Place:
    """The place of a node; of an input that has none, that of its first reader."""
    if node.op == "placeholder" and not node.meta.get("nn_module_stack") and node.users:
        reader = next(iter(node.users))
        return _module(reader.meta), _source(reader.meta)
    return _module(node.meta), _source(node.meta)


def places_of(node: Node) -> tuple[Place, ...]:
    """Its own place, and those of the nodes that it stands for."""
    return tuple(dict.fromkeys((place_of(node), *node.meta.get(STANDS_FOR, ()))))


def stand_for(new: Iterable[Node], old: Sequence[Node]) -> None:
    """Note on nodes that a rewrite inserts which ones they replace: they lie in the module and at the line of the first."""
    old = list(old)
    places = tuple(dict.fromkeys(place for n in old for place in places_of(n)))
    for node in new:
        for key in ("nn_module_stack", "stack_trace"):
            if not node.meta.get(key) and old[0].meta.get(key):
                node.meta[key] = old[0].meta[key]
        node.meta[STANDS_FOR] = places


def _module(meta: dict[str, Any]) -> str:
    """Dotted path of the innermost module, without what Dynamo calls the root: L['self'], L['args'][0]."""
    stack = meta.get("nn_module_stack")
    if not stack:
        return ""
    path = _ROOT.sub("", str(next(reversed(list(stack.values())))[0]))
    path = _CONTAINER.sub(r".\1", f".{path}").strip(".")
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)


def _source(meta: dict[str, Any]) -> str:
    """Of the innermost frame; never the folder, which is of the machine."""
    trace = meta.get("stack_trace") or ""
    found = _LINE.search(trace, max(0, trace.rfind('File "')))
    if found is None:
        return ""
    return found[1].replace("\\", "/").rpartition("/")[2] + f":{found[2]}"

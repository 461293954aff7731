"""Operators that follow one another become one call on the CPU, where a decode step of a small model is made of calls.

It is no rewrite of a site: what is computed stays as it was, and a diff shows the operators.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qpass.graph.flow import memory_of
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import op_name, set_value, value_of, writes, written_by
from qpass.ops.row import TYPED, VIEW, Call, Row

#: Operators that a row may hold. It begins with a linear.
_NAMES = ("linear", "attention", "append", "append_rotated", "write_rotated")
_OPERATORS = {getattr(torch.ops.qpass, name).default: name for name in _NAMES}
#: Those whose result lies in order in memory, so that it is known what a view of it sees.
_IN_ORDER = ("linear", "attention")
#: What may look at the same memory in another way.
_VIEWS = {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "getitem", "split",
    "chunk", "split_with_sizes", "select", "narrow",
}  # fmt: skip
#: Types that bytes of a cache are looked at as.
_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@dataclass
class _Members:
    """Nodes of a row that may yet grow. `seen`: what a node is in memory, as a tensor without data, where that is known."""

    nodes: list[Node] = field(default_factory=list)
    seen: dict[Node, Any] = field(default_factory=dict)
    targets: set[Node] = field(default_factory=set)
    #: Memory that it writes to, and other memory that it reads but does not make.
    written: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)

    @property
    def calls(self) -> list[Node]:
        """Without views and the getting of items."""
        return [n for n in self.nodes if n.target in _OPERATORS]

    def results(self) -> list[Node] | None:
        """What nodes outside of the row read; None if that is a view."""
        inside, found = set(self.nodes), []
        for node in self.nodes:
            if all(user in inside for user in node.users):
                continue
            if not isinstance(value_of(node), Tensor) or not (node.target in _OPERATORS or _is_item(node)):
                return None
            found.append(node)
        return found


def join_calls(graph_module: GraphModule) -> None:
    """Calls of qpass, each of what those before it give -> one qpass::row at the place of the last of them.

    It gives one result, or two, so many as are read elsewhere."""
    nodes, joined = list(graph_module.graph.nodes), set[Node]()
    rows = []
    for i, node in enumerate(nodes):
        value = value_of(node) if _OPERATORS.get(node.target) == "linear" and node not in joined else None
        if value is not None and value.device.type == "cpu":
            row = _row_from(nodes[i:], joined)
            joined.update(row)
            rows += [row] if sum(n.target in _OPERATORS for n in row) > 1 else []
    for row in rows:
        _join(graph_module, row)
    graph_module.graph.lint()
    graph_module.recompile()


def _is_item(node: Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].target in _OPERATORS


def _row_from(nodes: Sequence[Node], joined: set[Node]) -> list[Node]:
    """The longest row from the first of these nodes on that may be computed at the place of its last; without those `joined`."""
    row, best = _Members(), list[Node]()
    for node in nodes:
        inside = any(n in row.seen for n in node.all_input_nodes) or _is_typed(row, node)
        if not row.nodes or inside:
            if node in joined or not _grow(row, node):
                return best  # it reads the row, and what comes after it may not move before it
        elif not _may_pass(row, node):
            return best
        if row.nodes and row.nodes[-1] is node and (results := row.results()) is not None and 0 < len(results) <= 2:
            best = list(row.nodes)
    return best


def _may_pass(row: _Members, node: Node) -> bool:
    """Whether the row may be computed after a node that is behind its first: neither sees what the other writes."""
    changed = memory_of(written_by(node))
    if writes(node) and not changed:
        return False  # nobody knows what
    return not changed & (row.read | row.written) and not memory_of(node.all_input_nodes) & row.written


def _grow(row: _Members, node: Node) -> bool:
    """Takes a node into the row, if it may hold it."""
    name = _OPERATORS.get(node.target)
    if name is None:
        seen = _look(row, node)
        if seen is None:
            return False
        row.seen[node] = seen
    else:
        targets = [n for n in written_by(node) if n not in row.targets]
        given = [n for n in node.all_input_nodes if n not in row.seen and n not in row.targets and n not in targets]
        written, read = memory_of(targets), memory_of(given)
        # What is written to is one input, and no view of it is another.
        if any(n in row.seen for n in targets) or written & (row.read | row.written) or read & (row.written | written):
            return False
        row.targets.update(targets)
        row.written |= written
        row.read |= read
        row.seen[node] = _in_order(node) if name in _IN_ORDER else ()
    row.nodes.append(node)
    return True


def _is_typed(row: _Members, node: Node) -> bool:
    """Whether it looks at what the row has written to as another type of as many bytes."""
    to = node.args[1] if op_name(node) == "view" and len(node.args) == 2 and node.args[0] in row.targets else None
    return to in _BYTES and value_of(node.args[0]).dtype.itemsize == 1  # type: ignore[arg-type]


def _in_order(node: Node) -> Any:
    """A tensor without data of the size of a result; () where sizes are not known."""
    value = value_of(node)
    known = value is not None and all(isinstance(n, int) for n in value.shape)
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if known else ()


def _look(row: _Members, node: Node) -> Any:
    """What a view of a member sees, or a piece; () for an item of a call, and for what is written to, as another type; None for
    all else."""
    if _is_item(node) or _is_typed(row, node):
        return ()
    source = node.args[0] if node.args else None
    known = row.seen.get(source) if isinstance(source, Node) else None
    first = known[0] if isinstance(known, tuple) and known else known  # pieces share one memory
    if not isinstance(first, Tensor) or len(node.all_input_nodes) != 1 or op_name(node) not in _VIEWS:
        return None
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    seen = function(known, *node.args[1:], **node.kwargs)
    pieces = [seen] if isinstance(seen, Tensor) else list(seen)
    memory = first.untyped_storage()._cdata
    same = all(isinstance(p, Tensor) and (p.untyped_storage()._cdata, p.dtype) == (memory, first.dtype) for p in pieces)
    return (seen if isinstance(seen, Tensor) else tuple(pieces)) if same else None


# --- one call in the place of many ------------------------------------------------------------------------------------


def _join(graph_module: GraphModule, nodes: Sequence[Node]) -> None:
    graph, inside = graph_module.graph, set(nodes)
    row = _Members(list(nodes))
    calls = row.calls
    written = list(dict.fromkeys(n for call in calls for n in written_by(call)))
    given = (n for call in calls for n in call.all_input_nodes if n not in inside and n not in written)
    inputs = list(dict.fromkeys(given))
    results = row.results()
    assert results
    numbers = {n: i for i, n in enumerate([*inputs, *written])}
    made = tuple(_calls(nodes, numbers, len(numbers)))
    text = str(Row(made, tuple(numbers[n] for n in results)))
    with graph.inserting_after(nodes[-1]):
        new = graph.call_function(torch.ops.qpass.row.default, (None, inputs, written, text))
    with graph.inserting_after(new):
        items = [graph.call_function(operator.getitem, (new, i)) for i in range(len(results))]
    stand_for([new, *items], calls)
    for node, item in zip(results, items, strict=True):
        set_value(item, value_of(node))
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)


def _calls(nodes: Sequence[Node], numbers: dict[Node, int], free: int) -> Iterator[Call]:
    """The calls of a row; fills in the registers of its nodes, `free` being the first that holds nothing."""
    views = _Members()
    for node in nodes:
        name = _OPERATORS.get(node.target)
        if name is not None:
            for read in dict.fromkeys(node.all_input_nodes):
                root = _root(read)
                if read in views.seen and read is not root and read not in numbers:
                    seen = views.seen[read]
                    numbers[read] = numbers[root]
                    if not _is_same(seen, views.seen[root]):
                        yield Call(VIEW, (numbers[root], tuple(seen.shape), seen.stride(), seen.storage_offset()))
                        numbers[read], free = free, free + 1
            views.seen[node] = _in_order(node) if name in _IN_ORDER else ()
            yield Call(name, tuple(_numbered(a, numbers) for a in _arguments(node)))
            numbers[node] = free
            free += len(node.target._schema.returns)  # type: ignore[union-attr]
        elif _is_item(node):
            call, which = node.args
            numbers[node] = numbers[call] + int(which)  # type: ignore[index, arg-type]
        elif isinstance(node.args[-1], torch.dtype):
            yield Call(TYPED, (numbers[node.args[0]], str(node.args[1]).removeprefix("torch.")))  # type: ignore[index]
            numbers[node], free = free, free + 1
        else:
            views.seen[node] = _look(views, node)


def _root(node: Node) -> Node:
    """The call whose result a view sees."""
    while op_name(node) in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def _arguments(node: Node) -> list[Any]:
    """All that the schema names."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in schema.arguments]


def _numbered(argument: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(argument, Node):
        return numbers[argument]
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return tuple(numbers[n] for n in argument)
    return argument

"""Which nodes of two graphs are the same, by provenance, and which of the others stand for each other. Knows torch only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import Parameter

from qpass.graph.provenance import STANDS_FOR, Place, place_of, places_of
from qpass.graph.vocabulary import op_name, shape_of, value_of


def pairs_of(before: Graph, after: Graph) -> dict[Node, Node]:
    """Node after -> the node before that it is: of the same place, operation and shape; or of the same module, where lines
    have moved. Shapes are compared if both graphs are of one call.
    """
    shapes = _input_shapes(before) == _input_shapes(after)
    keys: list[Callable[[Node], object]] = [
        lambda n: (place_of(n), _identity(n, shapes)),
        lambda n: (place_of(n)[0], _identity(n, shapes)),
    ]
    found: dict[Node, Node] = {}
    for key in keys:
        taken = set(found.values())
        waiting: dict[object, list[Node]] = defaultdict(list)
        for node in before.nodes:
            if node not in taken:
                waiting[key(node)].append(node)
        for node in after.nodes:
            alike = waiting.get(key(node)) if node not in found else None
            if alike:  # of several that are alike in all but their names, the one that has the same
                i = next((i for i, n in enumerate(alike) if n.name == node.name), 0)
                found[node] = alike.pop(i)
    return found


def in_order(before: Graph, after: Graph, pairs: Mapping[Node, Node]) -> Iterator[tuple[Node, str]]:
    """All nodes with their status, in the order of both graphs: what was removed stands where it was among what is kept."""
    order = {n: i for i, n in enumerate(before.nodes)}
    kept, last = set(pairs.values()), len(order)
    waiting = [n for n in before.nodes if n not in kept][::-1]
    until: dict[Node, int] = {}  # the place before of the next node that is kept
    for node in reversed(after.nodes):
        until[node] = last = order[pairs[node]] if node in pairs else last
    for node in after.nodes:
        while waiting and order[waiting[-1]] < until[node]:
            yield waiting.pop(), "removed"
        yield node, "kept" if node in pairs else "added"
    yield from ((node, "removed") for node in reversed(waiting))


def groups_of(nodes: Sequence[Node]) -> dict[Node, int]:
    """Number of the group of each node: nodes that share a place, directly or through others, are one group."""
    parent: dict[Place, Place] = {}

    def root(place: Place) -> Place:
        while (above := parent.setdefault(place, place)) != place:
            parent[place] = place = parent[above]
        return place

    places = [(node, places_of(node)) for node in nodes]
    for _, (first, *others) in places:
        for other in others:
            parent[root(other)] = root(first)
    numbers: dict[Place, int] = {}
    return {node: numbers.setdefault(root(where[0]), len(numbers)) for node, where in places}


def _identity(node: Node, shapes: bool) -> object:
    """What it is, but for its name: an input that is stored (a weight, a part of one) always by its shape."""
    if node.op == "placeholder":
        stored = "label" in node.meta or isinstance(value_of(node), Parameter)
        kind = type(value_of(node)).__name__  # a tensor, or a size
        return node.op, kind, node.meta.get("label"), str(shape_of(node)) if shapes or stored else None
    inserted = STANDS_FOR in node.meta
    return (
        node.op,
        op_name(node) or str(node.target),
        formats_in(node),
        inserted,
        str(shape_of(node)) if shapes else None,
    )


def _input_shapes(graph: Graph) -> list[str]:
    """Of what the caller gives: integers, masks, caches; no Parameters."""
    given = [n for n in graph.nodes if n.op == "placeholder" and "label" not in n.meta]
    values = [v for n in given if isinstance(v := value_of(n), Tensor) and not isinstance(v, Parameter)]
    return sorted(str(tuple(v.shape)) for v in values if not v.is_floating_point())


def formats_in(node: Node) -> tuple[str, ...]:
    """The formats that an operator of qpass is told, and its gate."""
    return tuple(a for a in node.args if a and isinstance(a, str)) if op_name(node).startswith("qpass::") else ()

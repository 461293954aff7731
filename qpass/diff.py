"""qpass.diff: a graph before and after, as nodes removed, added and kept. Knows torch.fx only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch.fx import Graph, Node

from qpass.graph.vocabulary import op_name, shape_of


@dataclass(frozen=True)
class NodeChange:
    """One node. `status`: removed, added or kept. `module`: the module it was traced in. `text`: what it computes."""

    status: str
    name: str
    module: str
    text: str


@dataclass(frozen=True)
class GraphDiff:
    """The nodes of one captured graph: those only in the graph before, only in the graph after, and in both."""

    nodes: tuple[NodeChange, ...]

    def count(self, status: str) -> int:
        """How many nodes were removed, added or kept."""
        return sum(n.status == status for n in self.nodes)

    def blocks(self) -> list[tuple[str, int, list[NodeChange]]]:
        """(module pattern, repetitions, changes of one repetition): modules that differ only in an index are folded."""
        by_module: dict[str, list[NodeChange]] = {}
        for node in self.nodes:
            if node.status != "kept":
                by_module.setdefault(node.module, []).append(node)
        folded: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[int, list[NodeChange]]] = {}
        for module, changes in by_module.items():
            key = (re.sub(r"\b\d+\b", "*", module), tuple((c.status, c.text) for c in changes))
            count, first = folded.get(key, (0, changes))
            folded[key] = (count + 1, first)
        return [(pattern, count, changes) for (pattern, _), (count, changes) in folded.items()]


@dataclass(frozen=True)
class Diff:
    """The diffs of all graphs of a model. `print(diff)` folds repeated blocks; `to_json()` gives plain data."""

    graphs: tuple[GraphDiff, ...]

    def to_json(self) -> dict[str, Any]:
        """{"graphs": [{"removed", "added", "kept", "nodes": [...]}]} as plain data for json.dumps."""
        return {
            "graphs": [
                {s: g.count(s) for s in ("removed", "added", "kept")} | {"nodes": [asdict(n) for n in g.nodes]}
                for g in self.graphs
            ]
        }

    def summary(self) -> str:
        """One line a graph."""
        lines = (
            f"graph {i}: {g.count('removed')} nodes removed, {g.count('added')} added, {g.count('kept')} kept"
            for i, g in enumerate(self.graphs, 1)
        )
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.text import Text

        text = Text()
        for i, graph in enumerate(self.graphs):
            text.append(self.summary().splitlines()[i] + "\n", "bold")
            for line, status in _lines(graph):
                text.append(line + "\n", {"removed": "red", "added": "green"}.get(status, "cyan"))
        return text

    def __str__(self) -> str:
        return str(self.__rich__()).rstrip()


def _lines(graph: GraphDiff) -> Iterator[tuple[str, str]]:
    for pattern, count, changes in graph.blocks():
        yield f"  {pattern or '(inputs)'}" + (f"  x{count}" if count > 1 else ""), "module"
        for change in changes:
            yield f"    {'-' if change.status == 'removed' else '+'} {change.text}", change.status


def diff_graphs(before: Graph, after: Graph) -> GraphDiff:
    """Compare two graphs node by node: a node is kept if its name, operation and arguments' shape are the same."""
    old, new = {n.name: n for n in before.nodes}, {n.name: n for n in after.nodes}
    kept = {name for name, node in new.items() if name in old and _same(node, old[name])}
    nodes = [NodeChange("removed", n.name, _module(n), _text(n)) for n in before.nodes if n.name not in kept]
    nodes += [NodeChange("kept" if n.name in kept else "added", n.name, _module(n), _text(n)) for n in after.nodes]
    return GraphDiff(tuple(nodes))


def _same(a: Node, b: Node) -> bool:
    return a.op == b.op and (a.op in ("placeholder", "output") or a.target == b.target)


def _module(node: Node) -> str:
    """Dotted path of the innermost module that the node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    inside = re.sub(r"^[LG](\['?\w+'?\])+", "", str(path)).replace("_modules", "")  # without L['self'] or L['args'][0]
    return ".".join(re.findall(r"[A-Za-z_]\w*|\d+", inside))


def _text(node: Node) -> str:
    shape = shape_of(node)
    where = "" if shape is None else f" -> [{', '.join(map(str, shape))}]"
    if node.op == "placeholder":
        return f"input {node.meta.get('label', 'weight' if _module(node) else node.name)}{where}"
    specs = [a for a in node.args if isinstance(a, str) and op_name(node).startswith("qpass::")]
    return f"{op_name(node) or node.op}{'(' + ', '.join(specs) + ')' if specs else ''}{where}"

"""qpass.diff: two graphs, node by node, matched by where their nodes come from. Knows torch.fx only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import Graph, Node
from torch.nn import Parameter

from qpass.graph.pairs import formats_in, groups_of, in_order, pairs_of
from qpass.graph.provenance import place_of
from qpass.graph.vocabulary import op_name, shape_of, value_of


@dataclass(frozen=True)
class NodeChange:
    """One node. `status`: removed, added or kept. `module`, `source`: where it was traced, dotted path and "file.py:line".

    `op`: what it calls. `text`: the same with the format and the shape. `code`: its line of the graph. `inputs`: names of the
    nodes that it reads. `site`: "<kind> <name>" of the site that it is a part of, "" for none. `group`: nodes removed and added
    under one number stand for each other; None if it is kept.
    """

    status: str
    name: str
    module: str
    source: str
    op: str
    text: str
    code: str = ""
    inputs: tuple[str, ...] = ()
    site: str = ""
    group: int | None = None


@dataclass(frozen=True)
class Group:
    """Nodes before and nodes after that come from the same places: one float linear and the many nodes that quantize it, or
    three linears and the operator that computes them all. One side may be empty."""

    before: tuple[NodeChange, ...]
    after: tuple[NodeChange, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose weights were replaced; if there are none, those of all its nodes."""
        weights = [n.module for n in self.before if n.op == "input"]
        return tuple(dict.fromkeys(weights or [n.module for n in (*self.before, *self.after)]))


@dataclass(frozen=True)
class GraphDiff:
    """The nodes of one graph: those only in the graph before, only in the graph after, and in both (told once)."""

    nodes: tuple[NodeChange, ...]

    def count(self, status: str) -> int:
        """How many nodes were removed, added or kept; "changed": how many groups have both sides."""
        if status == "changed":
            return sum(bool(g.before and g.after) for g in self.groups())
        return sum(n.status == status for n in self.nodes)

    def groups(self) -> list[Group]:
        """What is not kept, in the order of the first node of each group."""
        sides: dict[int, tuple[list[NodeChange], list[NodeChange]]] = {}
        for node in self.nodes:
            if node.group is not None:
                sides.setdefault(node.group, ([], []))[node.status == "added"].append(node)
        return [Group(tuple(before), tuple(after)) for before, after in sides.values()]

    def blocks(self) -> list[tuple[str, int, list[NodeChange]]]:
        """(module pattern, repetitions, changes of one repetition): modules that differ only in an index are folded."""
        by_modules: dict[tuple[str, ...], list[NodeChange]] = {}
        for group in self.groups():
            by_modules.setdefault(group.modules, []).extend((*group.before, *group.after))
        folded: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[int, list[NodeChange]]] = {}
        for modules, changes in by_modules.items():
            key = (pattern_of(modules), tuple((c.status, c.text) for c in changes))
            count, first = folded.get(key, (0, changes))
            folded[key] = (count + 1, first)
        return [(pattern, count, changes) for (pattern, _), (count, changes) in folded.items()]


@dataclass(frozen=True)
class Histogram:
    """Of positive numbers, on an axis of powers of two. `counts[i]` of them lie from 2^(start + i * step) to one step more.

    `low`, `high`: of all `total` numbers. The counts are of `counted` of them, evenly strided.
    """

    start: float
    step: float
    counts: tuple[int, ...]
    low: float
    high: float
    counted: int
    total: int


@dataclass(frozen=True)
class SiteSide:
    """A site on one side. `format`: None for float, of which `dtype` says which. `skipped`: why it stays in float.

    `compute`: what its products are computed in. `scales`: the numbers that multiply its codes, where they are at hand.
    """

    format: str | None
    nbytes: int
    dtype: str = ""
    sqnr_db: float | None = None
    skipped: str | None = None
    compute: str | None = None
    scales: Histogram | None = None


@dataclass(frozen=True)
class SiteDetail:
    """A site before and after; None on a side that does not have it."""

    kind: str
    name: str
    before: SiteSide | None
    after: SiteSide | None

    @property
    def key(self) -> str:
        """What `NodeChange.site` says."""
        return f"{self.kind.split('+')[0]} {self.name}"


@dataclass(frozen=True)
class Diff:
    """The diffs of all graphs of a model, and its sites. `print(diff)` folds repeated blocks."""

    graphs: tuple[GraphDiff, ...]
    sites: tuple[SiteDetail, ...] = ()
    title: str = "qpass diff"

    @property
    def same(self) -> bool:
        """Whether no node was removed or added, and every site is stored as it was."""
        kept = all(node.status == "kept" for graph in self.graphs for node in graph.nodes)
        formats = ((s.before and s.before.format, s.after and s.after.format) for s in self.sites)
        return kept and all(before == after for before, after in formats)

    def to_json(self) -> dict[str, Any]:
        """{"title", "same", "graphs": [{"removed", .., "nodes": [..]}], "sites": [..]} as plain data for json.dumps."""
        counted = ("removed", "added", "kept", "changed")
        return {
            "title": self.title,
            "same": self.same,
            "graphs": [
                {s: g.count(s) for s in counted} | {"nodes": [vars(n) | {"inputs": list(n.inputs)} for n in g.nodes]}
                for g in self.graphs
            ],
            "sites": [{"key": s.key} | asdict(s) for s in self.sites],
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else, to look at in a browser. Written to `path`, if given, whole or not at all."""
        from qpass.seeing.html.page import page

        return page("diff", self.title, self.to_json(), path)

    def _repr_html_(self) -> str:
        from qpass.seeing.html.page import in_notebook

        return in_notebook(self.to_html())

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


def pattern_of(modules: Sequence[str]) -> str:
    """("layers.0.attn.q", "layers.0.attn.k") -> "layers.*.attn.q, k"."""
    paths = [re.sub(r"(?<![^.])\d+(?![^.])", "*", m).split(".") for m in modules]
    parents = {tuple(p[:-1]) for p in paths}
    if len(parents) > 1:
        return ", ".join(".".join(p) for p in paths)
    return ".".join([*parents.pop(), ", ".join(dict.fromkeys(p[-1] for p in paths))])


def _lines(graph: GraphDiff) -> Iterator[tuple[str, str]]:
    for pattern, count, changes in graph.blocks():
        yield f"  {pattern or '(inputs)'}" + (f"  x{count}" if count > 1 else ""), "module"
        for change in changes:
            yield f"    {'-' if change.status == 'removed' else '+'} {change.text}", change.status


#: Name of a node -> "<kind> <name>" of its site.
Sites = Mapping[str, str]


def diff_graphs(before: Graph, after: Graph, sites: tuple[Sites, Sites] = ({}, {})) -> GraphDiff:
    """Compare two graphs node by node, by provenance. `sites`: what is known of nodes before and after.

    What is left of one place on both sides is one group.
    """
    pairs = pairs_of(before, after)
    nodes = list(in_order(before, after, pairs))
    group_of = groups_of([node for node, status in nodes if status != "kept"])

    def told(node: Node, status: str) -> NodeChange:
        known = sites[status != "removed"].get(node.name, "")
        inputs = tuple(n.name for n in node.all_input_nodes)
        described = (*place_of(node), _operation(node), _text(node), _code(node))
        return NodeChange(status, node.name, *described, inputs, known, group_of.get(node))

    return GraphDiff(tuple(_sites_of_groups([told(node, status) for node, status in nodes])))


def _sites_of_groups(nodes: Sequence[NodeChange]) -> Iterator[NodeChange]:
    """A node whose site is not known is of that of its module in its group, or of its group."""
    known: dict[object, str] = {}
    for node in nodes:
        if node.site and node.group is not None:
            known.setdefault((node.group, node.module), node.site)
            known.setdefault(node.group, node.site)
    for node in nodes:
        found = node.site or known.get((node.group, node.module)) or known.get(node.group)
        yield replace(node, site=found) if found and node.group is not None else node


# --- describing ---------------------------------------------------------------------------------------------------------


def _operation(node: Node) -> str:
    return "input" if node.op == "placeholder" else op_name(node) or node.op


def _text(node: Node) -> str:
    shape = shape_of(node)
    where = "" if shape is None else f" -> [{', '.join(map(str, shape))}]"
    if node.op == "placeholder":
        name = "weight" if isinstance(value_of(node), Parameter) else node.name
        return f"input {node.meta.get('label', name)}{where}"
    specs = formats_in(node)
    return f"{_operation(node)}{'(' + ', '.join(specs) + ')' if specs else ''}{where}"


def _code(node: Node) -> str:
    """Its line, without the counts of users that fx adds; paths in constants are of the machine, and cut."""
    if node.op == "output":
        return f"return {node.args[0]}"
    line = node.format_node() or ""
    return re.sub(r" : (?:[\w.]+ )?\[num_users=\d+\]", "", line)

"""Two ONNX files, node by node: what quantizing took away and what it put there, module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from qpass.errors import QpassError
from qpass.seeing.diff import Diff, GraphDiff, NodeChange, SiteDetail, SiteSide
from qpass_export.provenance import SITE, module_of

#: Attributes that say how a node quantizes.
_TOLD = ("axis", "block_size", "bits", "output_dtype")


#: What torch.onnx calls the module of nodes that have none.
_NO_MODULE = "_empty_nn_module_stack"
#: Types of stored weights that nothing was quantized to.
_FLOATS = {"float", "double", "float16", "bfloat16"}


@dataclass(frozen=True)
class _File:
    """The nodes of a file, as kept ones; for each which nodes make its inputs, in order, and the tensors that it stores."""

    nodes: tuple[NodeChange, ...]
    producers: tuple[tuple[int | None, ...], ...]
    stored: tuple[tuple[ir.TensorProtocol, ...], ...]


def diff_onnx(before: str | Path, after: str | Path) -> Diff:
    """The graph of a float export against that of a quantized one.

    Nodes are matched by what they are: module, operator, types and shapes of their constants; names change from export to
    export. What is left of a module on both sides is one group, with what stands in the place of it for the nodes that read it.
    Raises `QpassError` for what is no ONNX file.
    """
    old, new = _described(Path(before)), _described(Path(after))
    waiting: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, node in enumerate(old.nodes):
        waiting[node.module, node.text].append(i)
    pairs: dict[int, int] = {}
    for j, node in enumerate(new.nodes):
        alike = waiting.get((node.module, node.text))
        if alike:
            pairs[j] = alike.pop(0)
    group_of = _joined(old, new, pairs)
    numbers: dict[str, int] = {}
    nodes = [
        n if n.status == "kept" else replace(n, group=numbers.setdefault(group_of(n.module), len(numbers)))
        for n in _merged(old, new, pairs)
    ]
    title = f"{_name(before)} against {_name(after)}"
    return Diff((GraphDiff(tuple(nodes)),), _sites(old, new, group_of), title)


def _joined(old: _File, new: _File, pairs: dict[int, int]) -> Callable[[str], str]:
    """Module -> one for all that were fused: where a kept node read one module before, and another in its place after."""
    parent: dict[str, str] = {}

    def root(module: str) -> str:
        while parent.get(module, module) != module:
            module = parent[module]
        return module

    kept = set(pairs.values())
    for j, i in pairs.items():
        for before, after in zip(old.producers[i], new.producers[j], strict=False):
            if before is not None and after is not None and before not in kept and after not in pairs:
                parent[root(old.nodes[before].module)] = root(new.nodes[after].module)
    return root


def _name(path: str | Path) -> str:
    path = Path(path)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _merged(old: _File, new: _File, pairs: dict[int, int]) -> Iterator[NodeChange]:
    """What is in one file only stands where it was among what is in both, which is told once, with the new file."""
    kept = set(pairs.values())
    waiting = [i for i in range(len(old.nodes)) if i not in kept][::-1]
    for j, node in enumerate(new.nodes):
        while j in pairs and waiting and waiting[-1] < pairs[j]:
            yield replace(old.nodes[waiting.pop()], status="removed")
        yield node if j in pairs else replace(node, status="added")
    yield from (replace(old.nodes[i], status="removed") for i in reversed(waiting))


def _sites(old: _File, new: _File, group_of: Callable[[str], str]) -> tuple[SiteDetail, ...]:
    """Sites that the new file names, with what their modules store in either; fused ones together, under the name of one."""
    keys = {n.site: group_of(n.module) for n in new.nodes if n.site and not n.site.startswith("kv ")}

    def side(file: _File, module: str) -> SiteSide:
        stored = [c for n, of in zip(file.nodes, file.stored, strict=True) if group_of(n.module) == module for c in of]
        largest = max(stored, key=lambda c: c.nbytes, default=None)
        name = "" if largest is None else largest.dtype.name.lower()
        return SiteSide(name if name not in _FLOATS else None, sum(c.nbytes for c in stored), name)

    found = []
    for key, module in keys.items():
        kind, _, name = key.partition(" ")
        found.append(SiteDetail(kind, name, side(old, module), side(new, module)))
    return tuple(found)


def _described(path: Path) -> _File:
    """A site that was calibrated or fused bears its kind."""
    try:
        graph = ir.load(path).graph
    except Exception as error:
        raise QpassError(f"{path}: no ONNX file: {error}") from error
    position = {id(node): i for i, node in enumerate(graph)}
    producers = (tuple(None if v is None else position.get(id(v.producer())) for v in node.inputs) for node in graph)
    return _File(tuple(map(_node, graph)), tuple(producers), tuple(tuple(_stored(node)) for node in graph))


def _node(node: ir.Node) -> NodeChange:
    inputs = [v.producer() for v in node.inputs if v is not None]
    module = module_of(node)
    return NodeChange(
        "kept", str(node.name), "" if module.startswith(_NO_MODULE) else module, "", _operation(node), _text(node), _code(node),
        tuple(dict.fromkeys(str(p.name) for p in inputs if p is not None)), node.metadata_props.get(SITE, ""),
    )  # fmt: skip


def _code(node: ir.Node) -> str:
    given = ", ".join("" if v is None else str(v.name) for v in node.inputs)
    made = ", ".join(str(v.name) for v in node.outputs)
    attributes = [f"{a.name}={a.value}" for a in node.attributes.values() if not a.is_ref()]
    plain = [text for text in attributes if len(text) < 80]
    return f"{made} = {_operation(node)}({given})" + (f" {{{', '.join(plain)}}}" if plain else "")


def _operation(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _stored(node: ir.Node) -> list[ir.TensorProtocol]:
    constants = [v.const_value for v in node.inputs if v is not None]
    return [c for c in constants if c is not None and c.size > 1]


def _text(node: ir.Node) -> str:
    told = [f"{n}={node.attributes[n].as_int()}" for n in _TOLD if n in node.attributes]
    stored = [f"{c.dtype.name.lower()}{list(c.shape)}" for c in _stored(node)]
    site = node.metadata_props.get(SITE, "").split(" ")[0]
    return (
        f"{_operation(node)}({', '.join(told)}){' ' + ' '.join(stored) if stored else ''}{' # ' + site if site else ''}"
    )

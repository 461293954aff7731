"""Two ONNX files, node by node: what quantizing took away and what it put there, module by module."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import onnx_ir as ir

from qpass.diff import Diff, GraphDiff, NodeChange
from qpass.errors import QpassError
from qpass_export.provenance import SITE, module_of

#: Attributes that say how a node quantizes.
_TOLD = ("axis", "block_size", "bits", "output_dtype")


def diff_onnx(before: str | Path, after: str | Path) -> Diff:
    """The graph of a float export against that of a quantized one.

    Nodes are matched by what they are: module, operator, types and shapes of their constants; names change from export to export.
    Raises `QpassError` for what is no ONNX file.
    """
    old, new = (_described(Path(path)) for path in (before, after))
    kept = Counter((m, text) for m, text, _ in old) & Counter((m, text) for m, text, _ in new)
    changes = [*_changes(old, "removed", Counter(kept)), *_changes(new, "added", Counter(kept))]
    order: dict[str, list[NodeChange]] = defaultdict(list)
    for change in changes:
        order[change.module].append(change)
    return Diff((GraphDiff(tuple(c for group in order.values() for c in group)),))


def _changes(nodes: list[tuple[str, str, str]], status: str, kept: Counter[tuple[str, str]]) -> list[NodeChange]:
    """What is in one file only; what is in both is told once, with the new file."""
    found = []
    for module, text, name in nodes:
        both = kept[module, text] > 0
        kept[module, text] -= both
        if not both:
            found.append(NodeChange(status, name, module, text))
        elif status == "added":
            found.append(NodeChange("kept", name, module, text))
    return found


def _described(path: Path) -> list[tuple[str, str, str]]:
    """(module, what it is, name) of each node. A site that was calibrated or fused bears its kind."""
    try:
        graph = ir.load(path).graph
    except Exception as error:
        raise QpassError(f"{path}: no ONNX file: {error}") from error
    return [(module_of(node), _text(node), str(node.name)) for node in graph]


def _text(node: ir.Node) -> str:
    told = [f"{n}={node.attributes[n].as_int()}" for n in _TOLD if n in node.attributes]
    constants = [v for v in node.inputs if v is not None and v.const_value is not None and v.const_value.size > 1]
    stored = [
        f"{v.const_value.dtype.name.lower()}{list(v.const_value.shape)}" for v in constants if v.const_value is not None
    ]
    site = node.metadata_props.get(SITE, "").split(" ")[0]
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{name}({', '.join(told)}){' ' + ' '.join(stored) if stored else ''}{' # ' + site if site else ''}"

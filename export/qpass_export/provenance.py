"""Where a node comes from: its module and its site, and nothing else that torch writes down (stack traces with paths)."""

from __future__ import annotations

import ast

import onnx_ir as ir

#: Metadata of a node: the dotted path of its module; "<kind> <weight>" of the site that it computes.
MODULE, SITE = "qpass.module", "qpass.site"
_SCOPES = "pkg.torch.onnx.name_scopes"


def module_of(node: ir.Node) -> str:
    """The innermost module that torch traced a node in, "" for the model itself."""
    if MODULE in node.metadata_props:
        return node.metadata_props[MODULE]
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _module_before(node: ir.Node) -> str:
    """Of a node that a simplification made: where what it reads comes from."""
    producers = (value.producer() for value in node.inputs if value is not None)
    return next((module_of(p) for p in producers if p is not None and module_of(p)), "")


def keep_provenance(model: ir.Model) -> None:
    """Leave module and site on every node of the graph; take away all else."""
    for node in model.graph:
        kept = {MODULE: module_of(node) or _module_before(node)} | {
            k: v for k, v in node.metadata_props.items() if k == SITE
        }
        node.metadata_props.clear()
        node.metadata_props.update({k: v for k, v in kept.items() if v})
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()

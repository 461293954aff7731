"""The whole graph: every node of the domain "qpass" becomes nodes that a target runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qpass.spec import parse_spec
from qpass_export.lowering import attention, embedding, linear
from qpass_export.lowering.build import Build
from qpass_export.lowering.grouped_query import appended, grouped_query
from qpass_export.provenance import MODULE, SITE, module_of
from qpass_export.targets import Target
from qpass_export.translate import DOMAIN

#: Operators of a cache.
_CACHES = ("quantize", "read_cache", "dequantize", "attention")


def lower(model: ir.Model, target: Target, kinds: Mapping[str, str]) -> None:
    """Replace qpass's operators in place. `kinds`: name of a weight -> kind of its site. Where the target has onnxruntime's
    operators, a table that an embedding and a linear read is stored once, in their form."""
    graph = model.graph
    opset = graph.opset_imports[""]
    if target.grouped_query:
        _append_in_attention(graph, target)
    nodes = [node for node in graph if node.domain == DOMAIN]
    shared = _shared(nodes) if target.contrib else set()
    make: dict[str, Callable[[Build, ir.Node], ir.Value | Sequence[ir.Value]]] = {
        "linear": lambda b, n: linear.linear(b, n, _data_name(n) in shared),
        "integer_linear": linear.integer_linear,
        "experts": linear.experts,
        "quantize_input": linear.quantize_input,
        "round_input": linear.round_input,
        "embedding": lambda b, n: embedding.embedding(b, n, _data_name(n) in shared),
        "quantize": attention.quantize,
        "read_cache": attention.read_cache,
        "dequantize": attention.read_cache,
        "attention": lambda b, n: attention.attention(b, n, opset),
    }
    for node in nodes:
        name = _data_name(node)
        build = Build(graph, target, _provenance(node, name, kinds))
        made = make[node.op_type](build, node)
        new = [made] if isinstance(made, ir.Value) else list(made)
        for before, after in zip(node.outputs, new, strict=True):
            after.type, after.shape = before.type, before.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, new)
    RemoveUnusedNodesPass()(model)
    for domain in {node.domain for node in graph} - graph.opset_imports.keys():
        graph.opset_imports[domain] = 1
    graph.opset_imports.pop(DOMAIN, None)


def _append_in_attention(graph: ir.Graph, target: Target) -> None:
    """Attentions that append to a cache of the graph become GroupQueryAttention."""
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == "attention"]:
        halves = appended(node)
        if halves is None:
            continue
        build = Build(graph, target, _provenance(node, "", {}))
        made = grouped_query(build, node, *halves)
        before = (node.outputs[0], *(half.joined for half in halves))
        for old, new in zip(before, made, strict=True):
            new.type, new.shape, name = old.type, old.shape, old.name
            if old.is_graph_output():
                position = next(i for i, v in enumerate(graph.outputs) if v is old)
                graph.outputs[position], old.name, new.name = new, f"{name}.joined", name
            ir.convenience.replace_all_uses_with(old, new)
        graph.insert_before(node, build.nodes)
        graph.remove(node, safe=True)


def _provenance(node: ir.Node, name: str, kinds: Mapping[str, str]) -> dict[str, str]:
    """Metadata of what stands for a node that reads the weight `name`, or a cache."""
    module = module_of(node)
    cached = not name and any(
        k.endswith("spec") and not parse_spec(a.as_string()).is_identity for k, a in node.attributes.items()
    )
    kind = kinds.get(name, "linear") if name else "kv" if cached and node.op_type in _CACHES else ""
    return {MODULE: module} | ({SITE: f"{kind} {name or module}".strip()} if kind else {})


def _data_name(node: ir.Node) -> str:
    """The weight that a node reads; "" if it reads none."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and str(value.name).endswith("_data"):
            return str(value.name).removesuffix("_data")
    return ""


def _shared(nodes: Sequence[ir.Node]) -> set[str]:
    """Tables of integers that embeddings and linears read."""
    both = [n for n in nodes if n.op_type in ("embedding", "linear")]
    integers = [n for n in both if parse_spec(n.attributes["spec"].as_string()).format.kind == "uniform"]
    readers = Counter((_data_name(n), n.op_type) for n in integers)
    return {name for name, op_type in readers if op_type == "embedding" and (name, "linear") in readers}

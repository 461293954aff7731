"""Small graphs: constants folded, norms and rotary embeddings as operators of the opset, or onnxruntime's own."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import add_0_rule, mul_by_1_rule, no_op_cast_rule, no_op_expand_rule
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.rules.fusion._rotary_embedding import fuse_partial_rotary_embedding, fuse_rotary_embedding

from qpass_export.lowering.build import Build
from qpass_export.targets import Target

#: The first opset with RMSNormalization, RotaryEmbedding and Attention.
FUSED_OPSET = 23


def simplify(model: ir.Model, target: Target) -> None:
    """Fold and fuse in place. Weights are left as they are: folding would make floats of them."""
    with contextlib.redirect_stdout(io.StringIO()):
        fold_constants(model, input_size_limit=1024, output_size_limit=4096)
        RewritePass([mul_by_1_rule, add_0_rule, no_op_cast_rule, no_op_expand_rule])(model)
        IdentityEliminationPass()(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        if model.graph.opset_imports[""] >= FUSED_OPSET:
            fuse_rms_normalization(model)
            fuse_rotary_embedding(model)
            fuse_partial_rotary_embedding(model)
            _one_row_for_each_sequence(model, target)
        elif target.contrib:
            _divide_by_roots(model, target)
    DeduplicateInitializersPass(size_limit=1024)(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[name]


def _one_row_for_each_sequence(model: ir.Model, target: Target) -> None:
    """RotaryEmbedding wants cos and sin of every sequence: positions that are the same for all are repeated."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "RotaryEmbedding"]:
        x = node.inputs[0]
        for i in (1, 2):
            table = node.inputs[i]
            producer = None if table is None else table.producer()
            shape = None if producer is None or producer.inputs[0] is None else producer.inputs[0].shape
            if (
                x is None
                or shape is None
                or len(shape) != 3
                or shape[0] != 1
                or (x.shape is not None and x.shape[0] == 1)
            ):
                continue
            build = Build(graph, target)
            whole = build("Concat", build("Shape", x, start=0, end=1), np.array([1, 1]), axis=0)
            node.replace_input_with(i, build("Expand", table, whole))
            graph.insert_before(node, build.nodes)


def _divide_by_roots(model: ir.Model, target: Target) -> None:
    """x * (1 / sqrt(y)) as x / sqrt(y): the form of a norm that onnxruntime joins to one kernel when it loads the graph."""
    for node in [n for n in model.graph if n.op_type == "Reciprocal"]:
        root = node.inputs[0]
        for user in list(node.outputs[0].consumers()):
            if root is None or user.op_type != "Mul":
                continue
            other = next(v for v in user.inputs if v is not node.outputs[0])
            build = Build(model.graph, target)
            quotient = build("Div", other, root)
            quotient.type, quotient.shape = user.outputs[0].type, user.outputs[0].shape
            ir.convenience.replace_nodes_and_values(model.graph, user, [user], build.nodes, user.outputs, [quotient])

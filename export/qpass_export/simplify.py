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
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization as fuse_contrib_norms
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
            _one_row_for_each_sequence(model)
        elif target.contrib:
            fuse_contrib_norms(model)
    DeduplicateInitializersPass(size_limit=1024)(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[name]


def _one_row_for_each_sequence(model: ir.Model) -> None:
    """RotaryEmbedding wants cos and sin of every sequence: positions that are the same for all are repeated."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "RotaryEmbedding"]:
        x = node.inputs[0]
        for i in (1, 2):
            table = node.inputs[i]
            producer = None if table is None else table.producer()
            shape = None if producer is None or producer.inputs[0] is None else producer.inputs[0].shape
            if x is None or shape is None or len(shape) != 3 or shape[0] != 1 or (x.shape is not None and x.shape[0] == 1):
                continue
            build = Build(graph, ir.DataType.FLOAT)
            whole = build("Concat", build("Shape", x, start=0, end=1), np.array([1, 1]), axis=0)
            node.replace_input_with(i, build("Expand", table, whole))
            graph.insert_before(node, build.nodes)

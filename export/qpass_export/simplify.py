"""Small graphs: constants folded, norms and rotary embeddings as operators of the opset, or onnxruntime's own."""

from __future__ import annotations

import contextlib
import io

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
        elif target.contrib:
            fuse_contrib_norms(model)
    DeduplicateInitializersPass(size_limit=1024)(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[name]

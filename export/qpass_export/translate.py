"""A quantized program as an ONNX graph in which qpass's operators are still nodes of the domain "qpass"."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator
from torch.export import ExportedProgram

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.errors import QpassError
from qpass.exported import fill_values
from qpass.graph.expand import drop_whole_slices
from qpass.graph.torch_private import copy_captured, drop_input_guards
from qpass.quantized import PART_NAMES
from qpass.sites.grouped import rewrite_every
from qpass.spec import parse_spec
from qpass_export.capture import Captured

#: Domain of nodes that stand for torch.ops.qpass: inputs are the operator's tensors, attributes all else. No runtime has it.
DOMAIN = "qpass"
_OPERATORS = ("linear", "integer_linear", "experts", "embedding", "quantize", "quantize_input", "round_input", "read_cache",
              "dequantize", "attention")  # fmt: skip
_TYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def with_whole_attention(program: ExportedProgram) -> ExportedProgram:
    """A program of the same weights in which each attention that can be read is one operator, fused in the model or not."""
    module = copy_captured(program.graph_module)
    drop_whole_slices(module)
    rewrite_every(module.graph)
    fill_values(module.graph)
    module.recompile()
    done = ExportedProgram(
        module, module.graph, copy.deepcopy(program.graph_signature), dict(program.state_dict), program.range_constraints,
        copy.deepcopy(program.module_call_graph), program.example_inputs, dict(program.constants), verifiers=program.verifiers,
    )  # fmt: skip
    drop_input_guards(done)
    return done


def translate(captured: Captured, program: ExportedProgram, opset: int) -> ir.Model:
    """`program`: what became of `captured.program`. Inputs and outputs get the names of `captured`, parts of a cache theirs.

    Raises `QpassError` for an operation that torch's exporter does not know.
    """
    _exponents_as_bytes(program)
    table = {getattr(torch.ops.qpass, name).default: _as_node(name) for name in _OPERATORS}
    table |= {torch.ops.aten.sym_stride.int: _stride, torch.ops.aten.searchsorted.Tensor: _search_sorted}
    with _quiet(), torch.no_grad():
        try:
            found = torch.onnx.export(
                program, dynamo=True, opset_version=opset, custom_translation_table=table, optimize=False, verbose=False
            )
        except Exception as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            if "grouped_mm" in reason:
                reason = "experts in float have no form in ONNX: give the recipe a format for their kind (ffn)"
            raise QpassError(f"torch.onnx.export does not take the graph: {reason}") from error
    assert found is not None
    model: ir.Model = found.model
    for value, name in zip(model.graph.inputs, _input_names(captured, program), strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, _output_names(captured, program), strict=True):
        value.name = name
    return model


def _exponents_as_bytes(program: ExportedProgram) -> None:
    """E8M0 scales, a type that torch's exporter does not know, as the bytes that they are."""
    e8m0 = torch.float8_e8m0fnu
    for name in [n for n, t in program.state_dict.items() if t.dtype == e8m0]:
        program.state_dict[name] = program.state_dict[name].view(torch.uint8)
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == e8m0:
            node.meta["val"] = value.view(torch.uint8)


def _as_node(name: str) -> Callable[..., Any]:
    """What torch's exporter calls for an operator: one node with its arguments."""
    arguments = getattr(torch.ops.qpass, name).default._schema.arguments

    def build(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        inputs: list[ir.Value | None] = []
        attributes: dict[str, Any] = {}
        for argument in arguments:
            value = given.get(argument.name, argument.default_value)
            if "Tensor" in str(argument.type):
                inputs.append(value)
            elif value is not None:
                attributes[argument.name] = int(_dtype(value)) if argument.name == "dtype" else value
        while inputs and inputs[-1] is None:
            inputs.pop()
        count = _outputs(name, attributes.get("spec", ""), inputs)
        node = ir.Node(DOMAIN, name, inputs, ir.convenience.convert_attributes(attributes), num_outputs=count)
        evaluator.default().nodes.append(node)
        return node.outputs[0] if name not in ("quantize", "quantize_input") else list(node.outputs)

    return build


def _stride(tensor: ir.Value, dim: int) -> ir.Value:
    """torch names a length by a stride where that is the first place that it meets it. ONNX tensors are contiguous."""
    shape = ir.node("Shape", [tensor], {"start": dim + 1})
    product = ir.node("ReduceProd", [shape.outputs[0]], {"keepdims": 0})
    evaluator.default().nodes.extend((shape, product))
    return product.outputs[0]


def _search_sorted(ascending: ir.Value, values: ir.Value, *, right: bool = False, **_: Any) -> ir.Value:
    """[E] and [T] -> [T]: how many of the first are at or below (`right`) or below each of the second: tokens to experts."""
    wide = {"to": int(ir.DataType.INT64)}
    nodes = [ir.node("Cast", [ascending], wide), ir.node("Cast", [values], wide)]
    nodes.append(ir.node("Unsqueeze", [nodes[-1].outputs[0], _number(1)]))
    nodes.append(ir.node("LessOrEqual" if right else "Less", [nodes[0].outputs[0], nodes[-1].outputs[0]]))
    nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": int(ir.DataType.INT64)}))
    nodes.append(ir.node("ReduceSum", [nodes[-1].outputs[0], _number(1)], {"keepdims": 0}))
    evaluator.default().nodes.extend(nodes)
    return nodes[-1].outputs[0]


def _number(value: int) -> ir.Value:
    """A constant [1] of a graph that is being made."""
    node = ir.node("Constant", [], {"value": ir.tensor([value], dtype=ir.DataType.INT64)})
    evaluator.default().nodes.append(node)
    return node.outputs[0]


def _dtype(value: Any) -> ir.DataType:
    return _TYPES[value] if isinstance(value, torch.dtype) else ir.DataType(value)


def _outputs(name: str, spec: str, inputs: Sequence[Any]) -> int:
    """How many tensors an operator gives."""
    if name not in ("quantize", "quantize_input"):
        return 1
    given = len(inputs) > 1  # a scale is given, so none is made
    return 1 if given else len(parse_spec(spec).stored_parts)


def _input_names(captured: Captured, program: ExportedProgram) -> list[str]:
    """Names of the inputs of `program`: of a cache, of each of its parts."""
    now = list(program.graph_signature.user_inputs)
    names: list[str] = []
    for name, old in zip(captured.inputs, captured.program.graph_signature.user_inputs, strict=True):
        parts = [f"{old}_{part}" for part in PART_NAMES]
        while now and now[0] in (old, *parts):
            found = now.pop(0)
            names.append(name if found == old else part_name(name, PART_NAMES[parts.index(found)]))
    return names


def _output_names(captured: Captured, program: ExportedProgram) -> list[str]:
    """Names of the outputs: the caches come last, as they do among the inputs, in as many parts."""
    kept = [
        n.removeprefix("past_key_values.") for n in _input_names(captured, program) if n.startswith("past_key_values.")
    ]
    plain = captured.outputs[: len(captured.outputs) - captured.caches]
    return [*plain, *(f"present.{name}" for name in kept)]


def part_name(cache: str, part: str) -> str:
    """The name of a stored part of a cache: the codes bear the name of the cache itself."""
    return cache if part == "data" else f"{cache}_{part}"


@contextlib.contextmanager
def _quiet() -> Any:
    """torch's exporter prints its progress, and warns of what does not concern a user."""
    loggers: Mapping[str, logging.Logger] = {
        n: logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    }
    levels = {n: logger.level for n, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for n, logger in loggers.items():
            logger.setLevel(levels[n])

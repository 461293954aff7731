"""qpass.quantize of a torch.export.ExportedProgram: the same passes, on ATen's spelling, into a program that runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from qpass.backend import Capture, QPass
from qpass.calibration import Data
from qpass.errors import QpassError
from qpass.exported_calibration import calibrate_program
from qpass.exported_state import HeldCaches, hold_quantized, quantized_examples, with_lists
from qpass.graph.expand import drop_whole_slices, inline_no_grad
from qpass.graph.torch_private import copy_captured, drop_input_guards, fake_like, fake_mode_of
from qpass.graph.vocabulary import op_name
from qpass.passes import GROUP_PARTS, INPUT, Convert, GraphInput, clean, run_passes
from qpass.recipe import Recipe
from qpass.registry import FINISHED
from qpass.seeing.diff import Diff, diff_graphs
from qpass.seeing.report import report_on
from qpass.sites.core import Edit
from qpass.sites.group import WeightGroup
from qpass.store import Parts
from qpass.weights import memory_of


def quantize_program(
    program: ExportedProgram, recipe: str | Path | Recipe | Mapping[str, Any], strict: bool, data: Data | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> ExportedProgram:  # fmt: skip
    """A new program whose weights are stored as `recipe` says, as buffers "<weight>_data", "<weight>_scale", ...

    `data`: batches for calibration. `scales`: of caches that are inputs, by their names, for a static format. The given program
    is unchanged. Raises `QpassError` as `quantize` of a module does.
    """
    if any(op_name(node).startswith("qpass::") for node in program.graph.nodes):
        raise QpassError("qpass.quantize: the program is already quantized; start from the one that torch.export made")
    backend = QPass(recipe, strict=strict, inner="eager")
    if data is not None:
        backend.use_data()
    fqns = program.graph_signature.inputs_to_parameters
    module = copy_captured(program.graph_module)
    inline_no_grad(module)
    dropped = Edit("simplify", "", tuple(drop_whole_slices(module)), ())
    placeholders = {n.name: n for n in module.graph.find_nodes(op="placeholder")}
    parameters = _parameters(module.graph, {placeholders[name]: program.state_dict[fqn] for name, fqn in fqns.items()})
    names = {node: fqns[node.name] for node in parameters}
    if data is not None:
        calibrate_program(program, module, parameters, names, data, backend)
    held = hold_quantized(program, module.graph, parameters, names, backend.recipe, _set_value, scales)
    plan = backend.planner.plan(module.graph, parameters, names, held=held.skips)
    by_name = {node.name: tensor for node, tensor in parameters.items()}

    def parts_of(group: WeightGroup) -> Parts:
        biases = [by_name[b] for b in group.biases if b is not None]
        params = [by_name[name] for name in group.weights]
        return backend.store.get([*params, *biases], group, "exported", lambda _: None).parts

    def fake_parts(group: WeightGroup) -> list[Tensor | None]:
        reference = placeholders[group.weights[0]].meta["val"]
        return [None if part is None else fake_like(reference, part) for part in parts_of(group)]

    result = run_passes(module, plan, [Convert(parameters, fake_parts), clean])
    buffers = _buffers_first(result.graph_module.graph, fqns)
    fill_values(result.graph_module.graph)
    read = {
        memory_of(by_name[n.name]) for n in result.graph_module.graph.find_nodes(op="placeholder") if n.name in by_name
    }
    quantized = {memory_of(by_name[m.weight.name]) for m in plan.matches if m.weight is not None} - read
    kept = {name: value for name, value in program.state_dict.items() if name not in held.gone}
    state = {name: value for name, value in kept.items() if memory_of(value) not in quantized}
    state |= {name: value for name, value, persistent in held.buffers.values() if persistent}
    for node, name in buffers.items():
        source: GraphInput = node.meta[INPUT]
        part = parts_of(source.group)[source.part]
        assert part is not None
        state[name] = part
    done = _rebuilt(program, result.graph_module, state, {n.name: name for n, name in buffers.items()}, held)
    capture = Capture(program.graph, done.graph, plan, (dropped, *held.edits, *result.edits), None)
    params = [(fqns[node.name], tensor) for node, tensor in parameters.items()]
    report = report_on(params, backend, [capture])
    left = sum(value.nbytes for value in done.state_dict.values() if isinstance(value, torch.nn.Parameter))
    report = replace(report, resident_float=left, notes=())
    FINISHED[done] = report, Diff((diff_graphs(program.graph, done.graph),))
    return done


def _parameters(graph: Graph, tensors: dict[Node, Tensor]) -> dict[Node, Tensor]:
    """Placeholder -> tensor, with one placeholder for a tied Parameter."""
    first: dict[object, Node] = {}
    for node, tensor in tensors.items():
        kept = first.setdefault(memory_of(tensor), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
    return {node: tensors[node] for node in first.values()}


def _buffers_first(graph: Graph, fqns: Mapping[str, str]) -> dict[Node, str]:
    """Move the placeholders of stored parts before all others, where buffers belong; -> their names in the state dict."""
    names: dict[Node, str] = {}
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="placeholder"):
        if INPUT in node.meta:
            source: GraphInput = node.meta[INPUT]
            names[node] = f"{fqns[source.group.weights[0]]}_{GROUP_PARTS[source.part]}"
            node.meta["val"] = node.meta.pop("example_value")
            first.prepend(node)
    return names


def fill_values(graph: Graph) -> None:
    """Fake values of the nodes that the passes added: export's verifier and serializer want one for each."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            _set_value(node)


def _set_value(node: Node) -> None:
    """The fake value of one node from those of its inputs."""
    some = next(n.meta["val"] for n in node.graph.nodes if isinstance(n.meta.get("val"), Tensor))
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with fake_mode_of(some):
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _rebuilt(
    program: ExportedProgram,
    module: GraphModule,
    state: dict[str, Tensor],
    buffers: Mapping[str, str],
    held: HeldCaches,
) -> ExportedProgram:
    signature = copy.deepcopy(program.graph_signature)
    old = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    parts = {name for names in held.inputs.values() for name in names}

    def described(name: str) -> InputSpec:
        if name in buffers:
            return InputSpec(InputKind.BUFFER, TensorArgument(name), buffers[name], persistent=True)
        if name in held.buffers:
            target, _, persistent = held.buffers[name]
            return InputSpec(InputKind.BUFFER, TensorArgument(name), target, persistent=persistent)
        return InputSpec(InputKind.USER_INPUT, TensorArgument(name), None) if name in parts else old[name]

    signature.input_specs = [described(n.name) for n in module.graph.find_nodes(op="placeholder")]
    outputs: list[Any] = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    described_outputs = []
    for i, spec in enumerate(signature.output_specs):
        nodes = [outputs.pop(0) for _ in held.outputs.get(i, [None])]
        for node in nodes:
            arg = replace(spec.arg, name=node.name) if isinstance(node, Node) else spec.arg
            described_outputs.append(replace(spec, arg=arg))
    signature.output_specs = described_outputs
    for node in module.graph.nodes:
        node.meta.pop(INPUT, None)
    constants = {name: value for name, value in program.constants.items() if name not in held.gone}
    constants |= {name: value for name, value, persistent in held.buffers.values() if not persistent}
    calls = copy.deepcopy(program.module_call_graph)
    call = calls[0].signature
    if held.states and call is not None:
        call.in_spec, call.out_spec = with_lists(call.in_spec, held.inputs), with_lists(call.out_spec, held.outputs)
    done = ExportedProgram(
        module,
        module.graph,
        signature,
        state,
        program.range_constraints,
        calls,
        quantized_examples(program.example_inputs, held),
        constants,
        verifiers=program.verifiers,
    )
    if held.inputs:
        drop_input_guards(done)
    return done

"""Buffers that a program writes to, as inputs and outputs: an ONNX graph keeps nothing from call to call."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec
from torch.utils import _pytree as pytree

from qpass.graph.vocabulary import writes_to
from qpass_export.capture import Captured

#: Names of such inputs and outputs: these, and the name of the buffer.
BEFORE, AFTER = "past.", "present."


def lift_state(captured: Captured, program: ExportedProgram) -> tuple[Captured, ExportedProgram]:
    """`program` without effects: the buffers that it writes to are its last inputs and outputs, in order of the buffers."""
    if not any(writes_to(node) is not None for node in program.graph.nodes):
        return captured, program
    plain = program.run_decompositions({})
    written = {s.target: s.arg for s in plain.graph_signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
    if not written:
        return captured, program
    signature, graph = copy.deepcopy(plain.graph_signature), plain.graph_module.graph
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    states = [s for s in signature.input_specs if s.kind == InputKind.BUFFER and s.target in written]
    kept = [s for s in signature.input_specs if s not in states]
    for spec in states:  # last among the inputs
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        if placeholders[spec.arg.name] is not last:
            last.append(placeholders[spec.arg.name])
    signature.input_specs = [*kept, *(InputSpec(InputKind.USER_INPUT, s.arg, None) for s in states)]
    output = graph.output_node()
    values = dict(zip((id(s) for s in signature.output_specs), output.args[0], strict=True))
    users = [s for s in signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    by_buffer = {s.target: s for s in signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
    ordered = [*users, *(by_buffer[s.target] for s in states)]
    output.args = (tuple(values[id(s)] for s in ordered),)
    signature.output_specs = [OutputSpec(OutputKind.USER_OUTPUT, s.arg, None) for s in ordered]
    plain.graph_module.recompile()
    names = [str(s.target) for s in states]
    calls = copy.deepcopy(plain.module_call_graph)
    convention = calls[0].signature
    assert convention is not None
    count = len(kept) - sum(s.kind != InputKind.USER_INPUT for s in kept)
    convention.in_spec = pytree.tree_structure((tuple([0] * (count + len(states))), {}))
    convention.out_spec = pytree.tree_structure([0] * len(ordered))
    convention.forward_arg_names = None
    done = ExportedProgram(
        plain.graph_module, graph, signature,
        {n: t for n, t in plain.state_dict.items() if n not in names},
        plain.range_constraints, calls, None,
        {n: t for n, t in plain.constants.items() if n not in names},
        verifiers=plain.verifiers,
    )  # fmt: skip
    inputs = (*captured.inputs, *(f"{BEFORE}{name}" for name in names))
    outputs = (*captured.outputs, *(f"{AFTER}{name}" for name in names))
    first = {**plain.state_dict, **plain.constants}
    state = tuple(first[name] for name in names)
    return replace(captured, program=done, inputs=inputs, outputs=outputs, state=state), done

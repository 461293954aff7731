"""Calibration of a torch.export.ExportedProgram: its graph is run over the data as a captured one is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qpass.backend import QPass
from qpass.calibration import Batch, Data, batches_of, mask_of
from qpass.errors import QpassError
from qpass.programs import Program, Run
from qpass.replay import places_of, quantize_in_order


def calibrate_program(
    program: ExportedProgram, module: GraphModule, parameters: Mapping[Node, Tensor], names: dict[Node, str], data: Data,
    backend: QPass,
) -> None:  # fmt: skip
    """Decide formats and codes of the weights of `program` on `data`; `backend` keeps them. `module`: its graph, read only;
    `parameters`, `names`: its placeholders that are Parameters.

    Raises `QpassError` if there is no batch, a batch does not fit the program, or what `quantize_in_order` raises.
    """
    plan = backend.planner.plan(module.graph, parameters, names)
    known = Program.of(module, plan, parameters)
    runs = []
    for batch in batches_of(data, torch.nn.Module()):
        given = {**_held(program), **_arguments(program, batch)}
        values = [parameters.get(n, given.get(n.name)) for n in module.graph.find_nodes(op="placeholder")]
        runs.append(Run(known, values, mask_of(batch)))
    if not runs:
        raise QpassError("calibration: no batches; give token ids of shape [batch, sequence], or dicts of arguments")
    backend.begin_calibration(runs)
    quantize_in_order(runs, places_of(runs), backend.choose)


def _held(program: ExportedProgram) -> dict[str, Any]:
    """Placeholder -> the tensor that the program holds for it."""
    held = {**program.constants, **program.state_dict}
    return {s.arg.name: held[s.target] for s in program.graph_signature.input_specs if s.target in held}


def _arguments(program: ExportedProgram, batch: Batch) -> dict[str, Any]:
    """Placeholder -> what a batch gives for it: arguments by name, or one tensor, the first argument. What is no tensor comes
    from the inputs that the program was exported with, if the batch does not give it."""
    args, kwargs = program.example_inputs or ((), {})
    call = program.module_call_graph[0].signature
    names = list(getattr(call, "forward_arg_names", None) or [])
    if not names or not isinstance(batch, Mapping | Tensor):
        raise QpassError(
            f"calibration: a batch is a {type(batch).__name__}; the program takes {', '.join(names) or 'nothing'}"
        )
    given = dict(batch) if isinstance(batch, Mapping) else {names[0]: batch}
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise QpassError(f"calibration: the program takes no {unknown[0]!r}; it takes {', '.join(names)}")
    leaves: list[Any] = []
    for name, example in zip(names, (*args, *kwargs.values()), strict=True):
        if name not in given and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example)):
            raise QpassError(f"calibration: a batch gives no {name!r}; give batches as dicts of {', '.join(names)}")
        leaves += _leaves_like(given.get(name, example), example, name)
    inputs = [s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    found = dict(zip(inputs, leaves, strict=True))
    for node in program.graph.find_nodes(op="placeholder"):
        value, expected = found.get(node.name), node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(expected, Tensor):
            _check_shape(node.name, value, expected)
    return found


def _leaves_like(value: Any, example: Any, name: str) -> list[Any]:
    """The leaves of an argument in the order of the exported one: mappings by key, whatever their order."""
    if isinstance(example, Mapping):
        if not isinstance(value, Mapping) or value.keys() != example.keys():
            raise QpassError(f"calibration: {name} is to be a mapping of {', '.join(map(str, example))}")
        return [leaf for key in example for leaf in _leaves_like(value[key], example[key], f"{name}[{key!r}]")]
    if isinstance(example, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(example):
            raise QpassError(f"calibration: {name} is to be a sequence of {len(example)}")
        return [leaf for i, one in enumerate(example) for leaf in _leaves_like(value[i], one, f"{name}[{i}]")]
    return [value] if pytree.tree_structure(value) == pytree.tree_structure(example) else pytree.tree_leaves(value)


def _check_shape(name: str, value: Tensor, expected: Tensor) -> None:
    pairs = list(zip(value.shape, expected.shape, strict=False))
    if value.is_floating_point() != expected.is_floating_point():
        raise QpassError(f"calibration: {name} is {value.dtype}, but the program was exported for {expected.dtype}")
    if value.dim() != expected.dim() or any(isinstance(wanted, int) and wanted != size for size, wanted in pairs):
        raise QpassError(
            f"calibration: {name} of shape {list(value.shape)}, but the program was exported for {list(expected.shape)}; "
            "export it with dynamic_shapes, or give batches of that shape"
        )

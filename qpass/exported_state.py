"""The KV cache of an ExportedProgram as integers and scales: in its graph, signature, buffers and calling convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from qpass.graph.flow import analyze
from qpass.graph.torch_private import fake_like
from qpass.graph.vocabulary import value_of
from qpass.packing import as_bytes
from qpass.quantized import PART_NAMES
from qpass.recipe import Recipe
from qpass.sites.core import Edit, Skip
from qpass.sites.state import Rewriter, State, find


@dataclass
class HeldCaches:
    """What became of the caches that a program holds.

    `buffers`: placeholder of a part -> (its name, its first value, whether it is persistent). `gone`: names of float buffers.
    `inputs`, `outputs`: position among the user's inputs or outputs -> the parts that stand there now.
    """

    edits: list[Edit] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    buffers: dict[str, tuple[str, Tensor, bool]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    inputs: dict[int, list[str]] = field(default_factory=dict)
    outputs: dict[int, list[str]] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)


def hold_quantized(
    program: ExportedProgram, graph: Graph, parameters: Mapping[Node, Tensor], names: Mapping[Node, str], recipe: Recipe,
    evaluate: Callable[[Node], None], scales: Mapping[str, Tensor] | None = None,
) -> HeldCaches:  # fmt: skip
    """Rewrite every cache that the program holds, or that it takes and gives back. `evaluate` records the value of a new node.
    `scales`: name of an input -> its scale [1, H, 1, D], for static specs."""
    done = HeldCaches()
    if recipe.kv_specs is None:
        return done
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    placeholders = graph.find_nodes(op="placeholder")
    candidates = [n for n in placeholders if specs[n.name].kind in (InputKind.BUFFER, InputKind.USER_INPUT)]
    states, done.skips = find(analyze(graph, parameters), candidates, names, recipe.kv_specs, scales or ())
    done.states = states
    users = [n.name for n in placeholders if specs[n.name].kind == InputKind.USER_INPUT]
    for state in states:
        old, spec = state.node, specs[state.node.name]
        static = scales[old.name] if scales and state.spec.static else None
        if static is not None:
            with graph.inserting_before(placeholders[0]):
                state.scale = graph.placeholder(f"{old.name}_static_scale")
            state.scale.meta = {"val": fake_like(value_of(old), static)}
            done.buffers[state.scale.name] = (state.scale.name, static, True)
        fake_scale = None if state.scale is None else value_of(state.scale)
        parts = torch.ops.qpass.quantize(value_of(old), str(state.spec), fake_scale)
        real: list[Any] = [None] * len(parts)
        if spec.kind == InputKind.BUFFER:
            held = {**program.state_dict, **program.constants}[spec.target]
            real = [as_bytes(p) for p in torch.ops.qpass.quantize(held, str(state.spec))]
            done.gone.add(spec.target)
        with graph.inserting_before(old):
            for slot, part, value in zip(state.spec.stored_parts, parts, real, strict=True):
                node = graph.placeholder(f"{old.name}_{PART_NAMES[slot]}")
                node.meta = {"val": as_bytes(part) if value is None else fake_like(value_of(old), value)}
                state.parts.append(node)
                if value is not None:
                    done.buffers[node.name] = (f"{spec.target}_{PART_NAMES[slot]}", value, bool(spec.persistent))
        if spec.kind == InputKind.USER_INPUT:
            done.inputs[users.index(old.name)] = [n.name for n in state.parts]
    if not states:
        return done
    rewriter = Rewriter(graph, states, evaluate)
    returned = list(graph.output_node().args[0])  # type: ignore[arg-type]
    done.edits = rewriter.run()
    done.outputs = {i: [p.name for p in rewriter.of[n][1]] for i, n in enumerate(returned) if n in rewriter.of}
    return done


def with_lists(spec: pytree.TreeSpec, at: Mapping[int, list[Any]]) -> pytree.TreeSpec:
    """A calling convention in which the leaves numbered in `at` are lists of as many."""
    leaves = [[0] * len(at[i]) if i in at else 0 for i in range(spec.num_leaves)]
    return pytree.tree_structure(pytree.tree_unflatten(leaves, spec))


def quantized_examples(examples: Any, done: HeldCaches) -> Any:
    """The example inputs with the parts of a cache in its place."""
    if examples is None:
        return None
    leaves, spec = pytree.tree_flatten(examples)
    users = {i: s for s in done.states for i, names in done.inputs.items() if names == [n.name for n in s.parts]}
    for i, state in users.items():
        leaves[i] = [as_bytes(p) for p in torch.ops.qpass.quantize(leaves[i], str(state.spec))]
    return pytree.tree_unflatten(leaves, spec)

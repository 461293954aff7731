"""The KV cache that a module itself keeps, in a buffer or an attribute: found in its captured graphs, stored as a QState."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from qpass.graph.flow import analyze, memory_behind
from qpass.graph.torch_private import fake_mode_of, is_of_module, mark_static_input, source_name
from qpass.graph.vocabulary import value_of, writes_to
from qpass.passes import INPUT, StateInput
from qpass.qstate import QState
from qpass.quantized import PART_NAMES
from qpass.sites.core import Edit, Site, Skip
from qpass.sites.state import Rewriter, State, find
from qpass.spec import QuantSpec, parse_spec

#: What is looked for where the recipe has no format for caches.
_ANY = parse_spec("int8")
#: Attributes of a module that torch sets.
_TORCHS_OWN = {"_compiled_call_impl", "_apply"}


@dataclass
class HeldStates:
    """A graph whose QStates became parts. `inputs`: the arguments of the graph as it is now. `returned`: position among its
    first outputs -> the state that stood there, which as many outputs as it has parts make up now."""

    inputs: list[Any]
    edits: list[Edit] = field(default_factory=list)
    returned: dict[int, State] = field(default_factory=dict)


def hold_parts(gm: GraphModule, inputs: Sequence[Any]) -> HeldStates:
    """Rewrite the graph to the parts of every QState among its `inputs`."""
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    of: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    states = []
    for i, node in enumerate(placeholders):
        value = inputs[i]
        if not isinstance(value, QState):
            continue
        fake = value_of(node)
        state = State(node, value.spec, Site("kv", source_name(node) or node.name), value.shape[-1], value.dtype)
        with graph.inserting_before(node):
            for j, (slot, part) in enumerate(zip(value.spec.stored_parts, value.parts, strict=True)):
                new = graph.placeholder(f"{node.name}_{PART_NAMES[slot]}")
                new.meta = {"example_value": fake.parts[j], INPUT: StateInput(i, j)}
                mark_static_input(new)
                state.parts.append(new)
                of[new] = part
        states.append(state)
    if not states:
        return HeldStates(list(inputs))
    returned = list(graph.output_node().args[0])  # type: ignore[arg-type]
    rewriter = Rewriter(graph, states, _evaluate)
    edits = rewriter.run()
    now = [of[n] for n in graph.find_nodes(op="placeholder")]
    return HeldStates(now, edits, {i: rewriter.of[n][0] for i, n in enumerate(returned) if n in rewriter.of})


def _evaluate(node: Node) -> None:
    """The fake value of a new node, in the fake mode of its inputs."""
    some = next(v for n in node.graph.nodes if isinstance(v := value_of(n), Tensor) and hasattr(v, "fake_mode"))
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
    with fake_mode_of(some):
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]


def restored(outputs: Sequence[Any], returned: Mapping[int, State]) -> list[Any]:
    """The outputs of a rewritten graph with QStates in the place of their parts."""
    rest = list(outputs)
    done: list[Any] = []
    while rest:
        state = returned.get(len(done))
        if state is None:
            done.append(rest.pop(0))
        else:
            parts = [rest.pop(0) for _ in state.parts]
            done.append(QState(parts, state.spec, state.columns, state.dtype))
    return done


def find_held(
    graph: Graph,
    parameters: Mapping[Node, Tensor],
    names: Mapping[Node, str],
    specs: tuple[QuantSpec, QuantSpec] | None,
) -> tuple[list[State], list[Skip]]:
    """The float caches of a captured graph that the module keeps and that can be stored quantized; why others cannot."""
    held = [n for n in graph.find_nodes(op="placeholder") if is_of_module(n) and n not in parameters]
    held = [n for n in held if isinstance(value_of(n), Tensor) and not isinstance(value_of(n), QState)]
    return find(analyze(graph, parameters), held, names, specs or (_ANY, _ANY)) if held else ([], [])


class OwnState:
    """Tensors that the modules of a model keep beside Parameters, while it is run to be captured or calibrated.

    Such a run must leave no trace: tensors that a graph writes are copied before it, and attributes that it sets are set back.
    """

    def __init__(self, model: nn.Module) -> None:
        places: list[dict[str, Any]] = [place for m in model.modules() for place in (m.__dict__, m._buffers)]
        self._before = [(place, dict(place)) for place in places]
        self._owned = {id(v): v for _, values in self._before for v in values.values() if isinstance(v, Tensor)}
        self._copies: dict[int, Tensor] = {}
        self._specs: dict[int, QuantSpec] = {}

    def see(self, graph: Graph, inputs: Sequence[Any], states: Sequence[State]) -> None:
        """Take what the run of a captured graph will write. `inputs`: its real arguments; `states`: what will be quantized."""
        of = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        for state in states:
            if id(of[state.node]) in self._owned:
                self._specs.setdefault(id(of[state.node]), state.spec)
        for node in graph.nodes:
            target = writes_to(node)
            value = None if target is None else of.get(memory_behind(target))
            if isinstance(value, Tensor) and id(value) in self._owned and id(value) not in self._copies:
                self._copies[id(value)] = value.clone()

    def undo(self) -> None:
        """Set all back."""
        for key, copy in self._copies.items():
            self._owned[key].copy_(copy)
        self._copies.clear()
        for place, values in self._before:
            for name, old in values.items():
                if name not in _TORCHS_OWN and place.get(name) is not old:
                    place[name] = old

    def store(self) -> None:
        """Put QStates in the place of the caches that will be quantized."""
        stored = {key: QState.of(self._owned[key], spec) for key, spec in self._specs.items()}
        for place, values in self._before:
            for name, old in values.items():
                if id(old) in stored:
                    place[name] = stored[id(old)]

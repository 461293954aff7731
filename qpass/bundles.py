"""The stored weights that a row reads become one input of the graph: what is the same at each call is not passed part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from qpass.graph.torch_private import mark_static_input
from qpass.graph.vocabulary import value_of
from qpass.ops.row import Like, parse_row, renumbered
from qpass.passes import INPUT, GraphInput, StateInput
from qpass.sites.group import WeightGroup


@dataclass(frozen=True)
class BundleInput:
    """A placeholder for the bundle (see ops/bundle.py) of these parts."""

    parts: tuple[GraphInput, ...]


#: Of an argument of a rewritten graph: the position of an original one, or what it comes from.
Source = int | GraphInput | StateInput | BundleInput


def bundle_weights(
    graph_module: GraphModule, stays: Callable[[WeightGroup], bool], fake: Callable[[Tensor], Tensor]
) -> None:
    """qpass::row(None, [weights, x], ..) -> qpass::row(bundle of weights, [x], ..). `stays`: whether a group's parts are the same
    tensors at each call. `fake`: a tensor -> what stands for it in the graph."""
    graph = graph_module.graph
    for row in graph.find_nodes(op="call_function", target=torch.ops.qpass.row.default):
        _, inputs, written, text = row.args
        bundled = [n for n in inputs if isinstance(source := n.meta.get(INPUT), GraphInput) and stays(source.group)]
        bundled = [n for n in bundled if _is_plain(value_of(n))]
        if not bundled:
            continue
        rest = [n for n in inputs if n not in bundled]
        places = {n: i for i, n in enumerate([*bundled, *rest])}
        old = parse_row(text)
        numbers = [places[n] for n in inputs]
        new = replace(renumbered(old, numbers), holds=tuple(Like.of(value_of(n)) for n in bundled))
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added = graph.placeholder(f"q_bundle_{row.name}")
        added.meta = {
            "example_value": fake(torch.tensor(0, device="cpu")),
            INPUT: BundleInput(tuple(n.meta[INPUT] for n in bundled)),
        }
        mark_static_input(added)
        row.args = (added, rest, written, str(new))
    _drop_unread(graph_module)


def _is_plain(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.is_contiguous()


def _drop_unread(graph_module: GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get(INPUT), GraphInput) and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()


def input_sources(graph_module: GraphModule, original: Sequence[str]) -> list[Source]:
    """For each placeholder of a rewritten graph: the index of the original argument, or what it comes from."""
    index = {name: i for i, name in enumerate(original)}
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return [node.meta[INPUT] if INPUT in node.meta else index[node.name] for node in placeholders]

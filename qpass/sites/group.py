"""Which Parameters are stored as one and read by one operator: linears of one input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from qpass.graph.calls import LinearCall
from qpass.graph.flow import memory_behind
from qpass.graph.vocabulary import shape_of, value_of, writes_to
from qpass.sites.core import Match, Plan
from qpass.spec import QuantSpec
from qpass.weights import memory_of

#: Kinds whose linears of one input become one operation: q, k, v; gate, up.
FUSED_KINDS = ("qkv", "ffn")


@dataclass(frozen=True)
class WeightGroup:
    """Parameters that are quantized to one spec and stored as one: rows of `weights` below each other, in order.

    `weights`, `biases`: names of the placeholders (a lone linear keeps its bias for itself: None). `names`: display names.
    `transposed`: which are [in, out].
    """

    weights: tuple[str, ...]
    names: tuple[str, ...]
    transposed: tuple[bool, ...]
    biases: tuple[str | None, ...]
    spec: QuantSpec

    @property
    def has_bias(self) -> bool:
        """Whether the biases are stored as one with the group."""
        return any(b is not None for b in self.biases)

    def subset(self, indices: Sequence[int]) -> WeightGroup:
        """The group of some of its members."""
        weights, names = (tuple(x[i] for i in indices) for x in (self.weights, self.names))
        return WeightGroup(
            weights,
            names,
            tuple(self.transposed[i] for i in indices),
            tuple(self.biases[i] for i in indices),
            self.spec,
        )


def group_weights(plan: Plan, parameters: Mapping[Node, object]) -> list[tuple[WeightGroup, list[Match]]]:
    """The plan's weight matches as groups: linears of one input, kind and spec together, everything else by itself.

    A Parameter is in one group only: where its uses would be grouped in different ways, they stay by themselves.
    """
    together: dict[object, list[Match]] = {}
    written = _written_memory(plan)
    for match in plan.matches:
        if match.weight is None:
            continue
        call, spec = match.call, plan.specs[match.site]
        key: object = match.node
        if match.site.kind in FUSED_KINDS and isinstance(call, LinearCall) and _may_join(call, parameters, written):
            key = (call.x, match.site.kind, spec, value_of(call.node).dtype)
        together.setdefault(key, []).append(match)
    partners: dict[Node, set[tuple[str, ...]]] = {}
    for group in together.values():
        for match in group:
            partners.setdefault(match.weight, set()).add(tuple(m.weight.name for m in group))  # type: ignore[union-attr, arg-type]
    grouped: list[tuple[WeightGroup, list[Match]]] = []
    for group in together.values():
        weights = [m.weight for m in group]
        if len(set(weights)) == len(weights) and all(len(partners[w]) == 1 for w in weights):  # type: ignore[index]
            grouped.append((_as_group(group, plan), group))
        else:
            grouped += [(_as_group([m], plan), [m]) for m in group]
    return grouped


def each_once(
    groups: Iterable[tuple[WeightGroup, list[Tensor]]], seen: set[Any], key: Callable[[Tensor], Any] = memory_of
) -> list[tuple[WeightGroup, list[Tensor]]]:
    """Groups with their weights, less what `seen` holds by `key`, which they are added to: tied weights have several uses."""
    kept = []
    for group, weights in groups:
        new = [i for i, w in enumerate(weights) if key(w) not in seen]
        seen.update(map(key, weights))
        if new:
            kept.append((group.subset(new), [weights[i] for i in new]))
    return kept


def _as_group(matches: Sequence[Match], plan: Plan) -> WeightGroup:
    calls = [m.call for m in matches]
    return WeightGroup(
        tuple(m.weight.name for m in matches),  # type: ignore[union-attr]
        tuple(m.site.name for m in matches),
        tuple(isinstance(c, LinearCall) and c.transposed for c in calls),
        tuple(c.bias.name if len(calls) > 1 and c.bias is not None else None for c in calls),
        plan.specs[matches[0].site],
    )


def _may_join(call: LinearCall, parameters: Mapping[Node, object], written: set[Node]) -> bool:
    """Not experts, nor if the bias is computed, or something writes to the input: between two of a group, perhaps."""
    outputs = (shape_of(call.weight) or ())[1 if call.transposed else 0]
    biased = call.bias is None or (call.bias in parameters and shape_of(call.bias) == (outputs,))
    return (
        call.route is None
        and call.rows is None
        and not call.columns
        and biased
        and memory_behind(call.x) not in written
    )


def _written_memory(plan: Plan) -> set[Node]:
    if not plan.matches:
        return set()
    targets = (writes_to(node) for node in plan.matches[0].node.graph.nodes)
    return {memory_behind(target) for target in targets if target is not None}

"""One call of a compiled graph: from the arguments that Dynamo passes to those of the rewritten graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.errors import errors_through_cpp
from qpass.passes import GraphInput, StateInput
from qpass.sites.group import WeightGroup
from qpass.store import Entry, WeightStore


class Lookup:
    """A group's stored parts from the arguments of a call."""

    def __init__(
        self,
        store: WeightStore,
        group: WeightGroup,
        order: Mapping[str, int],
        on_new: Callable[[Sequence[Tensor]], None],
    ) -> None:
        self.store, self.group, self.on_new = store, group, on_new
        biases = [b for b in group.biases if b is not None] if group.has_bias else []
        self.indices = [order[name] for name in (*group.weights, *biases)]
        #: The entry that served last; weakly, as the store lets go of entries whose Parameters are gone.
        self._last: Callable[[], Entry | None] = lambda: None
        self.key = f"{group.spec}|{group.transposed}|{[b is not None for b in group.biases]}|{len(group.weights)}"

    def __call__(self, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
        entry = self._last()
        if entry is None or not entry.is_quick(args, self.indices):
            entry = self.store.get([args[i] for i in self.indices], self.group, self.key, self.on_new)
            self._last = weakref.ref(entry)
        return entry.parts


class Arguments:
    """The arguments of the rewritten graph from those of the captured one."""

    def __init__(self, sources: Sequence[int | GraphInput | StateInput], lookups: Mapping[WeightGroup, Lookup]) -> None:
        self.order: list[tuple[int, int]] = []  # (-1, argument) or (lookup, or state behind all lookups; part)
        used = [group for group in lookups if any(isinstance(s, GraphInput) and s.group == group for s in sources)]
        self.lookups = [lookups[group] for group in used]
        self.states = sorted({s.argument for s in sources if isinstance(s, StateInput)})
        for source in sources:
            if isinstance(source, GraphInput):
                self.order.append((used.index(source.group), source.part))
            elif isinstance(source, StateInput):
                self.order.append((len(used) + self.states.index(source.argument), source.part))
            else:
                self.order.append((-1, source))

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        parts: list[Sequence[Any]] = [lookup(args) for lookup in self.lookups]
        parts += [args[i].parts for i in self.states]
        return [args[j] if i < 0 else parts[i][j] for i, j in self.order]


def run_as_inference(
    compiled: Callable[..., Any], pick: Arguments, finish: Callable[[Any], Any] | None, *args: Any
) -> Any:
    """One call of a compiled graph, as inference whatever the grad mode. `finish`: what is done to its outputs."""
    with torch.no_grad(), errors_through_cpp():
        outputs = compiled(*pick(args))
        return outputs if finish is None else finish(outputs)

"""One call of a compiled graph: from the arguments that Dynamo passes to those of the rewritten graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from qpass.errors import errors_through_cpp
from qpass.passes import GraphInput, StateInput
from qpass.sites.group import WeightGroup
from qpass.store import Entry, WeightStore

_token, _quantized = attrgetter("token"), attrgetter("quantized")


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
        self.key = f"{group.spec}|{group.transposed}|{[b is not None for b in group.biases]}|{len(group.weights)}"

    def entry(self, args: Sequence[Any]) -> Entry:
        return self.store.get([args[i] for i in self.indices], self.group, self.key, self.on_new)

    def __call__(self, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
        return self.entry(args).parts


class Settled:
    """What a call looked up, to be found again at the next: nearly always the weights are the same, and asking for each takes as
    long as a linear does. Serves QTensors; a float weight or bias may be edited in place and is looked up every time.

    Entries are referred to weakly: the store lets go of those whose Parameters are gone. A token that dies takes its entry along,
    so that no other can come to have its id; what is `quantized` is held by the entry.
    """

    def __init__(self, lookups: Sequence[Lookup], entries: Sequence[Entry], args: Sequence[Any]) -> None:
        found = list(zip(lookups, entries, strict=True))
        self.entries = [(weakref.ref(entry) if entry.of_qtensors else None, lookup) for lookup, entry in found]
        indices = [i for lookup, entry in found if entry.of_qtensors for i in lookup.indices]
        self.weights = itemgetter(*indices, *indices[:1]) if indices else lambda args: ()  # two or more give a tuple
        weights = self.weights(args)
        self.tokens, self.quantized = ids(map(_token, weights)), ids(map(_quantized, weights))

    def find(self, args: Sequence[Any]) -> list[Entry] | None:
        """The entries of another call; None if it has other weights."""
        weights = self.weights(args)
        try:
            if ids(map(_token, weights)) != self.tokens or ids(map(_quantized, weights)) != self.quantized:
                return None
        except AttributeError:  # something else than a QTensor
            return None
        entries = [lookup.entry(args) if ref is None else ref() for ref, lookup in self.entries]
        return None if None in entries else entries  # type: ignore[return-value]


def ids(objects: Iterable[Any]) -> list[int]:
    return list(map(id, objects))


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
        self._settled: Settled | None = None

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        entries = None if self._settled is None else self._settled.find(args)
        if entries is None:
            entries = [lookup.entry(args) for lookup in self.lookups]
            self._settled = Settled(self.lookups, entries, args)
        parts: list[Sequence[Any]] = [entry.parts for entry in entries]
        parts += [args[i].parts for i in self.states]
        return [args[j] if i < 0 else parts[i][j] for i, j in self.order]


def run_as_inference(
    compiled: Callable[..., Any], pick: Arguments, finish: Callable[[Any], Any] | None, *args: Any
) -> Any:
    """One call of a compiled graph, as inference whatever the grad mode. `finish`: what is done to its outputs."""
    with torch.no_grad(), errors_through_cpp():
        outputs = compiled(*pick(args))
        return outputs if finish is None else finish(outputs)

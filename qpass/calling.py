"""One call of a compiled graph: from the arguments that Dynamo passes to those of the rewritten graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from qpass.bundles import BundleInput, Source
from qpass.errors import errors_through_cpp
from qpass.ops.bundle import bundle
from qpass.passes import GraphInput, StateInput
from qpass.qtensor import last_change
from qpass.sites.group import WeightGroup
from qpass.store import Entry, WeightStore
from qpass.structure import Structure

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


class Held:
    """Arguments of a captured graph that Dynamo does not pass: Parameters of a watched module, fetched from where it keeps them.

    `count`: of all arguments. `places`: the position of each that is not passed -> the module, and the Parameter's name there.
    """

    def __init__(
        self, count: int, places: Mapping[int, tuple[Module, str]] = {}, structure: Structure | None = None
    ) -> None:
        self.count = count
        self.places = {i: (weakref.ref(module), name) for i, (module, name) in places.items()}
        self.passed = [i for i in range(count) if i not in places]
        #: The position among all -> that among those passed.
        self.at = {i: n for n, i in enumerate(self.passed)}
        self._structure = None if structure is None else weakref.ref(structure)

    def writes(self) -> int:
        """A number that is another one once one of them may be another tensor."""
        structure = None if self._structure is None else self._structure()
        return 0 if structure is None else structure.writes

    def all(self, args: Sequence[Any]) -> list[Any]:
        """All arguments, from those passed."""
        found: list[Any] = [None] * self.count
        for i, value in zip(self.passed, args, strict=True):
            found[i] = value
        for i, (ref, name) in self.places.items():
            module = ref()
            found[i] = None if module is None else module._parameters[name]
        return found


class At(NamedTuple):
    """Where an argument of the rewritten graph is: among those of the captured one (`of` is -1), or a part of what a lookup gives
    or, behind all lookups, of a quantized state."""

    of: int
    part: int


class Settled:
    """What a call looked up, to be found again at the next: nearly always the weights are the same, and asking for each takes as
    long as a linear does. Serves QTensors; a float weight or bias may be edited in place and is looked up every time.

    The weights are the same if they are the same objects and no QTensor was written to; else if their tokens and contents are.
    """

    def __init__(
        self, lookups: Sequence[Lookup], args: Sequence[Any], order: Sequence[At | tuple[At, ...]], held: Held
    ) -> None:
        self.held, self.change, self.writes = held, last_change(), held.writes()
        entries = [lookup.entry(args) for lookup in lookups]
        mine = {i: entry for i, entry in enumerate(entries) if entry.of_qtensors}
        indices = [index for i in mine for index in lookups[i].indices]
        self.weights = itemgetter(*indices, *indices[:1]) if indices else lambda args: ()  # two or more give a tuple
        #: Dynamo passes none of them, so they are the same as long as nothing is written.
        self.fetched = all(index in held.places for index in indices)
        weights = self.weights(args)
        self.objects, self.types = ids(weights), list(map(type, weights))
        self.tokens, self.quantized = ids(map(_token, weights)), ids(map(_quantized, weights))
        #: What the arguments are taken from, by `take`: these, then those passed, then `found` at each call.
        self.constants: tuple[Any, ...] = ()
        self.found: list[At | tuple[At, ...]] = []
        constants, taken = list[Any](), list[tuple[int, int]]()
        for at in order:
            each = (at,) if isinstance(at, At) else at
            if isinstance(at, At) and at.of < 0 and at.part in held.at:
                taken.append((1, held.at[at.part]))
                continue
            if isinstance(at, At) and at.of < 0:
                constants.append(args[at.part])
            elif all(of in mine for of, _ in each):
                parts = [mine[of].parts[part] for of, part in each]
                constants.append(parts[0] if isinstance(at, At) else bundle(parts))  # type: ignore[arg-type]
            else:
                taken.append((2, len(self.found)))
                self.found.append(at)
                continue
            taken.append((0, len(constants) - 1))
        self.constants = tuple(constants)
        start = [0, len(constants), len(constants) + len(held.passed)]
        places = [start[which] + i for which, i in taken]
        self.take = itemgetter(*places) if len(places) > 1 else lambda all: [all[i] for i in places]
        again = {of for at in self.found if not isinstance(at, At) for of, _ in at}
        self.lookups = {i: lookup for i, lookup in enumerate(lookups) if i not in mine or i in again}
        self.gone = False
        let_go = weakref.WeakMethod(self._let_go)  # no cycle: what is replaced goes at once
        self.refs = [weakref.ref(entry, lambda _: (done := let_go()) and done()) for entry in mine.values()]

    def _let_go(self) -> None:
        """Parameters are gone: the store held their parts no longer than that, and so does this."""
        self.gone = True
        self.constants = ()

    def is_of(self, args: Sequence[Any]) -> bool:
        """Whether the QTensors of a call are those that were looked up."""
        if self.gone:
            return False
        change, writes = last_change(), self.held.writes()
        if self.fetched and (change, writes) == (self.change, self.writes):
            return True
        weights = self.weights(self.held.all(args))
        if change == self.change:
            same = ids(weights) == self.objects and list(map(type, weights)) == self.types
            self.writes = writes if same else self.writes
            return same
        try:
            same = ids(map(_token, weights)) == self.tokens and ids(map(_quantized, weights)) == self.quantized
        except AttributeError:  # something else than a QTensor
            return False
        if same:
            self.objects, self.types = ids(weights), list(map(type, weights))
            self.change, self.writes = change, writes
        return same


def ids(objects: Iterable[Any]) -> list[int]:
    return list(map(id, objects))


class Arguments:
    """The arguments of the rewritten graph from those of the captured one, or from those of them that Dynamo passes."""

    def __init__(self, sources: Sequence[Source], lookups: Mapping[WeightGroup, Lookup], held: Held) -> None:
        self.held = held
        read = {s.group for source in sources for s in (source.parts if isinstance(source, BundleInput) else [source])
                if isinstance(s, GraphInput)}  # fmt: skip
        used = {group: i for i, group in enumerate(group for group in lookups if group in read)}
        self.lookups = [lookups[group] for group in used]
        self.states = sorted({s.argument for s in sources if isinstance(s, StateInput)})

        def at(source: int | GraphInput | StateInput) -> At:
            if isinstance(source, GraphInput):
                return At(used[source.group], source.part)
            if isinstance(source, StateInput):
                return At(len(used) + self.states.index(source.argument), source.part)
            return At(-1, source)

        #: Of each argument; of several that are one bundle.
        self.order = [tuple(map(at, s.parts)) if isinstance(s, BundleInput) else at(s) for s in sources]
        self._settled: Settled | None = None

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        if len(args) != len(self.held.passed):
            args = [args[i] for i in self.held.passed]
        settled = self._settled
        constants = () if settled is None else settled.constants  # first, for another thread may let go of it
        if settled is None or not settled.is_of(args):
            settled = self._settled = Settled(self.lookups, self.held.all(args), self.order, self.held)
            constants = settled.constants
        found = self._find(settled, args) if settled.found else ()
        taken: Sequence[Any] = settled.take((*constants, *args, *found))
        return taken

    def _find(self, settled: Settled, args: Sequence[Any]) -> list[Any]:
        """What may be another one at each call."""
        looked_up = self.held.all(args) if settled.lookups else ()
        parts = {i: lookup.entry(looked_up).parts for i, lookup in settled.lookups.items()}
        parts |= {len(self.lookups) + n: args[self.held.at[i]].parts for n, i in enumerate(self.states)}
        return [
            parts[at.of][at.part] if isinstance(at, At) else bundle([parts[of][part] for of, part in at])  # type: ignore[misc]
            for at in settled.found
        ]


def run_as_inference(
    compiled: Callable[..., Any], pick: Arguments, finish: Sequence[Callable[[Any], Any]], *args: Any
) -> Any:
    """One call of a compiled graph, as inference whatever the grad mode. `finish`: what is done to its outputs."""
    with torch.no_grad(), errors_through_cpp():
        outputs = compiled(*pick(args))
        for change in finish:
            outputs = change(outputs)
        return outputs

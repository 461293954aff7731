"""Calibration of weights: captured graphs are run over all batches at once, each weight quantized when its input is known.

So every weight sees inputs that went through the quantized weights before it, in a single pass; of the values in between only
those that are still needed are held, and nothing is computed behind the last weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qpass import ranks
from qpass.algorithms.rounding import needs_hessian
from qpass.errors import QpassError
from qpass.memory import return_freed_heap
from qpass.observers import InputStats
from qpass.programs import Run, Stop
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.sites.group import WeightGroup
from qpass.weights import memory_of

#: Bytes of values that may be held between two weights. Above them a run goes back to the last narrow place (the residual
#: stream, not what lies inside of a feed-forward network) and computes the rest again.
BUDGET = 4 << 30

#: What identifies the weights of a group in all graphs.
Key = tuple[tuple[object, ...], ...]


@dataclass
class Place:
    """Where the runs read a group of weights. `weights`: the float ones, until they are quantized."""

    weights: list[Tensor]
    readers: list[tuple[Run, Stop]]
    again: bool = False  # a run reads one of them a second time

    @property
    def group(self) -> WeightGroup:
        """The weights, as the first reader has them."""
        return self.readers[0][1].group

    @property
    def inputs(self) -> frozenset[tuple[int, Node]]:
        """What is read: equal for groups that read the same, for which one Hessian serves."""
        return frozenset((id(run), stop.x) for run, stop in self.readers)


def places_of(runs: Sequence[Run]) -> dict[Key, Place]:
    """Each group of weights, in an order that no run has to go back for.

    Raises `QpassError` if there is none: calls of the model that use the weights in different orders.
    """
    places: dict[Key, Place] = {}
    queues: list[list[Key]] = []
    for run in runs:
        queue: list[Key] = []
        seen: set[tuple[object, ...]] = set()
        for stop in run.program.stops:
            weights = [run.weights[w] for w in stop.weights]
            key = tuple(memory_of(w) for w in weights)
            place = places.setdefault(key, Place(weights, []))
            place.again |= any(one in seen for one in key)
            for other in (places[k] for k in queue if set(k) & set(key)):
                other.again = True
            seen |= set(key)
            if key not in queue:  # of a weight that is used again, the first use counts
                place.readers.append((run, stop))
                queue.append(key)
        queues.append(queue)
    ordered: list[Key] = []
    while any(queues):
        heads = [queue[0] for queue in queues if queue]
        free = [k for k in heads if all(k not in queue[1:] for queue in queues)]
        if not free:
            names = places[heads[0]].readers[0][1].group.names
            raise QpassError(
                f"calibration: the batches use {names[0]} and others in different orders; give batches for one kind of call"
            )
        ordered.append(free[0])
        for queue in queues:
            if queue and queue[0] == free[0]:
                queue.pop(0)
    return {key: places[key] for key in ordered}


@torch.no_grad()
def quantize_in_order(
    runs: Sequence[Run],
    places: Mapping[Key, Place],
    convert: Callable[[WeightGroup, list[Tensor], InputStats | None], Sequence[QTensor]],
    is_known: Callable[[WeightGroup], bool] = lambda group: False,
) -> None:
    """Quantize the weights of all places, each with what the runs give of its input.

    `convert`: (group, its float weights, stats of their input) -> QTensors, which the runs go on with. `is_known`: it gives
    those of a group without stats.
    With torch.distributed each rank has runs of its own, and all have what all give. Raises `QpassError` for an input with NaN or
    inf, naming the site.
    """
    ranks.check_same("use weights", [str((place.group.names, str(place.group.spec))) for place in places.values()])
    done: set[tuple[object, ...]] = set()
    readers: dict[frozenset[tuple[int, Node]], list[Place]] = {}
    for place in places.values():
        readers.setdefault(place.inputs, []).append(place)
    collected: dict[frozenset[tuple[int, Node]], InputStats] = {}
    for key in track(list(places), "qpass: calibrating"):
        place = places[key]
        alike = readers[place.inputs]
        alike.remove(place)
        new = [i for i, one in enumerate(key) if one not in done]  # others are the second use of a tied weight
        weights, place.weights = [place.weights[i] for i in new], []
        done |= set(key)
        if not new:
            continue
        group = place.group.subset(new)
        stats = collected.pop(place.inputs, None)
        if stats is None and not is_known(group):
            stats = _collect(place, runs, any(needs_hessian(p.group.spec) for p in (place, *alike)))
        if stats is not None:
            stats.partial = place.again
            if alike:
                collected[place.inputs] = stats
        stored = convert(group, weights, stats)
        del stats
        return_freed_heap()
        for run in runs:
            for node, value in run.weights.items():
                for weight, quantized in zip(weights, stored, strict=True):
                    if value is weight:
                        run.weights[node] = quantized


def _collect(place: Place, runs: Sequence[Run], hessian: bool) -> InputStats:
    """What the runs give to the weights of a place; they come as far as it."""
    stats: InputStats | None = None
    for run, stop in place.readers:
        rows = run.rows(stop)
        stats = stats or InputStats.empty(rows.shape[-1], rows.device, hessian)
        stats.add(rows)
        del rows
        if run.is_narrow or sum(r.nbytes for r in runs) <= BUDGET:
            run.mark()
        else:
            run.back()  # computed again behind the weights that are quantized now
    assert stats is not None
    stats = stats.over_ranks()
    if not stats.tokens:
        _no_token(place.group)
    if not bool(torch.isfinite(stats.squares).all()):
        raise QpassError(
            f"{place.group.names[0]}: its input in calibration holds NaN, inf, or numbers whose squares overflow; "
            "leave that batch out (a module has quantized the weights before it by now: load it again)"
        )
    return stats


def _no_token(group: WeightGroup) -> None:
    """A static scale cannot be had from nothing; codes can."""
    says = f"{group.names[0]}: no token of the calibration reached it"
    if group.spec.activations is not None and group.spec.activations.static:
        raise QpassError(f"{says} (all masked out, or an expert that was not chosen?); add batches that do")
    warnings.warn(f"{says}; it is rounded to nearest", stacklevel=2)

"""Quantized weights, looked up at each call from the Parameters that the graph receives.

By identity and version, never by name: two models of one class, one block compiled once for all layers, and weights
loaded or edited after compiling all get the weights that belong to them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.algorithms.rounding import input_parts
from qpass.errors import QpassError
from qpass.graph.torch_private import WeakIdKeyDictionary
from qpass.memory import into_huge_pages
from qpass.observers import InputStats
from qpass.qtensor import Outcome, QTensor
from qpass.quantized import Quantized
from qpass.sites.group import WeightGroup
from qpass.spec import QuantSpec
from qpass.weights import as_rows, check_weight, concat_rows, measured_weight, row_range, weight_range

#: What is stored of a group: qpass.passes.GROUP_PARTS.
Parts = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class WeightStats:
    """What quantizing one Parameter gave, and the bytes that it is stored in."""

    nbytes: int
    outcome: Outcome


@dataclass(frozen=True)
class Made:
    """One weight, quantized."""

    quantized: Quantized
    outcome: Outcome


class Kept:
    """What an earlier, interrupted run of the same work has made. This one kept nothing.

    `goes_on`: a run that fails can be started again, and goes on.
    """

    goes_on = False

    def bits(self) -> dict[str, str] | None:
        """Weight -> spec, where bits were given out."""
        return None

    def keep_bits(self, specs: dict[str, str]) -> None:
        """Bits were given out."""

    def has(self, group: WeightGroup) -> bool:
        """Whether `get` gives something."""
        return False

    def get(self, group: WeightGroup) -> list[Made] | None:
        """The weights of a group, if they are there."""
        return None

    def put(self, group: WeightGroup, made: Sequence[Made]) -> None:
        """The weights of a group were made."""


class Entry:
    """The parts of a group and what they were made from."""

    def __init__(self, params: Sequence[Tensor], parts: Parts, on_death: Callable[[Any], object]) -> None:
        self.parts = parts
        self.refs = [weakref.ref(anchor(p), on_death) for p in params]
        self.states = [_state(p) for p in params]
        # Held, so that new memory of a Parameter cannot come to lie where the old was.
        self.storages = [p.untyped_storage() for p in params if not isinstance(p, QTensor)]
        self.of_qtensors = all(isinstance(p, QTensor) for p in params)

    def holds(self, param: Tensor) -> bool:
        """Whether the parts were made of `param`, among others."""
        return any(ref() is anchor(param) for ref in self.refs)

    def is_of(self, params: Sequence[Tensor]) -> bool:
        for p, ref, state in zip(params, self.refs, self.states, strict=True):
            if ref() is not anchor(p) or _state(p) != state:
                return False
        return True


class WeightStore:
    """Groups of Parameters -> stored parts; quantized when first seen and again when a Parameter has changed."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], Entry] = {}
        self._lock = threading.Lock()
        self._stats: WeakIdKeyDictionary = WeakIdKeyDictionary()
        #: Parameter -> its state, and what calibration made of it.
        self._chosen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(
        self, params: Sequence[Tensor], group: WeightGroup, key: str, on_new: Callable[[Sequence[Tensor]], None]
    ) -> Entry:
        """With the parts for `params` (the group's weights, then its stored biases). `key`: a name of the group's layout.

        `on_new` is told of Parameters that were quantized just now.
        """
        entry = self._entries.get((id(anchor(params[0])), key))
        if entry is not None and entry.is_of(params):
            return entry
        with self._lock:
            slot = (id(anchor(params[0])), key)
            parts = self._make(params, group)
            entry = self._entries[slot] = Entry(params, parts, lambda _: self._entries.pop(slot, None))
        on_new(params)
        return entry

    def choose(self, param: Tensor, made: Made) -> None:
        """Keep what calibration made of a Parameter, for all graphs that will use it, as long as it is not changed."""
        self._chosen[param] = _state(param), made
        for slot in [slot for slot, entry in self._entries.items() if entry.holds(param)]:
            del self._entries[slot]

    def _made_before(self, params: Sequence[Tensor]) -> list[Made] | None:
        known = [None if isinstance(p, QTensor) else self._chosen.get(p) for p in params]
        if any(k is None or k[0] != _state(p) for k, p in zip(known, params, strict=True)):
            return None
        return [made for _, made in known]  # type: ignore[misc]

    def stats(self, param: Tensor) -> WeightStats | None:
        """What quantizing `param` gave, if it was done here or the Parameter is a QTensor."""
        if isinstance(param, QTensor):
            return WeightStats(param.stored_nbytes, param.outcome)
        return self._stats.get(param)

    def scales(self, param: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
        """(scale, outer scale) as stored for a Parameter that was quantized here, its rows of them; None if it was not."""
        for entry in self._entries.values():
            members = [ref() for ref in entry.refs]
            position = next((i for i, p in enumerate(members) if p is param), None)
            scale, outer = entry.parts[1], entry.parts[3]
            if position is None or scale is None:
                continue
            weights = [p for p in members if isinstance(p, Tensor) and p.dim() > 1]
            rows = [p.numel() // columns for p in weights if (columns := p.shape[-1])]
            # Alone; or a scale for all of them, or transposed ones.
            if len(weights) == 1 or sum(rows) != scale.shape[0]:
                return scale, outer
            cut = slice(sum(rows[:position]), sum(rows[: position + 1]))
            return scale[cut], outer[cut] if outer is not None and outer.shape[0] == scale.shape[0] else outer
        return None

    def _make(self, params: Sequence[Tensor], group: WeightGroup) -> Parts:
        # Autocast has no place for scales in other types than its own.
        with torch.autocast(params[0].device.type, enabled=False):
            return self._made(params, group)

    def _made(self, params: Sequence[Tensor], group: WeightGroup) -> Parts:
        n = len(group.weights)
        weights, biases = params[:n], list(params[n:])
        if all(isinstance(w, QTensor) for w in weights):
            for weight, name in zip(weights, group.names, strict=True):
                if weight.spec != group.spec:  # type: ignore[attr-defined]
                    raise QpassError(
                        f"{name}: now stored as {weight.spec}, but the graph was compiled for {group.spec}; "  # type: ignore[attr-defined]
                        "compile it again: model.compile(backend=qpass)"
                    )
            quantized = fuse(weights)  # type: ignore[arg-type]
        else:
            quantized = self._quantize(weights, group)
        if not group.has_bias:
            return (*quantized.all_parts, None)
        rows = [w.shape[1 if t else 0] for w, t in zip(weights, group.transposed, strict=True)]
        reference = biases[0]
        pieces = [
            reference.new_zeros(r) if b is None else biases.pop(0) for r, b in zip(rows, group.biases, strict=True)
        ]
        return (*quantized.all_parts, torch.cat([p.detach() for p in pieces]))

    def _quantize(self, weights: Sequence[Tensor], group: WeightGroup) -> Quantized:
        stored = []
        for weight, flipped, name in zip(weights, group.transposed, group.names, strict=True):
            value = weight.dequantize() if isinstance(weight, QTensor) else weight.detach()
            stored.append(as_rows(value, flipped))
            check_weight(stored[-1], group.spec, name)
        done = self._made_before(weights) or quantize_group(stored, group.spec)
        shared = group.spec.format.scale == "e4m3"  # one float multiplies the scales of them all
        for i, (weight, made) in enumerate(zip(weights, done, strict=True)):
            if not isinstance(weight, QTensor):
                outer = made.quantized.outer_scale
                twice = outer.nbytes if shared and i and outer is not None else 0
                self._stats[weight] = WeightStats(made.quantized.nbytes - twice, made.outcome)
        whole = done[0].quantized
        if len(done) > 1:
            whole = concat_rows([made.quantized for made in done], [s.shape[0] for s in stored], keep_single=shared)
        return whole.map(into_huge_pages)


def guards_beside_the_lookup(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are needed beside `WeightStore.get`: all but those on what is inside of a QTensor.

    That is looked up by identity at each call anyway, and the guards on it take as long as all others together.
    """
    ours = {g.name for g in guards if isinstance(g.value, QTensor)}
    inside = tuple(f"{name}." for name in ours)
    metadata = "TENSOR_SUBCLASS_METADATA_MATCH"
    return [not g.name.startswith(inside) and not (g.guard_type == metadata and g.name in ours) for g in guards]


def anchor(param: Tensor) -> Any:
    """The object whose identity stands for `param`: of a QTensor its token, which `.to()` exchanges with its contents."""
    return param.token if isinstance(param, QTensor) else param


def _state(param: Tensor) -> tuple[Any, ...]:
    """Changes when a Parameter is edited in place or given other memory. A QTensor's parts are edited where they are."""
    if isinstance(param, QTensor):
        return (param.quantized,)
    return 0 if param.is_inference() else param._version, param.data_ptr()


def quantize_group(weights: Sequence[Tensor], spec: QuantSpec, stats: InputStats | None = None) -> list[Made]:
    """[N_i, K] weights that one operator will read, each quantized. `stats`: of their common input.

    In nvfp4 the weights of a group share the float that multiplies their scales, so that one kernel can run them all.
    """
    begin = time.perf_counter()
    around, stats, seen = input_parts(weights, spec, stats)
    if stats is not None and "gptq" in spec.algorithms:
        stats.solver  # noqa: B018  made once for all of them
    shared = None
    if spec.format.scale == "e4m3" and len(weights) > 1:
        ranges = [weight_range(w, around) for w in weights]
        shared = (torch.stack([r[0] for r in ranges]).amin(), torch.stack([r[1] for r in ranges]).amax())
    common = time.perf_counter() - begin
    done = []
    for weight in weights:
        start = time.perf_counter()
        quantized, power = measured_weight(weight, spec, shared, stats, around)
        seconds = time.perf_counter() - start + common / len(weights)
        done.append(Made(quantized, Outcome(power.sqnr_db, seconds, seen)))
    return done


def fuse(weights: Sequence[QTensor]) -> Quantized:
    """One buffer for QTensors that one operator reads; they become row ranges of it, so that nothing is stored twice."""
    rows = [w.quantized.data.shape[0] for w in weights]
    if len(weights) == 1:
        weights[0].quantized.map(into_huge_pages)
        return weights[0].quantized
    base = _common_base(weights, rows)
    if base is not None:
        return base
    base = concat_rows([w.quantized for w in weights], rows).map(into_huge_pages)
    start = 0
    for weight, n in zip(weights, rows, strict=True):
        weight.quantized = row_range(base, start, n, sum(rows))
        weight.base = base
        start += n
    return base


def _common_base(weights: Sequence[QTensor], rows: Sequence[int]) -> Quantized | None:
    """The buffer that the weights already are consecutive rows of, if they are."""
    base = weights[0].base
    if base is None or base.data.shape[0] != sum(rows):
        return None
    start = 0
    for weight, n in zip(weights, rows, strict=True):
        if weight.base is not base or weight.quantized.data.data_ptr() != base.data[start:].data_ptr():
            return None
        start += n
    return base

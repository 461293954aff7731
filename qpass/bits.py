"""Bits given out: a number of them on average, more to the weights where they save most.

How much is lost by a weight is what calibration says of it (`qpass.sensitivity`). Without data it is taken to be its relative
error, and all weights of one kind together to count as much as those of another: the table, the values, the outputs of the
feed-forward networks. So a kind with few weights, as the values of grouped heads, gets more bits, which cost little there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from qpass.decisions import Decision, Decisions
from qpass.numerics import fake_quantize
from qpass.programs import Program, Run
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from qpass.sensitivity import GROUP, Sensitivity, measure
from qpass.sites.group import WeightGroup, group_weights
from qpass.spec import QuantSpec, parse_spec
from qpass.weights import as_rows, memory_of

#: What a weight may become where bits are given out.
LADDER = (*(f"int{b}:g{GROUP}:asym:scale=fp16" for b in (2, 3, 4, 5, 6)), f"int8:g{GROUP}:scale=fp16")
#: Rows that the error of a weight is taken from without data, evenly picked.
_SAMPLE = 256
#: What stands for a weight: `memory_of` it.
Key = tuple[object, ...]


def takes_bits(spec: QuantSpec | None, name: str, recipe: Recipe, columns: int) -> bool:
    """Whether bits are given out to a weight: not if the recipe names it, and only to integers in rows of a group or more."""
    named = any(fnmatchcase(name, glob) for glob, _ in recipe.overrides)
    return spec is not None and not named and spec.format.kind == "uniform" and columns >= GROUP


def give_out(
    weights: Mapping[Key, Tensor],
    bits: float,
    loss: Callable[[Key, QuantSpec], float],
    together: Iterable[Iterable[Key]] = (),
) -> dict[Key, QuantSpec]:
    """A format of LADDER for each of `weights`, so that they have `bits` a number together, scales included, and the sum of their
    losses is least. `together`: those that one operator reads get one format, so that it still can."""
    ladder = [parse_spec(text) for text in LADDER]
    items: list[list[Key]] = []
    seen: set[Key] = set()
    for keys in (*together, *([key] for key in weights)):
        new = [key for key in dict.fromkeys(keys) if key in weights and key not in seen]
        seen.update(new)
        items += [new] if new else []
    choices = [
        [
            (
                sum(weights[k].numel() * s.effective_bits(weights[k].shape[-1]) for k in keys),
                sum(loss(k, s) for k in keys),
            )
            for s in ladder
        ]
        for keys in track(items, "qpass: giving out bits")
    ]
    chosen = cheapest(choices, bits * sum(w.numel() for w in weights.values()))
    return {key: ladder[step] for keys, step in zip(items, chosen, strict=True) for key in keys}


def spread_bits(groups: Sequence[tuple[WeightGroup, Sequence[Tensor]]], bits: float, decisions: Decisions) -> None:
    """Give out `bits` a number to weights without data: by their relative errors, each kind as much as another. What was decided
    for good is left; `decisions` are of these formats afterwards."""
    weights: dict[Key, Tensor] = {}
    decided: dict[Key, tuple[Tensor, Decision]] = {}
    for group, params in groups:
        for param, flipped in zip(params, group.transposed, strict=True):
            known = decisions.of(param)
            rows = as_rows(param.detach(), flipped)
            if known is None or known.final or isinstance(param, QTensor) or rows.is_meta:
                continue
            if takes_bits(known.spec, known.site.name, decisions.recipe, rows.shape[-1]):
                weights[memory_of(param)], decided[memory_of(param)] = rows, (param, known)
    alike = Counter((known.site.kind, known.site.roles) for _, known in decided.values())

    def loss(key: Key, spec: QuantSpec) -> float:
        site = decided[key][1].site
        return _relative_error(weights[key], spec) / alike[site.kind, site.roles]

    chosen = give_out(weights, bits, loss, ([memory_of(p) for p in params] for _, params in groups))
    for key, spec in chosen.items():
        param, known = decided[key]
        decisions.adopt(param, replace(known, spec=_as_asked(spec, known), final=True))


def _relative_error(rows: Tensor, spec: QuantSpec) -> float:
    """Of rounding to nearest, the power of the error over that of the weight."""
    picked = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).long().to(rows.device)].float()
    power = float(picked.square().sum())
    return float((picked - fake_quantize(picked, spec)).square().sum()) / power if power else 0.0


def _as_asked(spec: QuantSpec, known: Decision) -> QuantSpec:
    """A format with the algorithms and activations of the spec that the recipe gives."""
    assert known.spec is not None
    return replace(spec, algorithms=known.spec.algorithms, activations=known.spec.activations)


def with_bits(
    runs: Sequence[Run], bits: float, decisions: Decisions, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Give out `bits` a number to the weights of the recorded calls: decisions and runs are of these formats afterwards.

    Returns weight -> spec; `known`: what an earlier call returned, which is taken as it is.

    Left as the recipe says are weights that it names by an override, other formats than integers, rows below GROUP, and what no
    output depends on.
    """
    together: list[list[Key]] = []
    for run in runs:
        by_name = {node.name: weight for node, weight in run.weights.items()}
        for group, _ in group_weights(run.program.plan, run.weights):
            params = [by_name[name] for name in group.weights]
            decisions.learn(params, run.program.plan, group)
            together.append([memory_of(p) for p in params])

    def decided(weight: Tensor) -> Decision:
        decision = decisions.of(weight)
        assert decision is not None
        return decision

    def takes(seen: Sensitivity) -> bool:
        decision = decided(seen.weight)
        there = seen.fisher is not None or seen.looked_up is not None
        return there and takes_bits(decision.spec, decision.site.name, decisions.recipe, seen.columns)

    names = {memory_of(w): decided(w).site.name for run in runs for w in run.weights.values() if decisions.of(w)}
    if known is None:
        found = {key: seen for key, seen in measure(runs).items() if takes(seen)}
        weights = {key: as_rows(seen.weight.detach(), seen.transposed) for key, seen in found.items()}
        given = give_out(weights, bits, lambda key, spec: found[key].loss(spec), together)
        chosen = {key: _as_asked(spec, decided(found[key].weight)) for key, spec in given.items()}
    else:
        chosen = {key: parse_spec(known[name]) for key, name in names.items() if name in known}

    def spec_of(weight: Tensor) -> QuantSpec:
        spec = chosen.get(memory_of(weight)) or decided(weight).spec
        assert spec is not None
        return spec

    programs: dict[Key, Program] = {}
    for run in runs:
        for weight in run.weights.values():
            if memory_of(weight) in chosen:
                decisions.adopt(weight, replace(decided(weight), spec=chosen[memory_of(weight)], final=True))
        key = id(run.program), tuple(str(chosen.get(memory_of(w))) for w in run.weights.values())
        if key not in programs:
            programs[key] = run.program.with_specs(run.weights, spec_of)
        run.program = programs[key]
    return {names[key]: str(spec) for key, spec in chosen.items()}


def cheapest(choices: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """One (size, loss) of each item, so that the sizes stay within `budget` and the sum of losses is least.

    Steps along the lower convex hull of each item, best gain for its size first: optimal but for the last step that fits.
    An item's first choice is its smallest; if even these are too large, they are taken.
    """
    steps: list[tuple[float, float, int, int]] = []
    for item, options in enumerate(choices):
        at = 0
        while at + 1 < len(options):
            gains = [((options[at][1] - loss) / (size - options[at][0]), i)
                     for i, (size, loss) in enumerate(options) if i > at]  # fmt: skip
            gain, following = max(gains)
            if gain <= 0:
                break
            steps.append((gain, options[following][0] - options[at][0], item, following))
            at = following
    chosen, left = [0] * len(choices), budget - sum(options[0][0] for options in choices)
    stopped: set[int] = set()
    for _, size, item, following in sorted(steps, reverse=True):
        if item not in stopped and size <= left:
            chosen[item], left = following, left - size
        else:
            stopped.add(item)  # its later steps begin where this one ends
    return chosen

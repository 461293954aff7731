"""The smallest change of a recipe that gives most of a quantized model's accuracy back, found greedily and measured."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qpass.measuring.restore import Pieces, Whole
from qpass.measuring.walk import CacheForm, Form, State
from qpass.numerics import fake_quantize, quantize
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from qpass.spec import QuantSpec, parse_spec
from qpass.weights import as_rows, from_rows

#: A fix recovers so much of the KL, with so many changes at most; one that brings less than the last is not made.
ENOUGH, MOST, LEAST = 0.8, 8, 0.01
#: A format serves that recovers so much of what floats at that site do.
SERVES = 0.9
#: Nats a token: below there is nothing to fix.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Suspect:
    """A site that is quantized: its weight and what it was, or a cache with K's and V's specs. `key`: in a State."""

    key: str
    kind: str
    name: str
    weight: QTensor | None = None
    was: Tensor | None = None
    cache: tuple[QuantSpec, QuantSpec] | None = None

    @property
    def format(self) -> str:
        """Its spec, or specs."""
        if self.cache is None:
            return str(self.weight.spec)  # type: ignore[union-attr]
        return str(self.cache[0]) if self.cache[0] == self.cache[1] else "k={}, v={}".format(*self.cache)


@dataclass(frozen=True)
class Change:
    """A format for a site (None: float), or for all caches. `name`: the glob of an override; "kv": of the caches."""

    name: str
    format: str | None
    bytes_added: int
    forms: State


@dataclass(frozen=True)
class Step:
    """One line of a fix: KL before and with it."""

    name: str
    format: str | None
    kl_before: float
    kl: float
    bytes_added: int

    @property
    def line(self) -> str:
        """As in YAML."""
        cost = f", +{self.bytes_added:,} bytes" if self.bytes_added else ""
        key = self.name if self.name == "kv" else f'"{self.name}"'
        return f"{key}: {self.format or 'null'}   # KL {self.kl_before:.4g} -> {self.kl:.4g}{cost}"


@dataclass(frozen=True)
class Fix:
    """Changes of the recipe: `kl` with all of them, `recovered`: share of the KL (NaN where that is). `recipe`: the whole
    recipe with them, as YAML that `Recipe.from_yaml` reads; `lines`: what was added to it."""

    steps: tuple[Step, ...]
    kl: float
    recovered: float
    bytes_added: int
    recipe: str
    lines: str

    def __str__(self) -> str:
        if not math.isfinite(self.recovered):
            says = f"leaves finite numbers, KL {self.kl:.4g}" if math.isfinite(self.kl) else "does not suffice"
        else:
            says = f"recovers {self.recovered:.0%} of the KL" + ("" if self.recovered >= ENOUGH else ", the best found")
        return f"this {says}:\n{self.lines}"


def find_fix(
    measured: Whole | Pieces,
    floats: State,
    state: State,
    kl: float,
    ranked: Sequence[tuple[Suspect, float]],
    recipe: Recipe,
) -> Fix | None:
    """`ranked`: sites, the worst first, with the KL that floats there recover. None where no change is worth naming."""
    if math.isfinite(kl) and kl < NEGLIGIBLE:
        return None
    taken: list[Change] = []
    now, order = kl, list(ranked)
    while order and len(taken) < MOST and not _solves(now, kl):
        if not math.isfinite(now):  # several sites may give NaN, and the first hides the others
            culprit = _first_bad(measured, floats, _with(state, taken))
            order.sort(key=lambda one: one[0].key != culprit)
        suspect, gain = order.pop(0)
        if math.isfinite(kl) and gain < LEAST * kl:
            break
        if any(suspect.key in change.forms for change in taken):
            continue
        tried: list[tuple[float, Change]] = []
        for change in _changes(suspect, ranked):
            tried.append((measured.kl(_with(state, [*taken, change])), change))
            if _solves(tried[-1][0], kl) or now - tried[-1][0] >= SERVES * gain:
                break
        chosen = _cheapest(tried, now)
        if chosen is not None:
            now = chosen[0]
            taken.append(chosen[1])
    for change in taken[:-1]:  # what a later one made superfluous
        others = [c for c in taken if c is not change]
        if _solves(now, kl) and _solves(measured.kl(_with(state, others)), kl):
            taken = others
    if not taken:
        return None
    steps, before = [], kl
    for i, change in enumerate(taken, 1):
        after = now if len(taken) == 1 else measured.kl(_with(state, taken[:i]))
        steps.append(Step(change.name, change.format, before, after, change.bytes_added))
        before = after
    return Fix(
        tuple(steps), before, 1 - before / kl, sum(c.bytes_added for c in taken), _yaml(recipe, taken), _lines(steps)
    )


def _solves(now: float, kl: float) -> bool:
    return math.isfinite(now) and (not math.isfinite(kl) or now <= (1 - ENOUGH) * kl)


def _with(state: State, changes: Sequence[Change]) -> State:
    return {**state, **{key: form for c in changes for key, form in c.forms.items()}}


def _first_bad(measured: Whole | Pieces, floats: State, state: State) -> str | None:
    return next((one.name for one in measured.contrasts(floats, state) if one.bad), None)


def _cheapest(tried: Sequence[tuple[float, Change]], now: float) -> tuple[float, Change] | None:
    """(KL, change) that does about as much as the best of them, `now` being the KL without; None if none does anything."""
    found = [one for one in tried if math.isfinite(one[0])]
    if not math.isfinite(now):  # floats, if other sites are bad too
        return found[0] if found else tried[-1]
    most = now - min((after for after, _ in found), default=now)
    return next((one for one in found if now - one[0] >= SERVES * most), None) if most > 0 else None


def _changes(suspect: Suspect, ranked: Sequence[tuple[Suspect, float]]) -> Iterator[Change]:
    """Formats that lose less than what the site has, in order of bytes; a recipe has one for all caches."""
    if suspect.cache is not None:
        keys = [s.key for s, _ in ranked if s.cache is not None]
        if max(spec.format.bits for spec in suspect.cache) < 8:
            yield Change(
                "kv", "int8", 0, dict.fromkeys(keys, CacheForm(specs=(parse_spec("int8"), parse_spec("int8"))))
            )
        yield Change("kv", None, 0, dict.fromkeys(keys, CacheForm()))
        return
    q, was = suspect.weight, suspect.was
    assert q is not None
    assert was is not None
    rows, name = as_rows(was, q.transposed), glob.escape(suspect.name)
    specs = []
    if q.spec.activations is not None:
        kept = tuple(a for a in q.spec.algorithms if a != "smooth")
        specs.append(replace(q.spec, algorithms=kept, activations=None))
    finer = parse_spec("int8:g32" if rows.shape[1] >= 32 else "int8")
    if finer.effective_bits(rows.shape[1]) > q.spec.effective_bits(rows.shape[1]):
        specs.append(finer)
    for spec in specs:
        same = spec.algorithms == q.spec.algorithms and spec.format == q.spec.format
        if same:
            form, nbytes = Form(q.dequantize(was.dtype)), q.stored_nbytes
        else:  # to nearest, whatever algorithms choose the codes
            plain = replace(spec, algorithms=())
            form = Form(from_rows(fake_quantize(rows, plain), was.shape, q.transposed))
            nbytes = quantize(rows, plain).nbytes
        yield Change(name, str(spec), max(0, nbytes - q.stored_nbytes), {suspect.key: form})
    yield Change(name, None, was.nbytes - q.stored_nbytes, {suspect.key: Form(was)})


def _yaml(recipe: Recipe, changes: Sequence[Change]) -> str:
    """The first override that matches wins, so the new ones come first."""
    import yaml

    data: dict[str, Any] = recipe.to_dict()
    overrides: dict[str, str | None] = {c.name: c.format for c in changes if c.name != "kv"}
    for change in changes:
        if change.name == "kv":
            data = {k: v for k, v in data.items() if k not in ("k", "v")} | (
                {"kv": change.format} if change.format else {}
            )
    overrides |= {k: v for k, v in data.pop("overrides", {}).items() if k not in overrides}
    return yaml.safe_dump(data | ({"overrides": overrides} if overrides else {}), sort_keys=False)


def _lines(steps: Sequence[Step]) -> str:
    weights = [f"  {step.line}" for step in steps if step.name != "kv"]
    caches = [step.line for step in steps if step.name == "kv"]
    return "\n".join((["overrides:", *weights] if weights else []) + caches)

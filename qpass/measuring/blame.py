"""qpass.blame: which sites of a quantized model cost its accuracy, measured, and the recipe that gives it back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpass.backend import QPass
from qpass.calibration import Batch
from qpass.errors import QpassError
from qpass.graph.torch_private import original_module
from qpass.measuring.evaluate import ids_and_mask
from qpass.measuring.fix import Fix, Suspect, find_fix
from qpass.measuring.restore import Contrast, captured_once
from qpass.measuring.walk import CacheForm, Form, State, cache_key
from qpass.numerics import power_of
from qpass.printing import finite, printed
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from qpass.registry import captured
from qpass.replay import BUDGET
from qpass.sites.core import Site

#: A site diverges that is off by so much, and by so many times as much as its input: rounding a weight to four bits alone
#: gives a tenth, which adds up from layer to layer without any one site to name.
DIVERGED, JUMP = 0.25, 3.0


@dataclass(frozen=True)
class BlameRow:
    """One site. `kl_restored`: nats a token with it in float and all others as they are; `kl_recovered`: what that takes from
    the KL, `share` of it (both NaN where the KL is). `bytes_added`: by restoring it; None for a cache."""

    kind: str
    name: str
    format: str
    kl_restored: float
    kl_recovered: float
    share: float
    sqnr_db: float | None
    bytes_added: int | None


@dataclass(frozen=True)
class FirstBad:
    """The first site in the order of the data whose output is NaN or infinite and not so in the float model (`nan`), or else
    whose output is off by DIVERGED or more and by JUMP times as much as its input. Errors are relative to the float run."""

    name: str
    nan: bool
    error_before: float
    error_after: float

    def __str__(self) -> str:
        if self.nan:
            return f"first NaN: {self.name}"
        return f"first divergence: {self.name}, relative error {self.error_before:.2g} before, {self.error_after:.2g} after"


@dataclass(frozen=True)
class Blame:
    """`kl`: KL(reference || model), nats a token; `rows`: by KL recovered, the most first; `fix`: None if nothing is worth it."""

    kl: float
    tokens: int
    rows: tuple[BlameRow, ...]
    first_bad: FirstBad | None
    fix: Fix | None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data, None for NaN and infinity."""
        data: dict[str, Any] = finite(asdict(self))
        return data

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", "kind", "name", "format", "KL recovered", "share", "SQNR dB", box=None, pad_edge=False)
        table.columns[2].overflow, table.columns[2].min_width = "fold", 24
        for column in (table.columns[0], *table.columns[4:]):
            column.justify = "right"
        for i, row in enumerate(self.rows, 1):
            recovered = f"{row.kl_recovered:.5f}" if math.isfinite(row.kl_recovered) else ""
            if not recovered and math.isfinite(row.kl_restored):
                recovered = f"NaN -> {row.kl_restored:.5f}"
            share = f"{row.share:.1%}" if math.isfinite(row.share) else ""
            sqnr = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
            table.add_row(str(i), row.kind, row.name, row.format, recovered, share, sqnr)
        bad = [] if self.first_bad is None else [str(self.first_bad)]
        end = "no change of formats is worth naming" if self.fix is None else str(self.fix)
        return Group(f"KL {self.kl:.5f} nats a token, {self.tokens} tokens", table, *map(Text, (*bad, end)))

    def __str__(self) -> str:
        return printed(self)


@torch.no_grad()
def blame(
    model: Any, reference: Any, batches: Iterable[Tensor | Mapping[str, Tensor]], *, top: int | None = None
) -> Blame:
    """Measure what each site of `model` (of qpass.quantize or qpass.load) costs, against the float model `reference`.

    `batches`: token ids [B, S], or dicts with input_ids and attention_mask, as for `qpass.evaluate`. Restoring a site: its weight
    and its input are floats, or the keys and values of its layer, and all else stays quantized. Products are computed in float
    from what is stored (as under `qpass.set_compute("float")`), and a cache is read as qpass.evaluate does. `top`: how many rows
    to keep. It takes half a forward pass for each site, and beside the models float copies of the weights, up to 4 GB of them,
    and 4 bytes a token and entry of the vocabulary. Where the model has graph breaks, a whole pass for each, and no cache is
    measured.
    Raises `QpassError` for a model without quantized weights, a reference with some or with other Parameters, and no tokens.
    """
    calls, sites = list(batches), _Sites(original_module(model), original_module(reference))
    if not any(ids_and_mask(b)[1][:, 1:].any() for b in calls):
        raise QpassError("qpass.blame: no batch with at least two tokens; pass token ids of shape [batch, sequence]")
    backend = captured(model, "qpass.blame")
    whole = captured_once(sites.reference, calls, [_with_cache(b, model, backend.recipe) for b in calls], sites.site_of)
    floats, stored = sites.states(whole.caches)
    whole.aim(floats)
    suspects = sites.suspects(backend, whole.caches)
    bad = _first_bad(whole.contrasts(floats, stored), {s.key: s.name for s in suspects})
    kl, restored = whole.changed(stored, {s.key: floats[s.key] for s in suspects})
    order = {s.key: restored[s.key] if math.isfinite(restored[s.key]) else math.inf for s in suspects}
    suspects.sort(key=lambda s: order[s.key])  # stable: equal ones by data flow
    rows = tuple(_row(s, kl, restored[s.key]) for s in suspects)
    fix = find_fix(whole, floats, stored, kl, [(s, kl - restored[s.key]) for s in suspects], backend.recipe)
    return Blame(kl, whole.tokens, rows[:top], bad, fix)


class _Sites:
    """The Parameters of the quantized model beside those of the float one. `site_of`: a Parameter's name -> its site's."""

    def __init__(self, model: Any, reference: Any) -> None:
        for what, module in (("model", model), ("reference", reference)):
            if not isinstance(module, nn.Module):
                raise QpassError(f"qpass.blame: {what} is a {type(module).__name__}; give a torch.nn.Module")
        self.reference: nn.Module = reference
        self.stored = dict(model.named_parameters(remove_duplicate=False))
        self.floats = dict(reference.named_parameters(remove_duplicate=False))
        if not any(isinstance(p, QTensor) for p in self.stored.values()):
            raise QpassError(
                "qpass.blame: model holds no quantized weights; give what qpass.quantize(model, ...) or qpass.load returned"
            )
        if (name := next((n for n, p in self.floats.items() if isinstance(p, QTensor)), None)) is not None:
            raise QpassError(f"qpass.blame: {name} of the reference is quantized; give the float model")
        shapes, others = ({n: list(p.shape) for n, p in ps.items()} for ps in (self.stored, self.floats))
        if (name := next((n for n in (*shapes, *others) if shapes.get(n) != others.get(n)), None)) is not None:
            raise QpassError(
                f"qpass.blame: {name} is {shapes.get(name, 'not there')} in the model and {others.get(name, 'not there')} in the "
                "reference; give the float model that it was made from"
            )
        first: dict[int, str] = {}
        self.site_of = {name: first.setdefault(id(param), name) for name, param in self.stored.items()}

    def states(self, caches: list[str]) -> tuple[State, State]:
        """(all in float, all as stored)."""
        floats: dict[str, Form | CacheForm] = {n: Form(self.floats[n]) for n in self.site_of.values()}
        stored: dict[str, Form | CacheForm] = {}
        held = 0
        for name in self.site_of.values():
            param, was = self.stored[name], self.floats[name]
            if name in stored:
                continue
            if not isinstance(param, QTensor):
                stored[name] = Form(param.detach().to(was.dtype))
                continue
            held += was.nbytes
            acts, scale = param.spec.activations, param.quantized.input_scale
            rounded = acts is not None and (scale is not None or not acts.static)  # too wide for one scale: in float
            weight = param.dequantize(was.dtype) if held <= BUDGET else param
            stored[name] = Form(weight, param if rounded else None, was.dtype)
        floats |= dict.fromkeys(caches, CacheForm())
        return floats, stored | dict.fromkeys(caches, CacheForm(stored=True))

    def suspects(self, backend: QPass, caches: list[str]) -> list[Suspect]:
        """What is quantized, in the order of the Parameters, then the caches; named as recipes name it."""
        found = []
        for name in dict.fromkeys(self.site_of.values()):
            param = self.stored[name]
            if isinstance(param, QTensor):
                decision = backend.decisions.of(param)
                site = Site("linear", name) if decision is None else decision.site
                found.append(Suspect(name, _label(site), site.name, param, self.floats[name].detach()))
        specs = backend.recipe.kv_specs
        return found + [Suspect(key, "kv", key.removeprefix(cache_key("")), cache=specs) for key in caches]


def _label(site: Site) -> str:
    """The kind, and what a tied table is beside it."""
    return "+".join(dict.fromkeys((site.kind, *(r for r in site.roles if r in ("embedding", "vocab")))))


def _with_cache(batch: Batch, model: Any, recipe: Recipe) -> Batch:
    """The arguments of a call, with a cache of the recipe's format if it has one and the model takes it."""
    config = getattr(original_module(model), "config", None)
    takes_one = hasattr(model, "generation_config") and not getattr(config, "is_encoder_decoder", False)
    if recipe.kv_specs is None or not takes_one:
        return batch
    from qpass.cache import KVCache

    k, v = recipe.kv_specs
    arguments = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    cache = KVCache(config, int(arguments["input_ids"].shape[1]), k=k, v=v)
    return {"past_key_values": cache, **arguments}


def _row(suspect: Suspect, kl: float, restored: float) -> BlameRow:
    q, was = suspect.weight, suspect.was
    sqnr = added = None
    if q is not None and was is not None:
        decibels = power_of(was, q.dequantize(was.dtype)).sqnr_db
        sqnr, added = decibels if math.isfinite(decibels) else None, was.nbytes - q.stored_nbytes
    share = (kl - restored) / kl if kl else math.nan
    return BlameRow(suspect.kind, suspect.name, suspect.format, restored, kl - restored, share, sqnr, added)


def _first_bad(contrasts: list[Contrast], names: Mapping[str, str]) -> FirstBad | None:
    """`names`: of sites, as recipes have them."""
    for one in contrasts:
        if one.bad:
            return FirstBad(names[one.name], True, *one.errors)
    for one in contrasts:
        before, after = one.errors
        if after >= max(DIVERGED, JUMP * before):
            return FirstBad(names[one.name], False, before, after)
    return None

"""qpass.plan_memory: what a model would take in memory, before anything is loaded.

The model is built and traced on the meta device, so its sites are found as they are in the real one; weights and cache are
quantized there, so their bytes are those that quantizing gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.bits import takes_bits
from qpass.errors import QpassError
from qpass.graph.whole import trace_whole
from qpass.planning.skeleton import call_inputs, on_meta, read_config
from qpass.printing import number_table, printed
from qpass.quantized import Quantized
from qpass.recipe import Recipe, SpecLike, kv_specs, resolve_recipe
from qpass.site_planner import SitePlanner
from qpass.sites.core import Site
from qpass.sites.group import WeightGroup, each_once, group_weights
from qpass.spec import QuantSpec
from qpass.weights import as_rows, concat_rows

RecipeLike = str | Path | Recipe | Mapping[str, Any]
#: Tokens of the traced call.
_TOKENS = 8


@dataclass(frozen=True)
class MemoryRow:
    """The tensors of one kind in one format. `float_bytes`: in the dtype of the model; `nominal_bytes`: bits a number;
    `bytes`: with scales, zero points and padding; `step_bytes`: the least of them that a decode step can read."""

    kind: str
    format: str
    tensors: int
    float_bytes: int
    nominal_bytes: int
    bytes: int
    step_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of weights and cache. `print(plan)` shows a table, `to_json()` gives plain data. `notes`: what is not in it."""

    rows: tuple[MemoryRow, ...]
    parameters: int
    context: int
    batch: int
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the cache that was asked for is among the rows."""
        return not self.context or any(row.kind == "kv" for row in self.rows)

    @property
    def weights(self) -> MemoryRow:
        """All weights together."""
        return _sum("weights", "", [r for r in self.rows if r.kind != "kv"])

    @property
    def cache(self) -> MemoryRow:
        """The KV cache of `context` tokens for each of `batch` sequences; nothing if there is none."""
        return _sum("cache", "", [r for r in self.rows if r.kind == "kv"])

    @property
    def total(self) -> MemoryRow:
        """Weights and cache."""
        return _sum("total", "", self.rows)

    @property
    def unit(self) -> tuple[str, float]:
        """What its numbers are told in, and the bytes of that."""
        return ("GB", 1e9) if self.total.float_bytes >= 10e9 else ("MB", 1e6)

    def to_json(self) -> dict[str, Any]:
        """The fields, with the sums, as plain data."""
        return asdict(self) | {name: asdict(getattr(self, name)) for name in ("weights", "cache", "total")}

    def __rich__(self) -> Any:
        from rich.console import Group

        unit, size = self.unit
        columns = (f"{name} {unit}" for name in ("float", "nominal", "with scales"))
        table = number_table("kind", "format", "tensors", *columns, words=2)
        sums = [self.weights, *([self.cache] if self.context else []), self.total]
        for i, row in enumerate((*self.rows, *sums)):
            numbers = (f"{b / size:,.3f}" for b in (row.float_bytes, row.nominal_bytes, row.bytes))
            table.add_row(
                row.kind, row.format, f"{row.tensors:,}", *numbers, style="bold" if i >= len(self.rows) else ""
            )
        what = f"{self.parameters:,} parameters"
        if self.context:
            what += f", {self.context:,} tokens of context, batch {self.batch}"
        return Group(what, table, *self.notes)

    def __str__(self) -> str:
        return printed(self)


class Planner:
    """A model traced once, to be planned under several recipes. The arguments are those of `plan_memory`."""

    def __init__(
        self,
        config: Any,
        context: int = 0,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if context < 0 or batch < 1:
            raise QpassError(f"qpass.plan_memory: context={context}, batch={batch}: at least 0 tokens and 1 sequence")
        self.context, self.batch, self.inputs = context, batch, inputs
        self.model = config if isinstance(config, nn.Module) else on_meta(read_config(config), dtype)
        given = call_inputs(self.model, 1, _TOKENS, inputs)
        self._whole = trace_whole(self.model, (), {**given, "use_cache": False})
        if self._whole is None:
            raise QpassError(
                f"qpass.plan_memory: {type(self.model).__name__} cannot be traced on {sorted(given)}; "
                "give inputs=..., the arguments of a call"
            )

    @torch.no_grad()
    def plan(self, recipe: RecipeLike = "int8", kv: SpecLike = None, calibrated: bool = False) -> MemoryPlan:
        """The bytes under a recipe. `kv`: the format of the cache, if the recipe gives none. `calibrated`: there will be data."""
        chosen = resolve_recipe(recipe, calibrated)
        halves = chosen.kv_specs or kv_specs(None, None, kv, "qpass.plan_memory")
        rows = self._rows(chosen)
        notes: list[str] = []
        if chosen.bits is not None:
            notes.append(f"{chosen.bits} bits a weight on average: some get more, some fewer")
        if self.context:
            try:
                rows.append(self.cache(halves))
            except QpassError as error:
                notes.append(f"no cache in it: {error}")
        parameters = sum(p.numel() for p in self.model.parameters())
        return MemoryPlan(tuple(rows), parameters, self.context, self.batch, tuple(notes))

    def groups(self, recipe: Recipe) -> list[tuple[Site, WeightGroup, list[Tensor]]]:
        """What will be quantized together: the site of its first weight, the group, its Parameters; tied ones once."""
        assert self._whole is not None
        plan = SitePlanner(recipe).plan(self._whole.graph, self._whole.parameters, self._whole.names)
        by_name = {node.name: p for node, p in self._whole.parameters.items()}
        found = [(g, [by_name[name] for name in g.weights]) for g, _ in group_weights(plan, self._whole.parameters)]
        sites = {m.weight.name: m.site for m in plan.matches if m.weight is not None}
        return [(sites[group.weights[0]], group, params) for group, params in each_once(found, set(), key=id)]

    def _rows(self, recipe: Recipe) -> list[MemoryRow]:
        groups = self.groups(recipe)
        rows = [_row(site, group, params, recipe, self._share_read(site, params[0])) for site, group, params in groups]
        taken = {id(p) for _, _, params in groups for p in params}
        others = [p.nbytes for p in self.model.parameters() if id(p) not in taken]
        if others:
            rows.append(MemoryRow("other", "float", len(others), *[sum(others)] * 4))
        keys = dict.fromkeys((row.kind, row.format) for row in rows)
        return [_sum(*key, [row for row in rows if (row.kind, row.format) == key]) for key in keys]

    def _share_read(self, site: Site, weight: Tensor) -> float:
        """The least share of a weight that a step reads: of a table that is only looked up next to nothing, of experts those that
        one token chooses (others of the batch may choose the same)."""
        experts = weight.shape[0] if weight.dim() == 3 else 1
        config = getattr(self.model, "config", None)
        chosen = getattr(config.get_text_config() if config is not None else None, "num_experts_per_tok", None) or 1
        return 0.0 if site.roles == ("embedding",) else min(1.0, chosen / experts)

    @torch.no_grad()
    def cache(self, halves: tuple[QuantSpec | None, QuantSpec | None]) -> MemoryRow:
        """The KV cache with these formats of K and V; None for a float one. Raises `QpassError` for a model without one."""
        return _cache(self.model, halves, self.context, call_inputs(self.model, self.batch, self.context, self.inputs))


def plan_memory(
    config: Any,
    recipe: RecipeLike = "int8",
    *,
    context: int = 0,
    batch: int = 1,
    kv: SpecLike = None,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, Any] | None = None,
    calibrated: bool = False,
) -> MemoryPlan:
    """Bytes of every kind of site under `recipe`, in float, nominal and with scales. Nothing is loaded.

    `config`: a transformers config, a config.json or its folder, a mapping of its fields, a name of a size ("70b", see
    qpass.planning.skeleton), or a module (on the meta device or not). `context`, `batch`: tokens that the KV cache has room for
    in each of so many sequences. `kv`: the format of the cache, if the recipe gives none. `dtype`: of float weights and cache,
    unless given the config's, or bfloat16. `inputs`: arguments of a call, for a model that takes more or other than token ids.
    `calibrated`: there will be data, which some presets are other recipes with.
    Not in it: activations. Raises `QpassError` for a config that transformers has no model for, or that cannot be traced.
    """
    return Planner(config, context, batch, dtype, inputs).plan(recipe, kv, calibrated)


def _sum(kind: str, format: str, rows: Iterable[MemoryRow]) -> MemoryRow:
    columns = ("tensors", "float_bytes", "nominal_bytes", "bytes", "step_bytes")
    members = list(rows)
    return MemoryRow(kind, format, *(sum(getattr(row, c) for row in members) for c in columns))


def _row(site: Site, group: WeightGroup, params: Sequence[Tensor], recipe: Recipe, read: float) -> MemoryRow:
    plain, count = sum(p.nbytes for p in params), sum(p.numel() for p in params)
    if recipe.bits is not None and takes_bits(group.spec, site.name, recipe, group_columns(group, params)):
        stored = round(count * recipe.bits / 8)
        text = f"{recipe.bits} bits"
        return MemoryRow(site.kind, text, len(params), plain, stored, stored, round(stored * read))
    like = [as_rows(torch.empty_like(p, device="meta"), t) for p, t in zip(params, group.transposed, strict=True)]
    kept = []
    for rows in like:
        slots: list[Any] = [None] * 4
        for slot, part in zip(group.spec.stored_parts, torch.ops.qpass.quantize(rows, str(group.spec)), strict=True):
            slots[slot] = part
        kept.append(Quantized(*slots))
    parts = kept[0] if len(kept) == 1 else concat_rows(kept, [len(rows) for rows in like])
    nominal = count * group.spec.format.bits // 8
    return MemoryRow(site.kind, str(group.spec), len(params), plain, nominal, parts.nbytes, round(parts.nbytes * read))


def group_columns(group: WeightGroup, params: Sequence[Tensor]) -> int:
    """K of the weights [N, K] of a group."""
    return int(params[0].shape[-2 if group.transposed[0] else -1])


def _cache(
    model: nn.Module, halves: tuple[QuantSpec | None, QuantSpec | None], context: int, inputs: Mapping[str, Any]
) -> MemoryRow:
    """Of one step on the meta device, which makes the cache allocate itself."""
    from qpass.cache import CACHE_ARGUMENT, KVCache
    from qpass.cache_layers import Stored

    config = getattr(model, "config", None)
    if config is None or not next(model.parameters()).is_meta:
        raise QpassError("the cache's size is read off a transformers model on the meta device; give its config")
    if not model.can_generate() and getattr(config, "is_decoder", True) is False:  # type: ignore[operator]
        raise QpassError("the model is an encoder, which keeps none")
    if hasattr(model, "set_experts_implementation"):  # that of grouped products takes bfloat16 alone on the meta device
        with suppress(ValueError):
            model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    make = KVCache.for_encoder_decoder if config.is_encoder_decoder else KVCache
    k, v = halves
    in_float = k is None or v is None
    cache = make(config, context, format="int8", k=k, v=v)  # where the plan is a float one, for its shape alone
    try:
        model(**inputs, use_cache=True, **{CACHE_ARGUMENT: cache})
    except Exception as error:  # whatever a model's own code stumbles over without values
        raise QpassError(f"the model does not run without weights: {error}") from error
    layers = (
        cache.layers
        if isinstance(cache, KVCache)
        else [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    )
    kept = [half for layer in layers if isinstance(layer, Stored) for half in (layer.k, layer.v) if half.parts]
    plain = sum(half.elements * half.dtype.itemsize for half in kept)
    nominal = plain if in_float else sum(half.elements * half.bits // 8 for half in kept)
    stored = plain if in_float else sum(layer.nbytes for layer in layers if isinstance(layer, Stored))
    text = "float" if in_float else str(k) if k == v else f"k={k}, v={v}"
    return MemoryRow("kv", text, len(kept), plain, nominal, stored, stored)

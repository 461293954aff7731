"""qpass.plan_memory: what a model would take in memory, before anything is loaded.

The model is built and traced on the meta device, so its sites are found as they are in the real one; weights and cache are
quantized there, so their bytes are those that quantizing gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.backend import QPass
from qpass.errors import QpassError
from qpass.graph.whole import WholeGraph, trace_whole
from qpass.numerics import Quantized
from qpass.printing import printed
from qpass.recipe import Recipe, SpecLike, kv_specs
from qpass.sites.group import WeightGroup, each_once, group_weights
from qpass.skeleton import call_inputs, on_meta, read_config
from qpass.spec import QuantSpec
from qpass.weights import as_rows, concat_rows

RecipeLike = str | Path | Recipe | Mapping[str, Any]
#: Tokens of the traced call.
_TOKENS = 8


@dataclass(frozen=True)
class MemoryRow:
    """The tensors of one kind in one format. `float_bytes`: in the dtype of the model; `nominal_bytes`: bits a number;
    `bytes`: with scales, zero points and padding; `step_bytes`: those of them that a decode step reads."""

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

    def to_json(self) -> dict[str, Any]:
        """The fields, with the sums, as plain data."""
        return asdict(self) | {name: asdict(getattr(self, name)) for name in ("weights", "cache", "total")}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("kind", "format", "tensors", "float GB", "nominal GB", "with scales GB", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        sums = [self.weights, *([self.cache] if self.context else []), self.total]
        for i, row in enumerate((*self.rows, *sums)):
            gigabytes = (f"{b / 1e9:,.3f}" for b in (row.float_bytes, row.nominal_bytes, row.bytes))
            table.add_row(
                row.kind, row.format, f"{row.tensors:,}", *gigabytes, style="bold" if i >= len(self.rows) else ""
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
    def plan(self, recipe: RecipeLike = "int8", kv: SpecLike = None) -> MemoryPlan:
        """The bytes under a recipe. `kv`: the format of the cache, if the recipe gives none."""
        backend = QPass(recipe)
        halves = backend.recipe.kv_specs or kv_specs(None, None, kv, "qpass.plan_memory")
        assert self._whole is not None
        rows = _weights(self.model, self._whole, backend, self.batch)
        notes: list[str] = []
        if backend.recipe.bits is not None:
            notes.append(
                f"with data the weights get {backend.recipe.bits} bits on average; the table is of the formats before that"
            )
        if self.context:
            try:
                rows.append(self.cache(halves))
            except QpassError as error:
                notes.append(f"no cache in it: {error}")
        parameters = sum(p.numel() for p in self.model.parameters())
        return MemoryPlan(tuple(rows), parameters, self.context, self.batch, tuple(notes))

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
) -> MemoryPlan:
    """Bytes of every kind of site under `recipe`, in float, nominal and with scales. Nothing is loaded.

    `config`: a transformers config, a config.json or its folder, a mapping of its fields, a name in `qpass.skeleton.SIZES`
    ("70b"), or a module (on the meta device or not). `context`, `batch`: tokens that the KV cache has room for in each of so
    many sequences. `kv`: the format of the cache, if the recipe gives none. `dtype`: of float weights and cache, unless given
    the config's, or bfloat16. `inputs`: arguments of a call, for a model that takes more or other than token ids.
    Not in it: activations. Raises `QpassError` for a config that transformers has no model for, or that cannot be traced.
    """
    return Planner(config, context, batch, dtype, inputs).plan(recipe, kv)


def _sum(kind: str, format: str, rows: Iterable[MemoryRow]) -> MemoryRow:
    columns = ("tensors", "float_bytes", "nominal_bytes", "bytes", "step_bytes")
    members = list(rows)
    return MemoryRow(kind, format, *(sum(getattr(row, c) for row in members) for c in columns))


def _weights(model: nn.Module, whole: WholeGraph, backend: QPass, batch: int) -> list[MemoryRow]:
    plan = backend.plan_parameters(whole.graph, whole.parameters, whole.names)
    by_name = {node.name: p for node, p in whole.parameters.items()}
    groups = [(g, [by_name[name] for name in g.weights]) for g, _ in group_weights(plan, whole.parameters)]
    sites = {m.weight.name: m.site for m in plan.matches if m.weight is not None}
    taken: set[int] = set()
    rows = []
    for group, params in each_once(groups, taken, key=id):
        site = sites[group.weights[0]]
        read = 0.0 if site.roles == ("embedding",) else _share_of_experts(model, params[0], batch)
        rows.append(_row(site.kind, group, params, read))
    others = [p.nbytes for p in model.parameters() if id(p) not in taken]
    if others:
        rows.append(MemoryRow("other", "float", len(others), *[sum(others)] * 4))
    keys = dict.fromkeys((row.kind, row.format) for row in rows)
    return [_sum(*key, [row for row in rows if (row.kind, row.format) == key]) for key in keys]


def _share_of_experts(model: nn.Module, weight: Tensor, batch: int) -> float:
    """The share of a weight that a step of `batch` tokens reads: of experts those that are chosen, if evenly."""
    experts = weight.shape[0] if weight.dim() == 3 else 1
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 1
    return 1.0 if experts <= chosen else 1 - (1 - chosen / experts) ** batch


def _row(kind: str, group: WeightGroup, params: Sequence[Tensor], read: float) -> MemoryRow:
    like = [as_rows(torch.empty_like(p, device="meta"), t) for p, t in zip(params, group.transposed, strict=True)]
    stored = []
    for rows in like:
        slots: list[Any] = [None] * 4
        for slot, part in zip(group.spec.stored_parts, torch.ops.qpass.quantize(rows, str(group.spec)), strict=True):
            slots[slot] = part
        stored.append(Quantized(*slots))
    parts = stored[0] if len(stored) == 1 else concat_rows(stored, [len(rows) for rows in like])
    plain, nominal = sum(p.nbytes for p in params), sum(p.numel() * group.spec.format.bits // 8 for p in params)
    return MemoryRow(kind, str(group.spec), len(params), plain, nominal, parts.nbytes, round(parts.nbytes * read))


def _cache(
    model: nn.Module, halves: tuple[QuantSpec | None, QuantSpec | None], context: int, inputs: Mapping[str, Any]
) -> MemoryRow:
    """Of one step on the meta device, which makes the cache allocate itself."""
    from qpass.cache import CACHE_ARGUMENT, KVCache
    from qpass.cache_layers import Stored

    config = getattr(model, "config", None)
    if config is None or not next(model.parameters()).is_meta:
        raise QpassError("the cache's size is read off a transformers model on the meta device; give its config")
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

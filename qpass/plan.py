"""qpass.plan_memory: what a model would take in memory, before anything is loaded.

The model is built and traced on the meta device, so its sites are found as they are in the real one; weights and cache are
quantized there, so their bytes are those that quantizing gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.backend import QPass
from qpass.errors import QpassError
from qpass.graph.whole import trace_whole
from qpass.numerics import Quantized
from qpass.printing import printed
from qpass.recipe import Recipe, SpecLike, kv_specs
from qpass.sites.group import WeightGroup, each_once, group_weights
from qpass.spec import QuantSpec
from qpass.weights import as_rows, concat_rows

#: Tokens of the traced call.
_TOKENS = 8


@dataclass(frozen=True)
class MemoryRow:
    """The tensors of one kind in one format. `float_bytes`: in the dtype of the model; `nominal_bytes`: bits a number;
    `bytes`: with scales, zero points and padding."""

    kind: str
    format: str
    tensors: int
    float_bytes: int
    nominal_bytes: int
    bytes: int


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


@torch.no_grad()
def plan_memory(
    config: Any,
    recipe: str | Path | Recipe | Mapping[str, Any] = "int8",
    *,
    context: int = 0,
    batch: int = 1,
    kv: SpecLike = None,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> MemoryPlan:
    """Bytes of every kind of site under `recipe`, in float, nominal and with scales. Nothing is loaded.

    `config`: a transformers config, a config.json or its folder, a mapping of its fields, or a module (on the meta device
    or not). `context`, `batch`: tokens that the KV cache has room for in each of so many sequences. `kv`: the format of the
    cache, if the recipe gives none. `dtype`: of float weights and cache, unless given the config's, or bfloat16.
    `inputs`: arguments of a call, for a model that takes more or other than token ids.
    Not in it: activations. Raises `QpassError` for a config that transformers has no model for, or that cannot be traced.
    """
    if context < 0 or batch < 1:
        raise QpassError(f"qpass.plan_memory: context={context}, batch={batch}: at least 0 tokens and 1 sequence")
    model = config if isinstance(config, nn.Module) else _on_meta(_read_config(config), dtype)
    backend = QPass(recipe)
    halves = backend.recipe.kv_specs or kv_specs(None, None, kv, "qpass.plan_memory")
    rows = _weights(model, backend, _inputs(model, 1, _TOKENS, inputs))
    notes: list[str] = []
    if backend.recipe.bits is not None:
        notes.append(
            f"with data the weights get {backend.recipe.bits} bits on average; the table is of the formats before that"
        )
    if context:
        try:
            rows.append(_cache(model, halves, context, _inputs(model, batch, context, inputs)))
        except QpassError as error:
            notes.append(f"no cache in it: {error}")
    return MemoryPlan(tuple(rows), sum(p.numel() for p in model.parameters()), context, batch, tuple(notes))


def _sum(kind: str, format: str, rows: Iterable[MemoryRow]) -> MemoryRow:
    columns = ("tensors", "float_bytes", "nominal_bytes", "bytes")
    members = list(rows)
    return MemoryRow(kind, format, *(sum(getattr(row, c) for row in members) for c in columns))


def _read_config(config: Any) -> Any:
    from transformers import AutoConfig

    if not isinstance(config, str | Path | Mapping):
        return config
    if isinstance(config, Mapping):
        fields = dict(config)
    else:
        path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        if not path.is_file():
            raise QpassError(f"qpass.plan_memory: {path} does not exist; give a config.json, its folder, or a config")
        fields = json.loads(path.read_text())
    kind = fields.pop("model_type", None)
    if kind is None:
        raise QpassError(
            "qpass.plan_memory: the config names no model_type, so there is no telling which model it is of"
        )
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise QpassError(f"qpass.plan_memory: this version of transformers has no {kind!r}: {error}") from None


def _on_meta(config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model of a config without weights: with a head for language if there is such a class, else as a bare model."""
    import transformers as t

    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    named = [getattr(t, name) for name in getattr(config, "architectures", None) or () if hasattr(t, name)]
    heads = (
        (t.AutoModelForSeq2SeqLM,) if config.is_encoder_decoder else (t.AutoModelForCausalLM, t.AutoModelForMaskedLM)
    )
    autos = [auto for auto in (*heads, t.AutoModel) if type(config) in auto._model_mapping]
    with torch.device("meta"):
        if named:
            model: nn.Module = named[0]._from_config(config, dtype=dtype)
        elif autos:
            model = autos[0].from_config(config, dtype=dtype)
        else:
            raise QpassError(f"qpass.plan_memory: transformers has no model for a {type(config).__name__}")
    return model.eval()


def _inputs(model: nn.Module, batch: int, tokens: int, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a call on the device of the model."""
    device = next(model.parameters()).device
    if given is not None:
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    ids = torch.zeros((batch, tokens), dtype=torch.long, device=device)
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :1]} if two else {"input_ids": ids}


def _weights(model: nn.Module, backend: QPass, inputs: Mapping[str, Any]) -> list[MemoryRow]:
    whole = trace_whole(model, (), {**inputs, "use_cache": False})
    if whole is None:
        raise QpassError(
            f"qpass.plan_memory: {type(model).__name__} cannot be traced on {sorted(inputs)}; "
            "give inputs=..., the arguments of a call"
        )
    plan = backend.plan_parameters(whole.graph, whole.parameters, whole.names)
    by_name = {node.name: p for node, p in whole.parameters.items()}
    groups = [(g, [by_name[name] for name in g.weights]) for g, _ in group_weights(plan, whole.parameters)]
    kinds = {m.weight.name: m.site.kind for m in plan.matches if m.weight is not None}
    taken: set[int] = set()
    rows = [_row(kinds[g.weights[0]], g, params) for g, params in each_once(groups, taken, key=id)]
    others = [p.nbytes for p in model.parameters() if id(p) not in taken]
    if others:
        rows.append(MemoryRow("other", "float", len(others), *[sum(others)] * 3))
    keys = dict.fromkeys((row.kind, row.format) for row in rows)
    return [_sum(*key, [row for row in rows if (row.kind, row.format) == key]) for key in keys]


def _row(kind: str, group: WeightGroup, params: Sequence[Tensor]) -> MemoryRow:
    like = [as_rows(torch.empty_like(p, device="meta"), t) for p, t in zip(params, group.transposed, strict=True)]
    stored = []
    for rows in like:
        slots: list[Any] = [None] * 4
        for slot, part in zip(group.spec.stored_parts, torch.ops.qpass.quantize(rows, str(group.spec)), strict=True):
            slots[slot] = part
        stored.append(Quantized(*slots))
    parts = stored[0] if len(stored) == 1 else concat_rows(stored, [len(rows) for rows in like])
    plain, nominal = sum(p.nbytes for p in params), sum(p.numel() * group.spec.format.bits // 8 for p in params)
    return MemoryRow(kind, str(group.spec), len(params), plain, nominal, parts.nbytes)


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
    return MemoryRow("kv", text, len(kept), plain, nominal, stored)

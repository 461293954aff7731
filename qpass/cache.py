"""KVCache: a transformers cache of static shape that stores K and V as integers, fp8 or smaller, with their scales."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMixin

from qpass.cache_layers import CrossLayer, Half, QuantizedLayer, ResidualLayer, SlidingLayer, Stored
from qpass.errors import QpassError
from qpass.granularity import PerTokens
from qpass.ops.residual import BLOCK
from qpass.recipe import SpecLike, kv_specs, of_single_tokens
from qpass.spec import QuantSpec, parse_spec

#: Layer types of transformers configs whose cache is keys and values of every token, or of the last ones.
_FULL, _SLIDING = (
    {"full_attention"},
    {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"},
)
#: Those that keep a recurrent state, in float, which is transformers' own; a hybrid keeps K and V beside it.
_STATES, _HYBRID = {"linear_attention", "conv", "mamba"}, {"hybrid"}
#: Those that keep nothing.
_NOTHING = {"moe", "mlp", "dummy"}
#: What `generate` calls the cache among its own arguments: transformers 5.24 renamed it (and takes both from a caller).
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)
#: Tokens that stay in float where keys are quantized in groups of tokens: of the last KIVI's 128, with four bits and more 32, the
#: least there can be, for these lose little (docs/kv-cache.md); and the first.
_WINDOW, _SHORT_WINDOW, _FIRSTS = 128, BLOCK, 1

#: Of each layer: scales of keys and of values, [1, H, 1, D] each; None where a layer has none.
Scales = Sequence[tuple[Tensor, Tensor] | None]


class KVCache(Cache):
    """A quantized KV cache for `generate` or for calls with `past_key_values=`.

    `config`: of the transformers model. `max_cache_len`: tokens it can hold, prompt included; a layer with a sliding window
    holds that many at most. `format`: a spec for keys and values alike ("int8", "fp8_e4m3", "int4", ...), None for floats;
    `k`, `v`: one for each half. `layers`: layer number -> another format, or None for floats. `window`, `firsts`: how many of
    the last and of the first tokens stay in float, in layers that hold all tokens; unless given none, but where keys are
    quantized in groups of tokens 32 ("int4") or 128 ("int3", "int2"), and 1. `scales`: of a calibrated cache, for static specs.
    Raises `QpassError` for a format with one scale for all tokens, and for layers that keep something else than K and V.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        format: SpecLike = "int8",
        k: SpecLike = None,
        v: SpecLike = None,
        *,
        layers: Mapping[int, SpecLike] | None = None,
        window: int | None = None,
        firsts: int | None = None,
        scales: Scales | None = None,
    ) -> None:
        if max_cache_len < 1:
            raise QpassError(f"KVCache: max_cache_len={max_cache_len}; a cache holds at least one token")
        if getattr(config, "is_encoder_decoder", False):
            raise QpassError(
                "KVCache: an encoder-decoder model keeps two caches; make them with qpass.KVCache.for_encoder_decoder(...)"
            )
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or [_kind_of_all(text)] * text.num_hidden_layers
        if not set(kinds) - _STATES - _NOTHING:
            raise QpassError(
                "KVCache: no layer of the model keeps keys and values, only states; use the model's own cache"
            )
        other = dict(layers or {})
        if any(not 0 <= i < len(kinds) for i in other):
            raise QpassError(f"KVCache: layers={sorted(other)}: the model has layers 0 to {len(kinds) - 1}")
        if window is not None and window % BLOCK:
            raise QpassError(f"KVCache: window={window}: tokens leave it {BLOCK} at a time; use a multiple of {BLOCK}")
        self.k_spec, self.v_spec = kv_specs(k, v, format, "KVCache")
        self.max_cache_len = max_cache_len
        specs = {i: kv_specs(None, None, spec, "KVCache") for i, spec in other.items()}
        halves = [self.k_spec, *(k for k, _ in specs.values())]
        blocks = window or firsts or any(k is not None and isinstance(k.granularity, PerTokens) for k in halves)
        self._room = -(-max_cache_len // BLOCK) * BLOCK if blocks else max_cache_len  # all layers have one mask
        made = [
            self._layer(
                i, kind, text, specs.get(i, (self.k_spec, self.v_spec)), window, firsts, scales[i] if scales else None
            )
            for i, kind in enumerate(kinds)
        ]
        super().__init__(layers=made)

    def _layer(self, i: int, kind: str, config: Any, specs: tuple[QuantSpec | None, QuantSpec | None], window: int | None,
               firsts: int | None, scales: tuple[Tensor, Tensor] | None) -> Any:  # fmt: skip
        k, v = specs
        length = self._room
        sliding = getattr(config, _SLIDING[kind], None) if kind in _SLIDING else None
        if kind in _STATES | _NOTHING | _HYBRID:
            return _layer_of_transformers(i, kind, config, length, specs)
        if kind not in _FULL | _SLIDING.keys():
            raise QpassError(
                f"KVCache: layer {i} is {kind} and keeps a cache of another form; use the model's own cache"
            )
        if k is None or v is None:
            return StaticLayer(length) if sliding is None else StaticSlidingWindowLayer(length, sliding)
        slides = sliding is not None and sliding < self.max_cache_len
        if slides:
            k, v = _singly(k, v, f"KVCache: layer {i} keeps the last {sliding} tokens, which leave it one by one")
        grouped = isinstance(k.granularity, PerTokens)
        firsts = (_FIRSTS if grouped else 0) if firsts is None else firsts
        if window is None:
            window = _WINDOW if grouped and k.format.bits < 4 else _SHORT_WINDOW if grouped or firsts else 0
        if (grouped or firsts) and not window:
            why = (
                f"keys in {k} wait in float for the others of their group" if grouped else f"so are they with {firsts=}"
            )
            raise QpassError(f"KVCache: window=0, but {why}; make it {BLOCK} or more")
        layer: Any
        if slides:
            layer = SlidingLayer(length, sliding)
        else:
            layer = ResidualLayer(length, window, firsts) if window or firsts else QuantizedLayer(length)
        layer.hold(Half(k, scales[0] if scales else None), Half(v, scales[1] if scales else None))
        return layer

    @classmethod
    def for_encoder_decoder(
        cls, config: Any, max_cache_len: int, format: SpecLike = "int8", **options: Any
    ) -> EncoderDecoderCache:
        """A pair of quantized caches: of the decoder's own tokens, and of the encoder's output, written once."""
        decoder = _DecoderConfig(config)
        own, cross = cls(decoder, max_cache_len, format, **options), cls(decoder, 1, format, **options)
        for i, layer in enumerate(cross.layers):
            if isinstance(layer, Stored):
                where = f"KVCache: layer {i} keeps the encoder's output, of any number of tokens"
                specs = _singly(parse_spec(layer.k.text), parse_spec(layer.v.text), where)
                cross.layers[i] = CrossLayer(1)
                cross.layers[i].hold(*(Half(s, h.static_scale) for s, h in zip(specs, (layer.k, layer.v), strict=True)))
            else:
                raise QpassError(
                    "KVCache: the cache of an encoder's output is quantized in every layer, or use the model's own"
                )
        return EncoderDecoderCache(own, cross)

    # --- calibration ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, model: Any, batches: Iterable[Any]) -> KVCache:
        """Find the scales of static halves: the largest magnitude of each head's channels over `batches` (token ids [B, S] or
        dicts of the model's arguments), run in float. Returns the cache. Raises `QpassError` if there are no batches."""
        seen: list[list[Any]] = []
        for batch in batches:
            plain = DynamicCache(config=model.config)
            arguments = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
            model(**arguments, past_key_values=plain, use_cache=True)
            kept = zip(self.layers, plain.layers, strict=True)
            floats = [(la.keys, la.values) for mine, la in kept if isinstance(mine, Stored)]
            tops = [[x.abs().amax((0, 2), keepdim=True).float() for x in pair] for pair in floats]
            if seen:
                tops = [
                    [torch.maximum(*two) for two in zip(*pair, strict=True)] for pair in zip(seen, tops, strict=True)
                ]
            seen = tops
        if not seen:
            raise QpassError("KVCache.calibrate: no batches; static scales need data")
        stored = [(i, la) for i, la in enumerate(self.layers) if isinstance(la, Stored)]
        for (i, layer), largest in zip(stored, seen, strict=True):
            for half, top, name in zip((layer.k, layer.v), largest, ("keys", "values"), strict=True):
                if not bool(top.isfinite().all()):
                    raise QpassError(f"KVCache.calibrate: the {name} of layer {i} hold NaN or inf")
                half.calibrate(top)
        return self

    @property
    def scales(self) -> Scales:
        """The scales of static halves, for another cache of the same format."""
        halves = [(la.k.static_scale, la.v.static_scale) if isinstance(la, Stored) else None for la in self.layers]
        return [None if pair is None or None in pair else pair for pair in halves]  # type: ignore[misc]

    # --- keeping --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the cache, with the tokens it holds, as one safetensors file; `load_tokens` reads it."""
        from safetensors.torch import save_file

        stored = {
            f"{i}.{name}": t.contiguous() for i, la in enumerate(self.layers) for name, t in self._state(i, la).items()
        }
        save_file(stored, str(path), {"qpass_kv_cache": json.dumps(self._form())})

    def load_tokens(self, path: str | Path) -> KVCache:
        """Take over the tokens that `save` wrote. Returns the cache. Raises `QpassError` if it is of another form."""
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            form = json.loads((file.metadata() or {}).get("qpass_kv_cache", "null"))
            if form != self._form():
                raise QpassError(f"{path}: holds a cache of another form: {form}, this is {self._form()}")
            for i, layer in enumerate(self.layers):
                mine = [name for name in file.keys() if name.startswith(f"{i}.")]  # noqa: SIM118  no dict
                tensors = {name.split(".", 1)[1]: file.get_tensor(name) for name in mine}
                layer.take(tensors)
        return self

    def _form(self) -> dict[str, Any]:
        layers = [
            {"k": la.k.text, "v": la.v.text}
            | ({"window": la.window, "firsts": la.firsts} if isinstance(la, ResidualLayer) else {})
            if isinstance(la, Stored)
            else None
            for la in self.layers
        ]
        return {"max_cache_len": self.max_cache_len, "layers": layers}

    def _state(self, i: int, layer: Any) -> dict[str, Tensor]:
        if not isinstance(layer, Stored):
            raise QpassError(f"KVCache.save: layer {i} is not quantized; only quantized layers are written")
        if not layer.is_initialized:
            raise QpassError("KVCache.save: the cache is empty")
        return layer.state()

    @property
    def is_compileable(self) -> bool:
        """Static shapes. But transformers, asked on a GPU, would compile the model anew without qpass: it is told no."""
        if torch.compiler.is_compiling():
            return True
        return sys._getframe(1).f_code.co_name != "_valid_auto_compile_criteria"

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far (all of them once the first token is in)."""
        return sum(_nbytes(layer) for layer in self.layers)

    def __repr__(self) -> str:
        first = next((la for la in self.layers if isinstance(la, StaticLayer)), None)
        length = int(first.get_seq_length()) if first is not None and first.is_initialized else 0
        formats = [f"k={la.k.text}, v={la.v.text}" if isinstance(la, Stored) else "float" for la in self.layers]
        spec = " / ".join(dict.fromkeys(formats))
        return f"KVCache({length}/{self.max_cache_len} tokens, {len(self.layers)} layers, {spec}, {self.nbytes / 1e6:.2f} MB)"


def _kind_of_all(config: Any) -> str:
    """The type of each layer where a config names none: transformers reads it from the same fields."""
    return next((kind for kind, size in _SLIDING.items() if getattr(config, size, None) is not None), "full_attention")


def _nbytes(layer: Any) -> int:
    if isinstance(layer, Stored):
        return layer.nbytes
    floats = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.nbytes for t in floats if t is not None)


def _singly(k: QuantSpec, v: QuantSpec, where: str) -> tuple[QuantSpec, QuantSpec]:
    """Formats of a layer without groups of tokens."""
    k, v = of_single_tokens(k), of_single_tokens(v)
    if isinstance(k.granularity, PerTokens):
        raise QpassError(
            f'{where}, but {k} quantizes them in groups; give it another format, say "int4", by layers= or k='
        )
    return k, v


class _DecoderConfig:
    """The decoder of an encoder-decoder config, read as that of a decoder alone."""

    is_encoder_decoder = False

    def __init__(self, config: Any) -> None:
        self._text = config.get_text_config(decoder=True)

    def get_text_config(self, decoder: bool = True) -> Any:
        return self._text


def _layer_of_transformers(
    i: int, kind: str, config: Any, length: int, specs: tuple[QuantSpec | None, QuantSpec | None]
) -> Any:
    """A layer with a recurrent state, in float; beside K and V, if it has these too."""
    floats = specs[0] is None or specs[1] is None
    name = (
        "DummyLayer" if kind in _NOTHING
        else "LinearAttentionAndStaticFullAttentionLayer" if kind in _HYBRID and floats
        else "LinearAttentionLayer"
    )  # fmt: skip
    if not hasattr(cache_utils, name):
        raise QpassError(f"KVCache: layer {i} is {kind}, which this version of transformers has no static cache for")
    if kind in _NOTHING:
        return cache_utils.DummyLayer()
    states = getattr(config, "number_of_conv_states", 1)
    if kind in _STATES:
        return cache_utils.LinearAttentionLayer(number_of_states=states)
    if specs[0] is None or specs[1] is None:
        return cache_utils.LinearAttentionAndStaticFullAttentionLayer(length, number_of_states=states)
    k, v = _singly(specs[0], specs[1], f"KVCache: layer {i} is {kind}, whose tokens are written one by one")
    return _hybrid_layer()(length, states, Half(k), Half(v))


@cache
def _hybrid_layer() -> Any:
    """A layer that keeps a recurrent state in float beside quantized K and V; made at first use, for not every version of
    transformers has the base."""

    class HybridLayer(cache_utils.LinearAttentionLayer, QuantizedLayer):
        def __init__(self, length: int, states: int, k: Half, v: Half) -> None:
            QuantizedLayer.__init__(self, length)  # type: ignore[call-arg]
            cache_utils.LinearAttentionLayer.__init__(self, number_of_states=states)
            self.hold(k, v)

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            part = QuantizedLayer if len(args) == 2 else cache_utils.LinearAttentionLayer
            part.lazy_initialization(self, *args, **kwargs)

        def reset(self) -> None:
            cache_utils.LinearAttentionLayer.reset(self)
            QuantizedLayer.reset(self)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            cache_utils.LinearAttentionLayer.reorder_cache(self, beam_idx)
            QuantizedLayer.reorder_cache(self, beam_idx)

    return HybridLayer


class CacheForGenerate:
    """Stands in for a model's `_prepare_cache_for_generation`: plain `generate(ids)` gets a KVCache sized for the call."""

    #: Cache lengths are rounded up, so that calls of similar length share their compiled graphs.
    STEP = 64

    def __init__(self, model: Any, k: QuantSpec, v: QuantSpec) -> None:
        self.model, self.k, self.v = model, k, v

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE_ARGUMENT) is not None or generation_config.cache_implementation is not None
        if generation_config.use_cache is not False and not given:
            length = -(-max_cache_length // self.STEP) * self.STEP
            config = self.model.config
            make = KVCache.for_encoder_decoder if config.is_encoder_decoder else KVCache
            model_kwargs[CACHE_ARGUMENT] = make(config, length, k=self.k, v=self.v)
        prepare = type(self.model)._prepare_cache_for_generation
        return prepare(self.model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

"""KVCache: a transformers cache of static shape that stores K and V as integers (or fp8) with scales per token and head."""

from __future__ import annotations

import sys
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerationMixin

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.errors import QpassError
from qpass.recipe import SpecLike, check_kv_spec
from qpass.spec import QuantSpec, parse_spec

#: Layer types of transformers configs whose cache is keys and values of every token.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
#: What `generate` calls the cache among its own arguments: transformers 5.24 renamed it (and takes both from a caller).
_KEYWORD = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)


class QuantizedLayer(StaticLayer):
    """One layer's keys and values. `keys` and `values` are the stored data [B, H, max_cache_len, packed D]."""

    def __init__(self, max_cache_len: int, k_spec: QuantSpec, v_spec: QuantSpec) -> None:
        super().__init__(max_cache_len)
        self.cumulative_length: Tensor
        self.k_text, self.v_text = str(k_spec), str(v_spec)
        self.k_slots, self.v_slots = _slots(k_spec), _slots(v_spec)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape, dtype and device of `key_states` [B, H, S, D] and `value_states` [B, H, S, Dv]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        for text, columns in ((self.k_text, self.k_head_dim), (self.v_text, self.v_head_dim)):
            if parse_spec(text).format.scale == "float" and parse_spec(text).group_size > columns:
                raise QpassError(
                    f"KVCache: {text}: the group is larger than a head of {columns}; use g{columns} or less"
                )
        self.key_parts = self._allocate(key_states, self.k_text)
        self.value_parts = self._allocate(value_states, self.v_text)
        self.keys, self.values = self.key_parts[0], self.value_parts[0]
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for tensor in (*self.key_parts, *self.value_parts, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _allocate(self, states: Tensor, spec: str) -> list[Tensor]:
        # 8-bit floats are kept as bytes: not every device can write rows of them.
        batch, heads, _, columns = states.shape
        parts = torch.ops.qpass.quantize(states.new_zeros((1, 1, 1, columns)), spec)
        shapes = [((batch, heads, self.max_cache_len, p.shape[-1]), _plain(p).dtype) for p in parts]
        return [torch.zeros(shape, dtype=dtype, device=states.device) for shape, dtype in shapes]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens [B, H, S, D]; returns all keys and values as floats, which the compiler pass takes away.

        Raises `QpassError` before anything is written if they do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        positions = torch.ops.qpass.cache_positions(self.cumulative_length, new, self.max_cache_len)
        self.cumulative_length.add_(new)
        keys = self._store(self.key_parts, positions, key_states, self.k_text, self.k_slots)
        values = self._store(self.value_parts, positions, value_states, self.v_text, self.v_slots)
        return keys, values

    def _store(self, stored: list[Tensor], positions: Tensor, states: Tensor, text: str, slots: list[int]) -> Tensor:
        new = torch.ops.qpass.quantize(states, text)
        parts: list[Tensor | None] = [None] * 4
        for slot, buffer, part in zip(slots, stored, new, strict=True):
            buffer.index_copy_(2, positions, _plain(part))
            parts[slot] = buffer if buffer.dtype == part.dtype else buffer.view(part.dtype)
        return torch.ops.qpass.dequantize(*parts, states.shape[-1], text, states.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, zero points."""
        return sum(t.nbytes for t in (*self.key_parts, *self.value_parts)) if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        if self.is_initialized:
            for tensor in (*self.key_parts, *self.value_parts, self.cumulative_length):
                tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in the order `beam_idx` [B], for beam search."""
        if self.is_initialized:
            for tensor in (*self.key_parts, *self.value_parts):
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


class KVCache(Cache):
    """A quantized KV cache for `generate` or for calls with `past_key_values=`.

    `config`: of the transformers model. `max_cache_len`: tokens it can hold, prompt included. `format`: a spec for keys
    and values alike ("int8", "fp8_e4m3", "int4:g32:asym", ...), None for floats; `k`, `v`: one for each half.
    Raises `QpassError` for formats without a scale of their own for each token, and for layers that are no attention.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        format: SpecLike = "int8",
        k: SpecLike = None,
        v: SpecLike = None,
    ) -> None:
        if max_cache_len < 1:
            raise QpassError(f"KVCache: max_cache_len={max_cache_len}; a cache holds at least one token")
        if getattr(config, "is_encoder_decoder", False):
            raise QpassError("KVCache: an encoder-decoder model keeps two caches; use its own")
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        for i, kind in enumerate(kinds):
            if kind not in _ATTENTION_LAYERS:
                attends = "attention" in kind and "linear" not in kind
                what = "a cache of another form" if attends else "a state, which is no KV cache"
                raise QpassError(f"KVCache: layer {i} is {kind} and keeps {what}; use the model's own cache")
        self.k_spec, self.v_spec = _cache_spec(k or format), _cache_spec(v or format)
        self.max_cache_len = max_cache_len
        if self.k_spec is None or self.v_spec is None:
            layers = [StaticLayer(max_cache_len) for _ in kinds]
        else:
            layers = [QuantizedLayer(max_cache_len, self.k_spec, self.v_spec) for _ in kinds]
        super().__init__(layers=layers)

    @property
    def is_compileable(self) -> bool:
        """Static shapes. But transformers, asked on a GPU, would compile the model anew without qpass: it is told no."""
        if torch.compiler.is_compiling():
            return True
        return sys._getframe(1).f_code.co_name != "_valid_auto_compile_criteria"

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far (all of them once the first token is in)."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    def __repr__(self) -> str:
        length = int(self.get_seq_length()) if self.layers[0].is_initialized else 0
        spec = "float" if self.k_spec is None else f"k={self.k_spec}, v={self.v_spec}"
        return f"KVCache({length}/{self.max_cache_len} tokens, {len(self.layers)} layers, {spec}, {self.nbytes / 1e6:.2f} MB)"


def _slots(spec: QuantSpec) -> list[int]:
    """Which of data, scale, zero_point, outer_scale the spec stores."""
    present = (True, spec.granularity is not None, spec.has_zero_point, spec.double_quantized)
    return [i for i, there in enumerate(present) if there]


def _plain(part: Tensor) -> Tensor:
    """8-bit floats as their bytes, everything else as it is."""
    return part.view(torch.uint8) if part.dtype.is_floating_point and part.dtype.itemsize == 1 else part


def _cache_spec(value: SpecLike) -> QuantSpec | None:
    if value is None:
        return None
    spec = parse_spec(value) if isinstance(value, str) else value
    check_kv_spec(spec, "KVCache")
    return spec


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
        given = model_kwargs.get(_KEYWORD) is not None or generation_config.cache_implementation is not None
        wanted = generation_config.use_cache is not False and not self.model.config.is_encoder_decoder
        if wanted and not given:
            length = -(-max_cache_length // self.STEP) * self.STEP
            model_kwargs[_KEYWORD] = KVCache(self.model.config, length, k=self.k, v=self.v)
        prepare = type(self.model)._prepare_cache_for_generation
        return prepare(self.model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

"""One layer of a KVCache: keys and values in their stored form, written and read inside of the captured graph.

`update` returns all keys and values as floats (qpass::read_cache), which the compiler pass takes away again: the attention that
reads them becomes one operator on the stored parts. The tokens of the call itself are attended as the floats they still are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.errors import QpassError, errors_through_cpp
from qpass.granularity import PerGroup
from qpass.ops.residual import BLOCK, quantized_before
from qpass.packing import as_bytes
from qpass.spec import QuantSpec, parse_spec


class Half:
    """The keys, or the values, of one layer: parts [B, H, tokens, *], in the order data, scale, zero_point, outer_scale.

    `static_scale`: [1, H, 1, D], for a static spec.
    """

    def __init__(self, spec: QuantSpec, static_scale: Tensor | None = None) -> None:
        self.text, self.static, self.static_scale = str(spec), spec.static, static_scale
        self.bits = spec.format.bits
        self.group_size = (
            spec.group_size if isinstance(spec.granularity, PerGroup) and spec.format.scale == "float" else 0
        )
        self.tokens = spec.tokens or 1
        self.stored = spec.stored_parts
        self.parts: list[Tensor] = []

    def allocate(self, states: Tensor, tokens: int) -> None:
        """Room for `tokens` like `states` [B, H, S, D]."""
        batch, heads, _, self.columns = states.shape
        self.dtype = states.dtype
        if self.group_size > self.columns:
            raise QpassError(
                f"KVCache: {self.text}: the group is larger than a head of {self.columns}; use g{self.columns} or less"
            )
        if self.static and states.is_meta:  # planning: there are no values to scale
            self.static_scale = states.new_ones((1, heads, 1, self.columns))
        if self.static and self.static_scale is None:
            raise QpassError(
                f"KVCache: {self.text} has no scales yet; run cache.calibrate(model, batches), or pass scales= of another cache"
            )
        if self.static_scale is not None:
            self.static_scale = self.static_scale.to(states.device)
        like = torch.zeros((1, 1, self.tokens, self.columns), dtype=states.dtype, device=states.device)
        one = torch.ops.qpass.quantize(like, self.text, self.static_scale)
        lengths = [tokens, *[tokens // self.tokens] * (len(one) - 1)]
        self.parts = [
            torch.zeros((batch, heads, n, p.shape[-1]), dtype=as_bytes(p).dtype, device=states.device)
            for n, p in zip(lengths, one, strict=True)
        ]

    @property
    def elements(self) -> int:
        """Numbers that there is room for."""
        return math.prod(self.parts[0].shape[:3]) * self.columns

    def calibrate(self, top: Tensor) -> None:
        """The scale of a static half from the largest magnitudes [1, H, 1, D]; 1 for a channel that is always 0."""
        if self.static:
            scale = top / parse_spec(self.text).format.symmetric_qmax
            self.static_scale = torch.where(scale == 0, torch.ones_like(scale), scale)

    def quantize(self, states: Tensor) -> list[Tensor]:
        """[B, H, S, D] -> parts as they are kept."""
        return [as_bytes(p) for p in torch.ops.qpass.quantize(states, self.text, self.static_scale)]

    def write(self, positions: Tensor, states: Tensor) -> None:
        """`states` [B, H, S, D] at `positions` [S]; where groups of tokens share scales, whole groups."""
        for slot, buffer, part in zip(self.stored, self.parts, self.quantize(states), strict=True):
            grouped = slot > 0 and self.tokens > 1
            buffer.index_copy_(2, positions[:: self.tokens] // self.tokens if grouped else positions, part)

    def read(self, first: Tensor | None = None, last: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """All tokens as floats [B, H, S, D]. See qpass::read_cache for those that are floats already."""
        parts: list[Tensor | None] = [None, self.static_scale, None, None]
        for (slot, dtype), buffer in zip(self.stored.items(), self.parts, strict=True):
            parts[slot] = buffer if buffer.dtype == dtype else buffer.view(dtype)
        return torch.ops.qpass.read_cache(*parts, self.columns, self.text, self.dtype, first, last, start)


class Stored(StaticLayer):
    """What all layers share: two halves, and what transformers does with a layer beside `update`."""

    cumulative_length: Tensor
    max_cache_len: int

    def hold(self, k: Half, v: Half) -> None:
        """Take the halves; nothing is allocated before the first token."""
        self.k, self.v = k, v

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape, dtype and device of `key_states` [B, H, S, D] and `value_states` [B, H, S, Dv]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.k.allocate(key_states, self.max_cache_len)
        self.v.allocate(value_states, self.max_cache_len)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.mark_static()
        self.is_initialized = True

    def append(self, key_states: Tensor, value_states: Tensor) -> Tensor:
        """Store the new tokens [B, H, S, D] behind those that are there; gives how many these were, []."""
        return self._run(torch.ops.qpass.append, key_states, value_states)

    def _run(self, operator: Any, key_states: Tensor, value_states: Tensor, *floats: list[Tensor]) -> Tensor:
        """One that appends to both halves. `floats`: those that it keeps beside them."""
        k, v = self.k, self.v
        specs, scales = (k.text, v.text), (k.static_scale, v.static_scale)
        arguments = (k.parts, v.parts, *floats, self.cumulative_length, key_states, value_states, *specs, *scales)
        if torch.compiler.is_compiling():
            return operator(*arguments)
        with errors_through_cpp():
            return operator(*arguments)

    def mark_static(self) -> None:
        """CUDA graphs need not copy these tensors: their addresses stay."""
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors().values(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has a row for each sequence of the batch, by name."""
        return {f"{name}{i}": t for name, half in (("k", self.k), ("v", self.v)) for i, t in enumerate(half.parts)}

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Another tensor in the place of each."""
        for half in (self.k, self.v):
            half.parts = [change(t) for t in half.parts]

    def state(self) -> dict[str, Tensor]:
        """All that `take` needs to hold the same tokens."""
        like = {f"{name}_like": torch.empty((self.batch_size, self.num_heads, 0, half.columns), dtype=half.dtype)
                for name, half in (("k", self.k), ("v", self.v))}  # fmt: skip
        return self.tensors() | like | {"length": self.cumulative_length}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Hold the tokens of another layer of this form: what `state` gave."""
        like = [tensors[f"{name}_like"] for name in ("k", "v")]
        self.lazy_initialization(*like)
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.cumulative_length.copy_(tensors["length"])

    # Where a model reads a cross-attention cache it asks for these.
    keys = property(lambda self: self.k.read() if self.k.parts else None, lambda self, _: None)
    values = property(lambda self: self.v.read() if self.v.parts else None, lambda self, _: None)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, zero points, and what is kept in float."""
        return sum(t.nbytes for t in self.tensors().values()) if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        if self.is_initialized:
            for tensor in (*self.tensors().values(), self.cumulative_length):
                tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in the order `beam_idx` [B], for beam search."""
        if self.is_initialized:
            for tensor in self.tensors().values():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._other_batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences that `indices` names, in that order."""
        self._other_batch(lambda t: t[indices])

    def _other_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.replace(change)
            self.batch_size = self.k.parts[0].shape[0]
            self.mark_static()


class QuantizedLayer(Stored):
    """Every token from the first to `max_cache_len`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens [B, H, S, D]; returns all keys and values as floats.

        Raises `QpassError` before anything is written if they do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.append(key_states, value_states)
        return self.k.read(None, key_states, start), self.v.read(None, value_states, start)


class CrossLayer(Stored):
    """Keys and values of another sequence, written once: as many tokens as the first update brings."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store all tokens [B, H, S, D]; returns them as they are."""
        tokens = key_states.shape[-2]
        if not self.is_initialized or self.max_cache_len != tokens:
            self.max_cache_len = tokens
            self.lazy_initialization(key_states, value_states)
        positions = torch.arange(tokens, device=key_states.device)
        self.cumulative_length.fill_(tokens)
        for half, states in ((self.k, key_states), (self.v, value_states)):
            half.write(positions, states)
        return key_states, value_states


class SlidingLayer(Stored, StaticSlidingWindowLayer):
    """The last `sliding_window` tokens, in order: a full layer moves them one place for a new one, as transformers does."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens [B, H, S, D]; returns the tokens that these may see, as floats."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, before, room = key_states.shape[-2], self.cumulative_length_int, self.max_cache_len
        self.cumulative_length_int += new
        halves = ((self.k, key_states), (self.v, value_states))
        if before + new <= room:
            start = self.append(key_states, value_states)
            return self.k.read(None, key_states, start), self.v.read(None, value_states, start)
        kept, seen = min(before, room), []
        for half, states in halves:
            # A full layer's oldest token is seen by no new one. Floats of the others are for several new ones only.
            dropped = 1 if before >= room else 0
            if kept and new > 1:
                seen.append(torch.cat([half.read()[:, :, dropped:kept], states], 2))
            elif not kept:
                seen.append(states)
            for buffer, part in zip(half.parts, half.quantize(states), strict=True):
                buffer.copy_(torch.cat([buffer[:, :, :kept], part], 2)[:, :, -room:])
        if kept and new == 1:
            start = torch.full((), room - 1, device=self.device)
            seen = [half.read(None, states, start) for half, states in halves]
        return seen[0], seen[1]

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        super().reset()
        self.cumulative_length_int = 0


class ResidualLayer(Stored):
    """Every token, but the last `window` and the first `firsts` are floats (KIVI, section 3.3).

    Tokens leave the window in blocks of 32, of which `max_cache_len` is a multiple. `k_last`, `v_last` [B, H, window + 32, D]
    hold those that are not quantized yet, in order, `k_first`, `v_first` [B, H, firsts, D] the first tokens.
    """

    def __init__(self, max_cache_len: int, window: int, firsts: int) -> None:
        super().__init__(max_cache_len)
        self.window, self.firsts = window, firsts
        self.floats: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        lengths = (self.window + BLOCK, self.firsts)
        self.floats = [
            s.new_zeros((*s.shape[:2], n, s.shape[-1])) for n in lengths for s in (key_states, value_states)
        ]  # k_last, v_last, k_first, v_first
        super().lazy_initialization(key_states, value_states)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | dict(zip(("k_last", "v_last", "k_first", "v_first"), self.floats, strict=False))

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        super().replace(change)
        self.floats = [change(t) for t in self.floats]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens [B, H, S, D]; returns all keys and values as floats.

        Raises `QpassError` before anything is written if they do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[-2] == 1 and key_states.device.type == "cpu":
            start = self._run(torch.ops.qpass.append_residual, key_states, value_states, self.floats)
            return self._read(0, start), self._read(1, start)
        return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """In operations of torch, which a compiler joins: what many tokens at once do, and one on a GPU."""
        new, room = key_states.shape[-2], self.window + BLOCK
        begin = torch.ops.qpass.cache_positions(self.cumulative_length, new, self.max_cache_len)[0]
        self.cumulative_length.add_(new)
        held_from, start, kept_from = (quantized_before(begin + n, self.window) for n in (0, 1, new))
        leaving = -(-new // BLOCK) * BLOCK  # as many as can be now
        wanted = [
            first + torch.arange(n, device=self.device)
            for first, n in ((held_from, leaving), (start, room - 1 + new), (kept_from, room))
        ]
        places = [
            torch.where(tokens < begin, tokens - held_from, room + (tokens - begin).clamp(max=new - 1))
            for tokens in wanted
        ]
        seen = []
        for i, (half, states) in enumerate(((self.k, key_states), (self.v, value_states))):
            last, first = self.floats[i], self.floats[2 + i]
            both = torch.cat([last, states], 2)
            leave, read, kept = (both.index_select(2, place) for place in places)
            half.write(wanted[0], leave)
            if self.firsts:
                place = torch.arange(self.firsts, device=self.device) - begin
                mine = states.index_select(2, place.clamp(0, new - 1))
                mine = torch.where(((place >= 0) & (place < new))[:, None], mine, first)
                first.index_copy_(2, torch.arange(self.firsts, device=self.device), mine)
            seen.append(half.read(first if self.firsts else None, read, start))
            last.index_copy_(2, torch.arange(room, device=self.device), kept)
        return seen[0], seen[1]

    def _read(self, i: int, start: Tensor) -> Tensor:
        """Keys (0) or values (1) as floats, those from `start` on as they came."""
        return (self.k, self.v)[i].read(self.floats[2 + i] if self.firsts else None, self.floats[i], start)

    def _read_all(self, i: int) -> Tensor | None:
        return self._read(i, quantized_before(self.cumulative_length, self.window)) if self.floats else None

    keys = property(lambda self: self._read_all(0), lambda self, _: None)
    values = property(lambda self: self._read_all(1), lambda self, _: None)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as in transformers). What then lies in the window again and was quantized
        comes back as it was read."""
        if not self.is_initialized:
            return
        keys, values, room = self.keys, self.values, self.window + BLOCK
        super().crop(tokens_to_remove)
        token = quantized_before(self.cumulative_length, self.window) + torch.arange(room, device=self.device)
        for last, states in zip(self.floats[:2], (keys, values), strict=True):
            last.copy_(states[:, :, token.clamp(max=self.max_cache_len - 1)])

"""torch.ops.qpass.attention on GPU tensors: a few queries against a quantized cache, without making it floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpass.ops import cache_reference
from qpass.ops.residual import BLOCK
from qpass.ops.triton.launching import HALVES, attempt, kernels_of, nf4_table, permutes_bytes, serves
from qpass.ops.triton.stored import as_bytes, layout_of
from qpass.ops.triton.table import FUSED, attention_tiles, device_of, token_parts
from qpass.ops.triton.workspace import counters
from qpass.rotation import rotate
from qpass.spec import QuantSpec, parse_spec


@dataclass(frozen=True, eq=False)
class Half:
    """Keys or values [B, heads, tokens, *] as the kernel takes them: the parts, how far batches and heads are apart in each."""

    spec: QuantSpec
    data: Tensor
    scale: Tensor | None
    zero: Tensor | None
    blocks: int
    scale_kind: int

    @property
    def kind(self) -> str:
        """How codes become floats, in unpacking.py."""
        return FUSED[self.spec.format.name]

    @property
    def group(self) -> int:
        """Columns that share a scale; 0: all of a token."""
        return self.spec.group_size if self.blocks > 1 else 0

    @property
    def fours(self) -> bool:
        """Whether the words of a token are a multiple of four; then strides of heads are."""
        return self.data.shape[-1] % 4 == 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Strides of data, scale and zero point; words, scales, zero points of a token; of data in fours, if whole."""
        words, (batch, head) = self.data.shape[-1], self.data.stride()[:2]
        of_data = (batch // 4, head // 4, words // 4) if self.fours else (batch, head, words)
        strides = [s for part in (self.scale, self.zero) for s in ((0, 0) if part is None else part.stride()[:2])]
        return *of_data[:2], *strides, of_data[2], self.blocks, 0 if self.zero is None else self.zero.shape[-1]

    def constants(self, name: str, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the kernel that are known when it is compiled; `name`: K or V."""
        unpacking = kernels_of("unpacking")
        number = getattr(unpacking, self.kind).value
        values = {
            "KIND": number, "PLANES": 16 // self.spec.format.bits, "UNIT": unpacking.unit_of(number, dtype), "GROUP": self.group,
            "SCALE": self.scale_kind, "CAST": self.scale is None and self.spec.format.kind == "float8",
            "FOURS": self.fours, "FLOAT_ZERO": self.spec.float_zero,
        }  # fmt: skip
        return {f"{name}_{key}": value for key, value in values.items()}


def half_of(parts: tuple[Tensor | None, ...], columns: int, text: str) -> Half | None:
    """Keys or values, if the kernel reads them: whole words, one scale a token or one for each of equal groups; or scales of the
    channels of some tokens, with zero points in float."""
    spec = parse_spec(text)
    data, scale, zero, outer = parts
    if spec.format.name not in FUSED or outer is not None or data is None or data.dim() != 4:
        return None
    if spec.static:
        scale = None
    shared = spec.tokens
    if shared not in (0, BLOCK) or (shared and (spec.rotated or not (spec.float_zero or spec.symmetric))):
        return None
    width, blocks, scale_types, kind = layout_of(text, columns)
    codes, group = 32 // spec.format.bits, spec.group_size if blocks > 1 else 0
    if columns % codes or (group and (group < codes or group & (group - 1))):
        return None
    if data.shape[-1] != width or data.dtype not in (spec.format.storage, torch.uint8):
        return None
    rows, scales = (data.shape[2] // shared, columns) if shared else (data.shape[2], blocks)
    zero_width = scales if spec.float_zero else -(-blocks * spec.format.bits // 8)
    expected = (
        (scale, bool(scale_types), scales, scale_types),
        (zero, spec.has_zero_point, zero_width, (spec.scale_dtype if spec.float_zero else spec.format.storage,)),
    )
    for part, wanted, last, types in expected:
        if (part is not None) != wanted:
            return None
        if part is not None and (part.shape != (*data.shape[:2], rows, last) or part.dtype not in types):
            return None
    data, scale, zero = (None if p is None else _tokens_in_a_row(as_bytes(p)) for p in (data, scale, zero))
    assert data is not None
    if data.data_ptr() % 16 or any(s * data.itemsize % 16 for s in data.stride()[:2]):
        data = data.contiguous()
        if data.data_ptr() % 16 or width % 4:
            return None
    return Half(spec, data.view(torch.int32), scale, zero, blocks, kind)


def _tokens_in_a_row(part: Tensor) -> Tensor:
    """Tokens of one head behind each other; heads may be apart, as in the filled part of a longer cache."""
    return part if part.stride()[2:] == (part.shape[3], 1) else part.contiguous()


def attention(
    q: Tensor,
    k_data: Tensor,
    k_scale: Tensor | None,
    k_zero_point: Tensor | None,
    k_outer_scale: Tensor | None,
    k_spec: str,
    v_data: Tensor,
    v_scale: Tensor | None,
    v_zero_point: Tensor | None,
    v_outer_scale: Tensor | None,
    v_columns: int,
    v_spec: str,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    k_first: Tensor | None = None,
    v_first: Tensor | None = None,
    k_last: Tensor | None = None,
    v_last: Tensor | None = None,
    start: Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, Q, D] against a quantized cache -> [B, Hq, Q, Dv]. Many queries go through the dequantized cache."""
    keys, values = (k_data, k_scale, k_zero_point, k_outer_scale), (v_data, v_scale, v_zero_point, v_outer_scale)
    floats = (k_first, v_first, k_last, v_last)
    found = None
    if serves(q, *keys, *values, mask, *floats, start, sinks) and q.dtype in HALVES and q.numel() and v_columns:
        found = _halves(q, keys, k_spec, values, v_columns, v_spec, floats)
    if found is not None:
        y = attempt(
            f"attention {k_spec}, {v_spec} of {q.dtype}",
            q.device,
            lambda: _in_frames(
                q, *found, k_scale, v_scale, v_columns, mask, is_causal, scale, floats, start, soft_cap, sinks
            ),
        )
        if y is not None:
            return y
    return cache_reference.attention(
        q, *keys, k_spec, *values, v_columns, v_spec, mask, is_causal, scale, *floats, start, soft_cap, sinks
    )


def _in_frames(q: Tensor, k: Half, v: Half, k_scale: Tensor | None, v_scale: Tensor | None, v_columns: int, mask: Tensor | None,
               is_causal: bool, scale: float | None, floats: tuple[Tensor | None, ...], start: Tensor | None, soft_cap: float,
               sinks: Tensor | None) -> Tensor:  # fmt: skip
    """With queries and float tokens (k_first, v_first, k_last, v_last) in the frames in which keys and values are stored."""
    floats = tuple(None if x is None else x.to(q.dtype) for x in floats)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k_floats = _in_frame(q, k.spec, k_scale, floats[::2], 1)
    _, v_floats = _in_frame(q, v.spec, v_scale, floats[1::2], -1)
    y = _attend(q, k, v, v_columns, mask, is_causal, factor, (*k_floats, *v_floats), start, soft_cap, sinks)
    return _in_frame(y, v.spec, v_scale, (), 1)[0]


def _halves(
    q: Tensor, keys: tuple[Tensor | None, ...], k_spec: str, values: tuple[Tensor | None, ...], v_columns: int, v_spec: str,
    floats: tuple[Tensor | None, ...],
) -> tuple[Half, Half] | None:  # fmt: skip
    """Keys and values, if the kernel takes them."""
    k, v = half_of(keys, q.shape[-1], k_spec), half_of(values, v_columns, v_spec)
    if k is None or v is None or v.spec.tokens or k.data.shape[:3] != v.data.shape[:3] or not k.data.numel():
        return None
    batch, heads, _, _ = k.data.shape
    if batch != q.shape[0] or q.shape[1] % heads or max(q.shape[-1], v_columns) > 256:
        return None
    if attention_tiles(q.shape[1] // heads * q.shape[2], q.shape[2]) is None or (
        floats[0] is not None and floats[2] is None
    ):
        return None
    return k, v


def _in_frame(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, floats: tuple[Tensor | None, ...], sign: int
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """x [B, Hq, Q, D] and float tokens [B, H, *, D] in the frame in which a half is stored, where products are the same.

    Rotated: both are. With static scales of channels: x is multiplied by them, floats are divided.
    """
    dtype = x.dtype
    if spec.rotated:
        return rotate(x), tuple(None if f is None else rotate(f) for f in floats)
    if spec.static and scale is not None:
        groups = x.shape[1] // scale.shape[1] if scale.shape[1] > 1 else 1
        scaled = (x * scale.repeat_interleave(groups, 1)).to(dtype) if sign > 0 else x
        return scaled, tuple(None if f is None else (f / scale).to(dtype) for f in floats)
    return x, floats


def _attend(q: Tensor, k: Half, v: Half, v_columns: int, mask: Tensor | None, is_causal: bool, factor: float,
            floats: tuple[Tensor | None, ...], start: Tensor | None, soft_cap: float, sinks: Tensor | None,
            ) -> Tensor:  # fmt: skip
    """The kernel. `floats`: k_first, k_last, v_first, v_last."""
    batch, heads, tokens, _ = k.data.shape
    queries, columns = q.shape[2:]
    groups = q.shape[1] // heads
    device, rows = device_of(q.device), groups * queries
    tiles = attention_tiles(rows, queries)
    assert tiles is not None
    if k.spec.tokens:
        tiles = replace(tiles, tokens=k.spec.tokens)
    k_first, k_last, v_first, v_last = floats
    k_first, v_first = (None if f is None else f.contiguous() for f in (k_first, v_first))
    k_last, v_last = (None if f is None else _heads_in_a_row(f) for f in (k_last, v_last))
    apart = tuple(0 if f is None else f.stride(0) for f in (k_last, v_last))
    parts = token_parts(tokens, batch * heads, device.multiprocessors)
    shared = counters(batch * heads, q.device)
    if shared is None:  # in a graph that is captured before anything ran: zeros of its own, which the graph sets
        shared = torch.zeros(batch * heads, dtype=torch.int32, device=q.device)
    chunk = -(-tokens // parts)
    chunk = -(-chunk // tiles.tokens) * tiles.tokens
    parts = -(-tokens // chunk) + (k_last is not None)
    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.expand(batch, q.shape[1], queries, tokens)
        strides = mask.stride()  # type: ignore[assignment]
        mask = mask.view(torch.uint8) if kind == 1 else mask
    one_row = queries == 1 and (strides[1] == 0 or q.shape[1] == 1)
    padded = max(16, 1 << (rows - 1).bit_length())
    k_constants, v_constants = k.constants("K", q.dtype), v.constants("V", q.dtype)
    wide_k, wide_v = (
        _padded(c, p) for c, p in ((columns, k_constants["K_PLANES"]), (v_columns, v_constants["V_PLANES"]))
    )
    y = q.new_empty((*q.shape[:-1], v_columns))
    sums = q.new_empty((batch * heads, parts, padded, v_columns), dtype=torch.float32)
    tops, totals = (q.new_empty((batch * heads, parts, padded), dtype=torch.float32) for _ in range(2))
    kernels_of("attention").attention_kernel[(batch * heads, parts)](
        q.contiguous(), k.data, k.scale, k.zero, v.data, v.scale, v.zero, nf4_table({k.kind, v.kind}, q.dtype, q.device), mask,
        k_first, v_first, k_last, v_last, start if k_last is not None else None,
        None if sinks is None else sinks.contiguous(), y, sums, tops, totals, shared,
        heads, tokens, chunk, 0 if k_first is None else k_first.shape[2], 0 if k_last is None else k_last.shape[2],
        float(factor), float(soft_cap), *k.sizes, *v.sizes, *strides, *apart,
        **k_constants, **v_constants, PRMT=permutes_bytes(q.device), MASK=kind, ONE_ROW=one_row, CAUSAL=is_causal,
        SOFT_CAP=soft_cap != 0, FLOATS=k_last is not None, PARTS=parts, QUERIES=queries, GROUPS=groups, D=columns,
        DV=v_columns, R=padded, S=tiles.tokens, BD=wide_k, BV=wide_v, SCAN=4096 if one_row else max(64, 16384 // padded),
        JOIN=max(1, 8192 // (padded * wide_v)), K_TOKENS=k.spec.tokens,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def _heads_in_a_row(x: Tensor) -> Tensor:
    """[B, H, S, D], where sequences may be apart, as those of one new token are in the result of a linear."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _padded(columns: int, planes: int) -> int:
    """The power of two that a block is wide: a plane of it has at least the 16 columns of a product on tensor cores."""
    return max(16 * planes, 1 << (columns - 1).bit_length())

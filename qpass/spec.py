"""QuantSpec: how one tensor is quantized, and the mini-language that writes it: `int4:g128:asym`, `int8@int8:static`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qpass.errors import QpassError, nearest
from qpass.formats import FORMATS, Format, get_format
from qpass.granularity import Granularity, PerAxis, PerGroup, PerTensor, PerTokens
from qpass.packing import packed_length

SCALE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALE_ROUNDINGS = ("floor", "rceil")
#: How codes are chosen, in the order in which they take part; see qpass.algorithms.
ALGORITHMS = ("smooth", "awq", "hqq", "search", "gptq")
#: What the range of a static scale is taken from; see qpass.observers.
RANGES = ("minmax", "percentile", "mse", "entropy")
_TOKENS = (
    "g<group size>", "t<tokens>", "channel", "tensor", "static", "asym", "zero=float", "rotated", "dq", *SCALE_ROUNDINGS,
    *ALGORITHMS, *RANGES,
    *(f"scale={name}" for name in SCALE_DTYPES),
)  # fmt: skip


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    `granularity`: what shares a scale; None for a direct cast (identity and unscaled fp8).
    `symmetric`: zero point 0 and the range -qmax..qmax; otherwise min..max including 0, with an integer zero point.
    `scale_dtype`: how float scales are stored; their arithmetic is always float32.
    `double_quantized`: the scales are themselves stored as 8-bit integers, with one float per row (QLoRA, section 3).
    `scale_rounding`: of E8M0 scales: `floor` (OCP MX v1.0, section 6.3: may clip up to a quarter of the range) or
    `rceil` (the next power of two at or above amax / max: never clips).
    `float_zero`: the zero point is a float stored like the scale; the range need not hold 0 (KIVI, section 3).
    `rotated`: rows are multiplied by an orthogonal matrix before they are quantized (qpass.rotation).
    `static`: the scales come from calibration: one for each head and channel of a cache, one for the input of a linear, whose
    range is found by `range`.
    `activations`: of a weight: how the input that it multiplies is quantized; None leaves it in float.
    """

    format: Format
    granularity: Granularity | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    double_quantized: bool = False
    scale_rounding: str = "floor"
    algorithms: tuple[str, ...] = ()
    float_zero: bool = False
    rotated: bool = False
    static: bool = False
    range: str = "minmax"
    activations: QuantSpec | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the tensor stays in a float format."""
        return self.format.kind == "identity"

    @property
    def container_bits(self) -> int:
        """Bits that files for other programs hold a code in: these have types and products of four and of eight, not of fewer or
        of those between. The values are the same."""
        return 4 if self.format.bits <= 4 else max(8, self.format.bits)

    @property
    def in_blocks(self) -> bool:
        """Whether the format fixes blocks and the type of their scales, as new GPUs multiply them: MX and nvfp4."""
        return self.format.scale in ("e8m0", "e4m3")

    @property
    def reads_tensor_range(self) -> bool:
        """Whether a scale follows from the range of the whole tensor."""
        return isinstance(self.granularity, PerTensor) or self.format.scale == "e4m3"

    @property
    def has_zero_point(self) -> bool:
        """Whether a zero point is stored beside the scale."""
        return not self.symmetric

    @property
    def stored_parts(self) -> dict[int, torch.dtype]:
        """Which of data, scale, zero_point, outer_scale are stored: position -> dtype."""
        floats = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}.get(self.format.scale, self.scale_dtype)
        stored = {0: self.format.storage}
        if self.granularity is not None:
            stored[1] = torch.uint8 if self.double_quantized else floats
        if self.has_zero_point:
            stored[2] = self.scale_dtype if self.float_zero else self.format.storage
        if self.double_quantized or self.format.scale == "e4m3":  # nvfp4: one float over the scales of a tensor
            stored[3] = torch.float32
        return stored

    @property
    def of_caches_only(self) -> str | None:
        """The part of the spec that has a meaning for a KV cache only, if there is one."""
        only = {
            str(self.granularity): isinstance(self.granularity, PerTokens),
            "rotated": self.rotated,
            "static": self.static,
        }
        return next((token for token, used in only.items() if used), None)

    @property
    def group_size(self) -> int:
        """Elements of a row that share a scale; 0 where a whole row or more does."""
        return self.granularity.group_size if isinstance(self.granularity, PerGroup) else 0

    @property
    def tokens(self) -> int:
        """Tokens of a cache that share the scales of their channels; 0 where each has its own."""
        return self.granularity.tokens if isinstance(self.granularity, PerTokens) else 0

    @property
    def qrange(self) -> tuple[float, float]:
        """The smallest and the largest code that quantization may give."""
        return (-self.format.symmetric_qmax if self.symmetric else self.format.qmin), self.format.qmax

    def effective_bits(self, columns: int) -> float:
        """Stored bits per element, scales and zero points included, for rows of `columns` elements."""
        if self.granularity is None:
            return self.format.bits
        scales: float = (
            self.granularity.scale_shape((1, columns))[-1] if not isinstance(self.granularity, PerTensor) else 0
        )
        if isinstance(self.granularity, PerTokens):
            scales /= self.granularity.tokens
        scale_bits = {"e8m0": 8, "e4m3": 8}.get(self.format.scale, 8 * self.scale_dtype.itemsize)
        if self.double_quantized:
            scale_bits = 8
        total = scales * scale_bits + 32 * self.double_quantized
        if self.float_zero:
            total += scales * scale_bits
        elif self.has_zero_point:
            total += self._packed_bits(scales)
        return (self._packed_bits(columns) + total) / columns

    def _packed_bits(self, codes: float) -> float:
        """Of a row of codes, which begins on a byte."""
        return (
            8 * packed_length(math.ceil(codes), self.format.bits) if self.format.bits < 8 else codes * self.format.bits
        )

    def __str__(self) -> str:
        parts = [self.format.name]
        if self.granularity is not None and self.format.scale == "float":
            parts.append(str(self.granularity))
        if self.static:
            parts += ["static"] if self.range == "minmax" else ["static", self.range]
        if not self.symmetric:
            parts.append("zero=float" if self.float_zero else "asym")
        if self.rotated:
            parts.append("rotated")
        if self.double_quantized:
            parts.append("dq")
        if self.scale_rounding != "floor":
            parts.append(self.scale_rounding)
        if self.scale_dtype != torch.float32:
            parts.append("scale=" + next(k for k, v in SCALE_DTYPES.items() if v == self.scale_dtype))
        parts += self.algorithms
        weight = ":".join(parts)
        return weight if self.activations is None else f"{weight}@{self.activations}"


def _default(fmt: Format) -> QuantSpec:
    """The spec that a bare format name means."""
    if fmt.kind == "identity" or (fmt.kind == "float8" and fmt.scale == "float"):
        return QuantSpec(fmt)
    return QuantSpec(fmt, PerGroup(fmt.group_size) if fmt.group_size else PerAxis())


@lru_cache(maxsize=1024)
def parse_spec(text: str) -> QuantSpec:
    """`<format>[:g<group>|:channel|:tensor][:asym][:dq][:rceil][:scale=fp16][:<algorithm>][@<activations>]` -> QuantSpec.

    For a KV cache also `:t<tokens>`, `:static` and `:rotated`. Activations: `int8` (a scale for each token, found as it comes),
    `int8:g32`, `int8:static` (one scale, from calibration), with `:asym` a zero point; `fp8_e4m3`, `fp8_e4m3:channel`, ...

    Raises `QpassError` for an unknown format or token (with the nearest name) and for combinations without a meaning.
    """
    weight, at, activations = text.partition("@")
    spec = _parse_one(weight, text)
    if spec.algorithms:
        _check_algorithms(spec, text)
    if "smooth" in spec.algorithms and not at:
        raise QpassError(f"spec {text!r}: smooth makes activations easier to quantize; say how they are: {text}@int8")
    if not at:
        return spec
    if spec.is_identity:
        raise QpassError(
            f"spec {text!r}: activations are quantized where the weight is; {spec.format.name} is a float format"
        )
    return replace(spec, activations=_activations(activations, text))


def _parse_one(part: str, text: str) -> QuantSpec:
    name, *tokens = part.split(":")
    spec = _default(get_format(name))
    for token in tokens:
        spec = _apply(spec, token, text)
    return spec


def _check_algorithms(spec: QuantSpec, text: str) -> None:
    ranged = next((a for a in spec.algorithms if a in ("search", "awq", "hqq")), None)
    if ranged and spec.granularity is None:
        raise QpassError(f"spec {text!r}: a cast without scale has nothing to search for {ranged}; add channel or g32")
    if "search" in spec.algorithms and isinstance(spec.granularity, PerTensor):
        raise QpassError(f"spec {text!r}: one scale for the whole tensor; search is of blocks: use channel or g32")
    if "hqq" in spec.algorithms and isinstance(spec.granularity, PerTensor):
        raise QpassError(f"spec {text!r}: one scale for the whole tensor; hqq is of blocks: use channel or g32")
    if {"smooth", "awq"} <= set(spec.algorithms):
        raise QpassError(f"spec {text!r}: smooth and awq both scale the columns; take one of them")
    if {"hqq", "search"} <= set(spec.algorithms):
        raise QpassError(f"spec {text!r}: hqq and search both choose the range; take one of them")
    if "hqq" in spec.algorithms and not spec.float_zero:
        raise QpassError(f"spec {text!r}: hqq moves a zero point between the integers; add zero=float")


def _activations(part: str, text: str) -> QuantSpec:
    spec = _parse_one(part, text)
    reason = None
    if spec.is_identity:
        reason = "a float format; leave the part behind @ out"
    elif spec.algorithms:
        reason = f"{spec.algorithms[0]} is for weights"
    elif spec.rotated or spec.float_zero or isinstance(spec.granularity, PerTokens):
        reason = "rotated, zero=float and t<tokens> are for a KV cache"
    elif spec.static and spec.granularity is not None:
        reason = "a static scale is one for all tokens"
    elif isinstance(spec.granularity, PerTensor):
        reason = "one scale for all tokens comes from calibration: int8:static; or take one a token: int8"
    elif spec.scale_dtype != torch.float32 or spec.double_quantized:
        reason = "scale=.. and dq are of what is stored; scales of activations are not"
    if reason is not None:
        raise QpassError(f"spec {text!r}: activations {part!r}: {reason}")
    return spec


def _apply(spec: QuantSpec, token: str, text: str) -> QuantSpec:
    fmt = spec.format

    def refuse(why: str) -> QpassError:
        return QpassError(f"spec {text!r}: {token!r} does not fit {fmt.name}: {why}")

    if token in ALGORITHMS:
        if fmt.kind == "identity":
            raise refuse("a float format has nothing to choose")
        return replace(spec, algorithms=tuple(a for a in ALGORITHMS if a in (*spec.algorithms, token)))
    if fmt.kind == "identity":
        raise refuse("a float format has no scale")
    if token in ("channel", "tensor") or (token[:1] in ("g", "t") and token[1:].isdigit()):
        if fmt.scale != "float":
            raise refuse(f"its blocks are fixed at {fmt.group_size}")
        if token[0] in "gt" and token[1:].isdigit() and int(token[1:]) < 1:
            raise refuse("a group has at least one element")
        fixed: dict[str, Granularity] = {"channel": PerAxis(), "tensor": PerTensor()}
        grouped = PerTokens if token[0] == "t" else PerGroup
        return replace(spec, granularity=fixed.get(token) or grouped(int(token[1:])))
    if token in ("asym", "zero=float"):
        if fmt.kind != "uniform":
            raise refuse("only integer formats have a zero point")
        return replace(spec, symmetric=False, float_zero=token == "zero=float")
    if token == "rotated":
        if spec.static:
            raise refuse("static scales are of channels, which a rotation mixes")
        return replace(spec, rotated=True)
    if token in RANGES:
        if not spec.static:
            raise refuse("it finds the range of a static scale; write static before it")
        return replace(spec, range=token)
    if token == "static":
        if fmt.name != "int8" and fmt.name not in ("fp8_e4m3", "fp8_e5m2"):
            raise refuse("static scales are for int8 and fp8")
        if spec.rotated:
            raise refuse("static scales are of channels, which a rotation mixes")
        return replace(spec, granularity=None, static=True)
    if token == "dq":
        if fmt.scale != "float" or not isinstance(spec.granularity, PerGroup):
            raise refuse("double quantization is of float scales per group")
        return replace(spec, double_quantized=True)
    if token in SCALE_ROUNDINGS:
        if fmt.scale != "e8m0":
            raise refuse("only E8M0 scales (mxfp8, mxfp4) have a rounding")
        return replace(spec, scale_rounding=token)
    if token.startswith("scale=") and token[6:] in SCALE_DTYPES:
        if fmt.scale != "float":
            raise refuse(f"its scales are {fmt.scale.upper()}")
        return replace(spec, scale_dtype=SCALE_DTYPES[token[6:]])
    raise QpassError(f"spec {text!r}: unknown part {token!r}: {nearest(token, _TOKENS)}")


def every_format() -> list[QuantSpec]:
    """The default spec of each format, in table order."""
    return [_default(f) for f in FORMATS.values()]

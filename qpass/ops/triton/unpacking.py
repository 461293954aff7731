"""Stored codes to values, in registers.

Codes are read as 32-bit words of the bit stream that `qpass.packing` makes. Shifted by `plane` codes and masked, a word holds two
of them in its halves, `codes / 2` columns apart: those are made floats by a few operations on both at once. A product over
columns does not care about their order, so what it is multiplied with is taken apart into the same planes (`planes_of`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qpass.formats import NF4_VALUES

INT4, INT8, E2M1, NF4, E4M3, E5M2 = (tl.constexpr(i) for i in range(6))
FLOAT_SCALE, E8M0_SCALE, E4M3_SCALE, BYTE_SCALE = (tl.constexpr(i) for i in range(4))
NO_ZERO, INTEGER_ZERO = tl.constexpr(0), tl.constexpr(1)

#: Integer codes are read as the smallest floats there are: code q is q 2^-133 in bfloat16 and q 2^-24 in float16 (subnormals and
#: the first normals are equally spaced). The product with a large power of two is exact, and no constant is merged into codes.
#: Values come as q / 64 and q / 512: the largest power of the type is 2^127, 2^15.
_BF16_UP, _FP16_UP = tl.constexpr(2.0**127), tl.constexpr(2.0**15)


def unit_of(kind: int, dtype: torch.dtype) -> float:
    """What values as `plane_values` gives them are multiplied by."""
    if kind not in (INT4.value, INT8.value):
        return 1.0
    return 2.0**9 if dtype == torch.float16 else 2.0**6


def prmt_lookup(patterns: Sequence[int]) -> str:
    """PTX: a word of eight codes $4 -> words $0 .. $3 of planes 0 .. 3, each of two values of a table of bit patterns.

    prmt picks four bytes of eight by the low three bits of four codes: twice for the halves of the table, then by the fourth
    bit between the two; for high bytes and for low bytes.
    """
    table = {"h": [p >> 8 for p in patterns], "l": [p & 0xFF for p in patterns]}
    quads = {
        f"{name}{i}": sum(part[4 * i + j] << (8 * j) for j in range(4))
        for name, part in table.items()
        for i in range(4)
    }
    lines = [".reg .b32 h0, h1, l0, l1, low, high, select, code, a01, a23, b01, b23;"]
    for part, out in (("a", 0), ("b", 16)):
        lines += [
            f"shr.b32 code, $4, {out};",
            "and.b32 low, code, 0x7777;",
            "shr.b32 select, code, 1;",
            "and.b32 select, select, 0x4444;",
            "or.b32 select, select, 0x3210;",
        ]
        for name in "hl":
            q = [quads[f"{name}{i}"] for i in range(4)]
            lines += [
                f"prmt.b32 {name}0, {q[0]:#x}, {q[1]:#x}, low;",
                f"prmt.b32 {name}1, {q[2]:#x}, {q[3]:#x}, low;",
                f"prmt.b32 {name}0, {name}0, {name}1, select;",
            ]
        lines += [f"prmt.b32 {part}01, l0, h0, 0x5140;", f"prmt.b32 {part}23, l0, h0, 0x7362;"]
    lines += [
        "prmt.b32 $0, a01, b01, 0x5410;",
        "prmt.b32 $1, a01, b01, 0x7632;",
        "prmt.b32 $2, a23, b23, 0x5410;",
        "prmt.b32 $3, a23, b23, 0x7632;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def nf4_patterns(dtype: torch.dtype) -> list[int]:
    """The values of the codebook as bits of a 16-bit type."""
    return [int(p) & 0xFFFF for p in torch.tensor(NF4_VALUES).to(dtype).view(torch.int16).tolist()]


_NF4_BF16 = tl.constexpr(prmt_lookup(nf4_patterns(torch.bfloat16)))
_NF4_FP16 = tl.constexpr(prmt_lookup(nf4_patterns(torch.float16)))


@triton.jit
def _joined(low, high):
    """Values of the lower and of the upper halves of words [R, W] -> [R, 2 W]."""
    return tl.reshape(tl.join(low, high), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def _scaled(values, scale, SCALED: tl.constexpr):
    """Values times scales in their type; of float16 in float32, for small scales are no float16."""
    if SCALED:
        values = (values * scale).to(values.dtype)
    return values


@triton.jit
def looked_up(words, table, KIND: tl.constexpr, DTYPE: tl.constexpr, PRMT: tl.constexpr):
    """[R, W] words of codes -> the words of the four planes that `plane_values` takes: the codes, or what a table says of them.

    `table`: [16] int32, of which the low halves are values as DTYPE. PRMT: by byte permutations instead, on NVIDIA devices.
    """
    if KIND == NF4 and PRMT:
        lookup: tl.constexpr = _NF4_FP16 if DTYPE == tl.float16 else _NF4_BF16
        planes = tl.inline_asm_elementwise(
            lookup, "=r,=r,=r,=r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    elif KIND == NF4:
        planes = (
            tl.load(table + (words & 15)) | (tl.load(table + ((words >> 16) & 15)) << 16),
            tl.load(table + ((words >> 4) & 15)) | (tl.load(table + ((words >> 20) & 15)) << 16),
            tl.load(table + ((words >> 8) & 15)) | (tl.load(table + ((words >> 24) & 15)) << 16),
            tl.load(table + ((words >> 12) & 15)) | (tl.load(table + ((words >> 28) & 15)) << 16),
        )
    elif KIND == INT8:
        words = words ^ -0x7F7F7F80  # 0x80808080: signed codes to 0 .. 255
        planes = words, words, words, words
    else:
        planes = words, words, words, words
    return planes


@triton.jit
def _bits(words, PLANE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Words of codes -> words of which the halves are bits of DTYPE, of values as they are in `_value`."""
    if KIND == INT4:  # odd planes lie four bits higher, and are as much larger
        bits = (words >> (8 * (PLANE // 2))) & (0x00F000F0 if PLANE % 2 else 0x000F000F)
    elif KIND == INT8:
        bits = (words >> (8 * PLANE)) & 0x00FF00FF
    elif KIND == E2M1:  # sign 8, exponent 6 (bias 1), mantissa 1, to where the type has them
        AT: tl.constexpr = 9 if DTYPE == tl.float16 else 6
        bits = words >> (4 * PLANE)
        bits = ((bits & 0x00080008) << 12) | ((bits & 0x00070007) << AT)
    elif KIND == NF4:  # looked up before
        bits = words
    else:
        # The byte's top in the top of the half. Bit 31 comes down as copies of itself, which the masks take off.
        bits = words << 8 if PLANE == 0 else words
        if KIND == E4M3 and DTYPE == tl.float16:
            bits = (bits & -0x7FFF8000) | ((bits >> 1) & 0x3F803F80)
        elif KIND == E4M3:
            bits = (bits & -0x7FFF8000) | ((bits >> 4) & 0x07F007F0)
        elif DTYPE == tl.float16:  # E5M2 is the top of a float16
            bits = bits & -0x00FF0100
        else:
            bits = (bits & -0x7FFF8000) | ((bits >> 3) & 0x0FE00FE0)
    return bits


@triton.jit
def _value(half, zero, PLANE: tl.constexpr, KIND: tl.constexpr):
    """Halves as `_bits` gives them -> values over `unit_of`."""
    DTYPE: tl.constexpr = half.dtype
    HALF: tl.constexpr = DTYPE == tl.float16
    if KIND == INT4 or KIND == INT8:
        UP: tl.constexpr = (_FP16_UP if HALF else _BF16_UP) / (16 if KIND == INT4 and PLANE % 2 else 1)
        MIDDLE: tl.constexpr = (8 if KIND == INT4 else 128) / (512 if HALF else 64)
        # The zero point by itself: a product and sum with a number that is none of the code's takes more instructions.
        values = ((half * UP - MIDDLE).to(DTYPE) - zero).to(DTYPE)
    elif KIND == E2M1:  # what the biases of the exponents differ by, as in the rest
        E2M1_UP: tl.constexpr = 2.0**14 if HALF else 2.0**126
        values = (half * E2M1_UP).to(DTYPE)
    elif KIND == E4M3:
        E4M3_UP: tl.constexpr = 2.0**8 if HALF else 2.0**120
        values = (half * E4M3_UP).to(DTYPE)
    elif KIND == E5M2 and not HALF:
        values = (half * 2.0**112).to(DTYPE)
    else:
        values = half
    return values


@triton.jit
def plane_values(
    words, zero, scale, PLANE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr
):
    """[R, W] words -> [R, 2 W]: the values of codes `PLANE` and `PLANE` + half a word, over `unit_of`.

    `zero`: zero points of integers over `unit_of`, of DTYPE for each word, or 0. `scale`: for each word, if SCALED.
    """
    bits = _bits(words, PLANE, KIND, DTYPE)
    low = _value(bits.to(tl.int16).to(DTYPE, bitcast=True), zero, PLANE, KIND)
    high = _value((bits >> 16).to(tl.int16).to(DTYPE, bitcast=True), zero, PLANE, KIND)
    return _joined(_scaled(low, scale, SCALED), _scaled(high, scale, SCALED))


@triton.jit
def for_words(per_group, GROUP_WORDS: tl.constexpr):
    """[R, G] of groups of columns -> [R, W] of their words."""
    R: tl.constexpr = per_group.shape[0]
    G: tl.constexpr = per_group.shape[1]
    return tl.reshape(tl.broadcast_to(per_group[:, :, None], (R, G, GROUP_WORDS)), (R, G * GROUP_WORDS))


@triton.jit
def planes_of(x, PLANES: tl.constexpr):
    """[M, K] -> four times [M, K / PLANES]: its columns as the planes of words have them; of bytes, two planes, each twice."""
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    if PLANES == 4:
        even, odd = tl.split(tl.reshape(x, (M, K // 8, 2, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    else:
        x0, x1 = tl.split(tl.reshape(x, (M, K // 4, 2, 2)))
        x2, x3 = x0, x1
    SIZE: tl.constexpr = K // PLANES
    return (
        tl.reshape(x0, (M, SIZE)),
        tl.reshape(x1, (M, SIZE)),
        tl.reshape(x2, (M, SIZE)),
        tl.reshape(x3, (M, SIZE)),
    )


@triton.jit
def scale_values(stored, outer, SCALE: tl.constexpr):
    """Stored scales -> float32. `outer` broadcasts to them."""
    if SCALE == E8M0_SCALE:  # 2^(byte - 127); 2^-127 is a subnormal
        values = tl.where(stored == 0, 0x00400000, stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALE == E4M3_SCALE:  # positive
        values = (stored.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120 * outer
    elif SCALE == BYTE_SCALE:
        values = stored.to(tl.float32) * outer
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit
def zero_codes(zero, row, block, width, KIND: tl.constexpr):
    """Integer zero points of `block`s of `row`s as float32; `width`: stored bytes of a row."""
    if KIND == INT4:
        byte = tl.load(zero + row * width + block // 2)
        codes = ((byte >> ((block % 2) * 4).to(tl.uint8)) & 15).to(tl.int32) - 8
    else:
        codes = (tl.load(zero + row * width + block) ^ 128).to(tl.int32) - 128  # bytes of signed codes
    return codes.to(tl.float32)

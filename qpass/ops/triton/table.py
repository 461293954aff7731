"""Which kernel multiplies a weight of a format with so many rows, in what tiles: one table, the same for every call.

Not measured yet: the numbers come from counting (bytes in flight, registers and instructions of the compiled code).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from qpass.granularity import PerAxis, PerTensor
from qpass.spec import parse_spec

#: Format -> how the codes of a word become floats, in unpacking.py. Of more rows of x than `most_rows`, and of formats that are
#: neither here nor in BITSTREAM, the weight is dequantized by a kernel of its own and multiplied by cuBLAS.
FUSED: dict[str, str] = {
    "int8": "INT8",
    "int4": "INT4",
    "nf4": "NF4",
    "fp4_e2m1": "E2M1",
    "mxfp4": "E2M1",
    "nvfp4": "E2M1",
    "fp8_e4m3": "E4M3",
    "mxfp8": "E4M3",
    "fp8_e5m2": "E5M2",
}
#: Integers that bitstream.py reads: of bits that fill no word, and for float zero points and float32 inputs of the others too.
BITSTREAM = frozenset({"int2", "int3", "int4", "int5", "int6", "int8"})
#: Columns of as many whole words as a code has bits.
UNIT = 32
#: Rows of x that a kernel takes, by its type. float32 has no tensor cores.
MOST_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 8}

#: Rows of x up to which a product takes in the norm before it whatever its outputs, and outputs up to which it does of more: each
#: program multiplies and adds up what it reads, which for a large weight is more work than a kernel before.
_NORMED_ROWS, _NORMED_OUTPUTS = 16, 1 << 14

#: Bytes of an int8 weight from which a product with one row is left to Inductor, whose reduction casts as it reads. What stands
#: around it then takes kernels of its own, so it is for the vocabulary projection, of which a step has one: it has so many times
#: more outputs than columns as no other linear.
WRITTEN_OUT, _VOCABULARY = 1 << 26, 8

#: Rows of codes from which torch's product of integers (_int_mm) takes them, and multiples of columns and outputs.
INTEGERS, INTEGER_TILE = 17, 8

#: Compute capability of the first GPUs with bfloat16 products and asynchronous copies (Ampere). fp8 weights need no hardware for
#: fp8: their bits are moved to where bfloat16 has them.
LEAST = (8, 0)


@dataclass(frozen=True)
class Tiles:
    """Rows of x, rows of the weight and words (32 bits) of each that a program takes at a time; its warps and copies ahead."""

    rows: int
    outputs: int
    words: int
    warps: int
    stages: int


#: Programs that fill a multiprocessor, and the least tiles along the columns that are worth a program.
_PROGRAMS, _LEAST_TILES = 2, 4
#: Rows of x up to which, bits of a code -> tiles. Compiled for sm_80, sm_89 and sm_90 they spill no register in their loops.
TILES: tuple[tuple[int, int, Tiles], ...] = (
    (16, 4, Tiles(16, 128, 16, 4, 4)),
    (16, 8, Tiles(16, 128, 32, 4, 3)),
    (32, 4, Tiles(32, 128, 16, 4, 3)),
    (32, 8, Tiles(32, 64, 16, 4, 4)),
    (64, 4, Tiles(64, 128, 16, 8, 3)),
    (64, 8, Tiles(64, 128, 16, 8, 4)),
)
#: The same of bitstream.py: units in the place of words.
BITSTREAM_TILES: tuple[tuple[int, Tiles], ...] = (
    (8, Tiles(8, 128, 8, 4, 3)),
    (16, Tiles(16, 128, 8, 4, 3)),
    (32, Tiles(32, 64, 8, 4, 3)),
    (64, Tiles(64, 64, 8, 4, 2)),
)


@dataclass(frozen=True)
class AttentionTiles:
    """Tokens that a program takes at a time; its warps and copies ahead."""

    tokens: int
    warps: int
    stages: int


#: Rows of a program (queries times query heads of a head of the cache) up to which -> tiles. Beyond, the cache is dequantized.
ATTENTION: tuple[tuple[int, AttentionTiles], ...] = (
    (16, AttentionTiles(64, 4, 3)),
    (64, AttentionTiles(32, 4, 2)),
)
#: The least tokens of the cache that are worth a program.
_LEAST_TOKENS = 256


def attention_tiles(rows: int, queries: int) -> AttentionTiles | None:
    """For `rows` of a program, of so many queries; None where the kernel does not serve. Masks of several take registers."""
    return next((tiles for most, tiles in ATTENTION if rows <= most and (queries == 1 or most > 16)), None)


def token_parts(tokens: int, heads: int, multiprocessors: int) -> int:
    """How many programs share the tokens of each of `heads` heads of the cache, of all sequences."""
    wanted = -(-_PROGRAMS * multiprocessors // heads)
    return max(1, min(wanted, -(-tokens // _LEAST_TOKENS)))


def tiles_of(rows: int, bits: int) -> Tiles:
    """For `rows` of x and codes of `bits`."""
    return next(tiles for most, width, tiles in TILES if rows <= most and width == bits)


def bitstream_tiles(rows: int) -> Tiles:
    """For `rows` of x."""
    return next(tiles for most, tiles in BITSTREAM_TILES if rows <= most)


def split_of(outputs: int, words: int, tiles: Tiles, multiprocessors: int) -> int:
    """How many programs share the columns of one tile of outputs, so that all multiprocessors have work."""
    programs = -(-outputs // tiles.outputs)
    wanted = -(-_PROGRAMS * multiprocessors // programs)
    return max(1, min(wanted, words // (tiles.words * _LEAST_TILES)))


@cache
def fused_kind(text: str, columns: int, dtype: torch.dtype) -> str | None:
    """Name of the way in which a weight of `columns` in this spec is read as it is stored, for inputs of `dtype`: one of
    unpacking.py, "BITSTREAM", or None: no kernel does."""
    spec = parse_spec(text)
    name, group = spec.format.name, spec.group_size
    if spec.of_caches_only is not None or group & (group - 1):
        return None
    codes = 32 // spec.format.bits
    whole_words = columns % codes == 0 and (not group or group >= codes)
    if name in FUSED and dtype in (torch.bfloat16, torch.float16) and whole_words and not spec.float_zero:
        return FUSED[name]
    whole_units = columns % UNIT == 0 and group % UNIT == 0
    return "BITSTREAM" if name in BITSTREAM and whole_units else None


def most_rows(text: str, dtype: torch.dtype) -> int:
    """Rows of x up to which a weight is read as it is stored: once for each MOST_ROWS of them, as long as these readings move no
    more bytes than one of bfloat16 does."""
    readings = max(1, 16 // parse_spec(text).format.bits) if dtype.itemsize == 2 else 1
    return MOST_ROWS.get(dtype, 0) * readings


def takes_norm_in(rows: int, outputs: int) -> bool:
    """Whether a product with `rows` of x normalizes them itself."""
    return rows <= _NORMED_ROWS or outputs <= _NORMED_OUTPUTS


def takes_in(text: str, columns: int, dtype: torch.dtype, rows: int | torch.SymInt) -> bool:
    """Whether a product may do what is around it: one kernel does it all. Of many rows, known when it is compiled, and of other
    formats, Inductor joins the norm, the gate and the sum with what stands before and behind them."""
    few = rows <= most_rows(text, dtype) if isinstance(rows, int) else dtype in MOST_ROWS
    return few and fused_kind(text, columns, dtype) is not None


def written_out(text: str, device: str, rows: int | torch.SymInt, outputs: int, columns: int) -> bool:
    """Whether a product with a weight [outputs, columns] is Inductor's: of one row, known when it is compiled, and codes with
    one scale for each row of the weight or for all of it."""
    spec = parse_spec(text)
    plain = spec.format.name == "int8" and spec.symmetric and isinstance(spec.granularity, PerAxis | PerTensor)
    one = isinstance(rows, int) and rows == 1
    return device == "cuda" and one and plain and outputs * columns >= WRITTEN_OUT and outputs >= _VOCABULARY * columns


@dataclass(frozen=True)
class Device:
    """What the choice depends on: compute capability (of an AMD GPU: None), multiprocessors."""

    capability: tuple[int, int] | None
    multiprocessors: int

    @property
    def served(self) -> bool:
        """Whether the kernels run there; on older devices the reference does."""
        return self.capability is None or self.capability >= LEAST


@cache
def device_of(device: torch.device) -> Device:
    """Of a GPU; the CPU stands for an H100, when kernels are interpreted there."""
    if device.type != "cuda":
        return Device((9, 0), 132)
    found = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (found.major, found.minor)
    return Device(capability, found.multi_processor_count)

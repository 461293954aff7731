"""Embeddings: rows of codes are gathered, then only those are dequantized."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch

from qpass.granularity import PerGroup
from qpass.packing import pack, packed_length
from qpass_export.lowering.build import Build
from qpass_export.lowering.codes import Rows
from qpass_export.lowering.codes import unpack as unpack_rows
from qpass_export.lowering.weights import StoredWeight, block_inputs, is_whole, lazy, stored_weight

_UINT8 = ir.DataType.UINT8


def embedding(b: Build, node: ir.Node, shared: bool) -> ir.Value:
    """qpass::embedding. `shared`: a linear reads the same table, blocks of unsigned codes (MatMulNBits)."""
    ids = node.inputs[0]
    assert ids is not None
    assert ids.shape is not None
    w = stored_weight(node, node.attributes["columns"].as_int())
    rank = len(ids.shape) + 1
    fmt = w.spec.format
    if fmt.kind == "identity":
        table = b.constant(f"{w.name}.cast", ir.tensor(w.parts.data, name=f"{w.name}.cast"))
        return b("Cast", b("Gather", table, ids, axis=0), to=int(b.dtype))
    if fmt.kind == "codebook":
        return _from_codebook(b, ids, w, rank)
    if shared:
        return _from_blocks(b, ids, w, rank)
    if fmt.kind == "float8":
        return _from_float8(b, ids, w, rank)
    if w.spec.container_bits == 8:
        data = lazy((w.rows, w.columns), ir.DataType.INT8, w.name, lambda: w.codes().numpy())
        codes = b("Gather", b.constant(f"{w.name}.rows", data), ids, axis=0)
    else:
        codes = unpack_rows(b, b("Gather", _packed(b, w), ids, axis=0), rank, w.columns)
    zeros = w.zero_points()
    zero = None if zeros is None else _of_rows(b, w, "zero_point", zeros.numpy(), ids)
    return _scaled(b, codes, zero, _scale_of_rows(b, w, ids), Rows(w.spec, rank, w.columns))


def _scaled(b: Build, codes: ir.Value, zero: ir.Value | None, scale: ir.Value, rows: Rows) -> ir.Value:
    """(codes - zero) * scale. Not DequantizeLinear: OpenVINO takes none of a size that it does not know."""
    values = b("Cast", codes, to=int(b.dtype))
    if zero is not None:
        values = b("Sub", values, _spread(b, b("Cast", zero, to=int(b.dtype)), rows))
    return b("Mul", values, _spread(b, scale, rows))


def _scale_of_rows(b: Build, w: StoredWeight, ids: ir.Value) -> ir.Value:
    return _of_rows(b, w, "scale", w.scales().numpy().astype(b.dtype.numpy()), ids)


def _of_rows(b: Build, w: StoredWeight, part: str, array: np.ndarray, ids: ir.Value) -> ir.Value:
    """Scales or zero points of the rows that `ids` names; the one of all, where there is one."""
    if is_whole(w):
        return b("Reshape", _table(b, w, part, array), np.array([1]))
    return b("Gather", _table(b, w, part, array), ids, axis=0)


def _table(b: Build, w: StoredWeight, part: str, array: np.ndarray) -> ir.Value:
    name = f"{w.name}.{part}_rows"
    return b.constant(name, ir.Tensor(np.ascontiguousarray(array), name=name))


def _packed(b: Build, w: StoredWeight) -> ir.Value:
    """Two codes a byte: ONNX has no Gather of four-bit types."""

    shape = (w.rows, packed_length(w.columns, 4))
    make = lambda: pack((w.codes() + 8).to(torch.uint8), 4).numpy()  # noqa: E731  evaluated when it is written
    return b.constant(f"{w.name}.packed", lazy(shape, _UINT8, w.name, make))


def _from_float8(b: Build, ids: ir.Value, w: StoredWeight, rank: int) -> ir.Value:
    """Bytes, and a table of what each of the 256 means: ONNX has no Gather of 8-bit floats."""
    kind = w.parts.data.dtype
    data = lazy((w.rows, w.columns), _UINT8, w.name, lambda: w.parts.data.view(torch.uint8).numpy())
    meanings = torch.arange(256, dtype=torch.uint8).view(kind).float().numpy().astype(b.dtype.numpy())
    codes = b("Gather", b.constant(f"{w.name}.rows", data), ids, axis=0)
    values = b("Gather", meanings, b("Cast", codes, to=int(ir.DataType.INT32)), axis=0)
    if w.parts.scale is None:
        return values
    return b("Mul", values, _spread(b, _scale_of_rows(b, w, ids), Rows(w.spec, rank, w.columns)))


def _from_blocks(b: Build, ids: ir.Value, w: StoredWeight, rank: int) -> ir.Value:
    blocks = block_inputs(b, w)
    count = -(-w.columns // blocks.size)
    half = 1 << (blocks.bits - 1)
    rows = Rows(w.spec, rank, count * blocks.size)
    gathered = b("Reshape", b("Gather", blocks.data, ids, axis=0), rows.shape(count * blocks.size * blocks.bits // 8))
    scales = b("Gather", blocks.scales, ids, axis=0)

    def signed(gathered: ir.Value, columns: int) -> ir.Value:
        if blocks.bits == 4:
            return unpack_rows(b, gathered, rank, columns)
        wide = b("Sub", b("Cast", gathered, to=int(ir.DataType.INT16)), np.array(half, np.int16))
        return b("Cast", wide, to=int(ir.DataType.INT8))

    zero = None if blocks.zeros is None else signed(b("Gather", blocks.zeros, ids, axis=0), count)
    spec = replace(w.spec, granularity=PerGroup(blocks.size))
    floats = _scaled(b, signed(gathered, rows.columns), zero, scales, Rows(spec, rank, rows.columns))
    if rows.columns == w.columns:
        return floats
    return b("Slice", floats, np.array([0]), np.array([w.columns]), np.array([-1]))


def _from_codebook(b: Build, ids: ir.Value, w: StoredWeight, rank: int) -> ir.Value:
    """Indices into the table of values, two a byte."""
    book = np.array(w.spec.format.codebook, b.dtype.numpy())

    table = b.constant(f"{w.name}.packed", ir.tensor(w.parts.data, name=f"{w.name}.packed"))
    signed = unpack_rows(b, b("Gather", table, ids, axis=0), rank, w.columns)
    indices = b("Cast", b("Add", signed, np.array(8, np.int8)), to=int(ir.DataType.INT32))
    rows = Rows(w.spec, rank, w.columns)
    return b("Mul", b("Gather", book, indices, axis=0), _spread(b, _scale_of_rows(b, w, ids), rows))


def _spread(b: Build, per_block: ir.Value, rows: Rows) -> ir.Value:
    """[.., blocks] -> [.., K]"""
    if rows.blocks == 1:
        return per_block
    wide = b("Tile", b("Unsqueeze", per_block, np.array([-1])), np.array([*[1] * rows.rank, rows.size]))
    flat = b("Reshape", wide, rows.shape(rows.blocks * rows.size))
    if rows.blocks * rows.size == rows.columns:
        return flat
    return b("Slice", flat, np.array([0]), np.array([rows.columns]), np.array([-1]))

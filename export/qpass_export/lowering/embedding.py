"""Embeddings: rows of codes are gathered, then only those are dequantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from qpass.packing import unpack
from qpass_export.lowering.build import Build
from qpass_export.lowering.codes import Rows
from qpass_export.lowering.codes import unpack as unpack_rows
from qpass_export.lowering.weights import StoredWeight, block_inputs, is_whole, lazy, stored_weight

_UINT8 = ir.DataType.UINT8


def embedding(b: Build, node: ir.Node, shared: bool) -> ir.Value:
    """qpass::embedding. `shared`: a linear reads the same table, blocks of unsigned codes (MatMulNBits)."""
    ids = node.inputs[0]
    assert ids is not None and ids.shape is not None
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
    scale = _table(b, w, "scale", w.scales().numpy().astype(b.dtype.numpy()))
    zeros = w.zero_points()
    zero = None if zeros is None else _table(b, w, "zero_point", zeros.numpy())
    if fmt.kind == "float8":
        return _from_float8(b, ids, w, rank, scale)
    if w.container == 8:
        data = lazy((w.rows, w.columns), ir.DataType.INT8, w.name, lambda: w.codes().numpy())
        codes = b("Gather", b.constant(f"{w.name}.rows", data), ids, axis=0)
    else:
        codes = unpack_rows(b, b("Gather", _packed(b, w), ids, axis=0), rank, w.columns)
    if is_whole(w):
        whole = b("Reshape", scale, np.array([], np.int64))
        return b("DequantizeLinear", codes, whole, None if zero is None else b("Reshape", zero, np.array([], np.int64)))
    scales = b("Gather", scale, ids, axis=0)
    offsets = None if zero is None else b("Gather", zero, ids, axis=0)
    if w.spec.float_zero:  # no DequantizeLinear has one
        rows = Rows(w.spec, rank, w.columns)
        floats = b("Cast", codes, to=int(b.dtype))
        return b("Mul", b("Sub", floats, _spread(b, offsets, rows)), _spread(b, scales, rows))
    return b("DequantizeLinear", codes, scales, offsets, axis=-1, block_size=w.block_size)


def _table(b: Build, w: StoredWeight, part: str, array: np.ndarray) -> ir.Value:
    name = f"{w.name}.{part}_rows"
    return b.constant(name, ir.Tensor(np.ascontiguousarray(array), name=name))


def _packed(b: Build, w: StoredWeight) -> ir.Value:
    """Two codes a byte: ONNX has no Gather of four-bit types."""

    def data() -> np.ndarray:
        codes = (w.codes() + 8).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, w.columns % 2))
        return (codes[:, 0::2] | codes[:, 1::2] << 4).numpy()

    shape = (w.rows, -(-w.columns // 2))
    return b.constant(f"{w.name}.packed", lazy(shape, _UINT8, w.name, data))


def _from_float8(b: Build, ids: ir.Value, w: StoredWeight, rank: int, scale: ir.Value) -> ir.Value:
    """Bytes, and a table of what each of the 256 means: ONNX has no Gather of 8-bit floats."""
    kind = w.parts.data.dtype
    data = lazy((w.rows, w.columns), _UINT8, w.name, lambda: w.parts.data.view(torch.uint8).numpy())
    meanings = torch.arange(256, dtype=torch.uint8).view(kind).float().numpy().astype(b.dtype.numpy())
    codes = b("Gather", b.constant(f"{w.name}.rows", data), ids, axis=0)
    values = b("Gather", meanings, b("Cast", codes, to=int(ir.DataType.INT32)), axis=0)
    if w.parts.scale is None:
        return values
    scales = scale if is_whole(w) else _spread(b, b("Gather", scale, ids, axis=0), Rows(w.spec, rank, w.columns))
    return b("Mul", values, scales)


def _from_blocks(b: Build, ids: ir.Value, w: StoredWeight, rank: int) -> ir.Value:
    blocks = block_inputs(b, w)
    count = -(-w.columns // blocks.size)
    half = 1 << (blocks.bits - 1)
    rows = Rows(w.spec, rank, count * blocks.size)
    gathered = b("Reshape", b("Gather", blocks.data, ids, axis=0), rows.shape(count * blocks.size * blocks.bits // 8))
    scales = b("Gather", blocks.scales, ids, axis=0)
    if blocks.bits == 4:
        codes = unpack_rows(b, gathered, rank, rows.columns)
    else:
        codes = b("Cast", b("Sub", b("Cast", gathered, to=int(ir.DataType.INT16)), np.array(half, np.int16)), to=int(ir.DataType.INT8))
    zero = None
    if blocks.zeros is not None:
        zero = b("Gather", blocks.zeros, ids, axis=0)
        if blocks.bits == 4:
            zero = unpack_rows(b, zero, rank, count)
        else:
            zero = b("Cast", b("Sub", b("Cast", zero, to=int(ir.DataType.INT16)), np.array(half, np.int16)), to=int(ir.DataType.INT8))
    floats = b("DequantizeLinear", codes, scales, zero, axis=-1, block_size=blocks.size)
    if rows.columns == w.columns:
        return floats
    return b("Slice", floats, np.array([0]), np.array([w.columns]), np.array([-1]))


def _from_codebook(b: Build, ids: ir.Value, w: StoredWeight, rank: int) -> ir.Value:
    """Indices into the table of values, two a byte."""
    book = np.array(w.spec.format.codebook, b.dtype.numpy())

    def data() -> np.ndarray:
        codes = torch.nn.functional.pad(unpack(w.parts.data, 4, w.columns), (0, w.columns % 2))
        return (codes[:, 0::2] | codes[:, 1::2] << 4).numpy()

    table = b.constant(f"{w.name}.packed", lazy((w.rows, -(-w.columns // 2)), _UINT8, w.name, data))
    signed = unpack_rows(b, b("Gather", table, ids, axis=0), rank, w.columns)
    indices = b("Cast", b("Add", signed, np.array(8, np.int8)), to=int(ir.DataType.INT32))
    rows = Rows(w.spec, rank, w.columns)
    scales = b("Gather", _table(b, w, "scale", w.scales().numpy().astype(b.dtype.numpy())), ids, axis=0)
    return b("Mul", b("Gather", book, indices, axis=0), _spread(b, scales, rows))


def _spread(b: Build, per_block: ir.Value, rows: Rows) -> ir.Value:
    """[.., blocks] -> [.., K]"""
    if rows.blocks == 1:
        return per_block
    wide = b("Tile", b("Unsqueeze", per_block, np.array([-1])), np.array([*[1] * rows.rank, rows.size]))
    flat = b("Reshape", wide, rows.shape(rows.blocks * rows.size))
    if rows.blocks * rows.size == rows.columns:
        return flat
    return b("Slice", flat, np.array([0]), np.array([rows.columns]), np.array([-1]))

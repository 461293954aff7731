"""Stored weights as ONNX initializers: the integers and scales that qpass runs, in the layout that a target reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.functional import pad

from qpass.errors import QpassError
from qpass.granularity import PerTensor
from qpass.numerics import codes_of, scale_values
from qpass.packing import pack, unpack
from qpass.quantized import Quantized
from qpass.spec import QuantSpec, parse_spec
from qpass_export.lowering.build import Build
from qpass_export.lowering.codes import float8_type

#: The code of 0.0 in the table of NF4.
_NF4_ZERO = 7


@dataclass(frozen=True)
class StoredWeight:
    """A weight [rows, columns] as its quantized parts. `name`: of the Parameter."""

    name: str
    spec: QuantSpec
    parts: Quantized
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return 1 if self.parts.scale is None else self.parts.scale.shape[-1]

    @property
    def block_size(self) -> int:
        """Columns that share a scale."""
        return self.spec.group_size if self.blocks > 1 else self.columns

    def codes(self) -> Tensor:
        """[rows, columns] int8 of a uniform format."""
        return codes_of(replace(self.parts, zero_point=None), self.spec, self.columns)[0]

    def zero_points(self) -> Tensor | None:
        """[rows, blocks] int8, or float for `zero=float`."""
        return self.parts.zero_point if self.spec.float_zero else codes_of(self.parts, self.spec, self.columns)[1]

    def scales(self) -> Tensor:
        """[rows, blocks] float32, or [1, 1] for one of the whole tensor; 1 for a cast."""
        scale = self.parts.scale
        if scale is None:
            return torch.ones(1, 1)
        if self.spec.format.scale == "e8m0":  # came as bytes
            scale = scale.view(torch.float8_e8m0fnu)
        return scale_values(scale, self.parts.outer_scale)


def stored_weight(node: ir.Node, columns: int) -> StoredWeight:
    """What an operator of qpass reads: its inputs data, scale, zero_point, outer_scale."""
    first = next(i for i, value in enumerate(node.inputs) if value is not None and _is_data(value))
    values = (*node.inputs, None, None, None)[first : first + 4]
    parts = [None if v is None else constant_of(v) for v in values]
    data = values[0]
    assert data is not None
    assert parts[0] is not None
    name = str(_initializer(data).name).removesuffix("_data") + _rows(data)
    quantized = Quantized(*parts)  # type: ignore[arg-type]
    return StoredWeight(name, parse_spec(node.attributes["spec"].as_string()), quantized, len(parts[0]), columns)


def _is_data(value: ir.Value) -> bool:
    return str(_initializer(value).name).endswith("_data") and _initializer(value).is_initializer()


def _initializer(value: ir.Value) -> ir.Value:
    """The initializer that `value` is, or is rows of."""
    producer = value.producer()
    return _initializer(producer.inputs[0]) if producer is not None and producer.op_type == "Slice" else value  # type: ignore[arg-type]


def _rows(value: ir.Value) -> str:
    """What a slice of rows adds to the name of a weight: two parts of one are two weights in the file."""
    producer = value.producer()
    if producer is None or producer.op_type != "Slice":
        return ""
    start, end = (int(_number(v)) for v in producer.inputs[1:3])  # type: ignore[arg-type]
    return f"[{start}:{end}]"


def constant_of(value: ir.Value) -> Tensor:
    """The tensor of an initializer, or of rows of one."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Slice":
        start, end = (int(_number(v)) for v in producer.inputs[1:3])  # type: ignore[arg-type]
        return constant_of(producer.inputs[0])[start:end]  # type: ignore[arg-type]
    if value.const_value is None:
        raise QpassError(f"{value.name}: a weight that the graph computes; export it before it is quantized")
    raw = getattr(value.const_value, "raw", None)
    return raw if isinstance(raw, Tensor) else torch.from_numpy(value.const_value.numpy().copy())


def _number(value: ir.Value) -> float:
    """The one number of a constant, of a reshaped one too."""
    producer = value.producer()
    if value.const_value is not None:
        return float(value.const_value.numpy().reshape(-1)[0])
    assert producer is not None
    if producer.op_type == "Constant":
        attribute = next(iter(producer.attributes.values()))
        return float(
            np.asarray(attribute.value.numpy() if hasattr(attribute.value, "numpy") else attribute.value).reshape(-1)[0]
        )
    return _number(producer.inputs[0])  # type: ignore[arg-type]


# --- tensors ------------------------------------------------------------------------------------------------------------


def lazy(shape: tuple[int, ...], dtype: ir.DataType, name: str, make: Callable[[], np.ndarray]) -> ir.TensorProtocol:
    """A tensor that is made when it is written, so that one at a time is in memory."""
    return ir.LazyTensor(
        lambda: ir.Tensor(make(), dtype=dtype, shape=ir.Shape(shape), name=name), dtype, ir.Shape(shape), name=name
    )


def dequantize_inputs(b: Build, w: StoredWeight) -> tuple[list[ir.Value | None], int | None, int | None]:
    """Data [K, N], scale and zero point of a DequantizeLinear, and its axis and block: what a MatMul multiplies by."""
    fmt, wide = w.spec.format, w.spec.container_bits == 8
    if fmt.kind == "float8":
        dtype = float8_type(w.spec)
        data = lazy((w.columns, w.rows), dtype, w.name, lambda: _bytes(w.parts.data.mT).view(dtype.numpy()))
    else:
        dtype = ir.DataType.INT8 if wide else ir.DataType.INT4
        data = lazy((w.columns, w.rows), dtype, w.name, lambda: _integers(w.codes().mT, wide))
    whole, single = w.scales().numel() == 1, w.blocks == 1
    floats = b.dtype.numpy()

    def arranged(part: Tensor) -> np.ndarray:
        """[rows, blocks] as DequantizeLinear has it: [], [rows] or [blocks, rows]."""
        flat = part.reshape(()) if whole else part.reshape(-1) if single else part.mT
        return np.ascontiguousarray(flat.numpy())

    scale = arranged(w.scales()).astype(floats)
    zero = w.zero_points()
    inputs: list[ir.Value | None] = [
        b.constant(f"{w.name}.quantized", data),
        b.constant(f"{w.name}.scale", ir.Tensor(scale, name=f"{w.name}.scale")),
    ]
    if zero is not None:
        made = arranged(zero) if wide else arranged(zero).astype(ml_dtypes.int4)
        inputs.append(b.constant(f"{w.name}.zero_point", ir.Tensor(made, dtype=dtype, name=f"{w.name}.zero_point")))
    axis = None if whole else 1 if single else 0
    return inputs, axis, None if whole or single else w.block_size


def _bytes(part: Tensor) -> np.ndarray:
    return part.contiguous().view(torch.uint8).numpy()


def _integers(codes: Tensor, wide: bool) -> np.ndarray:
    array = codes.contiguous().numpy()
    return array if wide else array.astype(ml_dtypes.int4)


@dataclass(frozen=True)
class Blocks:
    """A weight as MatMulNBits reads it: `data` [N, blocks, bytes], codes as unsigned; `scales` [N, blocks]; `zeros` [N, bytes] or
    floats [N, blocks]; of `size` columns each."""

    data: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    size: int
    bits: int


def block_inputs(b: Build, w: StoredWeight) -> Blocks:
    """Initializers of MatMulNBits. A scale of a whole row is repeated for blocks of a size that the operator takes."""
    bits, size = w.spec.container_bits, w.block_size if w.blocks > 1 else _block_of(w.columns)
    count = -(-w.columns // size)
    half = 1 << (bits - 1)

    def spread(part: Tensor) -> Tensor:
        return part.expand(w.rows, count) if part.shape[-1] == 1 else part

    def unsigned(codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) + half).to(torch.uint8)

    def data() -> np.ndarray:
        codes = pad(unsigned(w.codes()), (0, count * size - w.columns), value=half)
        return (pack(codes, bits) if bits == 4 else codes).reshape(w.rows, count, -1).numpy()

    shape = (w.rows, count, size * bits // 8)
    scales = spread(w.scales()).contiguous().numpy().astype(b.dtype.numpy())
    zero = w.zero_points()
    zeros = None
    if zero is not None:
        made = spread(zero).contiguous()
        if w.spec.float_zero:  # counted from the unsigned zero
            array = (made.float() + half).numpy().astype(b.dtype.numpy())
        else:
            array = (pack(unsigned(made), bits) if bits == 4 else unsigned(made)).numpy()
        zeros = b.constant(f"{w.name}.zero_blocks", ir.Tensor(array, name=f"{w.name}.zero_blocks"))
    return Blocks(
        b.constant(f"{w.name}.blocks", lazy(shape, ir.DataType.UINT8, w.name, data)),
        b.constant(f"{w.name}.scale_blocks", ir.Tensor(scales, name=f"{w.name}.scale_blocks")),
        zeros,
        size,
        bits,
    )


def _block_of(columns: int) -> int:
    """The largest block of a power of two from 16 to 256 that divides a row; 32 with a padded last block, if none does."""
    return next((size for size in (256, 128, 64, 32, 16) if columns % size == 0), 32)


def bnb_inputs(b: Build, w: StoredWeight) -> tuple[ir.Value, ir.Value]:
    """Codes and scales of MatMulBnb4, flat; the first of two codes lies in the high half of a byte. The operator counts blocks
    through all rows: the last block of a row is filled with zeros."""
    width = w.blocks * w.block_size

    def data() -> np.ndarray:
        codes = pad(unpack(w.parts.data, 4, w.columns), (0, width - w.columns), value=_NF4_ZERO)
        return (codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1).numpy()

    flat = w.scales().contiguous().reshape(-1).numpy().astype(b.dtype.numpy())
    return (
        b.constant(f"{w.name}.bnb", lazy((w.rows * width // 2,), ir.DataType.UINT8, w.name, data)),
        b.constant(f"{w.name}.scale_flat", ir.Tensor(flat, name=f"{w.name}.scale_flat")),
    )


def float8_blocks(b: Build, w: StoredWeight) -> tuple[ir.Value, ir.Value]:
    """E4M3 rows [N, K] and float32 scales [N, blocks]."""
    kind = float8_type(w.spec)
    data = lazy((w.rows, w.columns), kind, w.name, lambda: _bytes(w.parts.data).view(kind.numpy()))
    scales = w.scales().expand(w.rows, w.blocks).contiguous().numpy()
    name = f"{w.name}.scale"
    return b.constant(f"{w.name}.quantized", data), b.constant(name, ir.Tensor(scales, name=name))


def nvfp4_inputs(b: Build, w: StoredWeight, packed: bool) -> list[ir.Value]:
    """Codes [N, K], E4M3 scales [N, blocks] and the float32 over them. `packed`: both as bytes, for onnxruntime's operator."""
    scale, outer = w.parts.scale, w.parts.outer_scale
    assert scale is not None
    assert outer is not None
    raw = _bytes(scale)
    if packed:
        data: ir.TensorProtocol = lazy(
            (w.rows, w.columns // 2), ir.DataType.UINT8, w.name, lambda: w.parts.data.numpy()
        )
        scales = ir.Tensor(raw, name=f"{w.name}.scale")
    else:
        data = lazy(
            (w.rows, w.columns), ir.DataType.FLOAT4E2M1, w.name,
            lambda: unpack(w.parts.data, 4, w.columns).numpy().view(ml_dtypes.float4_e2m1fn),
        )  # fmt: skip
        scales = ir.Tensor(raw.view(ml_dtypes.float8_e4m3fn), name=f"{w.name}.scale")
    top = ir.Tensor(outer.reshape(-1)[:1].reshape(()).float().numpy(), name=f"{w.name}.outer_scale")
    parts = (("quantized", data), ("scale", scales), ("outer_scale", top))
    return [b.constant(f"{w.name}.{name}", part) for name, part in parts]


def is_whole(w: StoredWeight) -> bool:
    """Whether one scale serves the whole tensor."""
    return isinstance(w.spec.granularity, PerTensor) and w.scales().numel() == 1

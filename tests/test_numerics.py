"""Formats, scales and codes against published figures, analytic bounds and independent implementations."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qpass.errors import QpassError
from qpass.formats import E2M1_VALUES, FORMATS, NF4_VALUES
from qpass.numerics import choose_qparams, dequantize, fake_quantize, power_of, quantize, scale_values
from qpass.packing import pack, packed_length, unpack
from qpass.quantized import Quantized
from qpass.spec import every_format, parse_spec

# --- published figures ------------------------------------------------------------------------------------------------

#: SQNR on N(0, 1) in dB.
SQNR = {
    "int8:g128": 43.8, "fp8_e4m3": 31.5, "mxfp8": 30.6, "int4:g128:asym": 20.0, "int4:g64:asym": 20.8,
    "int4:g32:asym": 21.9, "int4:g128": 18.6, "nf4": 20.7, "nvfp4": 20.4, "mxfp4": 18.8, "int3:g128:asym": 13.3,
    "int3:g32:asym": 15.2, "int2:g128:asym": 6.0, "int2:g32:asym": 7.8,
}  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), SQNR.items(), ids=SQNR)
def test_sqnr_on_gaussian_weights(spec: str, expected: float) -> None:
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    assert power_of(x, fake_quantize(x, parse_spec(spec))).sqnr_db == pytest.approx(expected, abs=0.3)


def test_nf4_mean_error_is_that_of_bitsandbytes() -> None:
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    assert float((x - fake_quantize(x, parse_spec("nf4"))).abs().mean()) == pytest.approx(0.072798, abs=0.000074)


def test_the_textbook_case() -> None:
    """Weights in -0.5 .. 0.5 at int8: scale .5/127, codes -127 .. 127."""
    x = torch.linspace(-0.5, 0.5, 255)[None]
    q = quantize(x, parse_spec("int8:tensor"))
    assert float(q.scale) == np.float32(0.5) / np.float32(127)  # type: ignore[arg-type]
    assert q.data.tolist() == [list(range(-127, 128))]
    assert float((dequantize(q, parse_spec("int8:tensor"), 255) - x).abs().max()) <= 0.5 / 127 / 2


def test_constants() -> None:
    assert len(NF4_VALUES) == 16
    assert list(NF4_VALUES) == sorted(NF4_VALUES)
    assert (NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[15]) == (-1, 0, 1)
    bits = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert bits.tolist() == list(E2M1_VALUES)
    assert (FORMATS["fp8_e4m3"].qmax, FORMATS["fp8_e5m2"].qmax) == (
        torch.finfo(torch.float8_e4m3fn).max,
        torch.finfo(torch.float8_e5m2).max,
    )


# --- analytic bounds --------------------------------------------------------------------------------------------------

SPECS = [str(s) for s in every_format()] + [
    "int8:tensor", "int8:g32:asym", "int8:asym", "int4:tensor:asym", "int4:channel", "int4:g7", "int3:g32:asym",
    "int2:g64:asym", "nf4:g32:dq", "fp8_e4m3:channel", "fp8_e4m3:g32", "fp8_e5m2:tensor", "mxfp4:rceil", "mxfp8:rceil",
    "int4:g32:dq", "int4:g32:asym:dq", "int4:g32:scale=fp16", "int8:scale=bf16",
]  # fmt: skip


def half_step(spec_text: str, value: torch.Tensor) -> torch.Tensor:
    """Half the distance between the codes around `value` (in units of the scale)."""
    fmt = parse_spec(spec_text).format
    if fmt.kind == "uniform":
        return torch.full_like(value, 0.5)
    if fmt.kind == "float8":
        mantissa, smallest = (3, -6) if fmt.storage == torch.float8_e4m3fn else (2, -14)
        exponent = torch.frexp(value)[1].clamp(min=smallest + 1) - 1
        return torch.ldexp(torch.full_like(value, 0.5), exponent - mantissa)
    grid = torch.tensor(sorted(set(fmt.codebook or ())))
    gaps = grid[1:] - grid[:-1]
    return gaps[torch.bucketize(value.contiguous(), grid).clamp(1, len(grid) - 1) - 1] / 2


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """[.., K] of odd shapes, strides and dtypes, with zero rows, single elements, huge and tiny values."""
    shape = [*draw(st.lists(st.integers(1, 5), min_size=0, max_size=2)), draw(st.integers(1, 150))]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    x = x * 10.0 ** draw(st.integers(-4, 4) if dtype == torch.float16 else st.integers(-30, 30))
    if draw(st.booleans()):
        x[..., draw(st.integers(0, shape[-1] - 1)) :] = 0
    if draw(st.booleans()):
        x = x.abs()
    if draw(st.booleans()):  # not contiguous
        x = torch.stack([x, -x], -1)[..., 0]
    return x.to(dtype)


@pytest.mark.parametrize("text", SPECS)
@given(x=tensors())
def test_error_is_at_most_half_a_step_inside_the_range(text: str, x: torch.Tensor) -> None:
    """In float64, for every value that lies between the lowest and highest representable one."""
    spec = parse_spec(text)
    if spec.scale_dtype != torch.float32 and float(x.abs().max()) > 1e4:
        return  # a float16 scale overflows: see the test of that error
    q = quantize(x, spec)
    back = dequantize(q, spec, x.shape[-1]).double()
    assert back.shape == x.shape
    if spec.is_identity:  # a cast, which may overflow
        torch.testing.assert_close(
            back.to(x.dtype), x.to(spec.format.storage).to(x.dtype), rtol=0, atol=0, equal_nan=True
        )
        return
    assert torch.isfinite(back).all()
    scale = torch.ones(()) if q.scale is None else scale_values(q.scale, q.outer_scale)
    if spec.group_size and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(spec.group_size, -1)[..., : x.shape[-1]]
    scaled = x.double() / scale.double()
    low, high = spec.qrange
    zero = torch.zeros(())
    if q.zero_point is not None:
        zero = choose_qparams(x, spec)[1].double()  # type: ignore[union-attr]
        if spec.group_size and zero.shape[-1] > 1:
            zero = zero.repeat_interleave(spec.group_size, -1)[..., : x.shape[-1]]
    inside = (scaled >= low - zero) & (scaled <= high - zero)
    bound = half_step(text, scaled.abs().float() if spec.format.kind == "float8" else scaled.float()).double()
    error = (back - x.double()).abs() / scale.double()
    slack = 1e-4  # float32 arithmetic of scale and product
    assert bool((error <= bound * (1 + slack) + slack * scaled.abs() + 1e-30)[inside].all())


@pytest.mark.parametrize("text", SPECS)
def test_zeros_stay_zeros(text: str) -> None:
    x = torch.zeros(3, 70)
    assert torch.equal(fake_quantize(x, parse_spec(text)).abs(), x)


@pytest.mark.parametrize("text", SPECS)
def test_storage_is_at_the_true_bit_width(text: str) -> None:
    spec, columns = parse_spec(text), 1024
    q = quantize(torch.randn(8, columns), spec)
    constant = 4 / 8 / columns  # the one float of a tensor
    assert q.nbytes * 8 / (8 * columns) == pytest.approx(spec.effective_bits(columns), abs=constant * 8 + 0.01)


def test_a_scale_that_underflows_or_overflows_its_type() -> None:
    spec = parse_spec("int8:scale=fp16")
    tiny = quantize(torch.full((1, 8), 1e-9), spec)
    assert float(tiny.scale) > 0  # type: ignore[arg-type]
    with pytest.raises(QpassError, match="scale=fp32"):
        quantize(torch.full((1, 8), 1e30), spec)


@pytest.mark.parametrize("rounding", ["floor", "rceil"])
def test_mx_scales_are_the_powers_of_two_of_the_standard(rounding: str) -> None:
    amax = torch.tensor([[6.0], [6.1], [4.0], [7.9], [8.0], [1e-3], [3.0]])
    scale = quantize(amax.expand(-1, 32), parse_spec(f"mxfp4:{rounding}")).scale
    expected = {
        "floor": [2.0 ** (math.floor(math.log2(a)) - 2) for a in amax[:, 0].tolist()],
        "rceil": [2.0 ** math.ceil(math.log2(a / 6)) for a in amax[:, 0].tolist()],
    }
    assert scale.float()[:, 0].tolist() == expected[rounding]  # type: ignore[union-attr]


# --- independent implementations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_direct_cast_is_torchs_own_saturated(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.cat([torch.randn(1000) * 10.0**e for e in range(-6, 7)])[None]
    expected = x.clamp(-fmt.qmax, fmt.qmax).to(fmt.storage)
    assert torch.equal(quantize(x, parse_spec(name)).data.view(torch.uint8), expected.view(torch.uint8))


def test_e2m1_rounds_as_ml_dtypes_does() -> None:
    x = torch.cat([torch.linspace(-7, 7, 4001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0])])
    from qpass.numerics import _encode

    codes = _encode(x, parse_spec("fp4_e2m1"), None)
    expected = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert codes.tolist() == expected.tolist()


ONNX_TYPES = {
    "int8": TensorProto.INT8, "int8:asym": TensorProto.INT8, "int4:g32": TensorProto.INT4, "int4:g32:asym": TensorProto.INT4,
    "int2:g32:asym": TensorProto.INT2, "fp8_e4m3:channel": TensorProto.FLOAT8E4M3FN, "fp4_e2m1:g32": TensorProto.FLOAT4E2M1,
}  # fmt: skip


def onnx_round_trip(x: np.ndarray, q: Quantized, zero: np.ndarray, onnx_type: int, block: int) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear of the reference evaluator, with our scales."""
    scale = scale_values(q.scale, q.outer_scale).numpy()  # type: ignore[arg-type]
    attributes = {"axis": 1, "block_size": block} if block else {"axis": 0}
    if not block:
        scale, zero = scale[:, 0], zero[:, 0]
    names = ["x", "scale", "zero"]
    zero_tensor = helper.make_tensor("zero", onnx_type, zero.shape, zero.flatten().tolist())
    nodes = [
        helper.make_node("QuantizeLinear", names, ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "round_trip",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.flatten().tolist()), zero_tensor],
    )
    opset = 25 if onnx_type == TensorProto.INT2 else 23
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("text", ONNX_TYPES)
def test_formula_is_onnx_quantize_linear(text: str) -> None:
    spec = parse_spec(text)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(3)) * 3 + 0.5
    q = quantize(x, spec)
    zero = choose_qparams(x, spec)[1]
    zeros = torch.zeros_like(q.scale, dtype=torch.float32) if zero is None else zero  # type: ignore[arg-type]
    theirs = onnx_round_trip(x.numpy(), q, zeros.numpy(), ONNX_TYPES[text], spec.group_size)
    np.testing.assert_allclose(dequantize(q, spec, 96).numpy(), theirs, rtol=1e-6, atol=1e-7)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
@given(length=st.integers(1, 100), rows=st.integers(0, 3), seed=st.integers(0, 99))
def test_packing_is_exact_and_tight(bits: int, length: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape[-1] == packed_length(length, bits) < length * bits / 8 + bits
    assert torch.equal(unpack(packed, bits, length), codes)


def test_packing_is_a_little_endian_bit_stream() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    stream = sum(code << (3 * i) for i, code in enumerate(codes[0].tolist()))
    assert bytes(pack(codes, 3)[0].tolist()) == stream.to_bytes(3, "little")


# --- the mini-language ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SPECS)
def test_specs_survive_being_written(text: str) -> None:
    assert parse_spec(str(parse_spec(text))) == parse_spec(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int9", "did you mean 'int"),
        ("fp8", "fp8_e4m3"),
        ("int4:g0", "at least one"),
        ("int4:goup64", "unknown part"),
        ("bf16:g32", "no scale"),
        ("nf4:asym", "zero point"),
        ("mxfp4:g64", "fixed at 32"),
        ("int8:dq", "per group"),
        ("int8:rceil", "E8M0"),
        ("int8:gptqq", "unknown part"),
    ],
)
def test_bad_specs_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(QpassError, match=says):
        parse_spec(text)

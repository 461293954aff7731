"""The product of a few rows with a stored weight, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.bits import LADDER
from qpass.numerics import dequantize, quantize
from qpass.ops import reference
from qpass.ops.triton import operators, workspace
from qpass.ops.triton.table import BITSTREAM, FUSED, MOST_ROWS, fused_kind
from qpass.quantized import Quantized
from qpass.spec import parse_spec

FUSED_SPECS = ["int8", "int8:tensor", "int8:g64", "int8:g32:asym", "int8:asym:scale=bf16", "int4:g128", "int4:g32:asym",
               "int4:channel", "int4:channel:asym", "int4:g256", "int4:g8:scale=fp16", "int4:tensor:asym", "nf4", "nf4:g32:dq",
               "nf4:channel", "fp4_e2m1", "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e4m3:channel", "fp8_e5m2:g16", "mxfp8"]  # fmt: skip
BITSTREAM_SPECS = ["int2:g32:asym:scale=fp16", "int2", "int3:g32:asym:scale=fp16", "int3", "int3:channel:asym", "int5:g32:asym",
                   "int5:g32:asym:scale=fp16", "int5:tensor:asym", "int6:g32:asym:scale=fp16", "int6", "int6:channel",
                   "int6:g512:scale=bf16", "int4:g64:zero=float", "int8:g32:zero=float:scale=fp16",
                   "int3:g64:zero=float"]  # fmt: skip
OTHER_SPECS = ["int3:g40", "int2:g16:asym", "int5:g20", "int4:g7", "int4:g40", "bf16"]
#: Of the largest result: rounding of weights and of the result to the type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(rows: int, columns: int, text: str, device: str) -> tuple[Quantized, Tensor]:
    """(stored, float64 values on the CPU)"""
    spec = parse_spec(text)
    columns = max(columns, spec.group_size) if spec.format.scale == "float" else columns
    stored = quantize(random(rows, columns), spec)
    return stored.map(lambda p: p.to(device)), dequantize(stored, spec, columns).double()


def check(x: Tensor, text: str, stored: Quantized, values: Tensor, bias: Tensor | None = None) -> None:
    found = operators.linear(x, *stored.parts, bias, text)
    expected = F.linear(x.cpu().double(), values, None if bias is None else bias.cpu().double())
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    error = (found.cpu().double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("text", FUSED_SPECS)
@dtypes
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 37, 96), (3, 130, 608), (17, 37, 256), (64, 5, 264)])
def test_fused(
    text: str, dtype: torch.dtype, rows: int, outputs: int, columns: int, device: str, poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stored, values = weight(outputs, columns, text, device)
    assert fused_kind(text, values.shape[1], dtype) == FUSED[parse_spec(text).format.name]
    monkeypatch.setattr(operators, "dequantize", None)  # the wide path would need it
    check(random(rows, values.shape[1], seed=1).to(dtype).to(device), text, stored, values, random(outputs).to(device))


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        *((text, dtype) for text in BITSTREAM_SPECS for dtype in (torch.bfloat16, torch.float16)),
        *(
            (text, torch.float32)
            for text in ("int8", "int4:g32:asym", "int5:g32:asym:scale=fp16", "int3:g64:zero=float")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 37, 96), (3, 130, 544), (17, 37, 256), (64, 5, 32)])
def test_bitstream(
    text: str, dtype: torch.dtype, rows: int, outputs: int, columns: int, device: str, poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Codes that lie in two words; zero points that are packed, or floats; inputs in float32."""
    stored, values = weight(outputs, columns, text, device)
    assert fused_kind(text, values.shape[1], dtype) == "BITSTREAM"
    rows = min(rows, MOST_ROWS[dtype])
    monkeypatch.setattr(operators, "dequantize", None)  # the wide path would need it
    check(random(rows, values.shape[1], seed=1).to(dtype).to(device), text, stored, values, random(outputs).to(device))


@pytest.mark.parametrize("text", BITSTREAM_SPECS)
def test_every_place_of_a_code(text: str, device: str) -> None:
    """Each row of x takes one column: what is multiplied is exact but for its type."""
    stored, values = weight(9, 544, text, device)
    for start in (0, 480):  # the first two units, and the last two, the second of which is alone in its tile
        x = torch.zeros(64, values.shape[1])
        x[torch.arange(64), start + torch.arange(64)] = 1
        found = operators.linear(x.bfloat16().to(device), *stored.parts, None, text).cpu().double().T
        torch.testing.assert_close(found, values[:, start : start + 64], rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("text", LADDER)
def test_what_the_preset_gives_out_is_fused(text: str) -> None:
    assert fused_kind(text, 576, torch.bfloat16) is not None


def test_every_fused_format_is_tested() -> None:
    assert {parse_spec(text).format.name for text in FUSED_SPECS} == FUSED.keys()
    assert {parse_spec(text).format.name for text in BITSTREAM_SPECS} == BITSTREAM


@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "nf4", *OTHER_SPECS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 95), (70, 64)])
def test_wide(text: str, dtype: torch.dtype, rows: int, columns: int, device: str, poisoned: None) -> None:
    """Odd columns, many rows, formats and types that the fused kernel does not take."""
    stored, values = weight(19, columns, text, device)
    check(random(rows, values.shape[1], seed=1).to(dtype).to(device), text, stored, values)


@pytest.mark.parametrize(
    ("text", "rows", "read"),
    [("int8", 64, 1), ("int8", 65, 2), ("int8", 128, 2), ("int8", 129, 0), ("nf4:g32", 256, 4), ("nf4:g32", 257, 0),
     ("int5:g32:asym", 192, 3), ("int5:g32:asym", 193, 0)],
)  # fmt: skip
def test_a_weight_is_read_again_for_each_64_rows(
    text: str, rows: int, read: int, device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While that moves no more bytes than bfloat16 does; then it is dequantized."""
    kernels = {name: getattr(operators, name) for name in ("_fused", "_bitstream")}
    seen: list[int] = []
    for name, kernel in kernels.items():

        def counted(x: Tensor, *rest: object, kernel: object = kernel) -> None:
            seen.append(len(x))
            kernel(x, *rest)  # type: ignore[operator]

        monkeypatch.setattr(operators, name, counted)
    stored, values = weight(37, 64, text, device)
    check(random(rows, 64, seed=1).bfloat16().to(device), text, stored, values, random(37).to(device))
    assert (len(seen), sum(seen)) == (read, rows if read else 0)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "nf4:g32", "int5:g32:asym"])
@dtypes
@pytest.mark.parametrize("rows", [1, 20])
def test_programs_that_share_the_columns(text: str, dtype: torch.dtype, rows: int, device: str, poisoned: None) -> None:
    """The last to finish adds up; the result is the same again, and the counters are 0 again."""
    stored, values = weight(37, 2048, text, device)
    x = random(rows, 2048, seed=1).to(dtype).to(device)
    check(x, text, stored, values, random(37).to(device))
    results = [operators.linear(x, *stored.parts, None, text) for _ in range(3)]
    assert all(torch.equal(r, results[0]) for r in results)
    counters = workspace._made[x.device]
    assert counters.next_in_ring > 0
    assert not counters.ring.any()


def test_without_counters_programs_share_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, values = weight(37, 4096, "int8", device)
    monkeypatch.setattr(operators, "counters", lambda *_: None)
    check(random(2, 4096, seed=1).bfloat16().to(device), "int8", stored, values)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "nf4"])
def test_inputs_of_any_layout(text: str, device: str) -> None:
    stored, _ = weight(37, 256, text, device)
    x = random(6, 256, seed=1).bfloat16().to(device)
    expected = operators.linear(x, *stored.parts, None, text)
    memory = torch.empty(6 * 256 + 1, dtype=x.dtype, device=device)
    misaligned = memory[1:].view(6, 256).copy_(x)
    for same in (x.T.contiguous().T, misaligned, x.view(2, 3, 256), x.repeat(1, 2)[:, :256]):
        assert torch.equal(operators.linear(same, *stored.parts, None, text).reshape(6, 37), expected)
    every_other = stored.map(lambda p: p.repeat_interleave(2, 0)[::2] if p.dtype != torch.float8_e4m3fn else p)
    assert torch.equal(operators.linear(x, *every_other.parts, None, text), expected)
    row_range = stored.map(lambda p: p[5:29] if p.shape[0] == 37 else p)
    assert torch.equal(operators.linear(x, *row_range.parts, None, text), expected[:, 5:29])
    assert operators.linear(x[:0], *stored.parts, None, text).shape == (0, 37)
    assert operators.linear(x[2], *stored.parts, None, text).shape == (37,)


@pytest.mark.parametrize("shape", [(1,), (1, 37), (3, 37)], ids=str)
def test_what_is_added_may_be_broadcast(shape: tuple[int, ...], device: str) -> None:
    stored, values = weight(37, 256, "int8", device)
    x, added = random(3, 256, seed=1).to(device), random(*shape, seed=2).to(device)
    found = operators.linear(x, *stored.parts, added, "int8")
    expected = x.cpu().double() @ values.T + added.cpu().double()
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_their_row_only(text: str, bad: float, device: str) -> None:
    stored, _ = weight(37, 256, text, device)
    x = random(3, 256, seed=1).bfloat16().to(device)
    x[1, 100] = bad
    found = operators.linear(x, *stored.parts, None, text)
    assert not bool(found[1].isfinite().any())
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("text", ["int8", "nvfp4", "int4:g32:asym"])
def test_parts_that_are_not_what_the_spec_says(text: str, device: str) -> None:
    """Cast by someone, the reference reads them as they are; of another size, it says so."""
    stored, _ = weight(8, 64, text, device)
    x = random(2, 64, seed=1).to(device)
    assert stored.scale is not None
    cast = (stored.data, stored.scale.to(torch.bfloat16), stored.zero_point, stored.outer_scale)
    assert torch.equal(operators.linear(x, *cast, None, text), reference.linear(x, *cast, None, text))
    with pytest.raises(RuntimeError):
        operators.linear(random(2, 128).to(device), *stored.parts, None, text)


@pytest.mark.long
@pytest.mark.parametrize("text", [*FUSED_SPECS, *BITSTREAM_SPECS])
@dtypes
@pytest.mark.parametrize("rows", [2, 16, 33])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 8), (129, 576), (64, 4096), (257, 2056), (130, 2080)])
def test_fused_in_more_shapes(
    text: str, dtype: torch.dtype, rows: int, outputs: int, columns: int, device: str, poisoned: None
) -> None:
    stored, values = weight(outputs, columns, text, device)
    check(random(rows, values.shape[1], seed=1).to(dtype).to(device), text, stored, values)

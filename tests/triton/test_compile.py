"""Every kernel that an operator launches compiles for each generation of GPUs, keeps to its registers and reads 16 bytes at once.

The interpreter takes much that does not compile. No GPU is needed: Triton brings NVIDIA's assembler.
"""

from __future__ import annotations

import platform
import re
import sys

import pytest
import torch

from qpass.formats import NF4_VALUES
from qpass.ops.triton import operators
from qpass.spec import parse_spec
from tests.triton.compiling import PRODUCTS, Launch, launches  # noqa: F401  a fixture
from tests.triton.test_linear import BITSTREAM_SPECS, FUSED_SPECS, weight
from tests.triton.test_rows import SPECS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton brings NVIDIA's tools for Linux on x86-64"
)
capabilities = pytest.mark.parametrize("capability", [80, 89, 90, 100], ids="sm_{}".format)
#: Formats of which a few are compiled each time; the rest in the long run.
OFTEN = ["int8", "int4:g128", "int4:g32:asym", "nf4", "fp8_e4m3"]


def launch(launches: list[Launch], text: str, rows: int, dtype: torch.dtype = torch.bfloat16) -> Launch:  # noqa: F811
    """What the linear of 4096 columns launches."""
    stored, _ = weight(300, 4096, text, "cpu")
    operators.linear(torch.zeros(rows, 4096, dtype=dtype), *stored.parts, None, text)
    (found,) = launches
    return found


@pytest.mark.parametrize("text", OFTEN)
@pytest.mark.parametrize(("rows", "capability"), [(1, 80), (1, 90), (64, 89)])
def test_fused_linear(text: str, rows: int, capability: int, launches: list[Launch]) -> None:  # noqa: F811
    code = launch(launches, text, rows).compiled(capability)
    assert (
        code.count("LDGSTS.E.BYPASS.128") > 0
    )  # weights and x: 16 bytes at once, to shared memory, past the first cache
    assert code.count(*PRODUCTS) > 0
    assert code.spills == 0
    assert code.shared <= 99 << 10  # what sm_86 and sm_89 have for a program
    assert not re.search(r"ftz\.(bf16|f16)", code.ptx)  # codes are subnormal floats


@pytest.mark.parametrize("columns", [2880, 1056])
def test_rows_of_no_multiple_of_64_bytes(columns: int, launches: list[Launch]) -> None:  # noqa: F811
    """As many wide copies as of any other; what is left are scales."""
    counts = []
    for k in (columns, 4096):
        stored, _ = weight(300, k, "int4:g32", "cpu")
        operators.linear(torch.zeros(1, k, dtype=torch.bfloat16), *stored.parts, None, "int4:g32")
        counts.append(launches[-1].compiled(90).count("LDGSTS.E.BYPASS.128"))
    assert counts[0] == counts[1] > 0


@pytest.mark.long
@pytest.mark.parametrize("text", FUSED_SPECS)
@pytest.mark.parametrize("rows", [1, 32, 64])
@capabilities
def test_fused_linear_of_every_format(text: str, rows: int, capability: int, launches: list[Launch]) -> None:  # noqa: F811
    test_fused_linear(text, rows, capability, launches)


@pytest.mark.parametrize(
    "text",
    ["int5:g32:asym:scale=fp16", *(pytest.param(text, marks=pytest.mark.long) for text in BITSTREAM_SPECS)],
)
@pytest.mark.parametrize(
    ("rows", "capability", "barriers"), [(1, 80, 5), (1, 90, 5), (16, 89, 5), (64, 80, 5), (64, 90, 17)]
)
def test_codes_across_words(text: str, rows: int, capability: int, barriers: int, launches: list[Launch]) -> None:  # noqa: F811
    """Words are on their way before they are needed, and values are made where they are multiplied: 32 barriers if they were not,
    or 17, where the product of a warp group on sm_90 takes them from shared memory."""
    code = launch(launches, text, rows).compiled(capability)
    assert code.count("LDGSTS") > 0
    assert code.count(*PRODUCTS) > 0
    assert code.spills == 0
    assert code.shared <= 99 << 10
    assert code.in_loop["BAR.SYNC.DEFER_BLOCKING"] <= barriers
    assert "ftz.f32" not in code.ptx  # codes are subnormal floats


@pytest.mark.parametrize(("text", "most"), [("int3:g128", 5.8), ("int5:g32", 5.8), ("int5:g32:asym:scale=fp16", 6.5)])
def test_instructions_for_a_code_across_words(text: str, most: float, launches: list[Launch]) -> None:  # noqa: F811
    """Of bfloat16 weights an H200 gives 10 to each multiprocessor in a cycle, in which it has 128 instructions of threads."""
    found = launch(launches, text, 1)
    tile = found.arguments["BN"] * found.arguments["BU"] * 32
    assert found.compiled(90).loop_length * found.arguments["num_warps"] * 32 / tile <= most


@pytest.mark.parametrize("text", [*OFTEN, "int5:g32:asym"])
@pytest.mark.parametrize(
    ("rows", "capability"),
    [(1, 90), (64, 80), *(pytest.param(rows, 89, marks=pytest.mark.long) for rows in (16, 32, 64))],
)
def test_what_is_around_a_product_is_in_its_kernel(
    text: str,
    rows: int,
    capability: int,
    launches: list[Launch],  # noqa: F811
) -> None:
    """A norm before it, a gate and a residual behind: what is loaded still comes 16 bytes at once, and in time."""
    stored, _ = weight(304, 4096, text, "cpu")
    x, norm, residual = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((rows, 4096), (4096,), (rows, 152)))
    operators.linear(x, *stored.parts, None, text, norm, 1e-5, None, "silu", residual)
    (found,) = launches
    code = found.compiled(capability)
    assert code.count("LDGSTS") > 0
    assert code.spills == 0
    assert code.shared <= 99 << 10
    assert not re.search(r"ftz\.(bf16|f16)", code.ptx)


@pytest.mark.parametrize(("rows", "outputs", "kernels"), [(16, 16400, 1), (17, 16384, 1), (17, 16400, 2)])
def test_of_many_rows_the_norm_before_a_large_weight_is_a_kernel(
    rows: int,
    outputs: int,
    kernels: int,
    launches: list[Launch],  # noqa: F811
) -> None:
    stored, _ = weight(outputs, 256, "int8", "cpu")
    x, norm = torch.zeros(rows, 256, dtype=torch.bfloat16), torch.zeros(256)
    operators.linear(x, *stored.parts, None, "int8", norm, 1e-5, norm)
    assert len(launches) == kernels
    if kernels == 1:
        return
    product = launches[1].arguments
    assert product["norm"] is product["eps"] is product["column_scale"] is None
    code = launches[0].compiled(90)
    assert code.spills == 0
    assert "LDG.E.128" in " ".join(code.instructions)


@pytest.mark.parametrize("text", ["int8", "int5:g32:asym", "int4:g32:zero=float"])
def test_linear_of_float32(text: str, launches: list[Launch]) -> None:  # noqa: F811
    """No product is rounded to TF32."""
    code = launch(launches, text, 8, torch.float32).compiled(90)
    assert code.count(*PRODUCTS) == 0
    assert code.shared <= 99 << 10


@pytest.mark.parametrize("text", ["int8", "int4:g128"])
def test_fused_linear_of_float16(text: str, launches: list[Launch]) -> None:  # noqa: F811
    code = launch(launches, text, 1, torch.float16).compiled(90)
    assert (code.count("HMMA") > 0, code.spills) == (True, 0)


@pytest.mark.parametrize("text", ["int8", "int4:g128", "int5:g32:asym"])
@pytest.mark.parametrize(("rows", "capability"), [(8, 90), (64, 80)])
def test_a_norm_of_float16(text: str, rows: int, capability: int, launches: list[Launch]) -> None:  # noqa: F811
    stored, _ = weight(300, 4096, text, "cpu")
    x, norm = torch.zeros(rows, 4096, dtype=torch.float16), torch.zeros(4096, dtype=torch.float16)
    operators.linear(x, *stored.parts, None, text, norm, 1e-5)
    (found,) = launches
    code = found.compiled(capability)
    assert code.spills == 0
    assert code.shared <= 99 << 10


@pytest.mark.parametrize(
    ("text", "most"), [("int8", 4.0), ("int4:g128", 5.6), ("int4:g32", 6.8), ("nf4:g128", 14), ("fp8_e4m3", 4.2)]
)
def test_instructions_for_a_byte_of_weights(text: str, most: float, launches: list[Launch]) -> None:  # noqa: F811
    """An H200 gives each multiprocessor 20 bytes in a cycle, in which it has 128 instructions of threads."""
    found = launch(launches, text, 1)
    code = found.compiled(90)
    tile = found.arguments["BN"] * found.arguments["BW"] * 4
    inside = code.loop_length * found.arguments["num_warps"] * 32 / tile
    assert inside <= most


@pytest.mark.parametrize(("text", "most"), [("int8", 4.0), ("int4:g128", 6.4), ("fp8_e4m3", 4.2)])
def test_a_norm_takes_few_instructions_more(text: str, most: float, launches: list[Launch]) -> None:  # noqa: F811
    """No more than there is time for."""
    stored, _ = weight(300, 4096, text, "cpu")
    x, norm = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    operators.linear(x, *stored.parts, None, text, norm, 1e-5)
    tile = launches[0].arguments["BN"] * launches[0].arguments["BW"] * 4
    assert launches[0].compiled(90).loop_length * launches[0].arguments["num_warps"] * 32 / tile <= most


@pytest.mark.parametrize(
    "text", ["int4:g32:asym", "nf4", *(pytest.param(text, marks=pytest.mark.long) for text in SPECS)]
)
@pytest.mark.parametrize("named", [False, True], ids=["all rows", "named rows"])
def test_rows(text: str, named: bool, launches: list[Launch]) -> None:  # noqa: F811
    stored, values = weight(3, 4096, text, "cpu")
    if named:
        operators.embedding(torch.tensor([0, 2]), *stored.parts, values.shape[1], text, torch.bfloat16)
    else:
        operators.dequantize(*stored.parts, values.shape[1], text, torch.bfloat16)
    if parse_spec(text).is_identity:
        assert not launches
    else:
        for capability in (80, 90):
            assert launches[0].compiled(capability).spills == 0


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt.b32: each of four codes picks one of the eight bytes of b:a; its fourth bit repeats that byte's sign."""
    source = (b << 32) | a
    out = 0
    for i in range(4):
        code = (selector >> (4 * i)) & 15
        byte = (source >> (8 * (code & 7))) & 0xFF
        out |= (0xFF * (byte >> 7) if code & 8 else byte) << (8 * i)
    return out


def run(program: str, word: int) -> list[int]:
    """The four results of a lookup in PTX, for one word of codes."""
    values: dict[str, int] = {"$4": word}
    read = {"prmt": prmt, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "shr": lambda a, b: a >> b}
    for name, out, sources in re.findall(r"(\w+)\.b32 (\$?\w+), ([^;]+);", program.split(";", 1)[1]):
        arguments = [values[s] if s in values else int(s, 0) for s in sources.split(", ")]
        values[out] = read[name](*arguments)
    return [values[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_lookup_by_byte_permutations(dtype: torch.dtype) -> None:
    """Executed by hand: the interpreter runs no PTX."""
    from qpass.ops.triton.unpacking import nf4_patterns, prmt_lookup

    patterns = nf4_patterns(dtype)
    assert patterns == [int(v) & 0xFFFF for v in torch.tensor(NF4_VALUES).to(dtype).view(torch.int16)]
    program = prmt_lookup(patterns)
    generator = torch.Generator().manual_seed(0)
    for word in [
        0,
        0xFFFFFFFF,
        0x76543210,
        0xFEDCBA98,
        *torch.randint(0, 1 << 32, (200,), generator=generator).tolist(),
    ]:
        codes = [(word >> (4 * i)) & 15 for i in range(8)]
        assert run(program, word) == [patterns[codes[j]] | (patterns[codes[j + 4]] << 16) for j in range(4)]

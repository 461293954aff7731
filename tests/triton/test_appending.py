"""New tokens into a quantized cache by one kernel: to the bit what qpass.numerics gives, where they belong and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qpass.ops import cache_reference, reference
from qpass.ops.triton import operators, workspace, writing
from qpass.packing import as_bytes
from tests.triton.compiling import Launch, launches  # noqa: F401  a fixture
from tests.triton.test_linear import TOLERANCE, random

SPECS = ["int8", "int8:asym", "int8:g16", "int4:g16:asym", "int4:channel:asym", "fp8_e4m3", "fp8_e5m2:channel", "nf4:g16",
         "nf4:g8:dq", "mxfp4", "mxfp8", "int2:g16:zero=float:scale=fp16", "int3:g16:asym", "int8:static",
         "fp8_e4m3:static"]  # fmt: skip
OTHERS = ["int8:rotated", "int8:g24"]
CAPACITY = 12


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the kernel."""
    calls: list[int] = []
    made = writing._append
    monkeypatch.setattr(writing, "_append", lambda *given: calls.append(1) or made(*given))  # type: ignore[func-returns-value]
    return calls


def states(heads: int, new: int, columns: int, dtype: torch.dtype, seed: int, batch: int = 2) -> Tensor:
    """[B, H, S, D] as a view of a linear's result."""
    return (
        random(batch, new, heads * columns + 8, seed=seed)
        .to(dtype)[..., 8:]
        .unflatten(-1, (heads, columns))
        .transpose(1, 2)
    )


def static_scales(text: str, columns: Sequence[int]) -> list[Tensor | None]:
    return [random(1, 3, 1, d, seed=9).abs() / 50 + 0.01 if "static" in text else None for d in columns]


def empty_parts(x: Tensor, text: str, scale: Tensor | None) -> list[Tensor]:
    """A cache of CAPACITY tokens, in which everything is 77."""
    parts = [as_bytes(p) for p in reference.quantize(x, text, scale)]
    return [torch.full((*p.shape[:2], CAPACITY, p.shape[3]), 77, dtype=p.dtype) for p in parts]


def check(parts: Sequence[Tensor], start: int, x: Tensor, text: str, scale: Tensor | None) -> None:
    """Whether parts hold the codes of x from token `start` on, and 77 elsewhere."""
    for part, codes in zip(parts, reference.quantize(x, text, scale), strict=True):
        expected = torch.full_like(part, 77, device="cpu")
        expected[:, :, start : start + x.shape[2]] = as_bytes(codes)
        assert torch.equal(part.cpu(), expected)


@pytest.mark.parametrize("text", [*SPECS, *OTHERS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_behind_those_of_a_cache(text: str, dtype: torch.dtype, device: str, served: list[int]) -> None:
    k, v = states(3, 4, 32, dtype, 0), states(3, 4, 48, dtype, 1)
    k_scale, v_scale = static_scales(text, (32, 48))
    parts = [[p.to(device) for p in empty_parts(x, text, s)] for x, s in ((k, k_scale), (v, v_scale))]
    given = (text, text, *(None if s is None else s.to(device) for s in (k_scale, v_scale)))
    length = torch.tensor(2, device=device)
    firsts = [operators.append(*parts, length, k[:, :, a:b].to(device), v[:, :, a:b].to(device), *given)
              for a, b in ((0, 1), (1, 4))]  # fmt: skip
    assert [int(n) for n in firsts] == [2, 3]
    assert int(length) == 6
    assert len(served) == (2 if text in SPECS else 0)
    if text in SPECS:
        check(parts[0], 2, k, text, k_scale)
        check(parts[1], 2, v, text, v_scale)
        assert not workspace._made[length.device].ring.any()


@pytest.mark.parametrize(
    "specs", [("int8", "int4:g16:asym"), ("nf4:g16", "mxfp8"), ("fp8_e4m3", "int8:static")], ids="-".join
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("batch", "angles", "new"), [(1, 1, 1), (2, 1, 3), (2, 2, 3)])
def test_rotated_tokens(
    specs: tuple[str, str],
    dtype: torch.dtype,
    batch: int,
    angles: int,
    new: int,
    device: str,
    served: list[int],
    poisoned: None,
) -> None:
    """Keys and values in formats and of widths of their own; what is stored are the codes of the keys that come back."""
    q, k, v = (states(h, new, d, dtype, i, batch) for i, (h, d) in enumerate(((6, 40), (3, 40), (3, 64))))
    phase = torch.rand(angles, 1, new, 40, generator=torch.Generator().manual_seed(5)) * 6
    cos, sin = phase.cos().to(dtype), phase.sin().to(dtype)
    scales = [s if "static" in text else None for text, s in zip(specs, static_scales("static", (40, 64)), strict=True)]
    parts = [[p.to(device) for p in empty_parts(x, t, s)] for x, t, s in zip((k, v), specs, scales, strict=True)]
    length = torch.tensor(5, device=device)
    there = [None if s is None else s.to(device) for s in scales]
    before, found_q, found_k = operators.append_rotated(
        *parts, length, *(x.to(device) for x in (q, k, v, cos, sin)), *specs, *there
    )
    assert (int(before), int(length), len(served)) == (5, 5 + new, 1)
    for found, x in ((found_q, q), (found_k, k)):
        exact = cache_reference.rotated(x.double(), cos.double(), sin.double())
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert found.is_contiguous()
        assert (found.cpu().double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    check(parts[0], 5, found_k.cpu(), specs[0], scales[0])
    check(parts[1], 5, v, specs[1], scales[1])


@pytest.mark.parametrize("text", OTHERS)
def test_rotated_tokens_of_other_formats(text: str, device: str, served: list[int]) -> None:
    """As the reference has them."""
    q, k, v = (states(h, 2, 48, torch.float32, i) for i, h in enumerate((6, 3, 3)))
    phase = torch.rand(1, 1, 2, 48, generator=torch.Generator().manual_seed(5)) * 6
    results = []
    for function in (operators.append_rotated, cache_reference.append_rotated):
        parts = [[p.to(device) for p in empty_parts(x, text, None)] for x in (k, v)]
        length = torch.tensor(5, device=device)
        made = function(*parts, length, *(x.to(device) for x in (q, k, v, phase.cos(), phase.sin())), text, text)
        results.append([*made, length, *parts[0], *parts[1]])
    assert not served
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_layouts_that_the_kernel_does_not_take(device: str, served: list[int]) -> None:
    """Parts that are not contiguous are written all the same."""
    k = states(3, 2, 32, torch.float32, 0)
    parts = [
        [p.to(device).transpose(1, 2).contiguous().transpose(1, 2) for p in empty_parts(k, "int8", None)]
        for _ in range(2)
    ]
    operators.append(*parts, torch.tensor(1, device=device), k.to(device), k.to(device), "int8", "int8")
    assert not served
    for half in parts:
        check(half, 1, k, "int8", None)


def test_rows_whose_elements_are_apart(device: str, served: list[int]) -> None:
    k = random(2, 3, 32, 2).transpose(2, 3)
    parts = [[p.to(device) for p in empty_parts(k, "int8", None)] for _ in range(2)]
    operators.append(*parts, torch.tensor(0, device=device), k.to(device), k.to(device), "int8", "int8")
    assert served
    for half in parts:
        check(half, 0, k, "int8", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device asserts, after which it serves no more")
@pytest.mark.parametrize("new", [1, 4])
def test_a_full_cache_is_left_as_it_is(new: int, device: str, served: list[int]) -> None:
    """The interpreter lets the assertion pass: nothing is written, and the length stays."""
    k = states(3, new, 32, torch.float32, 0)
    parts = [empty_parts(k, "int8", None) for _ in range(2)]
    length = torch.tensor(CAPACITY - new + 1)
    before = operators.append(*parts, length, k, k, "int8", "int8")
    assert (int(before), int(length), len(served)) == (CAPACITY - new + 1, CAPACITY - new + 1, 1)
    assert all((p == 77).all() for half in parts for p in half)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_asserts_that_there_is_room() -> None:
    program = (
        "import torch; from qpass.ops.triton import operators\n"
        "parts = [[torch.zeros(1, 1, 4, 32, dtype=torch.int8).cuda(), torch.zeros(1, 1, 4, 1).cuda()] for _ in range(2)]\n"
        "x = torch.ones(1, 1, 2, 32).cuda()\n"
        "operators.append(*parts, torch.tensor(3).cuda(), x, x, 'int8', 'int8'); torch.cuda.synchronize()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode != 0
    assert "the KV cache is too short" in found.stderr


def rotated_launch(launches: list[Launch], text: str, new: int = 1) -> Launch:  # noqa: F811
    """What a decode step of the shape of an 8B model launches."""
    q, k, v = (torch.zeros(1, h, new, 128, dtype=torch.bfloat16) for h in (32, 8, 8))
    parts = [
        [p.zero_() for p in map(as_bytes, reference.quantized_like(torch.zeros(1, 8, 64, 128), text))] for _ in range(2)
    ]
    angles = torch.zeros(1, 1, new, 128, dtype=torch.bfloat16)
    operators.append_rotated(*parts, torch.tensor(0), q, k, v, angles, angles, text, text)
    (found,) = launches
    return found


@pytest.mark.parametrize("text", ["int8", "int4:channel:asym", "nf4:g32", "fp8_e4m3:channel"])
@pytest.mark.parametrize("capability", [80, pytest.param(89, marks=pytest.mark.long), 90], ids="sm_{}".format)
def test_it_compiles(text: str, capability: int, launches: list[Launch]) -> None:  # noqa: F811
    """One launch, which asserts that there is room, counts its programs once and divides as torch does."""
    code = rotated_launch(launches, text).compiled(capability)
    assert code.spills == 0
    assert "__assertfail" in code.ptx
    assert code.ptx.count("atom.acq_rel.gpu.global.add") + code.ptx.count("atom.global.gpu.acq_rel.add") == 1
    assert "div.rn.f32" in code.ptx

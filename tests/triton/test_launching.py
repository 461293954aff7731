"""When a kernel runs, and what happens where it cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from qpass.ops import reference
from qpass.ops.triton import launching, operators
from qpass.ops.triton.table import MOST_ROWS, Device, bitstream_tiles, fused_kind, split_of, tiles_of
from tests.triton.compiling import Launch, launches  # noqa: F401  a fixture
from tests.triton.test_linear import random, weight


def test_a_kernel_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, launches: list[Launch]) -> None:  # noqa: F811
    """A slower way gives the result, and one warning says so."""
    stored, _ = weight(8, 64, "int8", "cpu")
    x = random(2, 64, seed=1).bfloat16()
    tried: list[int] = []

    def fails(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(launching, "failed", set())
    monkeypatch.setattr(operators, "_fused", fails)
    monkeypatch.setattr(operators, "_rows", fails)
    expected = reference.linear(x, *stored.parts, None, "int8")
    with pytest.warns(
        UserWarning, match="linear int8 of torch.bfloat16 failed and a slower way is taken: out of resource"
    ):
        assert torch.equal(operators.linear(x, *stored.parts, None, "int8"), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(operators.linear(x, *stored.parts, None, "int8"), expected)
    assert len(tried) == 2


def test_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for capability, served in (((8, 0), True), ((12, 0), True), ((7, 5), False), (None, True)):
        monkeypatch.setattr(launching, "device_of", lambda _, c=capability: Device(c, 80))
        assert launching.runs_on(gpu) == served
    assert not launching.runs_on(torch.device("meta"))
    monkeypatch.setattr(launching, "available", lambda: False)
    assert not launching.runs_on(gpu)


@pytest.mark.parametrize(
    ("text", "columns", "dtype", "kind"),
    [
        ("int8", 64, torch.bfloat16, "INT8"),
        ("int4:g32:asym", 4096, torch.bfloat16, "INT4"),
        ("nf4:g64:dq", 4096, torch.float16, "NF4"),
        ("int4:g8", 64, torch.bfloat16, "INT4"),
        ("nvfp4", 64, torch.bfloat16, "E2M1"),
        ("fp8_e4m3", 4, torch.bfloat16, "E4M3"),
        ("int5:g32:asym:scale=fp16", 576, torch.bfloat16, "BITSTREAM"),
        ("int4:g32:zero=float", 64, torch.bfloat16, "BITSTREAM"),
        ("int8:g64", 64, torch.float32, "BITSTREAM"),
        ("int8", 33, torch.bfloat16, None),
        ("int8", 36, torch.float32, None),
        ("int4:g32", 4092, torch.bfloat16, None),
        ("int4:g40", 4000, torch.bfloat16, None),
        ("int4:g4", 64, torch.bfloat16, None),
        ("int3:g16", 64, torch.bfloat16, None),
        ("nf4", 64, torch.float32, None),
        ("bf16", 64, torch.bfloat16, None),
    ],
)
def test_which_weights_are_read_as_they_are_stored(
    text: str, columns: int, dtype: torch.dtype, kind: str | None
) -> None:
    assert fused_kind(text, columns, dtype) == kind


@pytest.mark.parametrize(
    ("outputs", "words", "expected"), [(4096, 512, 8), (28672, 512, 2), (128256, 512, 1), (300, 64, 1)]
)
def test_programs_share_columns_where_outputs_do_not_fill_the_device(outputs: int, words: int, expected: int) -> None:
    """Weights of four bits on 132 multiprocessors."""
    assert split_of(outputs, words, tiles_of(1, 4), 132) == expected


@pytest.mark.parametrize("rows", range(1, max(MOST_ROWS.values()) + 1))
def test_every_row_count_has_tiles(rows: int) -> None:
    assert all(tiles.rows >= rows for tiles in (tiles_of(rows, 4), tiles_of(rows, 8), bitstream_tiles(rows)))


def test_qpass_imports_no_kernels() -> None:
    program = (
        "import sys, torch, qpass, qpass.ops; x = torch.ones(2, 64);"
        "torch.ops.qpass.linear(x, *torch.ops.qpass.quantize(x, 'int8'), None, None, None, 'int8');"
        "sys.exit(any(name in sys.modules for name in ('qpass.ops.triton.unpacking', 'qpass.ops.triton.linear')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

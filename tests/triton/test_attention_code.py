"""The attention kernel compiles for each generation of GPUs: see test_compile.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.numerics import quantize
from qpass.ops.triton import operators
from qpass.recipe import KV_FORMATS
from qpass.spec import parse_spec
from tests.triton.compiling import PRODUCTS, Launch, launches  # noqa: F401  a fixture
from tests.triton.test_compile import capabilities, pytestmark  # noqa: F401

OFTEN = ["int8", "int4:g32:asym"]
SPECS = [
    "fp8_e4m3:channel",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8:asym",
    "int8:g32",
    "int4:channel:asym",
    "int4:channel:asym:rotated",
    "nf4:g32",
    "mxfp8",
    "mxfp4",
]


def launch(launches: list[Launch], text: str, queries: int, mask: Tensor | None, floats: bool) -> Launch:  # noqa: F811
    """Of 32 query heads on 8 heads of a cache of 128 columns."""
    stored = quantize(torch.zeros(1, 8, 2048, 128), parse_spec(text))
    q = torch.zeros(1, 32, queries, 128, dtype=torch.bfloat16)
    new = torch.zeros(1, 8, queries, 128, dtype=torch.bfloat16)
    extra = (None, None, new, new, torch.tensor(100)) if floats else ()
    operators.attention(q, *stored.parts, text, *stored.parts, 128, text, mask, False, None, *extra)
    (found,) = launches  # one kernel, which joins its parts too
    assert found.grid[1] > 1
    return found


@pytest.mark.parametrize("text", [*OFTEN, *(pytest.param(text, marks=pytest.mark.long) for text in SPECS)])
@pytest.mark.parametrize(
    "queries", [1, pytest.param(4, marks=pytest.mark.long), pytest.param(16, marks=pytest.mark.long)]
)
@capabilities
def test_attention(text: str, queries: int, capability: int, launches: list[Launch]) -> None:  # noqa: F811
    mask = torch.ones(1, 1, queries, 2048, dtype=torch.bool)
    code = launch(launches, text, queries, mask, floats=True).compiled(capability)
    assert code.count("LDGSTS.E.BYPASS.128") > 0
    assert code.count(*PRODUCTS) > 0
    # On sm_100 operands and sums go through registers on their way to tensor memory: a few of thousands of instructions spill.
    assert code.spills <= (code.loop_length / 1000 if capability == 100 else 0)


@capabilities
def test_scales_of_channels_over_tokens(capability: int, launches: list[Launch]) -> None:  # noqa: F811
    """Keys of the cache format int4."""
    k_text, v_text = KV_FORMATS["int4"]
    k, v = (quantize(torch.zeros(1, 8, 2048, 128), parse_spec(text)) for text in (k_text, v_text))
    q = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16)
    floats = [torch.zeros(1, 8, n, 128, dtype=torch.bfloat16) for n in (1, 1, 64, 64)]
    mask = torch.ones(1, 1, 1, 2048, dtype=torch.bool)
    operators.attention(q, *k.parts, k_text, *v.parts, 128, v_text, mask, False, None, *floats, torch.tensor(100))
    (found,) = launches
    code = found.compiled(capability)
    assert code.count("LDGSTS.E.BYPASS.128") > 0
    assert code.count(*PRODUCTS) > 0
    assert code.spills <= (code.loop_length / 1000 if capability == 100 else 0)


@pytest.mark.parametrize(("text", "columns", "tokens"), [("int4:channel", 64, 2001), ("int4:channel:asym", 96, 1001)])
def test_tokens_of_no_multiple_of_64_bytes(
    text: str,
    columns: int,
    tokens: int,
    launches: list[Launch],  # noqa: F811
) -> None:
    """Nor heads: data is copied 16 bytes at once."""
    stored = quantize(torch.zeros(1, 2, tokens, columns), parse_spec(text))
    q = torch.zeros(1, 8, 1, columns, dtype=torch.bfloat16)
    operators.attention(q, *stored.parts, text, *stored.parts, columns, text, None, False, None)
    assert launches[0].compiled(90).count("LDGSTS.E.BYPASS.128") >= 6  # keys and values, three times ahead

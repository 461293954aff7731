"""A new format is one row: whatever its width, what is computed with it is what the reference computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qpass
from qpass.formats import FORMATS, Format
from qpass.numerics import dequantize, quantize
from qpass.ops.cpu.matrix import has_kernels
from qpass.spec import parse_spec
from tests.models import build, dequantized_copy, logits_of, tokens


def codebook(bits: int) -> Format:
    values = tuple(torch.linspace(-1, 1, 2**bits).pow(3).tolist())
    return Format(f"cubic{bits}", "codebook", bits, -1.0, 1.0, torch.uint8, "float", 32, values)


def integers(bits: int) -> Format:
    half = 1 << (bits - 1)
    return Format(f"whole{bits}", "uniform", bits, -half, half - 1, torch.uint8, "float", 32)


#: Row -> whether the CPU kernels read it; the others go through the reference.
ROWS = {
    codebook(4): True, integers(4): True, codebook(2): False, codebook(3): False, codebook(5): False, integers(7): False,
}  # fmt: skip


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Iterator[Format]:
    FORMATS[request.param.name] = request.param
    yield request.param
    del FORMATS[request.param.name]


def test_it_computes_what_it_stores(row: Format) -> None:
    """The logits are those of the float model with the weights that the codes stand for."""
    spec = f"{row.name}:g16"
    assert has_kernels(spec) == ROWS[row]
    model = qpass.quantize(build("llama"), spec, inner="eager")
    wanted = dequantized_copy(build("llama"), lambda name: spec)
    with torch.no_grad():
        assert torch.allclose(logits_of(model(tokens())), logits_of(wanted(tokens())), atol=1e-4)


def test_the_report_knows_its_bytes_and_error(row: Format) -> None:
    model = build("llama")
    weight = model.get_parameter("lm_head.weight").detach().clone()
    qpass.quantize(model, f"{row.name}:g16", inner="eager")
    model(tokens())
    (site,) = (s for s in qpass.report(model).sites if s.name == "lm_head.weight")
    spec = parse_spec(f"{row.name}:g16")
    stored = quantize(weight, spec)
    noise = (weight.double() - dequantize(stored, spec, weight.shape[1]).double()).square().sum()
    assert site.bytes_after == stored.nbytes
    assert site.sqnr_db == pytest.approx(float(10 * (weight.double().square().sum() / noise).log10()), abs=0.01)

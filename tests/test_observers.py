"""What calibration sees of an input, and the static scale that follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.algorithms.rounding import input_parts
from qpass.observers import InputStats, observed, quantized_statically, static_qparams
from qpass.spec import parse_spec


def stats_of(x: Tensor, pieces: int = 3) -> InputStats:
    stats = InputStats.empty(x.shape[-1])
    for piece in x.tensor_split(pieces):
        stats.add(piece)
    return stats


def heavy_tailed(rows: int = 2000, columns: int = 24) -> Tensor:
    """Most values within 3, a few tens, one of a thousand."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x[::97, 3] *= 20
    x[1234, 5] = 1000.0
    return x


def activations(text: str) -> object:
    return parse_spec(f"int8@{text}").activations


def test_moments_and_ranges_are_those_of_all_rows_together() -> None:
    x = heavy_tailed()
    stats, rows = stats_of(x), x.double()
    assert stats.tokens == 2000
    torch.testing.assert_close(stats.hessian.double(), rows.T @ rows, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(stats.absolute.double(), rows.abs().sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.importance.double(), rows.square().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.low, x.amin(0))
    assert torch.equal(stats.high, x.amax(0))


def test_the_sample_is_of_rows_seen_early_and_late_and_holds_the_largest() -> None:
    x = torch.arange(4000.0)[:, None].expand(-1, 4).contiguous()
    stats = stats_of(x, pieces=16)
    assert len(stats.sample) == 504
    assert abs(float(stats.sample[:, 0].mean()) - 2000) < 200
    assert sorted(stats.extreme[:, 0].tolist()) == list(range(3992, 4000))
    rows, weights = stats.rows
    assert len(rows) == len(weights) == 512
    assert float(weights[0]) == pytest.approx(4000 / 504)


def test_an_input_that_is_scaled_has_the_stats_of_the_scaled_rows() -> None:
    x, c = heavy_tailed(), torch.linspace(0.1, 3, 24)[None]
    scaled, wanted = stats_of(x).scaled(c), stats_of(x * c)
    for name in ("hessian", "absolute", "low", "high", "sample"):
        torch.testing.assert_close(getattr(scaled, name), getattr(wanted, name), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("text", ["int8:static", "int8:static:asym", "fp8_e4m3:static"])
def test_min_max_covers_every_value(text: str) -> None:
    x = heavy_tailed() + (0.5 if "asym" in text else 0)
    spec = activations(text)
    scale, zero = static_qparams(stats_of(x), spec)  # type: ignore[arg-type]
    step = float(scale) * (32 if "fp8" in text else 1)  # E4M3 has steps of 32 at its end
    assert float((quantized_statically(x, spec, scale, zero) - x).abs().max()) <= step / 2 * 1.001  # type: ignore[arg-type]
    assert (zero is not None) == ("asym" in text)


def test_the_whole_range_in_int8_by_hand() -> None:
    x = torch.tensor([[-1.0, 3.0], [0.5, 2.0]])
    scale, zero = static_qparams(stats_of(x, 1), activations("int8:static"))  # type: ignore[arg-type]
    assert (float(scale), zero) == (pytest.approx(3 / 127), None)
    scale, zero = static_qparams(stats_of(x, 1), activations("int8:static:asym"))  # type: ignore[arg-type]
    assert float(scale) == pytest.approx(4 / 255)
    assert zero is not None
    assert int(zero) == -64  # -128 + 1 / (4 / 255)


@pytest.mark.parametrize("how", ["percentile", "mse", "entropy"])
def test_other_ranges_cut_off_what_is_rare(how: str) -> None:
    """The bulk of the values comes back better than from the whole range, which one value of a thousand sets."""
    x = heavy_tailed(columns=240)
    stats = stats_of(x)
    whole, cut = activations("int8:static"), activations(f"int8:static:{how}")
    bulk = x[x.abs().amax(1) < 5]
    errors = [
        float((quantized_statically(bulk, s, *static_qparams(stats, s)) - bulk).square().mean())  # type: ignore[arg-type]
        for s in (whole, cut)
    ]
    factor = 1.0001 if how == "mse" else 0.2  # the one value weighs more in a squared error than all others
    assert errors[1] <= factor * errors[0]


def test_mse_has_the_least_squared_error_of_all() -> None:
    x = heavy_tailed().clamp(-30, 30)
    stats = stats_of(x)
    losses = {}
    for how in ("minmax", "percentile", "mse", "entropy"):
        spec = activations(f"int4:g8@int8:static:{how}".partition("@")[2])
        back = quantized_statically(x, spec, *static_qparams(stats, spec))  # type: ignore[arg-type]
        losses[how] = float((back - x).square().sum())
    assert losses["mse"] <= 1.1 * min(losses.values())  # found on a sample


def test_entropy_keeps_the_whole_of_an_even_distribution() -> None:
    x = torch.linspace(-1, 1, 4096).view(-1, 4)
    scale, _ = static_qparams(stats_of(x), activations("int8:static:entropy"))  # type: ignore[arg-type]
    assert float(scale) > 0.95 / 127


def test_what_a_report_says() -> None:
    x = heavy_tailed()
    spec = activations("int8:static")
    seen = observed(stats_of(x), static_qparams(stats_of(x), spec), wide=False)  # type: ignore[arg-type]
    assert (seen.low, seen.high, seen.tokens) == (float(x.min()), 1000.0, 2000)
    assert 2 < seen.high_percentile < 40
    assert seen.scale == pytest.approx(1000 / 127)
    assert seen.zero_point is None


def test_an_input_that_no_one_scale_serves_is_left_wide() -> None:
    weight, x = torch.randn(32, 24, generator=torch.Generator().manual_seed(1)), heavy_tailed()
    spec = parse_spec("int8@int8:static")
    parts, _, seen = input_parts([weight], spec, stats_of(x))
    assert parts.input_scale is None
    assert seen is not None
    assert seen.wide
    parts, _, seen = input_parts([weight], spec, stats_of(x.clamp(-5, 5)))
    assert parts.input_scale is not None
    assert seen is not None
    assert not seen.wide


def test_no_token_is_no_division_by_zero() -> None:
    stats = InputStats.empty(8)
    stats.add(torch.zeros(0, 8))
    assert stats.tokens == 0
    assert observed(stats, None, False).tokens == 0

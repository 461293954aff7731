"""Range search, GPTQ, AWQ, SmoothQuant, HQQ: against what they must equal and what they must beat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qpass
from qpass.numerics import choose_qparams, dequantize, fake_quantize, quantize
from qpass.observers import InputStats
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from qpass.store import quantize_group
from qpass.weights import quantize_weight

FORMATS = ["int4:g32", "int4:g48:asym", "int4:channel", "int3:g32:asym", "int2:g32:asym", "int8", "nf4:g64", "nf4:g64:dq",
           "fp4_e2m1", "mxfp4", "nvfp4", "int4:tensor", "fp8_e4m3:channel"]  # fmt: skip


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int) -> Tensor:
    """Inputs that lie near few directions, as those of a transformer do."""
    return gaussian(tokens, columns // 8, seed=5) @ gaussian(columns // 8, columns, seed=6) + 0.3 * gaussian(
        tokens, columns, seed=7
    )


def stats_of(x: Tensor) -> InputStats:
    stats = InputStats.empty(x.shape[-1])
    for part in x.split(100):
        stats.add(part)
    return stats


def output_error(weight: Tensor, spec: str, stats: InputStats | None, x: Tensor) -> float:
    """||(W - Q) X||^2 in float64."""
    parsed = parse_spec(spec)
    stored = quantize_group([weight], parsed, stats)[0].quantized
    off = weight.double() - dequantize(stored, parsed, weight.shape[1]).double()
    return float((x.double() @ off.T).square().sum())


def test_the_hessian_is_the_sum_of_outer_products() -> None:
    x = gaussian(3, 50, 24)
    stats = InputStats.empty(24)
    for part in x:
        stats.add(part)
    rows = x.reshape(-1, 24).double()
    assert stats.tokens == 150
    torch.testing.assert_close(stats.hessian.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.importance.double(), rows.square().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", FORMATS)
def test_gptq_with_a_diagonal_hessian_is_rounding_to_nearest_to_the_bit(text: str) -> None:
    weight, spec = gaussian(40, 192), parse_spec(f"{text}:gptq")
    stats = InputStats.empty(192)
    stats.hessian = torch.diag(gaussian(192, seed=1).square() + 0.1)
    for mine, nearest in zip(
        quantize_weight(weight, spec, stats=stats).parts, quantize(weight, spec).parts, strict=True
    ):
        assert (mine is None) == (nearest is None)
        assert mine is None or torch.equal(mine.view(torch.uint8), nearest.view(torch.uint8))


@pytest.mark.parametrize("text", FORMATS)
def test_gptq_lowers_the_error_of_the_output(text: str) -> None:
    weight, x = gaussian(64, 192), correlated(1000, 192)
    stats = stats_of(x)
    plain, better = (output_error(weight, spec, stats, x) for spec in (text, f"{text}:gptq"))
    assert better < (0.9 if text.startswith("fp8") else 0.5) * plain


def test_gptq_halves_the_loss_of_a_planted_layer_on_inputs_it_has_not_seen() -> None:
    weight, x = gaussian(64, 256), correlated(4000, 256)
    for text in ("int4:g128", "int3:g128", "int2:g64"):
        plain, better = (output_error(weight, spec, stats_of(x[:3000]), x[3000:]) for spec in (text, f"{text}:gptq"))
        assert better < plain / 2


def test_gptq_equals_the_greedy_solution_in_float64() -> None:
    """An independent, slow statement of it: after each column the others are solved for exactly (optimal brain surgeon)."""
    columns, spec = 24, parse_spec("int3:channel:gptq")
    weight, x = gaussian(5, columns), correlated(400, columns)
    hessian = stats_of(x).hessian
    scale = choose_qparams(weight, spec)[0]
    assert scale is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    rest, left = weight.double().clone(), hessian.diagonal().argsort(descending=True).tolist()
    while left:
        now, later = left[0], left[1:]
        value = (rest[:, now] / scale[:, 0]).round().clamp(-3, 3) * scale[:, 0].double()
        off = rest[:, now] - value
        if later:  # the others take over what is lost, in the least squares sense
            rest[:, later] += off[:, None] * torch.linalg.solve(damped[later][:, later], damped[later][:, now])[None]
        rest[:, now] = value
        left = later
    mine = dequantize(quantize_weight(weight, spec, stats=stats_of(x)), spec, columns).double()
    nearest = dequantize(quantize(weight, spec), spec, columns).double()
    solved = [torch.allclose(row, wanted) for row, wanted in zip(mine, rest, strict=True)]
    assert sum(solved) >= 4
    assert all(s or torch.allclose(row, plain) for s, row, plain in zip(solved, mine, nearest, strict=True))


def test_columns_that_are_never_used_do_not_matter() -> None:
    weight, x = gaussian(16, 64), correlated(500, 64)
    x[:, 10:20] = 0
    spec = parse_spec("int4:g32:gptq")
    values = dequantize(quantize_weight(weight, spec, stats=stats_of(x)), spec, 64)
    assert bool(torch.isfinite(values).all())
    assert output_error(weight, "int4:g32:gptq", stats_of(x), x) < output_error(weight, "int4:g32", None, x)


def test_one_token_or_none_is_no_worse_than_rounding_to_nearest() -> None:
    weight, x = gaussian(16, 64), gaussian(1, 64, seed=3)
    for given in (x, x[:0], torch.zeros(3, 64)):
        assert output_error(weight, "int4:g32:gptq", stats_of(given), x) <= output_error(weight, "int4:g32", None, x)


@pytest.mark.parametrize("text", [t for t in FORMATS if t not in ("int8", "mxfp4", "int4:tensor")])
def test_search_lowers_the_weighted_error(text: str) -> None:
    """No block loses by it; the error is that which calibration weighs, if there was any."""
    weight, x = gaussian(32, 192, seed=2) ** 3, correlated(500, 192) * torch.linspace(0.1, 3, 192)
    importance = stats_of(x).importance
    for stats, error in (
        (None, lambda off: off.abs() ** 2.4),
        (stats_of(x), lambda off: off.square() * importance),
    ):
        losses = []
        for spec in (parse_spec(text), parse_spec(f"{text}:search")):
            off = weight - dequantize(quantize_weight(weight, spec, stats=stats), spec, 192)
            losses.append(float(error(off).sum()))
        assert losses[1] < losses[0]


def test_search_and_gptq_go_together() -> None:
    weight, x = gaussian(64, 192) ** 3, correlated(1000, 192)
    stats = stats_of(x)
    errors = {
        spec: output_error(weight, spec, stats, x) for spec in ("int3:g32", "int3:g32:gptq", "int3:g32:search:gptq")
    }
    assert errors["int3:g32:search:gptq"] < errors["int3:g32:gptq"] < errors["int3:g32"]
    assert str(parse_spec("int3:g32:gptq:search")) == "int3:g32:search:gptq"


@pytest.mark.parametrize("text", ["bf16:gptq", "fp32:search", "fp8_e4m3:search"])
def test_what_has_nothing_to_choose_is_refused(text: str) -> None:
    with pytest.raises(qpass.QpassError, match="nothing to"):
        parse_spec(text)


def test_search_is_of_blocks_and_no_algorithm_is_for_a_cache() -> None:
    with pytest.raises(qpass.QpassError, match="search is of blocks"):
        parse_spec("int4:tensor:search")
    with pytest.raises(qpass.QpassError, match="gptq is for weights"):
        qpass.Recipe(kv="int8:gptq")


@pytest.mark.parametrize("text", ["int4:g32:asym:search", "int4:channel:gptq", "nvfp4:search", "int4:tensor:gptq"])
def test_a_weight_in_several_chunks_is_as_in_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = gaussian(50, 96) * torch.linspace(0.05, 1, 50)[:, None], parse_spec(text)
    stats = stats_of(correlated(300, 96))
    whole = quantize_weight(weight, spec, stats=stats)
    monkeypatch.setattr("qpass.weights.CHUNK_ELEMENTS", 96 * 7)
    cut = quantize_weight(weight, spec, stats=stats)
    error = (dequantize(whole, spec, 96) - dequantize(cut, spec, 96)).abs().max()
    assert float(error) < 1e-6


def test_gptq_without_data_says_what_to_do() -> None:
    with pytest.raises(qpass.QpassError, match=r"int4:g32:gptq: gptq needs data: .*calibration=batches"):
        quantize_weight(gaussian(4, 64), parse_spec("int4:g32:gptq"))


# --- scales of columns -------------------------------------------------------------------------------------------------


def with_outliers(tokens: int = 1000, columns: int = 192) -> Tensor:
    """A few columns are thirty times as large as the others, as behind the norms of large models."""
    x = correlated(tokens, columns)
    x[:, ::50] *= 30
    return x


@pytest.mark.parametrize("text", [t for t in FORMATS if t not in ("int8", "int4:tensor", "fp8_e4m3:channel", "mxfp4")])
def test_awq_lowers_the_error_of_the_output(text: str) -> None:
    weight, x = gaussian(64, 192), with_outliers()
    stats = stats_of(x)
    plain, better = (output_error(weight, spec, stats, x) for spec in (text, f"{text}:awq"))
    assert better < 0.8 * plain


def test_awq_and_gptq_go_together() -> None:
    weight, x = gaussian(64, 192), with_outliers()
    stats = stats_of(x)
    errors = {a: output_error(weight, f"int3:g32{a}", stats, x) for a in ("", ":awq", ":gptq", ":awq:gptq")}
    assert errors[":awq:gptq"] < errors[":awq"] < errors[""]
    assert errors[":awq:gptq"] < 1.02 * errors[":gptq"]


def test_awq_leaves_alone_what_gains_nothing() -> None:
    """Columns that are all alike."""
    weight, x = gaussian(64, 192), gaussian(2000, 192, seed=3)
    stats = stats_of(x)
    chosen = quantize_group([weight], parse_spec("int4:g32:awq"), stats)[0].quantized
    assert output_error(weight, "int4:g32:awq", stats, x) <= output_error(weight, "int4:g32", stats, x)
    if chosen.column_scale is not None:
        assert float(chosen.column_scale.max() / chosen.column_scale.min()) < 1.5


def test_weights_that_read_one_input_share_its_scales() -> None:
    q, k, x = gaussian(64, 192), gaussian(16, 192, seed=1), with_outliers()
    first, second = quantize_group([q, k], parse_spec("int4:g32:awq"), stats_of(x))
    assert first.quantized.column_scale is not None
    assert second.quantized.column_scale is not None
    assert torch.equal(first.quantized.column_scale, second.quantized.column_scale)


def test_the_awq_of_the_paper_by_hand() -> None:
    """Of the scales that it may choose from, in float64 and the other way round (W s, x / s), none has a lower error."""
    weight, x = gaussian(40, 64), with_outliers(300, 64)
    spec = parse_spec("int4:g32")
    mine = output_error(weight, "int4:g32:awq", stats_of(x), x)
    wanted = output_error(weight, "int4:g32", None, x)
    for i in range(20):
        s = x.double().abs().mean(0) ** (i / 20) / weight.double().abs().mean(0) ** (1 - i / 20)
        s = s / (s.max() * s.min()).sqrt()
        back = dequantize(quantize((weight * s).float(), spec), spec, 64).double() / s
        wanted = min(wanted, float((x.double() @ (weight - back).T).square().sum()))
    assert mine == pytest.approx(wanted, rel=1e-3)


def activation_error(weight: Tensor, text: str, x: Tensor) -> float:
    """Squared error of x W^T with both quantized, from the stored parts, in float64."""
    spec = parse_spec(text)
    q = quantize_group([weight], spec, stats_of(x))[0].quantized
    assert spec.activations is not None
    bare = Quantized(*q.parts)
    inputs = x if q.column_scale is None else x * q.column_scale
    if q.input_scale is not None:
        inputs = (inputs / q.input_scale).round().clamp(-127, 127) * q.input_scale
    elif not spec.activations.static:
        inputs = fake_quantize(inputs, spec.activations)
    off = inputs.double() @ dequantize(bare, spec, 192).double().T - x.double() @ weight.double().T
    return float(off.square().sum())


@pytest.mark.parametrize("activations", ["int8", "int8:static"])
def test_smooth_removes_most_of_what_outliers_cost(activations: str) -> None:
    weight, x = gaussian(64, 192), with_outliers()
    plain, smooth = (activation_error(weight, f"int8{a}@{activations}", x) for a in ("", ":smooth"))
    assert smooth < 0.3 * plain


# --- HQQ -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int4:g64:zero=float", "int3:g64:zero=float", "int2:g32:zero=float", "int4:g48:zero=float"]
)
def test_hqq_lowers_the_error_that_it_minimizes(text: str) -> None:
    weight = gaussian(32, 192, seed=2) ** 3
    losses = []
    for spec in (parse_spec(text), parse_spec(f"{text}:hqq")):
        off = weight - dequantize(quantize_weight(weight, spec), spec, 192)
        losses.append(float((off.abs() ** 0.7).sum()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4:g64:asym:hqq", "add zero=float"),
        ("int8:smooth", "say how they are"),
        ("int8:smooth:awq@int8", "take one of them"),
        ("int4:zero=float:hqq:search", "take one of them"),
        ("fp8_e4m3:awq", "nothing to search"),
        ("int8@int9", "int8"),
        ("int8@fp32", "leave the part behind @ out"),
        ("int8@int8:gptq", "gptq is for weights"),
        ("int8@int8:tensor", "int8:static"),
        ("int8@nvfp4:static", "static scales are for int8 and fp8"),
        ("int8@int8:rotated", "KV cache"),
        ("int8@int8:mse", "write static before it"),
        ("bf16@int8", "float format"),
        ("int8@int8:scale=fp16", "not"),
    ],
)
def test_combinations_without_a_meaning_are_refused(text: str, says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        parse_spec(text)


@pytest.mark.parametrize("text", ["int8:smooth@int8:static:percentile", "int4:g32:asym:awq:search:gptq@int8:g32",
                                  "int8@int8:asym", "int4:g64:zero=float:hqq", "fp8_e4m3@fp8_e4m3:channel"])  # fmt: skip
def test_a_spec_is_read_as_it_is_written(text: str) -> None:
    assert parse_spec(str(parse_spec(text))) == parse_spec(text)
    assert str(parse_spec(text)).replace(":channel", "") == text.replace(":channel", "")

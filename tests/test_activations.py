"""Quantized activations: what operators compute, what the graph holds, what the compiler makes of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass.numerics import dequantize, fake_quantize
from qpass.ops.activations import multiplies_integers
from qpass.ops.cpu.build import cpu_features
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from qpass.weights import quantize_weight
from tests.models import hf, tokens

WEIGHTS = ["int8", "int8:asym", "int8:tensor", "int4:channel", "int4:channel:asym", "int3:channel"]
INPUTS = ["int8", "int8:asym"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(x: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor | None]:
    made = torch.ops.qpass.quantize_input(x, None, None, text)
    return made[0], made[1], made[2] if len(made) > 2 else None


@pytest.mark.parametrize("rows", [1, 3, 200], ids=lambda n: f"{n}rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("of_input", INPUTS)
def test_integer_linear_is_the_product_of_what_is_stored(
    of_input: str, text: str, dtype: torch.dtype, rows: int
) -> None:
    """Against float64 on the dequantized factors; few rows take another way than many."""
    spec = parse_spec(text)
    weight, x, bias = random(24, 40), random(2, rows, 40, seed=1).to(dtype), random(24, seed=2)
    stored = quantize_weight(weight, spec)
    codes, scale, zero = codes_of(x, of_input)
    with qpass.set_compute("float"):
        y = torch.ops.qpass.integer_linear(codes, scale, zero, *stored.parts, bias, text, dtype)
    exact = (
        fake_quantize(x.float(), parse_spec(of_input)).double() @ dequantize(stored, spec, 40).double().T
        + bias.double()
    )
    assert y.dtype == dtype
    assert y.shape == (2, rows, 24)
    torch.testing.assert_close(
        y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-5 if dtype == torch.float32 else 2e-2
    )


@pytest.mark.parametrize("text", ["int8", "int8:asym", "int8:g32", "fp8_e4m3", "fp8_e4m3:channel", "mxfp8", "int4:g32"])
def test_an_input_comes_back_from_its_codes_as_the_reference_says(text: str) -> None:
    x = random(3, 5, 64)
    back = torch.ops.qpass.round_input(x, None, None, text)
    assert torch.equal(back, fake_quantize(x, parse_spec(text)))
    if text.startswith("int8"):
        codes, scale, zero = codes_of(x, text)
        assert codes.dtype == torch.int8
        assert torch.equal(dequantize(Quantized(codes, scale, zero), parse_spec(text), 64), back)


@pytest.mark.parametrize("text", ["int8:static", "int8:static:asym", "fp8_e4m3:static"])
def test_a_static_scale_is_the_one_that_is_given(text: str) -> None:
    x, scale = random(4, 32), torch.tensor([[0.02]])
    zero = torch.tensor([[-5]], dtype=torch.int8) if "asym" in text else None
    back = torch.ops.qpass.round_input(x, scale, zero, text)
    if "int8" in text:
        offset = 0 if zero is None else -5
        low = -128 if zero is not None else -127
        wanted = ((x / scale).round() + offset).clamp(low, 127) - offset
    else:
        wanted = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(back, wanted * scale, rtol=0, atol=0)


def test_which_products_are_of_integers() -> None:
    yes = ["int8@int8", "int8:asym@int8:static", "int4:channel@int8:asym", "int8:tensor@int8", "int8:smooth@int8"]
    no = ["int8", "int8:g32@int8", "int8@int8:g32", "nf4@int8", "int8@fp8_e4m3", "fp8_e4m3@int8", "int4:g128@int8"]
    assert all(multiplies_integers(parse_spec(t)) for t in yes)
    assert not any(multiplies_integers(parse_spec(t)) for t in no)


class Pair(nn.Module):
    """A norm and two linears of its result, as in front of an attention; then one of what they make."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(97, 64), nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rounded(x: Tensor, text: str) -> Tensor:
    return fake_quantize(x, parse_spec(text))


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["int8@int8", "int8@int8:asym", "int4:g32@int8:g32", "fp8_e4m3@fp8_e4m3:channel", "nf4@int8"]
)
def test_a_model_computes_with_rounded_inputs(text: str) -> None:
    """Against the same written out with weights and inputs that come back from their codes."""
    model, ids = Pair().eval(), tokens(batch=2, length=40)
    weight, _, of_input = text.partition("@")
    spec = parse_spec(weight)
    w = {n: dequantize(quantize_weight(p, spec), spec, p.shape[1]) for n, p in model.named_parameters() if p.dim() == 2}
    quantized = qpass.quantize(Pair().eval(), text, inner="eager")
    with qpass.set_compute("float"):
        y = quantized(ids)
    x = F.embedding(ids, w["table.weight"])
    h = rounded(F.rms_norm(x, (64,), model.norm.weight), of_input)
    inner = F.silu(h @ w["gate.weight"].T) * (h @ w["up.weight"].T)
    wanted = x + rounded(inner, of_input) @ w["down.weight"].T
    error = float((y - wanted).norm() / (wanted - x).norm())
    without = float((y - x - inner @ w["down.weight"].T).norm() / (wanted - x).norm())
    assert error < 1e-3, "a sum in another order may round to the next code"
    assert without > 3 * error, "the input is rounded"


@torch.no_grad()
@pytest.mark.parametrize("text", [
    "int8:smooth@int8:static", "int8@int8:static:asym", "int4:g32:awq@int8:g32",
    *(pytest.param(text, marks=pytest.mark.long) for text in ("int8:smooth@int8", "int4:g32:awq:gptq")),
])  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "bf16", "tied", "experts", "conv1d", "post-norm"])
def test_calibrated_inputs_of_every_kind_of_linear(name: str, text: str) -> None:
    """Close to the float model; closer than rounding to nearest where that is rough."""
    make = {
        "plain": lambda: hf("LlamaForCausalLM", num_key_value_heads=2),
        "bf16": lambda: hf("LlamaForCausalLM", num_key_value_heads=2).bfloat16(),
        "tied": lambda: hf("LlamaForCausalLM", tie_word_embeddings=True, num_key_value_heads=2),
        "experts": lambda: hf("MixtralForCausalLM", num_local_experts=4, num_key_value_heads=2),
        "conv1d": lambda: hf("GPT2LMHeadModel", n_embd=64, n_layer=1, n_head=4),
        "post-norm": lambda: hf(
            "BertForMaskedLM"
        ),  # what a norm makes is also added to the stream: nothing to fold into
    }[name]
    ids = tokens(batch=4, length=24)
    reference, model = make().eval(), make().eval()
    model.load_state_dict(reference.state_dict())
    qpass.quantize(model, text, calibration=[ids], inner="eager")
    with qpass.set_compute("float"):
        got, wanted = model(ids).logits.float(), reference(ids).logits.float()
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < (0.05 if text.startswith("int8") else 0.3)
    seen = [s.input for s in qpass.report(model).sites if s.input is not None]
    assert seen
    assert all(o.tokens > 0 and o.low <= o.low_percentile <= o.high_percentile <= o.high for o in seen)
    assert ("static" in text) == any(o.scale is not None for o in seen)


@torch.no_grad()
def test_with_torch_compile_too() -> None:
    """The weights of `calibrate()` are those of qpass.quantize, scales of inputs and columns among them."""
    ids, text = tokens(batch=4, length=24), "int8:smooth@int8:static"
    model = Pair().eval()
    backend = qpass.QPass(text, inner="eager")
    fast = torch.compile(model, backend=backend)
    with backend.calibrate():
        fast(ids)
    other = qpass.quantize(Pair().eval(), text, calibration=[ids], inner="eager")
    torch.testing.assert_close(fast(ids), other(ids))
    assert "scale" in str(qpass.report(fast))


def test_static_scales_need_data() -> None:
    with pytest.raises(qpass.QpassError, match="static needs data"):
        qpass.quantize(Pair().eval(), "int8@int8:static", inner="eager")


@torch.no_grad()
def test_a_calibrated_weight_is_written_copied_and_saved_whole(tmp_path: Any) -> None:
    """Scales of columns and inputs go where the codes go; a float weight written to it is rounded to the same columns."""
    import copy

    ids = tokens(batch=4, length=24)
    model = qpass.quantize(Pair().eval(), "int8:smooth@int8:static", calibration=[ids], inner="eager")
    weight: Any = model.down.weight
    assert weight.quantized.column_scale is not None
    assert weight.quantized.input_scale is not None
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    for other in (copy.deepcopy(weight), state["down.weight"], weight.clone()):
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.quantized.all_parts, weight.quantized.all_parts, strict=True)
            if a is not None
        )
    wanted = Pair().down.weight
    weight.copy_(wanted * 2)
    steps = weight.quantized.scale * weight.quantized.column_scale
    assert bool(((weight.dequantize() - wanted * 2).abs() <= steps * 0.501).all())


class Twice(nn.Module):
    """One weight with two inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear = nn.Embedding(97, 64), nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.linear(x) + self.linear(x * 30)


@torch.no_grad()
def test_a_weight_with_several_inputs_gets_no_static_scale_of_the_first() -> None:
    ids = tokens(batch=4, length=24)
    model = qpass.quantize(Twice().eval(), "int8@int8:static", calibration=[ids], inner="eager")
    wanted = Twice().eval()(ids)
    assert float((model(ids) - wanted).norm() / wanted.norm()) < 0.02
    assert "input left in float" in str(qpass.report(model))


@torch.no_grad()
def test_a_weight_takes_over_the_values_of_one_that_was_calibrated_otherwise() -> None:
    """Its own scales of columns stay, which other weights share."""
    ids = tokens(batch=4, length=24)
    spec = qpass.Recipe.uniform("int8:smooth@int8")
    model = qpass.quantize(Pair().eval(), spec, calibration=[ids], inner="eager")
    plain: Any = qpass.quantize(Pair().eval(), "int8@int8", inner="eager").gate.weight
    other: Any = plain.detach().clone()
    gate: Any = model.gate.weight
    up, columns = model.up.weight.dequantize(), gate.quantized.column_scale.clone()
    other.spec = gate.spec  # as after loading: the same recipe, but nothing to gain by scaling its columns
    gate.copy_(other)
    torch.testing.assert_close(
        gate.dequantize(), other.dequantize(), rtol=0, atol=float(other.dequantize().abs().max()) / 40
    )
    assert torch.equal(gate.quantized.column_scale, columns)
    assert torch.equal(model.up.weight.dequantize(), up)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_presets(recipe: str) -> None:
    model = qpass.quantize(hf("LlamaForCausalLM", num_key_value_heads=2).eval(), recipe, inner="eager")
    with torch.no_grad():
        model(tokens())
    specs = {s.kind: s.format for s in qpass.report(model).sites if s.format}
    assert specs["ffn"].endswith("@int8:channel" if recipe == "w8a8" else "@int8:g32")
    assert "@" not in specs["embedding"], "rows that are looked up have no input"


@torch.no_grad()
@pytest.mark.skipif(not cpu_features() & {"avx512_vnni", "avx_vnni", "amx_int8"}, reason="this CPU multiplies no int8")
def test_many_rows_are_multiplied_as_integers_and_few_are_not() -> None:
    model = qpass.quantize(Pair().eval(), "int8@int8", inner="eager")
    for length, of_integers in ((512, True), (4, False)):
        ids = tokens(batch=1, length=length)
        model(ids)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            model(ids)
        names = [e.key for e in recorded.key_averages()]
        assert ("aten::_int_mm" in names) is of_integers
        assert not {"aten::addmm", "aten::mm", "aten::linear"} & set(names)


@torch.no_grad()
def test_the_compiler_joins_rounding_with_the_norm_before_it() -> None:
    """One kernel reads the residual stream and writes codes: what it is made of is in its name."""
    from torch._inductor.utils import run_and_get_code

    model = Pair().eval()
    fast = torch.compile(model, backend=qpass.QPass("int8@int8"))
    _, (code, *_) = run_and_get_code(fast, tokens(batch=1, length=16))
    kernels = set(re.findall(r"cpp_fused_\w+", code))
    assert any({"rsqrt", "round", "aminmax"} <= set(name.split("_")) for name in kernels), kernels

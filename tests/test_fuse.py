"""A quantized linear takes in the norm, the scales, the gate and the residual around it; and when it keeps its hands off."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.nn import functional as F

import qpass
from qpass.numerics import fake_quantize
from qpass.sites.fuse import rewrite
from qpass.spec import parse_spec
from tests.models import build, logits_of, tokens

WIDTH = 64


class Model(nn.Module):
    """A norm, a pair of gated linears and one behind them; whatever `compute` makes of them."""

    def __init__(self, compute: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=i == 2) for i in range(3))
        self.wide = nn.Parameter(torch.randn(3 * 32, WIDTH) / 8)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x + 1)


def rms(m: Model, x: Tensor) -> Tensor:
    """As transformers writes it for Llama."""
    kept = x.dtype
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return m.norm * x.to(kept)


def glu(m: Model, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """A feed-forward network: linears of one input are joined there."""
    return m.down(act(m.gate(x)) * m.up(x))


def halves(m: Model, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    first, second = m.gate(x).chunk(2, dim=-1)
    return second * act(first)


def dropped_out(m: Model, x: Tensor) -> Tensor:
    return x + F.dropout(m.down(x), 0.1, training=False)


def norm_read_twice(m: Model, x: Tensor) -> Tensor:
    normed = rms(m, x)
    return m.down(normed) + normed.sum()


def written_before_the_sum(m: Model, x: Tensor) -> Tensor:
    residual = x.clone()
    y = m.down(x)
    residual.mul_(2.0)
    x.mul_(3.0)
    return residual + y + x


def written_before_the_product(m: Model, x: Tensor) -> Tensor:
    normed = rms(m, x)
    x.mul_(3.0)
    return m.down(normed) + x.sum()


def gate_read_beside(m: Model, x: Tensor) -> Tensor:
    gate = F.silu(m.gate(x))
    y = m.down(gate * m.up(x))
    return x + y + y.sum() + gate


def mean_of_something_else(m: Model, x: Tensor) -> Tensor:
    return m.down(m.norm * (x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-5)))


def third_piece(m: Model, x: Tensor) -> Tensor:
    first, second, _ = F.linear(x, m.wide).chunk(3, dim=-1)
    return F.silu(first) * second


def written_after_an_earlier_fusion(m: Model, x: Tensor) -> Tensor:
    h = x + m.down(x)
    normed = rms(m, h)
    h.mul_(2.0)
    return m.gate(normed) + h.sum()


def written_through_a_transpose(m: Model, x: Tensor) -> Tensor:
    h = x * 1.5
    normed = rms(m, h)
    h.transpose(0, 1).mul_(3.0)
    return m.down(normed) + h.sum()


def written_by_relu(m: Model, x: Tensor) -> Tensor:
    h = x * 1.5
    normed = rms(m, h)
    F.relu(h, inplace=True)
    return m.down(normed) + h.sum()


def summed_into_a_buffer(m: Model, x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    torch.add(m.down(x), x, out=buffer)
    return buffer * 2


def rounded_on_the_way(m: Model, x: Tensor) -> Tensor:
    return m.down(m.norm * (torch.ones_like(x) * 2.75).to(torch.int32).to(x.dtype))


#: What is computed -> the names that are around the linears then: norm, eps, column_scale, gate, residual.
FIRES: dict[str, tuple[Callable[[Model, Tensor], Tensor], str]] = {
    "norm, as transformers writes it": (lambda m, x: m.down(rms(m, x)), "norm eps"),
    "torch's rms_norm": (lambda m, x: m.down(F.rms_norm(x, (WIDTH,), m.norm, 1e-6)), "norm eps"),
    "a norm without a weight": (lambda m, x: m.down(F.rms_norm(x, (WIDTH,))), "eps"),
    "a norm by squares": (
        lambda m, x: m.down(m.norm * (torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * x)), "norm eps",
    ),
    "silu": (lambda m, x: x + glu(m, x), "gate=silu; residual"),
    "gelu": (lambda m, x: x + glu(m, x, F.gelu), "gate=gelu; residual"),
    "gelu by tanh": (
        lambda m, x: x + glu(m, x, lambda v: F.gelu(v, approximate="tanh")), "gate=gelu_tanh; residual",
    ),
    "halves of one linear": (halves, "gate=silu"),
    "residual": (lambda m, x: x + m.down(x), "residual"),
    "residual behind idle dropout": (dropped_out, "residual"),
    "residual behind a norm": (lambda m, x: m.down(rms(m, x)) + x, "norm eps residual"),
    "a whole block": (lambda m, x: x + glu(m, rms(m, x)), "norm eps gate=silu; residual"),
}  # fmt: skip
STAYS: dict[str, tuple[Callable[[Model, Tensor], Tensor], str]] = {
    "a norm that something else reads": (norm_read_twice, ""),
    "what a norm reads changes before the product": (written_before_the_product, ""),
    "the summand changes before the sum": (written_before_the_sum, ""),
    "the result is read beside the sum": (lambda m, x: (y := m.down(x)).sum() + (x + y), ""),
    "a summand of another shape": (lambda m, x: m.down(x) + x[:, :1], ""),
    "twice itself": (lambda m, x: (y := m.down(x)) + y, ""),
    "a gate that is no gate": (lambda m, x: x + glu(m, x, torch.tanh), "residual"),
    "the gate behind": (lambda m, x: x + m.down(m.gate(x) * F.silu(m.up(x))), "residual"),
    "the gate is read beside": (gate_read_beside, ""),
    "halves of three": (third_piece, ""),
    "written to after an earlier fusion": (written_after_an_earlier_fusion, "residual"),
    "written to through a transpose": (written_through_a_transpose, ""),
    "written to by relu": (written_by_relu, ""),
    "summed into a buffer": (summed_into_a_buffer, ""),
    "rounded on the way": (rounded_on_the_way, ""),
    "a multiple of the summand": (lambda m, x: torch.add(m.down(x), x, alpha=2), ""),
    "a multiple of eps": (
        lambda m, x: m.down(x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, alpha=2))),
        "",
    ),
    "the mean of something else": (mean_of_something_else, "column_scale"),
    "a norm over two dimensions": (lambda m, x: m.down(F.rms_norm(x, (5, WIDTH))), ""),
    "scaled by a number for each token": (lambda m, x: m.down(x * x.sum(-1, keepdim=True)), ""),
}


def around(node: Node) -> str:
    names = ("norm", "eps", "column_scale", "gate", "residual")
    given = dict(zip(names, node.args[7:], strict=False))
    return " ".join(f"gate={v}" if n == "gate" else n for n, v in given.items() if v not in (None, ""))


def fused(backend: qpass.QPass) -> str:
    linears = [n for n in backend.captures[-1].after.nodes if n.target is torch.ops.qpass.linear.default]
    return "; ".join(a for n in linears if (a := around(n)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*FIRES, *STAYS])
def test_what_is_taken_in(case: str, dtype: torch.dtype, exact_products: None) -> None:
    compute, expected = {**FIRES, **STAYS}[case]
    model, x = Model(compute).eval(), torch.randn(2, 5, WIDTH)
    rounded = Model(compute).eval()
    with torch.no_grad():
        for weight in (rounded.gate.weight, rounded.up.weight, rounded.down.weight, rounded.wide):
            weight.copy_(fake_quantize(weight.to(dtype).float(), parse_spec("int8:channel")))
    model.to(dtype)
    backend = qpass.QPass("int8:channel", inner="eager")
    with torch.no_grad():
        found = torch.compile(model, backend=backend)(x.to(dtype))
        exact = rounded.to(dtype).double()(x.to(dtype).double())
    if dtype == torch.bfloat16:  # scales of columns are float32
        expected = expected.replace("column_scale", "")
    assert fused(backend) == expected
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (found - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torchs_own_eps_is_that_of_float32(dtype: torch.dtype, exact_products: None) -> None:
    """Rows of 1e-3, beside which the eps of a shorter type would be large."""
    model = Model(lambda m, x: m.down(F.rms_norm((x - 1) * 1e-3, (WIDTH,), m.norm))).eval().to(dtype)
    x, backend = torch.randn(2, 5, WIDTH).to(dtype), qpass.QPass("fp32", inner="eager")
    with torch.no_grad():
        found, expected = torch.compile(model, backend=backend)(x), model(x)
    assert fused(backend) == "norm eps"
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=2e-2)


def test_a_summand_that_reads_an_int8_product_of_another_type_stays() -> None:
    """Under autocast the product is bfloat16 and the residual float32."""
    model = Model(lambda m, x: x + m.down(x)).eval()
    backend = qpass.QPass("int8:channel", inner="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(model, backend=backend)(torch.randn(2, 5, WIDTH))
    assert found.dtype == torch.float32
    assert fused(backend) == ""


def test_a_decode_step_of_a_llama_is_four_linears_a_layer_and_nothing_around_them() -> None:
    """The vocabulary reads a slice of the last norm, which is all of it."""
    model = build("llama").eval()
    backend = qpass.QPass("int4", inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(tokens(1, 1), use_cache=False)
    layer = "norm eps; residual; norm eps gate=silu; residual"
    assert fused(backend) == "; ".join([*[layer] * model.config.num_hidden_layers, "norm eps"])
    assert not [n for n in backend.captures[-1].after.nodes if re.match("rsqrt|silu", n.name)]


def test_a_slice_that_leaves_rows_out_keeps_the_norm_before_it() -> None:
    model = build("llama").eval()
    backend = qpass.QPass("int4", inner="eager")
    with torch.no_grad():
        every = torch.compile(model, backend=backend)(tokens(1, 3), use_cache=False).logits
        found = torch.compile(model, backend=backend)(tokens(1, 3), use_cache=False, logits_to_keep=2).logits
    assert not fused(backend).endswith("norm eps")
    torch.testing.assert_close(found, every[:, 1:], rtol=1e-5, atol=1e-5)


def test_column_scales_of_awq_are_taken_in(exact_products: None) -> None:
    model = build("llama").eval()
    exact = build("llama").eval()
    backend = qpass.QPass(dict.fromkeys(("qkv", "attn_out", "ffn"), "int8:channel:awq"), inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        with backend.calibrate():
            compiled(tokens(2, 16), use_cache=False)
        found = logits_of(compiled(tokens(1, 7), use_cache=False))
        expected = logits_of(exact.double()(tokens(1, 7), use_cache=False))
    layer = "norm eps column_scale; column_scale residual; norm eps column_scale gate=silu; column_scale residual"
    assert fused(backend) == "; ".join([layer] * model.config.num_hidden_layers)
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("text", "rows", "dtype", "fires"),
    [
        ("int8:channel", 1, torch.bfloat16, True),
        ("int4:g32:asym", 64, torch.float16, True),
        ("int5:g32:asym", 8, torch.float32, True),
        ("int8:channel", 128, torch.bfloat16, True),
        ("int8:channel", 129, torch.bfloat16, False),
        ("int4:g32:asym", 256, torch.float16, True),
        ("int4:g32:asym", 257, torch.float16, False),
        ("int8:channel", 9, torch.float32, False),
        ("nf4", 1, torch.float32, False),
        ("int4:g40", 1, torch.bfloat16, False),
        ("fp32", 1, torch.bfloat16, False),
    ],
)
def test_on_gpus_it_fires_where_one_kernel_does_it_all(text: str, rows: int, dtype: torch.dtype, fires: bool) -> None:
    """A graph of CUDA tensors, written by hand."""
    graph = Graph()
    x, norm, data = (graph.placeholder(name) for name in ("x", "norm", "data"))
    normed = graph.call_function(F.rms_norm, (x, (WIDTH,), norm, 1e-6))
    y = graph.call_function(torch.ops.qpass.linear.default, (normed, data, None, None, None, None, text))
    graph.output(y)
    with FakeTensorMode():
        for node, shape in ((x, (rows, WIDTH)), (norm, (WIDTH,)), (normed, (rows, WIDTH)), (y, (rows, 32))):
            node.meta["example_value"] = torch.empty(shape, dtype=dtype, device="cuda")
    assert bool(rewrite(graph)) == fires

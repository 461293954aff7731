"""Linears that follow one another are one call on the CPU; and which of them stay apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

import qpass
from qpass.numerics import fake_quantize, quantize
from qpass.ops.cpu.library import bind
from qpass.ops.steps import Step, linears, parse_steps
from qpass.sites.row import join_linears
from qpass.spec import parse_spec
from tests.models import build, tokens

WIDTH = 48
_LINEAR, _LINEARS = torch.ops.qpass.linear.default, torch.ops.qpass.linears.default


class Model(nn.Module):
    """Linears a, b, c and whatever `compute` makes of them."""

    def __init__(self, compute: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=i == 1) for i in range(3))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x + 1)


def layer(m: Model, x: Tensor) -> Tensor:
    """The tail of a layer: a residual that is read twice, a norm between two linears."""
    h = x + m.a(x)
    return h + m.c(m.b(F.rms_norm(h, (WIDTH,), m.norm, 1e-6)))


def read_beside(m: Model, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h).tanh() + h


def read_before_the_next(m: Model, x: Tensor) -> Tensor:
    h = m.a(x)
    doubled = h.relu() * 2
    return m.b(h) + doubled


def read_by_two(m: Model, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h) * m.b(h).tanh()


def two_read_later(m: Model, x: Tensor) -> Tensor:
    first = m.a(x)
    second = m.b(first)
    return m.c(second).tanh() + first + second


def two_rows(m: Model, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    return m.c(m.b(y.tanh())) + y


def written_between(m: Model, x: Tensor) -> Tensor:
    h = m.a(x)
    x.mul_(2)
    return m.b(h) + x


#: What is computed -> the calls that are left.
JOINED: dict[str, tuple[Callable[[Model, Tensor], Tensor], list[str]]] = {
    "two": (lambda m, x: m.b(m.a(x)), ["linears"]),
    "three": (lambda m, x: m.c(m.b(m.a(x))), ["linears"]),
    "the tail of a layer": (layer, ["linears"]),
    "a result that is read later": (read_beside, ["linears"]),
    "two results that are read later": (two_read_later, ["linears", "linear"]),
    "a residual of another row": (two_rows, ["linears", "linears"]),
}
APART: dict[str, tuple[Callable[[Model, Tensor], Tensor], list[str]]] = {
    "one": (lambda m, x: m.a(x), ["linear"]),
    "something between": (lambda m, x: m.b(m.a(x).tanh()), ["linear", "linear"]),
    "the result is read before the next": (read_before_the_next, ["linear", "linear"]),
    "two read the result": (read_by_two, ["linear", "linear", "linear"]),
    "the input is written to between": (written_between, ["linear", "linear"]),
    "as the summand only": (lambda m, x: m.b(x) + m.a(x), ["linear", "linear"]),
}


def calls_of(run: Callable[[], Any]) -> list[str]:
    """The linears that are called through the dispatcher, rows among them, but not those inside of a row."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()

    def parents(event: Any) -> list[str]:
        return [] if event.cpu_parent is None else [event.cpu_parent.name, *parents(event.cpu_parent)]

    events = [e for e in profile.events() if e.name.startswith("qpass::linear") and not e.name.endswith("_checked")]
    return [e.name.removeprefix("qpass::") for e in events if "qpass::linears" not in parents(e)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*JOINED, *APART])
def test_what_is_joined(case: str, dtype: torch.dtype, exact_products: None) -> None:
    compute, expected = {**JOINED, **APART}[case]
    model, x = Model(compute).eval().to(dtype), torch.randn(2, 5, WIDTH).to(dtype)
    exact = Model(compute).eval()
    with torch.no_grad():
        for linear in (exact.a, exact.b, exact.c):
            linear.weight.copy_(fake_quantize(linear.weight.to(dtype).float(), parse_spec("int8:channel")))
        compiled = torch.compile(model, backend=qpass.QPass("int8:channel", inner="eager"))
        found = compiled(x)
        reference = exact.to(dtype).double()(x.double())
        assert calls_of(lambda: compiled(x)) == expected
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (found - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_decode_step_of_a_llama_is_a_row_between_two_attentions(compiler: str) -> None:
    """And one linear before the first of them; the last norm, of which a slice is read, is no linear's."""
    model = build("llama").eval()
    layers = model.config.num_hidden_layers
    compiled = torch.compile(model, backend=qpass.QPass("int4", inner=compiler))
    with torch.no_grad():
        compiled(tokens(1, 1), use_cache=False)
        found = calls_of(lambda: compiled(tokens(1, 1), use_cache=False))
    assert found == ["linear", *["linears"] * layers, "linear"]


@pytest.mark.long
def test_inductors_wrapper_in_cpp_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes lists of tensors, and takes no list back but through Python."""
    model = build("llama").eval()
    found = []
    for cpp in (False, True):
        monkeypatch.setattr("torch._inductor.config.cpp_wrapper", cpp)
        torch._dynamo.reset()
        cache = qpass.KVCache(model.config, 16, "int8")
        compiled = torch.compile(model, backend=qpass.QPass("int4"))
        with torch.no_grad():
            for _ in range(3):
                logits = compiled(tokens(1, 1), past_key_values=cache, use_cache=True).logits
        found.append(logits)
    torch.testing.assert_close(*found)


def test_linears_of_other_devices_stay() -> None:
    graph = Graph()
    x, data = graph.placeholder("x"), graph.placeholder("data")
    y = graph.call_function(_LINEAR, (x, data, None, None, None, None, "int8:channel"))
    z = graph.call_function(_LINEAR, (y, data, None, None, None, None, "int8:channel"))
    graph.output(z)
    for node in (x, data, y, z):
        node.meta["example_value"] = torch.empty(4, 4, device="meta")
    module = GraphModule(nn.Module(), graph)
    join_linears(module)
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [_LINEAR, _LINEAR]


def test_a_diff_shows_the_linears() -> None:
    backend = qpass.QPass("int8:channel", inner="eager")
    with torch.no_grad():
        torch.compile(Model(layer).eval(), backend=backend)(torch.randn(2, WIDTH))
    nodes: list[Node] = list(backend.captures[-1].after.nodes)
    assert sum(n.target is _LINEAR for n in nodes) == 3
    assert not any(n.target is _LINEARS for n in nodes)


# --- the operator -----------------------------------------------------------------------------------------------------


def parts(n: int, k: int, spec: str) -> list[Tensor]:
    return [p for p in quantize(torch.randn(n, k) / k**0.5, parse_spec(spec)).parts if p is not None]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(
    ("spec", "letters"), [("int8:channel", "ds"), ("int4:g32:asym", "dsz"), ("nf4:dq", "dso"), ("bf16", "d")]
)
def test_without_python_it_gives_what_it_gives_with(spec: str, letters: str, rows: int, exact_products: None) -> None:
    torch.manual_seed(0)
    assert bind() is None
    x, residual, norm = torch.randn(rows, 70), torch.randn(rows, 33), torch.rand(33)
    steps = (
        Step(spec, letters + "r"),
        Step(spec, letters + "bn", 1e-5, "silu", kept=True),
        Step(spec, letters, residual=0),
        Step("fp32", "dc"),
    )
    tensors = [
        *parts(33, 70, spec), residual, *parts(46, 33, spec), torch.randn(46), norm, *parts(33, 23, spec),
        torch.randn(7, 33), torch.rand(33),
    ]  # fmt: skip
    text = "|".join(map(str, steps))
    torch.ops.qpass.linears(x, tensors, text)  # Python says with what kernels calls like this one are served
    found = torch.ops.qpass.linears(x, tensors, text)
    assert [tuple(y.shape) for y in found] == [(rows, 7), (rows, 23)]
    torch.testing.assert_close(found, linears(x, tensors, text), rtol=0, atol=0)
    in_double = linears(x.double(), tensors, text)
    for y, reference in zip(found, in_double, strict=True):
        assert (y - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize(
    "step",
    [
        Step("int8:channel", "ds"),
        Step("nf4:dq", "dsobncr", 1e-12, "gelu_tanh", None, True),
        Step("int4:g32:asym:scale=fp16", "dsz", 0.1, "", 11),
    ],
    ids=str,
)
def test_text_of_a_step_is_read_back(step: Step) -> None:
    other = replace(step, kept=False)
    assert parse_steps(f"{step}|{other}") == (step, other)
    assert str(step).count(";") == len(astuple(step)) - 1


@pytest.mark.parametrize("text", ["", "int8:channel", "int8:channel;ds;x;;;1", "int8:channel;ds;;;first;1"])
def test_text_that_is_no_step_is_refused(text: str) -> None:
    with pytest.raises(qpass.QpassError, match="are not written as Step says"):
        parse_steps(text)


def test_two_kept_results_are_refused() -> None:
    with pytest.raises(qpass.QpassError, match="keep more than one result beside the last"):
        parse_steps("|".join([str(Step("int8:channel", "ds", kept=True))] * 2))


def test_tensors_that_no_step_names_are_refused() -> None:
    x, tensors, text = torch.randn(2, 32), parts(8, 32, "int8:channel"), str(Step("int8:channel", "ds"))
    bind()
    assert [tuple(y.shape) for y in torch.ops.qpass.linears(x, tensors, text)] == [(2, 8), (0,)]
    for wrong in (tensors[:1], [*tensors, x]):
        with pytest.raises(qpass.QpassError, match="tensors for steps that name 2"):
            linears(x, wrong, text)
        with pytest.raises(RuntimeError, match="tensors for steps"):
            torch.ops.qpass.linears(x, wrong, text)

"""Operators that follow one another are one call on the CPU; and which of them stay apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F
from transformers.cache_utils import StaticCache

import qpass
from qpass.numerics import fake_quantize, quantize
from qpass.ops.bundle import bundle
from qpass.ops.cpu.library import bind, planned_rows
from qpass.ops.row import Call, Like, Row, parse_row, renumbered, types_of
from qpass.ops.row import run as in_python
from qpass.sites.row import _OPERATORS, join_calls
from qpass.spec import parse_spec
from tests.models import build, tokens

WIDTH = 48
_LINEAR, _ROW = torch.ops.qpass.linear.default, torch.ops.qpass.row.default


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


def reshaped(m: Model, x: Tensor) -> Tensor:
    """Heads of half the width, apart and together again: no data moves if there is one token."""
    heads = m.a(x).view(*x.shape[:-1], 2, -1).transpose(-2, -3).contiguous()
    return m.b(heads.transpose(-2, -3).reshape(x.shape))


def a_piece(m: Model, x: Tensor) -> Tensor:
    first, second = m.a(x).chunk(2, -1)
    return m.b(first.repeat(1, 1, 2)) + second.sum()


def a_view_is_read(m: Model, x: Tensor) -> Tensor:
    h = m.a(x).view(x.shape[0], -1, WIDTH)
    return m.b(h).tanh() + h


def another_is_written(m: Model, x: Tensor) -> Tensor:
    h, other = m.a(x), torch.zeros(3)
    other.add_(1)
    return m.b(h) + other.sum()


def beside(m: Model, x: Tensor) -> Tensor:
    """As attention and feed-forward of a layer in parallel: the last reads both others."""
    first, second = m.a(x), m.b(x * 2)
    return (m.c(first) + second) * second


#: What is computed -> the calls that are left.
JOINED: dict[str, tuple[Callable[[Model, Tensor], Tensor], list[str]]] = {
    "two": (lambda m, x: m.b(m.a(x)), ["row"]),
    "three": (lambda m, x: m.c(m.b(m.a(x))), ["row"]),
    "the tail of a layer": (layer, ["row"]),
    "a result that is read later": (read_beside, ["row"]),
    "two results that are read later": (two_read_later, ["row", "linear"]),
    "a residual of another row": (two_rows, ["row", "row"]),
    "two read the result": (read_by_two, ["row"]),
    "as the summand only": (lambda m, x: m.b(x) + m.a(x), ["row"]),
    "other memory is written to between": (another_is_written, ["row"]),
    "another beside it, and their sum": (beside, ["linear", "row"]),
}
APART: dict[str, tuple[Callable[[Model, Tensor], Tensor], list[str]]] = {
    "one": (lambda m, x: m.a(x), ["linear"]),
    "something between": (lambda m, x: m.b(m.a(x).tanh()), ["linear", "linear"]),
    "the result is read before the next": (read_before_the_next, ["linear", "linear"]),
    "the input is written to between": (written_between, ["linear", "linear"]),
    "data moves between": (reshaped, ["linear", "linear"]),
    "a piece that is copied": (a_piece, ["linear", "linear"]),
    "a view that is read elsewhere": (a_view_is_read, ["linear", "linear"]),
}


def calls_of(run: Callable[[], Any]) -> list[str]:
    """The linears, attentions and rows that are called through the dispatcher, but not those inside of a row."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()

    def parents(event: Any) -> list[str]:
        return [] if event.cpu_parent is None else [event.cpu_parent.name, *parents(event.cpu_parent)]

    events = [e for e in profile.events() if e.name in ("qpass::linear", "qpass::row", "qpass::attention")]
    return [e.name.removeprefix("qpass::") for e in events if "qpass::row" not in parents(e)]


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


def test_no_data_moves_where_there_is_one_token(exact_products: None) -> None:
    model, x = Model(reshaped).eval(), torch.randn(2, 1, WIDTH)
    compiled = torch.compile(model, backend=qpass.QPass("int8:channel", inner="eager"))
    with torch.no_grad():
        found = compiled(x)
        assert calls_of(lambda: compiled(x)) == ["row"]
        apart = torch.compile(
            Model(lambda m, x: m.b(m.a(x))).eval(), backend=qpass.QPass("int8:channel", inner="eager")
        )
        assert torch.equal(found, apart(x))


def cache_of(model: Any, kind: str, capacity: int = 16) -> Any:
    if kind == "float":
        return StaticCache(model.config, max_cache_len=capacity)
    return qpass.KVCache(model.config, capacity, kind)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3:channel", "int4:g16:asym:rotated", "float"])
def test_a_decode_step_of_a_llama_is_one_row(
    kind: str, batch: int, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what its operators give one by one, at each step."""
    model = build("llama").eval()

    def steps() -> tuple[list[Tensor], list[str]]:
        torch._dynamo.reset()
        cache = cache_of(model, kind)
        compiled = torch.compile(model, backend=qpass.QPass("int4", inner=compiler))

        def step(count: int) -> Tensor:
            return compiled(tokens(batch, count), past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]

        with torch.no_grad():
            return [step(count) for count in (3, 1, 1, 1, 1, 1)], calls_of(lambda: step(1))

    before = planned_rows()
    logits, calls = steps()
    assert planned_rows() > before  # the last steps are the kernels and nothing else
    monkeypatch.setattr("qpass.backend.join_calls", lambda graph_module: None)
    one_by_one, _ = steps()
    assert calls == ["row"]
    torch.testing.assert_close(logits, one_by_one, rtol=1e-5, atol=1e-5)


@dataclass
class AppendRow:
    """A linear, and rotated keys and values of it appended to a cache: gives `gives`, counted from the linear's result on.

    `bundled`: the linear's weight is given as one tensor."""

    gives: tuple[int, ...]
    bundled: bool = False
    width: int = 16
    heads: int = 2

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        n, w, h = 3 * self.heads * self.width, self.width, self.heads
        self.weight = [p for p in quantize(torch.randn(n, 24) / 5, parse_spec("int8:channel")).parts if p is not None]
        k, v, length, y = (5, 6), (7, 8), 9, 10
        views = [Call("view", (y, (1, h, 1, w), (n, w, n, 1), i * h * w)) for i in range(3)]
        append = Call(
            "append_rotated", (k, v, length, y + 1, y + 2, y + 3, 3, 4, "int8:channel", "int8:channel", None, None)
        )
        first = Call("linear", (0, 1, 2, None, None, None, "int8:channel", None, None, None, "", None))
        row = Row((first, *views, append), tuple(y + g for g in self.gives))
        self.bundle = None
        if self.bundled:
            self.bundle = bundle(self.weight)
            row = replace(renumbered(row, [2, 0, 1]), holds=tuple(map(Like.of, self.weight)))
        self.text = str(row)

    def given(self, x: Tensor, angles: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The bundle and the other inputs."""
        return self.bundle, [x, *([] if self.bundled else self.weight), *angles]

    def cache(self) -> list[Tensor]:
        """Parts of keys and of values, and the length."""
        parts = [torch.zeros(1, self.heads, 12, self.width, dtype=torch.int8), torch.zeros(1, self.heads, 12, 1)]
        return [*parts, *(p.clone() for p in parts), torch.tensor(0)]

    def steps(self, run: Callable[..., Any], trouble: int) -> list[Tensor]:
        """Results of six steps, and the cache; at step `trouble` the keys are no numbers, though the linear's result is."""
        cache, results = self.cache(), list[Tensor]()
        generator = torch.Generator().manual_seed(1)
        for i in range(6):
            x = torch.randn(1, 1, 24, generator=generator)
            angles = torch.full((2, 1, 1, 1, self.width), float("nan") if i == trouble else 0.5)
            results += run(*self.given(x, angles), cache, self.text)
        return [*results, *cache]


@pytest.mark.parametrize("gives", [(5, 6), (0, 5), (5,)], ids=["queries and keys", "the linear and queries", "queries"])
@pytest.mark.parametrize("bundled", [False, True], ids=["apart", "bundled"])
@pytest.mark.parametrize("trouble", range(6))
def test_a_call_that_a_kernel_gives_up_changes_no_other(trouble: int, bundled: bool, gives: tuple[int, ...]) -> None:
    """Before there is a plan, while it is made, and when it runs."""
    assert bind() is None
    row = AppendRow(gives, bundled)
    before = planned_rows()
    found = row.steps(torch.ops.qpass.row, trouble)
    assert planned_rows() > before
    torch.testing.assert_close(found, row.steps(in_python, trouble), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_threads_share_a_row() -> None:
    assert bind() is None
    row = AppendRow((5, 6))
    expected = row.steps(in_python, -1)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: row.steps(torch.ops.qpass.row, -1), range(40)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_a_row_that_finds_its_cache_full_says_so_and_changes_nothing(kind: str) -> None:
    model = build("llama").eval()
    cache = cache_of(model, kind, 7)
    compiled = torch.compile(model, backend=qpass.QPass("int4", inner="eager"))
    with torch.no_grad():
        for n in (2, 1, 1, 1, 1, 1):
            compiled(tokens(1, n), past_key_values=cache, use_cache=True)
        before = [t.clone() for t in stored(cache)]
        with pytest.raises(qpass.QpassError, match=r"too short|has no position 7"):
            compiled(tokens(1, 1), past_key_values=cache, use_cache=True)
    assert all(torch.equal(a, b) for a, b in zip(before, stored(cache), strict=True))


def test_what_is_no_number_goes_the_way_it_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layer, where the kernel that makes codes of keys gives up; the others have written to their caches by then."""

    def after_numbers() -> list[Tensor]:
        torch._dynamo.reset()
        model = build("llama").eval()
        cache = cache_of(model, "int8")
        compiled = torch.compile(model, backend=qpass.QPass("int4", inner="eager"))
        with torch.no_grad():
            for _ in range(5):
                compiled(tokens(1, 1), past_key_values=cache, use_cache=True)
            model.model.layers[-1].input_layernorm.weight[0] = float("nan")
            logits = compiled(tokens(1, 1), past_key_values=cache, use_cache=True).logits
        assert bool(logits.isnan().any())
        return [logits, *stored(cache), *(layer.cumulative_length for layer in cache.layers)]

    found = after_numbers()
    monkeypatch.setattr("qpass.backend.join_calls", lambda graph_module: None)
    torch.testing.assert_close(found, after_numbers(), rtol=1e-5, atol=1e-5, equal_nan=True)


def stored(cache: Any) -> list[Tensor]:
    """What holds the keys and values of a cache."""
    quantized = hasattr(cache.layers[0], "k")
    return [t for c in cache.layers for t in ((*c.k.parts, *c.v.parts) if quantized else (c.keys, c.values))]


@pytest.mark.long
def test_inductors_wrapper_in_cpp_calls_it() -> None:
    """It passes lists of tensors, and takes no list back but through Python."""
    model = build("llama").eval()
    found = []
    for cpp in (False, True):
        torch._dynamo.reset()
        cache = qpass.KVCache(model.config, 16, "int8")
        compiled = torch.compile(model, backend=qpass.QPass("int4"))
        # patch, for what monkeypatch takes back is gone from torch's config
        with torch.no_grad(), torch._inductor.config.patch(cpp_wrapper=cpp):
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
    join_calls(module)
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [_LINEAR, _LINEAR]


def test_a_diff_shows_the_linears() -> None:
    backend = qpass.QPass("int8:channel", inner="eager")
    with torch.no_grad():
        torch.compile(Model(layer).eval(), backend=backend)(torch.randn(2, WIDTH))
    nodes: list[Node] = list(backend.captures[-1].after.nodes)
    assert sum(n.target is _LINEAR for n in nodes) == 3
    assert not any(n.target is _ROW for n in nodes)


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("spec", ["int8:channel", "int4:g32:asym", "nf4:dq", "bf16"])
def test_without_python_it_gives_what_it_gives_with(spec: str, rows: int, exact_products: None) -> None:
    torch.manual_seed(0)
    assert bind() is None
    inputs = [
        torch.randn(rows, 70),
        torch.randn(rows, 33),
        torch.rand(33),
        torch.randn(46),
        torch.randn(7, 33),
        torch.rand(33),
    ]
    x, residual, norm, bias, last, scale = range(6)
    weights = []
    for n, k in ((33, 70), (46, 33), (33, 23)):
        stored = quantize(torch.randn(n, k) / k**0.5, parse_spec(spec)).parts
        weights.append(tuple(None if p is None else len(inputs) + i for i, p in enumerate(stored)))
        inputs += [torch.empty(0) if p is None else p for p in stored]
    first, second, third = (len(inputs) + i for i in (0, 1, 2))
    row = Row(
        (
            Call("linear", (x, *weights[0], None, spec, None, None, None, "", residual)),
            Call("linear", (first, *weights[1], bias, spec, norm, 1e-5, None, "silu", None)),
            Call("linear", (second, *weights[2], None, spec, None, None, None, "", first)),
            Call("view", (third, (rows, 1, 33), (33, 33, 1), 0)),
            Call("linear", (third + 1, last, None, None, None, None, "fp32", None, None, scale, "", None)),
        ),
        (third + 2, second),
    )
    torch.ops.qpass.row(None, inputs, [], str(row))  # Python says with what kernels calls like this one are served
    found = torch.ops.qpass.row(None, inputs, [], str(row))
    assert [tuple(y.shape) for y in found] == [(rows, 1, 7), (rows, 23)]
    torch.testing.assert_close(found, in_python(None, inputs, [], str(row)), rtol=0, atol=0)
    in_double = in_python(None, [t.double() if i in (x, residual) else t for i, t in enumerate(inputs)], [], str(row))
    for y, reference in zip(found, in_double, strict=True):
        assert (y - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_calls_like_earlier_ones_are_the_kernels_and_nothing_else() -> None:
    """Until the inputs, or how products are computed, are others; then again."""
    assert bind() is None
    spec = "int8:channel"
    weights = [
        p for n in (40, 48) for p in quantize(torch.randn(n, 88 - n) / 7, parse_spec(spec)).parts if p is not None
    ]
    calls = [
        Call("linear", (x, w, w + 1, None, None, None, spec, None, None, None, "", None)) for x, w in ((0, 1), (5, 3))
    ]
    text = str(Row(tuple(calls), (6,)))

    def check(rows: int, settled: bool) -> None:
        x, before = torch.randn(rows, 48), planned_rows()
        found, _ = torch.ops.qpass.row(None, [x, *weights], [], text)
        expected, _ = in_python(None, [x, *weights], [], text)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert planned_rows() - before == settled

    for rows in (1, 3, 1):
        torch.ops.qpass.row(None, [torch.randn(rows, 48), *weights], [], text)
        torch.ops.qpass.row(None, [torch.randn(rows, 48), *weights], [], text)
        check(rows, True)
        check(rows, True)
    check(2, False)
    with qpass.set_compute("int8"):
        check(2, False)
        check(2, False)
        check(2, True)


@pytest.mark.parametrize(
    "row",
    [
        Row((Call("linear", (0, 1, 2, None, None, None, "int8:channel", None, None, None, "", None)),), (3,)),
        Row(
            (Call("view", (4, (1, 2), (2, 1), 7)), Call("append", ((0, 1), (2,), 3, 4, 5, "int8", "int8", None, 6))),
            (7, 8),
        ),
        Row((Call("linear", (0, 1, 2, 3, 4, 5, "nf4:dq", 6, 1e-12, 7, "gelu_tanh", 8)),), (9,)),
        Row(
            (Call("linear", (2, 0, 1, None, None, None, "int8:channel", None, None, None, "", None)),),
            (3,),
            (Like("int8", (4, 8)), Like("float32", ())),
        ),
    ],
    ids=["little is given", "views and lists", "all is given", "a bundle"],
)
def test_text_of_a_row_is_read_back(row: Row) -> None:
    assert parse_row(str(row)) == row


#: Text -> why it is none of a row.
WRONG = {
    "": "not end with one or two registers",
    "linear;0;1|gives;2": "not written as Call says",
    "tanh;0|gives;1": "no operator 'tanh'",
    "view;x;1;1;0|gives;1": "not written as Call says",
    "view;0;1;1;0|gives": "not end with one or two registers",
    "view;0;1;1;0|gives;1;1;1": "not end with one or two registers",
    "view;0;1;1;0|returns;1": "not end with one or two registers",
}


@pytest.mark.parametrize(("text", "why"), WRONG.items(), ids=[t or "nothing" for t in WRONG])
def test_text_that_is_no_row_is_refused(text: str, why: str) -> None:
    with pytest.raises(qpass.QpassError, match=why):
        parse_row(text)


@pytest.mark.parametrize(
    "text",
    ["view;1;1;1;0|gives;1", "view;0;1;1;0|gives;2", "tanh;0|gives;1", "view;0;1|gives;1", "", "view;;1;1;0|gives;1"],
)
def test_registers_and_calls_that_there_are_not_are_refused_without_python_too(text: str) -> None:
    assert bind() is None
    with pytest.raises(RuntimeError, match=r"qpass::row|Error\("):
        torch.ops.qpass.row(None, [torch.ones(1)], [], text)


def test_cpp_knows_the_operators_as_their_schemas_say() -> None:
    """Names, arguments and numbers of results, as row.h lists them."""
    source = (Path(qpass.__file__).parent / "ops/cpu/row.h").read_text()
    known = re.findall(r'\{"(\w+)", Operator::\w+, (\d), "(\w+)"\}', source)
    letters = {
        "Tensor": "t",
        "Optional[Tensor]": "o",
        "List[Tensor]": "l",
        "str": "s",
        "int": "i",
        "int[]": "i",
        "bool": "i",
    }
    letters |= {"float": "f", "Optional[float]": "f"}
    assert {name for name, _, _ in known} == {"view", "typed", *_OPERATORS.values()}
    for name, results, arguments in known:
        assert "".join(letters[kind] for kind in types_of(name)) == arguments
        if name in _OPERATORS.values():
            assert len(getattr(torch.ops.qpass, name).default._schema.returns) == int(results)

"""What is taken for granted of a quantized module, in the place of Dynamo's guards on it; and that changes are seen."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass import structure
from qpass.backend import QPass
from qpass.graph.torch_private import backend_of
from qpass.ops.cpu.library import bind
from qpass.structure import Structure
from tests.models import build, logits_of, tokens
from tests.test_backend import INT8, dequantized_copy

IDS = tokens()
WATCHED = pytest.mark.skipif(not structure._IS_SO, reason=f"Python {sys.version}: versions of dicts cannot be read")


class Block(nn.Module):
    """A linear behind a norm; a constant, a switch and a function."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        self.factor, self.gate = 2.0, True

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x)) * self.factor * self.scale
        y = F.silu(y) if self.gate else y
        return y + 1 if hasattr(self, "shifted") else y


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Other(Block):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 3


def _exchange_class(model: Any) -> None:
    model.blocks[1].__class__ = Other


def _add_block(model: Any) -> None:
    model.blocks.append(model.blocks[0])


def _patch_class(model: Any) -> None:
    Block.scale = 3.0


def _repeat_bias(model: Any) -> None:
    bias = model.blocks[1].linear.bias
    bias.data = bias.data[:1].expand(16)


def _exchange_forward(model: Any) -> None:
    model.blocks[1].forward = lambda x: x * 5


CHANGES: dict[str, Callable[[Any], object]] = {
    "a constant": lambda m: setattr(m.blocks[1], "factor", 3.0),
    "a constant of another type": lambda m: setattr(m.blocks[1], "factor", 2),
    "a switch": lambda m: setattr(m.blocks[0], "gate", False),
    "a new attribute": lambda m: setattr(m.blocks[1], "shifted", True),
    "the constant of a norm": lambda m: setattr(m.blocks[1].norm, "eps", 0.5),
    "one module more": _add_block,
    "one module less": lambda m: m.blocks.pop(1),
    "the order of modules": lambda m: m.blocks.insert(0, m.blocks.pop(1)),
    "a module": lambda m: m.blocks.__setitem__(1, nn.Tanh()),
    "a float Parameter": lambda m: setattr(m.blocks[1].norm, "weight", nn.Parameter(torch.full((16,), 2.0))),
    "the layout of a float Parameter": _repeat_bias,
    "contents of a float Parameter": lambda m: m.blocks[1].norm.weight.data.mul_(2),
    "no Parameter": lambda m: setattr(m.blocks[1].linear, "bias", None),
    "a class": _exchange_class,
    "an attribute of a class": _patch_class,
    "a method of an instance": _exchange_forward,
}


@pytest.fixture(autouse=True)
def _restored() -> Any:
    yield
    Block.scale = 1.0


def in_float(model: nn.Module) -> nn.Module:
    """A copy of a quantized model that multiplies by its dequantized weights."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize())  # type: ignore[operator]
    return plain


@pytest.mark.parametrize("way", ["watched", "guarded"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changes_is_seen(change: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Dynamo guards it or qpass looks."""
    monkeypatch.setattr(structure, "_IS_SO", structure._IS_SO and way == "watched")
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    before = model(x)
    torch.testing.assert_close(before, in_float(model)(x), rtol=1e-5, atol=1e-5)
    CHANGES[change](model)
    after = in_float(model)(x)
    assert torch.allclose(before, after) == (change == "a constant of another type")
    for _ in range(2):
        torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)


def _captured(model: nn.Module) -> list[Any]:
    backend = backend_of(model)
    assert isinstance(backend, QPass)
    return backend.captures


SAME: dict[str, Callable[[Any, Any], object]] = {
    "the same constant": lambda m, other: setattr(m.blocks[1], "factor", 2.0),
    "training": lambda m, other: m.eval(),
    "another QTensor": lambda m, other: setattr(m.blocks[1].linear, "weight", other.blocks[0].linear.weight),
    "to where it is": lambda m, other: m.to("cpu"),
}


@WATCHED
@pytest.mark.parametrize("change", SAME)
@torch.no_grad()
def test_what_changes_nothing_makes_no_new_graph(change: str) -> None:
    x = torch.randn(3, 16)
    model, other = (qpass.quantize(Model().eval(), "int8", inputs=x, inner="eager") for _ in range(2))
    model(x)
    captures = len(_captured(model))
    SAME[change](model, other)
    torch.testing.assert_close(model(x), in_float(model)(x), rtol=1e-5, atol=1e-5)
    assert len(_captured(model)) == captures


@WATCHED
@torch.no_grad()
def test_what_changes_often_is_left_to_dynamo() -> None:
    """Which remembers the graphs of each state."""
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    results, made = [], []
    for i in range(8):
        model.blocks[0].gate = i % 2 == 0
        results.append(model(x))
        made.append(len(_captured(model)))
    assert made[-1] == made[-4]
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % 2])


@WATCHED
@torch.no_grad()
def test_guards_on_modules_and_their_parameters_are_left_out_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, bool]] = []
    needed = structure.needed_guards

    def look(of: Any, guards: Any) -> list[bool]:
        flags = needed(of, guards)
        seen.extend((g.guard_type, g.name, keep) for g, keep in zip(guards, flags, strict=True))
        return flags

    monkeypatch.setattr("qpass.finish.needed_guards", look)
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    model(IDS)
    kept = [(kind, name) for kind, name, keep in seen if keep and "._modules" in name and "type(" not in name]
    kept = [(kind, name) for kind, name in kept if not kind.endswith("HOOKS_DICT") and "__class__" not in name]
    tensors = [name for kind, name in kept if kind == "TENSOR_MATCH"]
    assert [name.split("'")[-2] for name in tensors] == ["inv_freq"]  # a buffer
    assert not [name for kind, name in kept if kind in ("TYPE_MATCH", "CONSTANT_MATCH", "NOT_PRESENT_IN_GENERIC_DICT")]
    names = [name for _, name, keep in seen if keep]
    assert any(name == "args[1]" for name in names)
    assert any(".config" in name for name in names)


@WATCHED
@torch.no_grad()
def test_parameters_are_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    run = qpass.backend.run_as_inference
    monkeypatch.setattr(qpass.backend, "run_as_inference", lambda *a: passed.append(len(a) - 3) or run(*a))  # type: ignore[func-returns-value]
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    model(IDS)
    assert passed == [2]  # ids, and the frequencies of the rotary embedding, a buffer


@torch.no_grad()
def test_parts_of_a_module_in_fragments_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame of a block may be that of another."""

    def forward(self: Model, x: Tensor) -> Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x

    monkeypatch.setattr(Model, "forward", forward)
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    for _ in range(2):
        torch.testing.assert_close(model(x), in_float(model)(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_module_in_one_of_its_own_class() -> None:
    class Nested(nn.Module):
        """Itself, at the end."""

        def __init__(self, depth: int) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.inner = Nested(depth - 1) if depth else nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(self.linear(x))
            return y

    torch.manual_seed(0)
    x = torch.randn(3, 16)
    model = qpass.quantize(Nested(1), "int8", inputs=x, inner="eager")
    torch.testing.assert_close(model(x), in_float(model)(x), rtol=1e-5, atol=1e-5)
    model.inner.linear.bias = nn.Parameter(torch.ones(16))
    torch.testing.assert_close(model(x), in_float(model)(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_models_of_one_class_do_not_mix() -> None:
    models = [qpass.quantize(build("llama", seed=s), "int8", inner="eager") for s in (0, 1)]
    expected = [logits_of(dequantized_copy(build("llama", seed=s), lambda name: INT8)(IDS)) for s in (0, 1)]
    for i in (0, 1, 0, 1):
        torch.testing.assert_close(logits_of(models[i](IDS)), expected[i], rtol=1e-5, atol=1e-5)


class Linked(nn.Module):
    """Calls another one of its class as a frame of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(int(factor))
        self.linear, self.factor, self.others = nn.Linear(16, 16), factor, list[nn.Module]()

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        y = self.linear(x) * self.factor
        return _call(self.others[0], y) if deep else y


@torch._dynamo.disable(recursive=False)
def _call(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


@torch.no_grad()
def test_a_graph_is_of_one_module_and_not_of_its_class() -> None:
    x = torch.randn(3, 16)
    model = Linked(2.0)
    model.others.append(Linked(5.0))
    model = qpass.quantize(model, "int8", inputs=x, inner="eager")
    model(x)
    other = in_float(qpass.quantize(Linked(5.0), "int8", inputs=x, inner="eager"))  # as its capture quantizes it
    torch.testing.assert_close(model(x, True), other(in_float(model)(x)), rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """One weight at two places."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(x)))
        return y


@pytest.mark.parametrize("name", ["a", "b"])
@torch.no_grad()
def test_a_tied_weight_is_exchanged_at_one_place(name: str) -> None:
    x = torch.randn(3, 16)
    model, other = (qpass.quantize(Tied(seed), "int8", inputs=x, inner="eager") for seed in (0, 1))
    model(x)
    getattr(model, name).weight = other.a.weight
    torch.testing.assert_close(model(x), in_float(model)(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_whether_a_parameter_wants_its_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Model, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return x * 2 if self.blocks[0].norm.weight.requires_grad else x  # type: ignore[union-attr,operator]

    monkeypatch.setattr(Model, "forward", forward)
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    before = model(x)
    model.blocks[0].norm.weight.requires_grad_(False)
    torch.testing.assert_close(model(x) * 2, before)


@WATCHED
@torch.no_grad()
def test_an_attribute_that_no_graph_has_read_makes_no_new_one() -> None:
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    model(x)
    for i in range(3):
        model.note = model.blocks[0].step = i
        model(x)
    assert len(_captured(model)) == 1


@torch.no_grad()
def test_it_is_a_part_of_what_is_compiled_around_it() -> None:
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), in_float(model)(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_threads_call_while_another_model_of_the_class_changes() -> None:
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    others = [qpass.quantize(Model(), "int8", inputs=x, inner="eager") for _ in range(4)]
    expected = model(x)

    def change(other: Any) -> None:
        other(x)
        other.blocks[1].factor = 3.0
        torch.testing.assert_close(other(x), in_float(other)(x), rtol=1e-5, atol=1e-5)

    def read(_: Any) -> None:
        for _ in range(300):
            assert torch.equal(model(x), expected)

    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        with_grad_off = torch.no_grad()
        for done in [
            *(pool.submit(with_grad_off(read), i) for i in range(3)),
            *(pool.submit(with_grad_off(change), o) for o in others),
        ]:
            done.result()


def test_threads_look_while_another_writes() -> None:
    assert bind() is None
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    kept = Structure(model)
    assert kept.keeper("._modules['blocks']._modules['0'].factor", 2.0) is None or structure._IS_SO
    block: Any = model.blocks[0]  # type: ignore[index]
    kept.keeper("._modules['blocks']._modules['0'].factor", block.factor)
    stop = threading.Event()

    def look(_: Any) -> None:
        while not stop.is_set():
            assert not kept.has_changed()

    with ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(look, i) for i in range(3)]
        for i in range(2000):
            block.note = i
            kept.keeper(f"._modules['blocks']._modules['{i % 2}']", model.blocks[i % 2])  # type: ignore[index]
        stop.set()
        for each in looking:
            each.result()


@torch.no_grad()
def test_bundles_are_on_the_cpu_whatever_the_default_device() -> None:
    model, other = (
        qpass.quantize(
            nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), "int8", inputs=torch.randn(3, 16), inner="eager"
        )
        for _ in range(2)
    )
    x = torch.randn(3, 16)
    model(x)
    model[0].weight = other[0].weight
    with torch.device("meta"):
        found = model(x)
    torch.testing.assert_close(found, in_float(model)(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_keeps_a_module_that_is_gone() -> None:
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    model(IDS)
    part = weakref.ref(model.model.layers[1].mlp.down_proj.weight.quantized.data)
    model = weakref.ref(model)
    gc.collect()
    assert model() is None
    assert part() is None


@torch.no_grad()
def test_another_compilation_of_the_module_is_left_alone() -> None:
    """It has no part in what qpass has watched."""
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    model(x)
    again = torch.compile(model, backend=QPass("int8", inner="eager"))
    torch.testing.assert_close(again(x), in_float(model)(x), rtol=1e-5, atol=1e-5)
    model.blocks[0].factor = 4.0
    for compiled in (model, again, model):
        torch.testing.assert_close(compiled(x), in_float(model)(x), rtol=1e-5, atol=1e-5)


@WATCHED
def test_the_version_of_a_dict_is_read() -> None:
    kept = {"a": 1}
    place = id(kept) + structure._VERSION
    versions = [structure._read(place)]
    for write in (
        lambda: kept.__setitem__("a", 2),
        lambda: kept.__setitem__("b", 1),
        lambda: kept.pop("a"),
        kept.clear,
    ):
        write()
        versions.append(structure._read(place))
    assert len(set(versions)) == len(versions)
    assert structure._read(id(kept) + structure._TYPE) == id(dict)


def test_a_path_must_lead_to_the_value() -> None:
    assert bind() is None
    x = torch.randn(3, 16)
    model = qpass.quantize(Model(), "int8", inputs=x, inner="eager")
    watched = Structure(model)
    block: Any = model.blocks[0]  # type: ignore[index]
    here = "._modules['blocks']._modules['0']"
    found = {
        f"{here}": block,
        f"{here}._modules": block._modules,
        f"{here}.factor": block.factor,
        f"{here}._modules['linear']._parameters['weight']": block.linear.weight,
        f"{here}._modules['norm']._parameters['weight']": block.norm.weight,
    }
    for path, value in found.items():
        assert (watched.keeper(path, value) is not None) == structure._IS_SO, path
        assert watched.keeper(path.replace("'0'", "'1'"), value) is None or path.endswith("factor")
    for path, value in {
        f"{here}.forward": block.forward, f"{here}._forward_hooks": block._forward_hooks, f"{here}.factor[0]": 2.0,
        f"{here}._modules['norm']._parameters['weight']": block.norm.bias, f"{here}._modules['none']": None,
    }.items():  # fmt: skip
        assert watched.keeper(path, value) is None, path

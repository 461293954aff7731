"""The backend: every way to name it, what it compiles, and that weights are never stale and never another model's."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.backends.common import aot_autograd

import qpass
from qpass.store import WeightStore, guards_beside_the_lookup
from tests.models import BLOCKS, INT8, FusedBlock, build, dequantized_copy, logits_of, tokens

IDS = tokens()


@torch.no_grad()
def run(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return logits_of(model(ids))


def int8_copy(model: nn.Module) -> nn.Module:
    return dequantized_copy(model, lambda name: INT8)


def assert_quantized(ours: torch.Tensor, model: nn.Module) -> None:
    """`ours` are the logits of `model` with int8 weights, and not those of the float model."""
    torch.testing.assert_close(ours, run(int8_copy(model)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, run(model), rtol=1e-5, atol=1e-5)


# --- how it is named --------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda m: torch.compile(m, backend=qpass, options={"inner": "eager"}),
    "name": lambda m: torch.compile(m, backend="qpass", options={"inner": "eager", "recipe": "int8"}),
    "object": lambda m: torch.compile(m, backend=qpass.QPass("int8", inner="eager")),
    "in place": lambda m: m.compile(backend=qpass, options={"inner": "eager"}) or m,
    "quantize": lambda m: qpass.quantize(m, "int8", inner="eager"),
    "aot_eager": lambda m: torch.compile(m, backend=qpass.QPass(inner="aot_eager")),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_quantizes(way: str) -> None:
    model = build("nanogpt")
    assert_quantized(run(WAYS[way](copy.deepcopy(model))), model)


def test_the_name_needs_no_import_and_qpass_imports_none_of_the_heavy() -> None:
    code = (
        "import torch, sys\n"
        "torch.compile(torch.nn.Linear(8, 9), backend='eager')(torch.ones(1, 8))\n"  # torch imports triton, where there is one
        "before = set(sys.modules)\n"
        "m = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9)).eval()\n"
        "out = torch.compile(m, backend='qpass', options={'inner': 'eager'})(torch.tensor([[1, 2]]))\n"
        "assert 'qpass' in sys.modules\n"
        "print(sorted({'transformers', 'torchao', 'triton', 'onnx'} & (set(sys.modules) - before)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- Inductor ---------------------------------------------------------------------------------------------------------


def test_inductor_compiles_prefill_and_decode_lengths() -> None:
    model = build("nanogpt")
    fast = torch.compile(model, backend=qpass, mode="default")
    for length in (9, 1, 5, 7):
        ids = tokens(length=length)
        torch.testing.assert_close(run(fast, ids), run(int8_copy(model), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["torch.compile", "QPass"])
def test_the_mode_reaches_inductor(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any) -> Any:
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model = build("nanogpt")
    if how == "torch.compile":
        run(torch.compile(model, backend=qpass, mode="reduce-overhead"))
    else:
        run(torch.compile(model, backend=qpass.QPass(mode="reduce-overhead")))
    assert patches == [torch._inductor.list_mode_options("reduce-overhead")]


@pytest.mark.parametrize("family", ["nanogpt", "llama"])
def test_no_more_graphs_than_without(family: str) -> None:
    """Lengths and batches as in generation: as many graphs as a backend that changes nothing."""
    calls = [tokens(b, n) for b, n in ((1, 9), (1, 1), (1, 7), (3, 4), (3, 1), (2, 11), (4, 2))]
    counts = []
    for quantize in (False, True):
        torch._dynamo.reset()
        graphs: list[Any] = []
        backend = qpass.QPass(inner="eager")

        def counting(gm: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(gm)
            return gm.forward

        fast = torch.compile(build(family), backend=backend if quantize else counting)
        for ids in calls:
            run(fast, ids)
        counts.append(len(backend.captures) if quantize else len(graphs))
    assert counts[1] == counts[0]


@pytest.mark.parametrize("how", ["compile", "quantize"])
def test_every_stored_part_is_a_static_input(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs copy each input that is not static, at every call."""
    seen: list[tuple[list[int], int]] = []

    def forward_compiler(gm: Any, inputs: Any) -> Any:
        metadata = torch._guards.TracingContext.get().fw_metadata
        seen.append((list(metadata.static_input_indices), len(inputs)))
        return gm.forward

    monkeypatch.setitem(registry._COMPILER_FNS, "probe", aot_autograd(fw_compiler=forward_compiler))
    monkeypatch.setitem(registry._BACKENDS, "probe", None)
    model = build("llama")
    if how == "compile":
        model.compile(backend=qpass.QPass(inner="probe"))
    else:
        qpass.quantize(model, "int8", inner="probe")
    run(model)
    ((static, inputs),) = seen
    assert len(static) == inputs - 1  # all but the token ids


# --- never stale, never another's -------------------------------------------------------------------------------------


def test_two_models_of_one_class_under_one_backend() -> None:
    first, second = build("nanogpt", seed=1), build("nanogpt", seed=2)
    backend = qpass.QPass(inner="eager")
    a, b = torch.compile(first, backend=backend), torch.compile(second, backend=backend)
    mixed = [run(a), run(b), run(a), run(b)]
    for model, outs in ((first, mixed[::2]), (second, mixed[1::2])):
        torch._dynamo.reset()
        alone = run(torch.compile(model, backend=qpass.QPass(inner="eager")))
        assert all(torch.equal(out, alone) for out in outs)


def test_one_block_compiled_for_each_layer() -> None:
    blocks = nn.ModuleList(FusedBlock() for _ in range(4)).eval()
    backend = qpass.QPass(inner="eager")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = [int8_copy(block)(x) for block in blocks]
        for block in blocks:
            block.compile(backend=backend)
        for block, reference in zip(blocks, expected, strict=True):
            torch.testing.assert_close(block(x), reference)
    rows = qpass.report(blocks).sites
    assert {r.name for r in rows if r.format} == {n for n, p in blocks.named_parameters() if p.dim() == 2}


def edit_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.first.c_attn.weight.mul_(1.5)


def load(model: nn.Module) -> None:
    model.load_state_dict(build("nanogpt", seed=7).state_dict())


def load_assign(model: nn.Module) -> None:
    model.load_state_dict(build("nanogpt", seed=7).state_dict(), assign=True)


def new_data(model: nn.Module) -> None:
    model.first.fc.weight.data = torch.randn_like(model.first.fc.weight)


def edit_bias(model: nn.Module) -> None:
    with torch.no_grad():
        model.first.c_attn.bias.add_(0.5)


@pytest.mark.parametrize("change", [edit_in_place, load, load_assign, new_data, edit_bias])
def test_changed_weights_are_quantized_again(change: Callable[[nn.Module], None]) -> None:
    model = build("nanogpt")
    fast = torch.compile(model, backend=qpass.QPass(inner="eager"))
    before = run(fast)
    change(model)
    assert not torch.equal(run(fast), before)
    assert_quantized(run(fast), model)


@pytest.mark.parametrize("change", [edit_in_place, load])
@pytest.mark.parametrize("family", ["nanogpt"])
def test_changes_to_a_quantized_model_are_quantized_in_place(family: str, change: Callable[[nn.Module], None]) -> None:
    floats, model = build(family), qpass.quantize(build(family), "int8", inner="eager")
    run(model)
    change(model)
    if change is edit_in_place:
        floats = int8_copy(floats)  # what is edited are the dequantized values
    change(floats)
    torch.testing.assert_close(run(model), run(int8_copy(floats)), rtol=1e-4, atol=1e-4)


def test_dead_models_leave_nothing_behind() -> None:
    backend = qpass.QPass(inner="eager")
    model = build("nanogpt")
    run(torch.compile(model, backend=backend))
    assert backend.decisions.items()
    assert backend.store._entries
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not backend.decisions.items()
    assert not backend.store._entries


# --- a quantized model as an object -----------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = qpass.quantize(build("llama", seed=5), SPEC, inner="eager")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


SPEC = "int4:g32:asym"


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("copier", [copy.deepcopy, pickled, through_torch_save])
def test_copies_compute_the_same(copier: Callable[[nn.Module], nn.Module], called: bool) -> None:
    model = qpass.quantize(build("llama"), SPEC, inner="eager")
    if called:
        run(model)
    twin = copier(model)
    torch.testing.assert_close(run(twin), run(model), rtol=1e-5, atol=1e-5)
    assert all(isinstance(p, qpass.QTensor) for p in twin.parameters() if p.dim() == 2)
    ours, theirs = (m.get_parameter("model.layers.0.self_attn.q_proj.weight") for m in (model, twin))
    assert ours.quantized.data.data_ptr() != theirs.quantized.data.data_ptr()


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
def test_to_another_dtype(called: bool) -> None:
    model = qpass.quantize(build("llama"), SPEC, inner="eager")
    expected = run(model) if called else None
    model.to(torch.bfloat16)
    out = run(model)
    assert out.dtype == torch.bfloat16
    if expected is not None:
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("spec", ["int8", "int4:g32:asym", "nf4:g32:dq", "nvfp4", "mxfp4", "fp8_e4m3", "int8:tensor"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "flat"])
def test_eager_equals_compiled(family: str, spec: str) -> None:
    model = qpass.quantize(build(family), spec, inner="eager")
    torch.testing.assert_close(run(model), run(copy.deepcopy(model)), rtol=1e-5, atol=1e-5)


def test_fused_weights_are_stored_once() -> None:
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    run(model)
    layer = model.model.layers[0].self_attn
    q, k, v = (p.weight.quantized.data for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    calls = [
        n for n in qpass.registry.captured(model, "test").captures[0].after.nodes if "qpass.linear" in str(n.target)
    ]
    assert len(calls) == 4 * BLOCKS + 1  # qkv, o, gate+up, down; the head


def test_a_tied_table_stays_one_table() -> None:
    model = qpass.quantize(build("gpt2"), "int8", inner="eager")
    assert model.lm_head.weight is model.transformer.wte.weight
    run(model)
    assert len([r for r in qpass.report(model).sites if "wte" in r.name]) == 1


@pytest.mark.parametrize("family", ["nanogpt", "llama"])
def test_under_autocast_it_computes_in_autocasts_type(family: str) -> None:
    model = build(family)
    fast = torch.compile(model, backend=qpass.QPass(inner="aot_eager"))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(fast), run(int8_copy(model))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


# --- inference only ---------------------------------------------------------------------------------------------------


def test_eval_mode_with_grad_enabled_is_inference_and_backward_raises() -> None:
    model = build("nanogpt")
    out = torch.compile(model, backend=qpass.QPass(inner="aot_eager"))(IDS)
    assert not out.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.dropout(self.table(ids), 0.5, self.training))


def test_training_mode_is_refused_only_where_it_matters() -> None:
    ids = torch.tensor([[1, 2]])
    fast = torch.compile(WithDropout().train(), backend=qpass.QPass(inner="eager"))
    with pytest.raises(qpass.QpassError, match=r"model\.eval"):
        fast(ids)
    plain = build("nanogpt").train()  # no dropout in it
    assert_quantized(run(torch.compile(plain, backend=qpass.QPass(inner="eager"))), plain)


def test_an_input_that_requires_grad_is_refused() -> None:
    block = FusedBlock().eval()
    fast = torch.compile(block, backend=qpass.QPass(inner="eager"))
    with pytest.raises(qpass.QpassError, match="requires grad"):
        fast(torch.randn(1, 3, 64, requires_grad=True))


# --- several threads --------------------------------------------------------------------------------------------------


def test_threads_get_the_results_of_a_serial_run() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = qpass.quantize(build("nanogpt"), "int8", inner="eager")
    batches = [tokens(seed=i) for i in range(16)]
    serial = [run(model, ids) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda ids: run(model, ids), batches), serial, strict=True):
            assert torch.equal(ours, theirs)


# --- guards -----------------------------------------------------------------------------------------------------------


def exchange_objects(weight: nn.Parameter, other: nn.Parameter, place: nn.Linear) -> None:
    place.weight = other


def exchange_contents(weight: nn.Parameter, other: nn.Parameter, place: nn.Linear) -> None:
    """As torch.utils.swap_tensors does, which refuses a weight that Dynamo refers to."""
    weight.__dict__, other.__dict__ = other.__dict__, weight.__dict__


def exchange_parts(weight: nn.Parameter, other: nn.Parameter, place: nn.Linear) -> None:
    weight.quantized = other.quantized  # type: ignore[attr-defined]


@pytest.mark.parametrize("exchange", [exchange_objects, exchange_contents, exchange_parts])
def test_whatever_is_exchanged_is_seen_and_nothing_else_looked_up(
    exchange: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No guard of Dynamo's looks inside of a QTensor: the lookup does. Both weights were there before the first call: no new one
    betrays the exchange."""
    model, other = (qpass.quantize(build("llama", seed=s), "int8", inner="eager") for s in (0, 1))
    reference = build("llama")
    assert_quantized(run(model), reference)
    looked_up: list[str] = []
    get = WeightStore.get
    monkeypatch.setattr(WeightStore, "get", lambda self, *a: looked_up.append(str(a[1])) or get(self, *a))
    run(model)
    assert not looked_up
    exchange(
        model.model.layers[1].mlp.down_proj.weight,
        other.model.layers[1].mlp.down_proj.weight,
        model.model.layers[1].mlp.down_proj,
    )
    reference.model.layers[1].mlp.down_proj.weight = build("llama", seed=1).model.layers[1].mlp.down_proj.weight
    assert_quantized(run(model), reference)
    assert looked_up
    looked_up.clear()
    run(model)
    assert not looked_up


def test_parts_of_weights_that_are_gone_are_let_go() -> None:
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    run(model)
    part = weakref.ref(model.model.layers[1].mlp.down_proj.weight.quantized.data)
    model.model.layers[1].mlp.down_proj.weight = (
        qpass.quantize(build("llama", seed=1), "int8", inner="eager").model.layers[1].mlp.down_proj.weight
    )
    gc.collect()
    assert part() is None


def test_a_weight_in_another_format_than_was_compiled_is_refused() -> None:
    model, other = (qpass.quantize(build("nanogpt"), spec, inner="eager") for spec in ("int8", "int8:g16"))
    run(model)
    model.second.fc.weight = other.second.fc.weight
    with pytest.raises(
        qpass.QpassError, match=r"fc\.weight: now stored as int8:g16.*compiled for int8.*model\.compile"
    ):
        run(model)


def test_guards_inside_of_quantized_weights_are_dropped_and_no_others() -> None:
    kept: list[tuple[str, str]] = []

    def look(guards: Any) -> list[bool]:
        flags = guards_beside_the_lookup(guards)
        kept.extend((g.guard_type, g.name) for g, keep in zip(guards, flags, strict=True) if keep)
        dropped = [g for g, keep in zip(guards, flags, strict=True) if not keep]
        assert dropped
        assert all("_parameters['weight']" in g.name for g in dropped)
        return flags

    model = qpass.quantize(build("nanogpt"), "int8", inner="eager")
    model.compile(backend=qpass.QPass("int8", inner="eager"), options={"guard_filter_fn": look})
    run(model)
    assert any(kind == "TENSOR_MATCH" and name.endswith("_parameters['weight']") for kind, name in kept)
    assert not any("_part" in name for _, name in kept)

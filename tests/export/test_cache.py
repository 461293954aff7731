"""The KV cache of a graph: integers in and out, the codes and scales that qpass makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qpass_export import export_onnx, load
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from tests.export.micro import decode, empty_cache, float_products
from tests.models import hf
from tests.zoo.configs import build

SPECS = ["int8", "int8:g8", "int8:asym", "int4:g16:asym", "int4:g8:rotated", "int4:g8:asym:rotated", "int4:channel"]


class Joiner(nn.Module):
    """Past keys and values come in, longer ones go out; the inputs are queries, keys and values themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        y = F.scaled_dot_product_attention(self.scale(q), keys, values, enable_gqa=True)
        return y, keys, values


@pytest.mark.parametrize("spec", SPECS)
def test_codes_scales_and_zero_points_are_those_of_qpass_to_the_bit(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Joiner().eval()
    example = (torch.randn(2, 4, 3, 16), *(torch.randn(2, 2, n, 16) for n in (3, 3, 5, 5)))
    dynamic = tuple({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in example)
    program = torch.export.export(model, example, dynamic_shapes=dynamic)
    quantized = qpass.quantize(program, qpass.Recipe(qkv="int8", kv=spec))
    export_onnx(quantized, tmp_path)
    session = load(tmp_path, exact=True)
    new = torch.randn(1, 2, 4, 16) * torch.logspace(-3, 3, 16)
    new[0, 0, 0] = 0  # a token of zeros has a scale too
    feeds: dict[str, Any] = {"q": torch.randn(1, 4, 4, 16), "k": new, "v": new.flip(3)}
    names = [i.name for i in session.get_inputs()]
    parts = torch.ops.qpass.quantize(torch.zeros(1, 2, 0, 16), spec)
    for half in ("past_k", "past_v"):
        feeds |= dict(zip([n for n in names if n.startswith(half)], parts, strict=True))
    out = session.run(None, {n: feeds[n].numpy() for n in names})
    for states, found in ((new, out[1 : 1 + len(parts)]), (new.flip(3), out[1 + len(parts) :])):
        for ours, theirs in zip(found, torch.ops.qpass.quantize(states, spec), strict=True):
            np.testing.assert_array_equal(ours, theirs.numpy())
    with torch.no_grad(), float_products():
        weight = qpass.numerics.fake_quantize(model.scale.weight, qpass.spec.parse_spec("int8"))
        q = F.linear(feeds["q"], weight, model.scale.bias)
        k, v = (qpass.numerics.fake_quantize(t, qpass.spec.parse_spec(spec)) for t in (new, new.flip(3)))
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    np.testing.assert_allclose(out[0], expected.numpy(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kv", ["int8", "int4:g16:asym:rotated"])
def test_a_decoder_with_a_quantized_cache(kv: str, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    exported = export_onnx(model, tmp_path, recipe=qpass.Recipe.uniform("int8:g16", kv=kv))
    assert [s.format for s in exported.sites if s.kind == "kv"] == [str(qpass.spec.parse_spec(kv))] * 2
    session = load(tmp_path, exact=True)
    names = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values.0.")]
    assert "past_key_values.0.key" in names
    assert "past_key_values.0.key_scale" in names
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(3))
    plain = qpass.quantize(build("LlamaForCausalLM"), "int8:g16", inner="eager")
    with torch.no_grad(), float_products():
        expected = plain(ids).logits.numpy()
    for tokens, found in decode(session, ids, 12):
        error = np.abs(found - expected[:, tokens]).max() / np.abs(expected).max()
        assert error < (0.02 if kv == "int8" else 0.3)
    held = sum(v.nbytes for v in empty_cache(session, 1).values())
    assert held == 0


def test_int4_is_rotated_groups_in_a_file(tmp_path: Path) -> None:
    """Whose tokens come one by one."""
    model = hf("LlamaForCausalLM", head_dim=32).eval()
    exported = export_onnx(model, tmp_path, recipe=qpass.Recipe.uniform("int8:g16", kv="int4"))
    assert [s.format for s in exported.sites if s.kind == "kv"] == ["int4:g32:asym:rotated"] * len(model.model.layers)


def test_static_scales_are_constants_and_the_cache_is_codes_alone(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    batches = [torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    cache = qpass.KVCache(model.config, 64, "int8:static").calibrate(model, batches)
    exported = export_onnx(model, tmp_path, recipe="int8:g16", cache=cache)
    session = load(tmp_path, exact=True)
    assert not any("scale" in i.name for i in session.get_inputs())
    kinds = {i.name: i.type for i in session.get_inputs()}
    assert kinds["past_key_values.0.key"] == "tensor(int8)"
    assert exported.genai is None
    plain = qpass.quantize(build("LlamaForCausalLM"), "int8:g16", inner="eager")
    ids = batches[0][:1]
    with torch.no_grad(), float_products():
        expected = plain(ids).logits.numpy()
    for tokens, found in decode(session, ids, 12):
        assert np.abs(found - expected[:, tokens]).max() < 0.1 * np.abs(expected).max()


def test_static_scales_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(qpass.QpassError, match="calibrate"):
        export_onnx(build("LlamaForCausalLM"), tmp_path, recipe=qpass.Recipe.uniform("int8:g16", kv="int8:static"))


@pytest.mark.parametrize("cache", ["float", "int8:static"])
def test_group_query_attention_of_the_file_for_cuda(cache: str, tmp_path: Path) -> None:
    """It runs in half precision on the CPU provider too."""
    model = build("LlamaForCausalLM")
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(3))
    held = None if cache == "float" else qpass.KVCache(model.config, 64, cache).calibrate(model, [ids])
    exported = export_onnx(model, tmp_path, "ort-cuda", "int8:g16", cache=held)
    session = load(tmp_path, provider="CPUExecutionProvider", exact=True)
    assert exported.hardware == "rule-checked only"
    plain = qpass.quantize(build("LlamaForCausalLM"), "int8:g16", inner="eager")
    with torch.no_grad(), float_products():
        expected = plain(ids).logits.numpy()
    for tokens, found in decode(session, ids, 12):
        bound = 0.02 if cache == "float" else 0.1
        assert np.abs(found.astype(np.float32) - expected[:, tokens]).max() < bound * np.abs(expected).max()


def test_a_model_that_sees_later_tokens_has_no_causal_mask_added(tmp_path: Path) -> None:
    model = build("Gemma3ForCausalLM")
    model.config.use_bidirectional_attention = True
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, causal = model(ids).logits.numpy(), build("Gemma3ForCausalLM")(ids).logits.numpy()
    assert np.abs(expected - causal).max() > 0.01 * np.abs(expected).max()
    export_onnx(model, tmp_path, "ort-cuda")
    (_, found), *_ = decode(load(tmp_path, provider="CPUExecutionProvider"), ids, 12)
    assert np.abs(found.astype(np.float32) - expected).max() < 0.01 * np.abs(expected).max()


class Keeper(nn.Module):
    """A decoder that keeps its cache itself, in buffers or in plain attributes."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(97, 64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 97)
        for name in ("k_cache", "v_cache"):
            empty = torch.zeros(1, 4, 32, 16)
            self.register_buffer(name, empty, persistent=False) if buffers else setattr(self, name, empty)

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (m(x).view(1, -1, 4, 16).transpose(1, 2) for m in (self.q, self.k, self.v))
        self.k_cache[:, :, at], self.v_cache[:, :, at] = k, v
        mask = torch.arange(32)[None] <= at[:, None]
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).reshape(1, -1, 64))
        return self.head(x + self.down(F.gelu(self.up(x))))


@pytest.mark.parametrize("before", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("kv", [None, "int8", "int4:g8:asym:rotated"])
@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "attributes"])
def test_a_cache_that_the_module_keeps_becomes_inputs_and_outputs(
    buffers: bool, kv: str | None, before: bool, tmp_path: Path
) -> None:
    inputs, recipe = (torch.zeros(1, 3, dtype=torch.long), torch.arange(3)), qpass.Recipe.uniform("int8", kv=kv)
    reference = qpass.quantize(Keeper(buffers).eval(), recipe, inputs=inputs, inner="eager")
    model = Keeper(buffers).eval()
    if before:
        model = qpass.quantize(model, recipe, inputs=inputs, inner="eager")
    export_onnx(model, tmp_path, recipe=None if before else recipe, inputs=inputs)
    session = load(tmp_path, exact=True)
    types = {"tensor(int8)": np.int8, "tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    states = {i.name: np.zeros(i.shape, types[i.type]) for i in session.get_inputs() if i.name.startswith("past.")}
    states |= {n: np.ones_like(v) for n, v in states.items() if n.endswith("_scale")}
    names = [o.name for o in session.get_outputs()]
    start = 0
    for new in (5, 1, 1, 1):
        ids = torch.randint(0, 97, (1, new), generator=torch.Generator().manual_seed(start))
        at = torch.arange(start, start + new)
        out = dict(zip(names, session.run(None, states | {"ids": ids.numpy(), "at": at.numpy()}), strict=True))
        states = {n: out[n.replace("past.", "present.")] for n in states}
        with torch.no_grad(), float_products():
            expected = reference(ids, at).numpy()
        np.testing.assert_allclose(out[names[0]], expected, atol=1e-5 * float(np.abs(expected).max()))
        start += new

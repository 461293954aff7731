"""qpass.export_compressed_tensors, read back by transformers' own reader: the same weights, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qpass
from tests.models import build, logits_of, tokens

pytest.importorskip("compressed_tensors")
RECIPES = {
    "int8": "int8", "int4": "int4:g32", "int4 asym": "int4:g16:asym", "int4 gptq": "int4:g32:gptq", "int3": "int3:g32",
    "int5 asym": "int5:g16:asym", "int6": "int6:g32",
    "int8 tensor": "int8:tensor", "fp8": "fp8_e4m3:channel", "int4 channel": "int4:channel",
    "mixed": {**dict.fromkeys(("qkv", "attn_out"), "int8"), "ffn": "int4:g32", "vocab": "int8", "embedding": "int8"},
}  # fmt: skip


def exported(recipe: Any, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any]:
    data = [tokens(4, 16)] if any(word in str(recipe) for word in ("gptq", "smooth", "static")) else None
    model = qpass.quantize(build("llama").to(dtype), recipe, calibration=data, inner="eager")
    return model, qpass.export_compressed_tensors(model, folder)


def read(folder: Path, dequantized: bool) -> torch.nn.Module:
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantized else {}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    model, written = exported(RECIPES[name], tmp_path / "a")
    # the reader (compressed-tensors 0.20) makes no place for packed zero points unless it dequantizes
    loaded = read(tmp_path / "a", dequantized="asym" in name)
    with torch.no_grad(), qpass.set_compute("float"):
        ours, theirs = logits_of(model(tokens())), logits_of(loaded(tokens()))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    layers = model.config.num_hidden_layers
    assert len(written.quantized) == 7 * layers
    assert set(written.floats) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("activations", ["int8@int8", "int8@int8:static", "fp8_e4m3:channel@fp8_e4m3:channel"])
def test_quantized_activations(activations: str, tmp_path: Path) -> None:
    recipe = {**dict.fromkeys(("qkv", "attn_out", "ffn"), activations), "vocab": "int8", "embedding": "int8"}
    model, _ = exported(recipe, tmp_path / "a")
    loaded = read(tmp_path / "a", dequantized=False)
    with torch.no_grad(), qpass.set_compute("float"):
        ours, theirs = logits_of(model(tokens())), logits_of(loaded(tokens()))
    fp8 = activations.startswith("fp8")  # int8: the reader divides by amax / 127.5 where every engine takes 127
    torch.testing.assert_close(theirs, ours, rtol=0, atol=(1e-5 if fp8 else 0.03) * float(ours.abs().max()))
    for name, param in model.named_parameters():
        if isinstance(param, qpass.QTensor) and "proj" in name:
            torch.testing.assert_close(loaded.get_parameter(name), param.dequantize(), rtol=1e-6, atol=0)
    groups = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert all(g["input_activations"]["dynamic"] is ("static" not in activations) for g in groups)


@pytest.mark.parametrize(("recipe", "says"), [
    ("nf4:g16", "nf4"), ("mxfp4", "mxfp4"), ("int4:g16:zero=float", "zero points between"),
    ("int8:smooth@int8", "scales of columns"), ("int4:g7", "no multiple of the group"), ("fp8_e4m3", "fp8 without a scale"),
])  # fmt: skip
def test_what_has_no_form_there_is_written_in_floats_and_listed(recipe: str, says: str, tmp_path: Path) -> None:
    model, written = exported(recipe, tmp_path / "a")
    assert any(says in reason for reason in written.floats.values())
    assert says in str(written)
    loaded = (
        read(tmp_path / "a", dequantized=True)
        if written.quantized
        else AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(loaded.get_parameter(name), model.get_parameter(name).dequantize())


def test_a_model_of_16_bits(tmp_path: Path) -> None:
    model, _ = exported("int4:g32", tmp_path / "a", torch.bfloat16)
    loaded = read(tmp_path / "a", dequantized=False)
    with torch.no_grad(), qpass.set_compute("float"):
        ours, theirs = logits_of(model(tokens())).float(), logits_of(loaded(tokens())).float()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.03 * float(ours.abs().max()))


def test_experts_and_transposed_weights_are_listed(tmp_path: Path) -> None:
    model = qpass.quantize(build("gpt2"), "int8", inner="eager")
    written = qpass.export_compressed_tensors(model, tmp_path / "a")
    assert not written.quantized
    assert any("nn.Linear" in reason for reason in written.floats.values())


def test_a_weight_of_two_linears_is_written_for_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 32, bias=False), torch.nn.ReLU(), torch.nn.Linear(32, 32, bias=False)
    )
    model[2].weight = model[0].weight
    model = qpass.quantize(model.eval(), "int8", inputs=torch.randn(2, 32), inner="eager")
    written = qpass.export_compressed_tensors(model, tmp_path / "a")
    assert set(written.quantized) == {"0", "2"}
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert {f"{i}.weight_packed" for i in (0, 2)} <= set(file.keys())


def test_folders_and_models_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(qpass.QpassError, match="no weight is quantized"):
        qpass.export_compressed_tensors(build("llama"), tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    model, _ = exported("int8", tmp_path / "b")
    with pytest.raises(qpass.QpassError, match="holds something else"):
        qpass.export_compressed_tensors(model, tmp_path / "mine")
    qpass.export_compressed_tensors(model, tmp_path / "b")  # an earlier export is replaced


@pytest.mark.parametrize(
    ("format", "largest", "kind"), [("fp8_e4m3:static", 448, "float"), ("int8:static", 127, "int")]
)
def test_scales_of_the_cache(format: str, largest: int, kind: str, tmp_path: Path) -> None:
    """One for the keys and one for the values of a layer: its largest number is the largest code."""
    from safetensors.torch import load_file
    from transformers import DynamicCache

    batches = [tokens(2, 16), tokens(2, 16, seed=5)]
    model, _ = exported("int8", tmp_path / "without")
    cache = qpass.KVCache(model.config, 64, format).calibrate(model, batches)
    qpass.export_compressed_tensors(model, tmp_path / "a", cache)
    found = load_file(tmp_path / "a" / "model.safetensors")
    largest_seen: dict[str, float] = {}
    for batch in batches:
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            model(batch, past_key_values=plain, use_cache=True)
        for i, layer in enumerate(plain.layers):
            for half, states in (("k", layer.keys), ("v", layer.values)):
                name = f"model.layers.{i}.self_attn.{half}_scale"
                largest_seen[name] = max(largest_seen.get(name, 0.0), float(states.abs().max()))
    assert {name for name in found if name.endswith(("k_scale", "v_scale"))} == largest_seen.keys()
    for name, top in largest_seen.items():
        torch.testing.assert_close(found[name], torch.tensor([top / largest]), rtol=1e-5, atol=0)
    scheme = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["strategy"], scheme["dynamic"]) == (kind, 8, "tensor", False)
    from compressed_tensors.quantization import QuantizationArgs

    assert QuantizationArgs(**scheme).type == kind


def test_a_cache_without_scales_is_refused(tmp_path: Path) -> None:
    model, _ = exported("int8", tmp_path / "b")
    for cache in (qpass.KVCache(model.config, 64, "int8"), qpass.KVCache(model.config, 64, "fp8_e4m3:static")):
        with pytest.raises(qpass.QpassError, match="static scales"):
            qpass.export_compressed_tensors(model, tmp_path / "a", cache)
    assert not (tmp_path / "a").exists()

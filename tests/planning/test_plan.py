"""qpass.plan_memory: the bytes it names are those of real weights and real caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import qpass
from qpass.cache import CACHE_ARGUMENT
from qpass.recipe import resolve_recipe

SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**SMALL),
    "tied": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "sliding": lambda: t.Gemma2Config(**SMALL, sliding_window=64),
    "conv1d": lambda: t.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=300),
    "experts": lambda: t.MixtralConfig(**SMALL, num_local_experts=4),
    "experts transposed": lambda: t.GptOssConfig(**SMALL, num_local_experts=4),
    "encoder-decoder": lambda: t.T5Config(d_model=128, d_ff=192, d_kv=32, num_layers=2, num_heads=4, vocab_size=300),
}


@pytest.mark.parametrize("recipe", ["int8", "int4", "int4:g48", "nvfp4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_take_what_quantizing_them_gives(name: str, recipe: str) -> None:
    plan = qpass.plan_memory(CONFIGS[name](), recipe, dtype=torch.float32)
    auto = t.AutoModelForSeq2SeqLM if name == "encoder-decoder" else t.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[name]()).eval()
    float_bytes = sum(p.nbytes for p in model.parameters())
    assert plan.weights.float_bytes == float_bytes
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.zeros((1, 8), dtype=torch.long)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if name == "encoder-decoder" else {"input_ids": ids}
    quantized = qpass.quantize(model, recipe, inputs=inputs | {"use_cache": False}, inner="eager")
    stored = sum(p.stored_nbytes if isinstance(p, qpass.QTensor) else p.nbytes for p in quantized.parameters())
    if resolve_recipe(recipe).bits is None:
        assert plan.weights.bytes == stored
    else:  # given out in steps of whole weights
        assert stored == pytest.approx(plan.weights.bytes, rel=0.02)
        assert stored <= plan.weights.bytes


@pytest.mark.parametrize("kv", [None, "int8", "fp8_e4m3", "int8:static", "int4", "int2", "mxfp4"])
@pytest.mark.parametrize("name", ["llama", "sliding", "encoder-decoder"])
def test_caches_take_what_is_allocated_for_them(name: str, kv: str | None) -> None:
    """Two sequences of 320 tokens, in the real model and in the plan."""
    if name != "llama" and kv == "int2":
        pytest.skip("no groups of tokens where they come or leave one by one")
    config, context = CONFIGS[name](), 320
    plan = qpass.plan_memory(config, context=context, batch=2, kv=kv, dtype=torch.float32)
    two = name == "encoder-decoder"
    model = (t.AutoModelForSeq2SeqLM if two else t.AutoModelForCausalLM).from_config(config).eval()
    make = qpass.KVCache.for_encoder_decoder if two else qpass.KVCache
    if kv is None and two:
        pytest.skip("transformers' own")
    cache = make(config, context, format=kv)
    ids = torch.zeros((2, context), dtype=torch.long)
    if kv == "int8:static" and two:
        pytest.skip("calibrated on decoders")
    if kv == "int8:static":
        cache.calibrate(model, [ids[:1]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :1]} if two else {"input_ids": ids[:, :8]}
    with torch.no_grad():
        model(**inputs, **{CACHE_ARGUMENT: cache})
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if two else [cache]
    assert plan.cache.bytes == sum(c.nbytes for c in caches)
    assert plan.cache.bytes == plan.cache.float_bytes if kv is None else plan.cache.bytes < plan.cache.float_bytes


def test_eighty_layers_of_64_heads_at_100k_tokens() -> None:
    """262 GB in 16 bits, half of it nominal in 8, and a scale of four bytes for each row of 128."""
    config = t.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    plan = qpass.plan_memory(config, "int4", context=100_000, kv="int8")
    assert plan.cache.float_bytes == 2 * 80 * 64 * 128 * 100_000 * 2 == 262_144_000_000
    assert plan.cache.nominal_bytes == 131_072_000_000
    assert plan.cache.bytes == 131_072_000_000 * 132 // 128
    assert plan.total.bytes == plan.cache.bytes + plan.weights.bytes
    assert plan.weights.float_bytes == 2 * plan.parameters


def test_it_prints_and_gives_plain_data() -> None:
    plan = qpass.plan_memory(CONFIGS["llama"](), {"qkv": "int4:g32", "kv": "int8"}, context=64)
    text = str(plan)
    assert all(part in text for part in ("int4:g32", "int8", "64 tokens of context"))
    data = json.loads(json.dumps(plan.to_json()))
    assert data["total"]["bytes"] == plan.total.bytes
    assert [r["kind"] for r in data["rows"]].count("kv") == 1
    assert "other" in [r.kind for r in plan.rows], "weights that stay in float are counted"


def test_a_config_is_read_from_a_folder_a_file_or_a_mapping(tmp_path: Path) -> None:
    config = CONFIGS["tied"]()
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    whole = qpass.plan_memory(config)
    assert all(qpass.plan_memory(c) == whole for c in (tmp_path, str(tmp_path / "config.json"), fields))


def test_models_of_other_things_than_text_take_inputs() -> None:
    config = t.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, image_size=32
    )
    with pytest.raises(qpass.QpassError, match="inputs="):
        qpass.plan_memory(config)
    plan = qpass.plan_memory(config, inputs={"pixel_values": torch.zeros(1, 3, 32, 32)})
    assert {"qkv", "ffn"} <= {r.kind for r in plan.rows}


def test_a_model_without_a_cache_says_so() -> None:
    plan = qpass.plan_memory(t.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=300), context=64)
    assert plan.cache.bytes == 0
    assert "no cache" in plan.notes[0]


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("nowhere/config.json", {}, "does not exist"),
        ({"hidden_size": 64}, {}, "model_type"),
        ({"model_type": "no such thing"}, {}, "no such thing"),
        ({"model_type": "gpt2"}, {"context": -1}, "context=-1"),
        ({"model_type": "gpt2"}, {"kv": "int9"}, "int9"),
    ],
    ids=["file", "type", "class", "context", "format"],
)
def test_what_cannot_be_planned_is_named(config: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        qpass.plan_memory(config, **options)

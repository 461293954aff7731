"""A tiny random model of any transformers class, from its config class with every size made small."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

VOCAB = 97

#: Size attributes of configs -> tiny values that go together.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "n_embed", "dim_model", "lru_width"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
         "num_encoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads", "num_global_attention_heads"), 4
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size",
         "hidden_dim", "dim_ff", "shared_intermediate_size", "block_ff_dim", "dense_intermediate_size"), 128
    ),
    "head_dim": 16, "d_kv": 16, "dim_head": 16, "attention_hidden_size": 64, "embedding_size": 48, "rotary_dim": 8,
    "vocab_size": VOCAB, "unpadded_vocab_size": VOCAB, "decoder_vocab_size": VOCAB, "type_vocab_size": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions", "context_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 24, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_d_state": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "projection_dim": 64,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
}  # fmt: skip

#: What the rules above get wrong for one architecture (class name without the suffix). None removes a rule's value.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "Bamba": {"attn_layer_indices": [1]},
    "Dots3Note": {"swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16,
                  "swa_v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    "CpmAnt": {"vocab_size": 2048, "prompt_types": 4},
    "CodeGen": {"rotary_dim": 8},
    "Dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {
        "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "DeepseekV2": {"num_experts_per_tok": 2},
    "FalconH1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "FalconMamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 128},
    "Gemma3n": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
                "num_kv_shared_layers": 2, "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4,
                "laurel_rank": 16},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "attention_layers": None},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 8},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba": {"state_size": 8, "time_step_rank": 4},
    "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "Nemotron": {"num_key_value_heads": 2},
    "RecurrentGemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "Zamba": {"num_hidden_layers": 8, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2 + [
        "linear_attention"] * 2, "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 8},
    "Zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
               "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8, "mamba_headdim": 16,
               "mamba_ngroups": 1, "adapter_rank": 8, "chunk_size": 16, "hybrid_layer_ids": [2, 5]},
    "Zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "BigBird": {"attention_type": "original_full"},
    "BigBirdPegasus": {"attention_type": "original_full"},
    "RoCBert": {"pronunciation_embed_dim": 32, "pronunciation_vocab_size": 40, "shape_embed_dim": 32,
                "shape_vocab_size": 50},
    "RemBert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "LongcatFlash": {"zero_expert_num": 4},
    "KimiLinear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "BailingHybrid": {"n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
     "num_expert_group": 1, "group_norm_size": 1},
    "CohereCompass": {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in (
        "full_attention", "sliding_attention")}, "layer_types": ["sliding_attention", "full_attention"]},
    "Dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeHybrid": {"layer_types": ["linear_attention", "full_attention"]},
    **{key: {"head_dim": 16} for key in ("HunYuanDenseV1", "HunYuanMoEV1", "Ministral")},
    "Mistral4": {"first_k_dense_replace": 1, "qk_nope_head_dim": 8, "qk_head_dim": 16},
    "Qwen4Exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                 "indexer_compress_ratio": 2},
    "Xmod": {"default_language": "en_XX"},
    "xLSTM": {"num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 16},
}  # fmt: skip


def small_config(cls: type[nn.Module]) -> PretrainedConfig:
    """A config of `cls` with every size small; raises what the config class raises if the sizes do not go together."""
    name = cls.__name__.removesuffix("ForCausalLM").removesuffix("Model")
    config_class: type[PretrainedConfig] = cls.config_class  # type: ignore[attr-defined]
    return config_class(**_small(config_class, _OVERRIDES.get(name, {})))


def _small(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    values = vars(config_class())
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, PretrainedConfig):
            out[key] = _small(type(value), {})
        elif key in _SMALL and value is not None and not isinstance(value, list | dict):
            out[key] = _SMALL[key]
    for key in ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"):
        if isinstance(values.get(key), int):
            out[key] = {values.get("num_attention_heads"): 4, 1: 1}.get(values[key], 2)
    rotary = values.get("qk_rope_head_dim")
    if rotary is not None and values.get("head_dim") == rotary:  # latent attention calls its rotary part so
        out["head_dim"] = out["qk_rope_head_dim"]
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = values.get(key)
        if kinds and not isinstance(getattr(config_class, key, None), property):
            out[key] = list(dict.fromkeys(kinds))
    lists = [k for k in ("layer_types", "layers_block_type", "mlp_layer_types") if k in out]
    if lists:
        count = max(2, *(len(out[k]) for k in lists))
        for k in lists:
            out[k] = (out[k] * count)[:count]
        out |= {k: count for k in ("num_hidden_layers", "n_layer", "num_layers") if k in out}
    out |= overrides
    return {k: v for k, v in out.items() if v is not None}


def build(name: str) -> nn.Module:
    """A random model of the transformers class `name` in eval mode, with weights that let every branch matter."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(small_config(cls)).eval()
        spread(model)
    return model


def spread(model: nn.Module) -> None:
    """Rescale matrices from the initial .02 to 1/sqrt(columns): at .02 a wrong attention hides behind the residual stream."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() >= 2 and param.is_floating_point() and param.numel() > 64:
                param.normal_(std=1.0 if id(param) in tables else 1 / math.sqrt(param.shape[-1]))


def causal_architectures() -> list[str]:
    """Every *ForCausalLM class of the installed transformers."""
    return sorted(n for n in dir(transformers) if n.endswith("ForCausalLM") and not n.startswith("Auto"))


#: Classes that hold transformers and are no causal language models.
OTHER_ARCHITECTURES = (
    "BertForMaskedLM", "RobertaForMaskedLM", "AlbertForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM",
    "DebertaV2ForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration",
    "ViTForImageClassification", "CLIPModel", "SiglipModel", "Wav2Vec2ForCTC", "Dinov2Model",
)  # fmt: skip


def example_inputs(model: Any, length: int = 9) -> dict[str, Tensor]:
    """Arguments of one call: token ids, pixels or audio features, whatever the class takes."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 32
    pixels = torch.randn(2, 3, size, size, generator=generator)
    main = type(model).main_input_name
    if main == "pixel_values" and not hasattr(config, "vocab_size"):
        return {"pixel_values": pixels}
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and not hasattr(model, "lm_head"):
        return {"input_ids": ids, "pixel_values": pixels}
    if main == "input_features":
        frames = 2 * config.max_source_positions
        features = torch.randn(2, config.num_mel_bins, frames, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    if main == "input_values":
        return {"input_values": torch.randn(2, 4000, generator=generator)}
    out = {"input_ids": ids}
    if type(model).__name__.startswith("Musicgen"):
        out["input_ids"] = ids.repeat_interleave(config.num_codebooks, 0)
    if config.is_encoder_decoder and not type(model).__name__.endswith("CausalLM"):
        out["decoder_input_ids"] = ids.flip(0)
    return out


def logits_of(out: Any) -> Tensor:
    """The tensor that stands for what a model says: logits, or the last hidden state."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    return next(v for v in out.values() if isinstance(v, Tensor))

"""One tiny model for each shape of transformer that a captured graph can have, with the sites that a person finds in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import (
    BLOCKS,
    DOWN,
    EMBED,
    FAMILIES,
    FLOAT,
    GATE,
    HEADS,
    LINEAR,
    LLAMA,
    OUT,
    TIED,
    UP,
    VOCAB,
    VOCABULARY,
    WIDTH,
    Family,
    FusedBlock,
    K,
    Q,
    V,
    build_family,
    hf,
)  # fmt: skip

QKV, KV = ("qkv", ("q", "k", "v")), ("qkv", ("k", "v"))
_GPT_MLP = {"h_to_4h": UP, "4h_to_h": DOWN}
_ATTENTION = {"q_proj": Q, "k_proj": K, "v_proj": V, "o_proj": OUT}
_UNTIED = {"embed_tokens": EMBED, "lm_head": VOCABULARY}
_MOE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


class ParallelInOneLinear(nn.Module):
    """Attention and feed-forward in one linear before and one after, as in ViT-22B and PaLM-like code; one shared K and V."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(BLOCKS))
        self.into = nn.ModuleList(nn.Linear(WIDTH, WIDTH + 32 + 4 * WIDTH) for _ in range(BLOCKS))
        self.back = nn.ModuleList(nn.Linear(5 * WIDTH, WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        batch, length, _ = x.shape
        for norm, into, back in zip(self.norm, self.into, self.back, strict=True):
            q, k, v, up = into(norm(x)).split([WIDTH, 16, 16, 4 * WIDTH], -1)
            q = q.view(batch, length, HEADS, 16).transpose(1, 2)
            k, v = (t.unsqueeze(1).expand(-1, HEADS, -1, -1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + back(torch.cat([y, F.gelu(up)], -1))
        return self.head(x)


class ExpertsAsModules(nn.Module):
    """A mixture of experts with a module for each: every expert sees every token, weighed by the gates of the chosen two."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attn, self.router = nn.Embedding(VOCAB, WIDTH), FusedBlock(), nn.Linear(WIDTH, 4)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 96) for _ in range(4))
        self.lower = nn.ModuleList(nn.Linear(96, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.attn(self.table(ids))
        best, chosen = self.router(x).softmax(-1).topk(2)
        gates = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype).scatter(-1, chosen, best)
        y = torch.zeros_like(x)
        for i, (up, lower) in enumerate(zip(self.up, self.lower, strict=True)):
            y = y + gates[..., i, None] * lower(F.silu(up(x)))
        return self.head(x + y)


class SharedLayers(nn.Module):
    """One block applied three times (ALBERT, universal transformers): each Parameter is one site with three uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(VOCAB, WIDTH), FusedBlock()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for _ in range(3):
            x = self.block(x)
        return x @ self.table.weight.T


SHAPES = {
    "multi-query": Family(
        lambda: hf("GPTBigCodeForCausalLM", n_embd=WIDTH, n_head=HEADS, n_layer=BLOCKS, n_positions=64, n_inner=128),
        {"wte": TIED, "wpe": EMBED, "c_attn": QKV, "attn.c_proj": OUT, "c_fc": UP, "mlp.c_proj": DOWN},
    ),
    "neox (fused per head, partial rotary, parallel)": Family(
        lambda: hf("GPTNeoXForCausalLM", rotary_pct=0.5),
        {"embed_in": EMBED, "query_key_value": QKV, "attention.dense": OUT, "lm_head": VOCABULARY} | _GPT_MLP,
    ),
    "falcon (grouped fused, parallel)": Family(
        lambda: hf("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
        {"word_embeddings": TIED, "query_key_value": QKV, "self_attention.dense": OUT} | _GPT_MLP,
    ),
    "falcon (multi-query, alibi)": Family(
        lambda: hf("FalconForCausalLM", alibi=True, multi_query=True),
        {"word_embeddings": TIED, "query_key_value": QKV, "self_attention.dense": OUT} | _GPT_MLP,
    ),
    "phi3 (fused qkv, fused gate and up)": Family(
        lambda: hf("Phi3ForCausalLM", num_key_value_heads=2),
        {"qkv_proj": QKV, "o_proj": OUT, "gate_up_proj": UP, "down_proj": DOWN} | _UNTIED,
    ),
    "mpt (alibi)": Family(
        lambda: hf("MptForCausalLM", d_model=WIDTH, n_heads=HEADS, n_layers=BLOCKS),
        {"wte": TIED, "Wqkv": QKV, "out_proj": OUT, "up_proj": UP, "down_proj": DOWN},
    ),
    "gptj (parallel)": Family(
        lambda: hf("GPTJForCausalLM", n_embd=WIDTH, n_head=HEADS, n_layer=BLOCKS, rotary_dim=8, n_positions=64),
        {"wte": EMBED, "q_proj": Q, "k_proj": K, "v_proj": V, "out_proj": OUT, "fc_in": UP, "fc_out": DOWN,
         "lm_head": VOCABULARY},
    ),
    "parallel in one linear": Family(
        ParallelInOneLinear,
        {"table": EMBED, "into": ("qkv", ("q", "k", "v", "up")), "back": ("attn_out", ("o", "down")), "head": VOCABULARY},
    ),
    "opt (learned positions)": Family(
        lambda: hf("OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=WIDTH),
        {"embed_tokens": TIED, "embed_positions": EMBED, "q_proj": Q, "k_proj": K, "v_proj": V, "out_proj": OUT, "fc1": UP,
         "fc2": DOWN},
    ),
    "olmo2 (q and k norms over all heads)": Family(
        lambda: hf("Olmo2ForCausalLM", num_key_value_heads=2), LLAMA | _UNTIED
    ),
    "cohere (scaled logits, parallel)": Family(
        lambda: hf("CohereForCausalLM", num_key_value_heads=2, logit_scale=0.25), LLAMA | {"embed_tokens": TIED}
    ),
    "gemma3 (sliding and full layers)": Family(
        lambda: hf("Gemma3ForCausalLM", num_key_value_heads=2, head_dim=16, sliding_window=4,
                   layer_types=["sliding_attention", "full_attention"]),
        LLAMA | {"embed_tokens": TIED},
    ),
    "deepseek v3 (latent attention, shared experts)": Family(
        lambda: hf("DeepseekV3ForCausalLM", **_LATENT),
        _UNTIED | {"q_a_proj": Q, "q_b_proj": Q, "kv_a_proj": KV, "kv_b_proj": KV, "o_proj": OUT, "layers.0.mlp.gate_proj": GATE,
                   "layers.0.mlp.up_proj": UP, "layers.0.mlp.down_proj": DOWN, "shared_experts.gate_proj": GATE,
                   "shared_experts.up_proj": UP, "shared_experts.down_proj": DOWN, "mlp.gate.weight": FLOAT,
                   "experts.gate_up_proj": UP, "mlp.experts.down_proj": DOWN},
    ),
    "deepseek v2 (latent attention, full queries)": Family(
        lambda: hf("DeepseekV2ForCausalLM", **_LATENT | {"q_lora_rank": None, "first_k_dense_replace": 2}),
        _UNTIED | {"q_proj": Q, "kv_a_proj": KV, "kv_b_proj": KV, "o_proj": OUT, "gate_proj": GATE, "up_proj": UP,
                   "down_proj": DOWN},
    ),
    "mixtral (3-D experts)": Family(
        lambda: hf("MixtralForCausalLM", **_MOE),
        _ATTENTION | _UNTIED | {"gate.weight": FLOAT, "gate_up_proj": UP, "down_proj": DOWN},
    ),
    "qwen2 moe (shared expert with a gate)": Family(
        lambda: hf("Qwen2MoeForCausalLM", **_MOE, shared_expert_intermediate_size=32),
        _ATTENTION | _UNTIED | {"mlp.gate.weight": FLOAT, "experts.gate_up_proj": UP, "experts.down_proj": DOWN,
                                "shared_expert_gate": FLOAT, "shared_expert.gate_proj": GATE, "shared_expert.up_proj": UP,
                                "shared_expert.down_proj": DOWN},
    ),
    "gpt-oss (experts as [in, out] with biases, sinks)": Family(
        lambda: hf("GptOssForCausalLM", **_MOE, sliding_window=4),
        _ATTENTION | _UNTIED | {"router": FLOAT, "gate_up_proj_bias": FLOAT, "down_proj_bias": FLOAT,
                                "gate_up_proj$": UP, "down_proj$": DOWN},
        transposed=r"experts\.\w+_proj$",
    ),
    "llama4 (dense products over experts)": Family(
        lambda: hf("Llama4ForCausalLM", **_MOE, intermediate_size_mlp=128, interleave_moe_layer_step=2,
                   attn_temperature_tuning=False, layer_types=["full_attention", "full_attention"], no_rope_layers=[1, 1]),
        _ATTENTION | _UNTIED | {"router": FLOAT, "experts.gate_up_proj": UP, "experts.down_proj": DOWN,
                                "(layers.0.feed_forward|shared_expert).gate_proj": GATE,
                                "(layers.0.feed_forward|shared_expert).up_proj": UP,
                                "(layers.0.feed_forward|shared_expert).down_proj": DOWN},
        transposed=r"experts\.\w+_proj$",
    ),
    "mamba (state space)": Family(
        lambda: hf("MambaForCausalLM", state_size=8, time_step_rank=16),
        {"embeddings": TIED, "_proj": LINEAR, "conv1d": FLOAT, "A_log": FLOAT},
    ),
    "bamba (state space and attention)": Family(
        lambda: hf("BambaForCausalLM", num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16,
                   mamba_d_state=8),
        LLAMA | _UNTIED | {"mamba.(in|out)_proj": LINEAR, "conv1d": FLOAT},
    ),
    "bart (cross attention)": Family(
        lambda: hf("BartForConditionalGeneration", d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128,
                   decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=1,
                   forced_eos_token_id=None),
        {"shared": TIED, "embed_positions": EMBED, "q_proj": Q, "k_proj": K, "v_proj": V, "out_proj": OUT, "fc1": UP,
         "fc2": DOWN},
    ),
    "experts as modules": Family(
        ExpertsAsModules,
        {"table": EMBED, "c_attn": QKV, "c_proj": OUT, "attn.fc": UP, "attn.out": DOWN, "router": FLOAT, r"^up\.": UP,
         "lower": DOWN, "head": VOCABULARY},
    ),
    "shared layers": Family(
        SharedLayers,
        {"table": TIED, "c_attn": QKV, "c_proj": OUT, "fc": UP, "out": DOWN},
    ),
}  # fmt: skip

EVERY = FAMILIES | SHAPES


def build(family: str, seed: int = 0) -> nn.Module:
    """A random model of any family, in eval mode."""
    return build_family(EVERY[family], seed)

"""What a person would say each Parameter is, from its name. qpass itself never looks at names: that is what is compared."""

from __future__ import annotations

import re

#: (pattern in a Parameter's full name, kind), the first that matches. "float": no site, stays as it is; "a|b": may be said
#: to be either.
Rules = tuple[tuple[str, str], ...]

#: Where the same name means another thing in some layers: class without its suffix -> rules before all others.
_EXCEPTIONS: dict[str, Rules] = {
    **dict.fromkeys(("BailingHybrid", "KimiLinear"), ((r"layers\.0\.self_attn.*proj\.weight", "linear"),)),
    "MiniMax": ((r"layers\.1\.self_attn.*proj\.weight", "linear"),),
    "Rwkv": ((r"attention\.(key|value|receptance|output)", "linear"), (r"feed_forward\.receptance", "ffn|linear")),
    "Wav2Vec2ForCTC": ((r"lm_head", "linear"),),
    "SiglipModel": ((r"\bhead\.weight", "linear"), (r"\bhead\.mlp", "ffn"), (r"\bhead\.attention\.in_proj", "qkv")),
}

#: Parts that only a few architectures have, told before the usual ones.
_UNUSUAL: Rules = (
    # learned scales of norms, one for each head; convolutions, states, positions, hyper-connections
    (r"norm\.(scale|weight)$", "float"),
    (r"[kv]_sconv\.weight_proj|[kv]_proj\.sconv\.weight_proj", "qkv"),
    (r"relative_position_bias\.(linear|proj)", "linear"),
    (r"conv(1d|2d|_1d)?\d?\.(weight|bias)|sconv|_conv|conv_qk|patch_embeddings?\.|A_log|time_mix|statics", "float"),
    (r"relative_attention_bias", "float|embedding"),
    (r"relative_pos_embeddings", "linear|router"),
    (r"position_bias$|position_embeddings?$|_bias(\b|_)|l2_clip|\.b[12]$|probe|extensor|class_embedding", "float"),
    (r"cls_token|mask_token|hc_|_hc\.|hyper_connection|query$(?<!self\.query)|adapter_list", "float"),
    # routers, and small networks that are routers
    (r"(mlp\.gate|router)\.(\w+\.)?\w+(_proj|fc\d)|altup\.\w+_coefs|rel_logits", "router|linear"),
    (
        r"router|(mlp|mixer|moe|block_sparse_moe|feed_forward|ffn|experts)\.gate\b|\.gate\.wg|shared_expert_gate",
        "router",
    ),
    (r"correction|indexer\.weights_proj|modality_router", "router"),
    # experts inside attention; what makes queries, keys and values in unusual ways
    (r"attention\.experts\.input_linear|q_gate_proj|temporal_block\.[qkv]_proj", "qkv"),
    (r"attention\.experts\.output_linear|temporal_block\.o_proj", "attn_out"),
    (r"compressor\.|sink_proj", "qkv|linear"),
    # gates on the output of an attention; projections beside or between layers; small gated branches
    (
        r"(attn|attention)\.(o_proj\.)?(gate_proj|g_proj|gate)\.|embed(ding)?s?_project|embedding_hidden_mapping",
        "linear",
    ),
    (r"embeds_projector|conv\.(in|out)_proj|lm_head\.dense", "linear"),
    (r"layers\.\d+\.linear\.weight|layernorm\.mlp", "linear|ffn"),
    (r"laurel|per_layer_(input_gate|projection|model_projection)\.", "ffn|linear"),
    # layers that are no attention
    (
        r"mamba|mixer\.(in|x|dt|out)_proj|linear_attn|mlstm|(temporal|rec)_block|time_shift|indexer|scorer|recurrent",
        "linear",
    ),
    (r"^output\.weight", "vocab"),
)

_USUAL: Rules = (
    (r"lm_head|embed_out|cls\.predictions\.decoder|generator_lm_head|output_projection|codebooks_head", "vocab"),
    (r"vocab_projector|\bhead\.weight|prediction\w*\.decoder|proj_out", "vocab"),
    (r"embed(ding)?(s|_in)?\w*\.(weight|\d+)|\bwte\b|\bwpe\b|\bshared\.weight|_embed\b|tok_embeddings", "embedding"),
    (r"embeds_layer|embed_tokens|embed_positions|embed_in", "embedding"),
    (r"(attn|attention|self|mixer|crossattention|EncDecAttention|SelfAttention|layers\.\d+)\w*\.(\d+\.)?"
     r"(q|k|v|kv|qkv|query|key|value|q_lin|k_lin|v_lin)(_a|_b)?(_proj|_up|_down)?(_with_mqa)?(\.linear)?\.weight", "qkv"),
    (r"Wqkv|query_key_value|c_attn|c_q|qkv|in_proj_weight|project_[qkv]|(query|key|value|kv|[qkv])_proj", "qkv"),
    (r"key_value|[qkv]_lin", "qkv"),
    (r"(attn|attention|mixer|SelfAttention|EncDecAttention|layers\.\d+)\w*\.(\d+\.)?((self|output)\.)?"
     r"(o_proj|out_proj|dense|o|wo|Wo|c_proj|out|out_lin|attention_out|output_linear|o_[ab]_proj)"
     r"(\.linear)?\.weight", "attn_out"),
    (r"out_lin\b|attention\.output\.dense", "attn_out"),
    (r"mlp|ffn|feed_forward|intermediate|output\.dense|fc[12]|experts|c_fc|fc_in|fc_out|dense_h_to|dense_4h", "ffn"),
    (r"DenseReluDense|lin[12]\b|(gate|up|down)_proj|shared_mlp|feedforward|w[123]\b|block_sparse|dense[12]", "ffn"),
)  # fmt: skip


def expected_kind(name: str, architecture: str = "") -> str:
    """One of qpass's kinds, "router" or "float" (both stay in float), or "linear" if the name says nothing."""
    exceptions = _EXCEPTIONS.get(architecture.removesuffix("ForCausalLM"), ())
    for pattern, kind in (*exceptions, *_UNUSUAL, *_USUAL):
        if re.search(pattern, name):
            return kind
    return "linear"

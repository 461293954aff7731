"""What a person would say each Parameter is, from its name. qpass itself never looks at names: that is what is compared."""

from __future__ import annotations

import re

#: Pattern on a Parameter's full name -> kind; the first that matches. "float": no site, stays as it is.
_RULES: tuple[tuple[str, str], ...] = (
    # what is no matrix of a transformer
    (r"conv(1d|2d)?\b|sconv|_conv|patch_embedding\.|patch_embeddings\.|A_log|position_bias$|time_mix|_bias(\b|_)|statics"
     r"|l2_clip|\.b[12]$|probe|extensor|class_embedding|cls_token|mask_token|hc_|_hc\.|query$(?<!self\.query)", "float"),
    (r"router|(mlp|mixer|moe|block_sparse_moe|feed_forward|ffn|experts)\.gate\b|\.gate\.wg|shared_expert_gate"
     r"|correction", "router"),
    # projections of layers that are no attention
    (r"mamba|linear_attn|mlstm|(temporal|rec)_block|time_shift|indexer|compressor|scorer|recurrent", "linear"),
    (r"lm_head|embed_out|cls\.predictions\.decoder|generator_lm_head|output_projection|codebooks_head|vocab_projector"
     r"|\bhead\.weight|prediction\w*\.decoder|proj_out", "vocab"),
    (r"embed(ding)?(s|_in)?\w*\.(weight|\d+)|\bwte\b|\bwpe\b|\bshared\.weight|_embed\b|tok_embeddings|embeds_layer"
     r"|relative_attention_bias|embed_tokens|embed_positions|embed_in", "embedding"),
    # attention
    (r"(attn|attention|self|mixer|crossattention|EncDecAttention|SelfAttention|layers\.\d+)\w*\.(\d+\.)?"
     r"(q|k|v|kv|qkv|query|key|value|q_lin|k_lin|v_lin)(_a|_b)?(_proj|_up|_down)?(_with_mqa)?(\.linear)?\.weight", "qkv"),
    (r"Wqkv|query_key_value|c_attn|c_q|qkv|in_proj_weight|project_[qkv]|(query|key|value|kv|[qkv])_proj|key_value"
     r"|[qkv]_lin", "qkv"),
    (r"(attn|attention|mixer|SelfAttention|EncDecAttention|layers\.\d+)\w*\.(\d+\.)?((self|output)\.)?"
     r"(o_proj|out_proj|dense|o|wo|Wo|c_proj|out|out_lin|attention_out|output_linear|o_[ab]_proj)"
     r"(\.linear)?\.weight", "attn_out"),
    (r"out_lin\b|attention\.output\.dense", "attn_out"),
    # feed-forward
    (r"mlp|ffn|feed_forward|intermediate|output\.dense|fc[12]|experts|c_fc|fc_in|fc_out|dense_h_to|dense_4h"
     r"|DenseReluDense|lin[12]\b|(gate|up|down)_proj|shared_mlp|feedforward|w[123]\b|block_sparse|dense[12]", "ffn"),
)  # fmt: skip


def expected_kind(name: str) -> str:
    """One of qpass's kinds, "router" or "float" (both stay in float), or "linear" if the name says nothing."""
    for pattern, kind in _RULES:
        if re.search(pattern, name):
            return kind
    return "linear"

"""Plain PyTorch, written in the ways that people write transformers, with the sites of each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from tests.models import DOWN, EMBED, HEADS, OUT, TIED, UP, VOCAB, VOCABULARY, WIDTH, Family, K, Q, V

QKV = ("qkv", ("q", "k", "v"))
Attend = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """One block whose attention is computed by `attend`; the rest is the same everywhere."""

    def __init__(self, attend: Attend, head_dim: int = 16) -> None:
        super().__init__()
        self.attend, self.head_dim = attend, head_dim
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 8) for _ in range(4))
        self.packed = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 8)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.register_buffer("keys", torch.zeros(2, HEADS, 16, head_dim), persistent=False)
        self.register_buffer("values", torch.zeros(2, HEADS, 16, head_dim), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.attend(self, self.a(x))
        return self.head(x + self.down(F.gelu(self.up(self.b(x)))))


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge_heads(F.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v), is_causal=True))


def einsum_everywhere(m: Block, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bti,oi->bto", x, w).view(2, -1, HEADS, 16) for w in (m.wq, m.wk, m.wv))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bti,oi->bto", torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2), m.wo)


def matmul_operator(m: Block, x: Tensor) -> Tensor:
    return attention(x @ m.wq.T, x @ m.wk.T, x @ m.wv.T) @ m.wo.T


def batched_products(m: Block, x: Tensor) -> Tensor:
    q, k, v = (split_heads(F.linear(x, w)).reshape(2 * HEADS, -1, 16) for w in (m.wq, m.wk, m.wv))
    bias = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1).expand(2 * HEADS, -1, -1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.25)
    return F.linear(merge_heads(torch.bmm(F.softmax(scores, -1), v).view(2, HEADS, -1, 16)), m.wo)


def exponentials_by_hand(m: Block, x: Tensor) -> Tensor:
    q, k, v = (split_heads(F.linear(x, w)) for w in (m.wq, m.wk, m.wv))
    scores = q @ k.mT / 4
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return F.linear(merge_heads((weights / weights.sum(-1, keepdim=True)) @ v), m.wo)


def flexible(m: Block, x: Tensor) -> Tensor:
    q, k, v = (split_heads(F.linear(x, w)) for w in (m.wq, m.wk, m.wv))
    return F.linear(merge_heads(flex_attention(q, k, v)), m.wo)


def packed_chunk(m: Block, x: Tensor) -> Tensor:
    return F.linear(attention(*F.linear(x, m.packed).chunk(3, -1)), m.wo)


def packed_split(m: Block, x: Tensor) -> Tensor:
    return F.linear(attention(*F.linear(x, m.packed).split(WIDTH, -1)), m.wo)


def packed_unbind(m: Block, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, m.packed).view(2, -1, 3, HEADS, 16).permute(2, 0, 3, 1, 4).unbind(0)
    return F.linear(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)), m.wo)


def packed_weight_in_pieces(m: Block, x: Tensor) -> Tensor:
    wq, rest = m.packed.split([WIDTH, 2 * WIDTH])
    k, v = F.linear(x, rest).chunk(2, -1)
    return F.linear(attention(F.linear(x, wq), k, v), m.wo)


def packed_weight_sliced(m: Block, x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, m.packed[i * WIDTH : (i + 1) * WIDTH]) for i in range(3))
    return F.linear(attention(q, k, v), m.wo)


def _cached(m: Block, x: Tensor, store: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    q, k, v = (split_heads(F.linear(x, w)) for w in (m.wq, m.wk, m.wv))
    y = F.scaled_dot_product_attention(q, store(m.keys, k), store(m.values, v), is_causal=True)  # type: ignore[arg-type]
    return F.linear(merge_heads(y), m.wo)


def cache_by_cat(m: Block, x: Tensor) -> Tensor:
    return _cached(m, x, lambda buffer, new: torch.cat([buffer[:, :, :0], new], 2))


def cache_by_index_copy(m: Block, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    return _cached(m, x, lambda buffer, new: buffer.index_copy_(2, positions, new)[:, :, : x.shape[1]])


def cache_by_slice(m: Block, x: Tensor) -> Tensor:
    def store(buffer: Tensor, new: Tensor) -> Tensor:
        buffer[:, :, : new.shape[2]] = new
        return buffer[:, :, : new.shape[2]]

    return _cached(m, x, store)


SEPARATE = [einsum_everywhere, matmul_operator, batched_products, exponentials_by_hand, flexible, cache_by_cat,
            cache_by_index_copy, cache_by_slice]  # fmt: skip
PACKED = [packed_chunk, packed_split, packed_unbind, packed_weight_in_pieces, packed_weight_sliced]
#: Attentions with a cache that the model keeps itself, in float.
CACHED = {"cache_by_cat", "cache_by_index_copy", "cache_by_slice"}


class TorchLayers(nn.Module):
    """torch.nn's own layers: an encoder over the tokens and a decoder that attends to it."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.layer = layer
        if layer == "MultiheadAttention":
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        else:
            self.enc = nn.TransformerEncoderLayer(WIDTH, HEADS, 128, batch_first=True)
        if layer == "TransformerDecoderLayer":
            self.dec = nn.TransformerDecoderLayer(WIDTH, HEADS, 128, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) / math.sqrt(WIDTH)
        if self.layer == "MultiheadAttention":
            x = x + self.attn(x, x, x, need_weights=False)[0]
            x = x + self.down(F.gelu(self.up(x)))
        else:
            memory = self.enc(x)
            x = self.dec(x, memory) if self.layer == "TransformerDecoderLayer" else memory
        return F.linear(x, self.table.weight)


PLAIN = (
    {
        f.__name__: Family(
            lambda f=f: Block(f),
            {"table": EMBED, "wq": Q, "wk": K, "wv": V, "wo": OUT, "up": UP, "down": DOWN, "head": VOCABULARY},
        )
        for f in SEPARATE
    }
    | {
        f.__name__: Family(
            lambda f=f: Block(f),
            {"table": EMBED, "packed": QKV, "wo": OUT, "up": UP, "down": DOWN, "head": VOCABULARY},
        )
        for f in PACKED
    }
    | {
        layer: Family(
            lambda layer=layer: TorchLayers(layer),
            {
                "table": TIED,
                "in_proj_weight": QKV,
                "out_proj": OUT,
                "linear1": UP,
                "linear2": DOWN,
                "up": UP,
                "down": DOWN,
            },
        )
        for layer in ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
    }
)

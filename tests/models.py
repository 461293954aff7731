"""Tiny random models of several families, each with the sites that a person finds in it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.recipe import PRESETS

VOCAB, WIDTH, HEADS, BLOCKS = 97, 64, 4, 2


class FusedBlock(nn.Module):
    """Pre-norm block: one linear for q, k and v, fused attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.c_attn(self.a(x)).split(WIDTH, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.out(F.gelu(self.fc(self.b(x))))


class NanoGPT(nn.Module):
    """Learned positions, tied vocabulary projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(128, WIDTH)
        self.first, self.second = FusedBlock(), FusedBlock()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.second(self.first(x))))


class FlatExplicit(nn.Module):
    """No submodules and no telling names: raw Parameters, x @ W, einsum, softmax(QK^T)V, grouped heads, rotary, gated FFN."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"table": (VOCAB, WIDTH), "last": (WIDTH, VOCAB)}
        for i in range(BLOCKS):
            shapes |= {
                f"n{i}a": (WIDTH, WIDTH), f"n{i}b": (WIDTH, WIDTH // 2), f"n{i}c": (WIDTH // 2, WIDTH),
                f"n{i}d": (WIDTH, WIDTH), f"n{i}e": (2 * WIDTH, WIDTH), f"n{i}f": (2 * WIDTH, WIDTH),
                f"n{i}g": (WIDTH, 2 * WIDTH),
            }  # fmt: skip
        self.p = nn.ParameterDict({k: nn.Parameter(torch.randn(s) / math.sqrt(WIDTH)) for k, s in shapes.items()})

    def forward(self, ids: Tensor) -> Tensor:
        p = self.p
        x = F.embedding(ids, p["table"]) * WIDTH**0.5
        batch, length = ids.shape
        angle = torch.arange(length)[:, None] / 100 ** (torch.arange(8) / 8)
        cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angle.cos(), angle.sin()))
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        for i in range(BLOCKS):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            q = (h @ p[f"n{i}a"]).view(batch, length, HEADS, 16).transpose(1, 2)
            k = torch.matmul(h, p[f"n{i}b"]).view(batch, length, 2, 16).transpose(1, 2)
            v = F.linear(h, p[f"n{i}c"]).view(batch, length, 2, 16).transpose(1, 2)
            k, v = rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = torch.tanh(rotate(q) @ k.transpose(-2, -1) / 4 / 30) * 30 + mask
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH)
            x = x + y @ p[f"n{i}d"].T
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            gate, up = torch.einsum("bsi,oi->bso", h, p[f"n{i}e"]), F.linear(h, p[f"n{i}f"])
            x = x + F.linear(F.silu(gate) * up, p[f"n{i}g"])
        return torch.tanh(x @ p["last"] / 30) * 30


def hf(name: str, **config: object) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    common = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
              "intermediate_size": 2 * WIDTH, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
              "eos_token_id": 2}  # fmt: skip
    return cls(cls.config_class(**(common | config)))


#: parameter name pattern -> (kind, roles)
Expected = dict[str, tuple[str, tuple[str, ...]]]

EMBED, VOCABULARY = ("embedding", ("embedding",)), ("vocab", ("vocab",))
TIED = ("embedding", ("embedding", "vocab"))
Q, K, V, OUT = ("qkv", ("q",)), ("qkv", ("k",)), ("qkv", ("v",)), ("attn_out", ("o",))
LINEAR, FLOAT = ("linear", ()), ("other", ())
GATE, UP, DOWN = ("ffn", ("gate",)), ("ffn", ("up",)), ("ffn", ("down",))
LLAMA = {"q_proj": Q, "k_proj": K, "v_proj": V, "o_proj": OUT, "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}


@dataclass(frozen=True)
class Family:
    """How to build a model, and what its sites are. `transposed`: pattern of the Parameters that are [in, out]."""

    build: Callable[[], nn.Module]
    sites: Expected
    transposed: str = r"(?!)"

    def expected(self, model: nn.Module) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Name of every Parameter of two dimensions or more -> (kind, roles): of the longest pattern that is found in it."""
        found = {}
        for name, param in model.named_parameters():
            if param.dim() > 1:
                patterns = [p for p in self.sites if re.search(p, name)]
                assert patterns, name
                found[name] = self.sites[max(patterns, key=len)]
        return found


FAMILIES = {
    "llama": Family(
        lambda: hf("LlamaForCausalLM", num_key_value_heads=2), LLAMA | {"embed_tokens": EMBED, "lm_head": VOCABULARY}
    ),
    "gpt2": Family(
        lambda: hf("GPT2LMHeadModel", n_embd=WIDTH, n_head=HEADS, n_layer=BLOCKS, n_positions=256),
        {"wte": TIED, "wpe": EMBED, "c_attn": ("qkv", ("q", "k", "v")), "attn.c_proj": OUT, "c_fc": UP, "mlp.c_proj": DOWN},
        transposed=r"c_attn|c_proj|c_fc",
    ),
    "qwen2": Family(
        lambda: hf("Qwen2ForCausalLM", num_key_value_heads=2), LLAMA | {"embed_tokens": EMBED, "lm_head": VOCABULARY}
    ),
    "qwen3": Family(
        lambda: hf("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
        LLAMA | {"embed_tokens": TIED},
    ),
    "gemma2": Family(
        lambda: hf("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=16, sliding_window=4, attn_implementation="eager"),
        LLAMA | {"embed_tokens": TIED},
    ),
    "bloom": Family(
        lambda: hf("BloomForCausalLM", n_head=HEADS, n_layer=BLOCKS),
        {"word_embeddings": TIED, "query_key_value": ("qkv", ("q", "k", "v")), "attention.dense": OUT, "h_to_4h": UP,
         "4h_to_h": DOWN},
    ),
    "bert": Family(
        lambda: hf("BertForMaskedLM"),
        {"embeddings.word": TIED, "embeddings.position": EMBED, "embeddings.token_type": EMBED, "self.query": Q,
         "self.key": K, "self.value": V, "attention.output": OUT, "intermediate": UP, "r.0.output": DOWN, "r.1.output": DOWN,
         "transform": ("linear", ())},
    ),
    "nanogpt": Family(
        NanoGPT,
        {"wte": TIED, "wpe": EMBED, "c_attn": ("qkv", ("q", "k", "v")), "c_proj": OUT, ".fc": UP, ".out": DOWN},
    ),
    "flat": Family(
        FlatExplicit,
        {"table": EMBED, "last": VOCABULARY}
        | {f"n{i}{k}": s for i in range(BLOCKS) for k, s in zip("abcdefg", (Q, K, V, OUT, GATE, UP, DOWN), strict=True)},
        transposed=r"p\.(last|n\d[ab])$",
    ),
}  # fmt: skip


def build_family(family: Family, seed: int = 0) -> nn.Module:
    """A random model of `family` in eval mode; the same weights for the same seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = family.build().eval()
    torch.random.set_rng_state(state)
    return model


def build(family: str, seed: int = 0) -> nn.Module:
    """`build_family` by name."""
    return build_family(FAMILIES[family], seed)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """[batch, length] random token ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(out: object) -> Tensor:
    """The logits of a model's output, whatever it wraps them in."""
    return getattr(out, "logits", out)  # type: ignore[return-value]


#: The operations of a Llama's norm, as transformers writes it.
NORM = ["to", "pow", "mean", "add", "rsqrt", "mul", "to", "mul"]

#: What the preset "int8" stores weights as.
INT8 = str(PRESETS["int8"].ffn)


def dequantized_copy(model: nn.Module, spec_of: Callable[[str], str | None], transposed: str = r"(?!)") -> nn.Module:
    """The independent reference: the float model with each named weight quantized and dequantized in place."""
    import copy

    from qpass.numerics import fake_quantize
    from qpass.spec import parse_spec

    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in reference.named_parameters():
            text = spec_of(name) if param.dim() > 1 else None
            if text is not None:
                flipped = re.search(transposed, name) is not None
                rows = param.mT.contiguous() if flipped else param
                rounded = fake_quantize(rows, parse_spec(text))
                param.copy_(rounded.mT if flipped else rounded)
    return reference

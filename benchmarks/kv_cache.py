"""What a quantized KV cache costs a model: KL by position, perplexity, top-1, recall over distance, and bytes a token.

    python benchmarks/kv_cache.py MODEL_DIR --text FILE [--formats "int8" "k=int8,v=int4" ...] [--recall 2000 6000]
                                  [--outliers F] [--json OUT]

Weights stay in float. The windows are those of benchmarks/accuracy.py, read `--chunk` tokens at a time: a chunk sees its own
tokens as floats and all before it as they are stored. Recall: a sentence stands at a quarter, half or three quarters of so many
tokens of text, and greedy decoding must give its last words; so many of three. --outliers F: in every head two of the keys'
channels (a pair that rotary embedding turns) are F times as large, and those of its queries F times smaller, which changes
nothing in float.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import qpass

DEFAULT = (
    "int8", "fp8_e4m3", "int8:static", "k=int8,v=int4:channel:asym", "int4:channel:asym", "int4:channel:asym:rotated",
    "int4:g32:asym", "int4:g32:asym:rotated", "k=int4:t32:zero=float:scale=fp16,v=int4:g32:zero=float:scale=fp16",
    "int3", "int2", "int2:g32:asym",
)  # fmt: skip
NEEDLES = (
    (" My locker number is 58213.", " My locker number is", " 58213"),
    (" The password of the garden gate is PELICAN.", " The password of the garden gate is", " PELICAN"),
    (" Doctor Quimby lives in the town of Aberlour.", " Doctor Quimby lives in the town of", " Aberlour"),
)


def new_cache(config: Any, length: int, text: str | None, calibration: Any) -> Any:
    if text is None:
        return DynamicCache(config=config)
    halves = dict(part.split("=", 1) for part in text.split(",")) if text.startswith("k=") else {"format": text}
    cache = qpass.KVCache(config, length, **halves)
    return cache.calibrate(*calibration) if "static" in text else cache


@torch.no_grad()
def by_chunks(model: Any, ids: Tensor, cache: Any, chunk: int) -> Tensor:
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunk, 1)], 1)


@torch.no_grad()
def with_key_outliers(model: Any, factor: float) -> Any:
    """The same function of a Llama with larger keys and smaller queries in one pair of channels of each head."""
    config = model.config
    width = config.head_dim
    for i, layer in enumerate(model.model.layers):
        pair = [i % (width // 2), i % (width // 2) + width // 2]
        attention = layer.self_attn
        attention.k_proj.weight.view(config.num_key_value_heads, width, -1)[:, pair] *= factor
        attention.q_proj.weight.view(config.num_attention_heads, width, -1)[:, pair] /= factor
    return model


@torch.no_grad()
def recalls(model: Any, tokenizer: Any, words: list[int], length: int, make: Any) -> int:
    """How many of the three needles, each at a place of its own, come back."""
    found = 0
    for (sentence, question, answer), place in zip(NEEDLES, (0.25, 0.5, 0.75), strict=True):
        needle, asked, wanted = (tokenizer(t, add_special_tokens=False).input_ids for t in (sentence, question, answer))
        at = int(length * place)
        ids = torch.tensor([words[:at] + needle + words[at:length] + asked])
        cache = make(ids.shape[1] + len(wanted) + 1)
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, given = ids[:, -1:], []
        for _ in wanted:
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            given.append(int(token))
        found += given == wanted
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="text for static scales; --text unless given")
    parser.add_argument("--formats", nargs="*", default=DEFAULT)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--outliers", type=float, default=1.0)
    parser.add_argument("--recall", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.outliers != 1:
        with_key_outliers(model, args.outliers)

    def windows(path: str) -> Tensor:
        documents = [d for d in Path(path).read_text().split("<|endoftext|>\n") if d.strip()]
        rows = [tokenizer(d, add_special_tokens=False).input_ids[: args.window] for d in documents]
        return torch.tensor(rows[: args.windows])

    ids = windows(args.text)
    calibration = (model, [windows(args.calibration or args.text)])
    words = tokenizer(Path(args.text).read_text()[:60000], add_special_tokens=False).input_ids
    reference = by_chunks(model, ids, DynamicCache(config=model.config), args.chunk).log_softmax(-1)
    rows: list[dict[str, Any]] = []
    for text in (None, *args.formats):
        cache = new_cache(model.config, args.window, text, calibration)
        log_q = by_chunks(model, ids, cache, args.chunk).log_softmax(-1)
        kl = (reference.exp() * (reference - log_q)).sum(-1)
        loss = -log_q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        per_token = getattr(cache, "nbytes", 0) / (len(ids) * args.window) or sum(
            2 * la.keys[0, :, 0].nbytes for la in cache.layers
        )
        row: dict[str, Any] = {
            "format": text or "float", "bytes_per_token": per_token, "kl": float(kl.mean()),
            "kl_by_quarter": [float(q.mean()) for q in kl.chunk(4, 1)], "perplexity": float(loss.exp()),
            "standard_error": float(kl.mean(1).std() / len(ids) ** 0.5),
            "top1": float((log_q.argmax(-1) == reference.argmax(-1)).float().mean()),
        }  # fmt: skip
        for length in args.recall:
            make = lambda n, text=text: new_cache(model.config, n, text, calibration)  # noqa: E731
            row[f"recall_{length}"] = recalls(model, tokenizer, words, length, make)
        rows.append(row)
        quarters = " ".join(f"{q:.5f}" for q in row["kl_by_quarter"])
        recalled = " ".join(f"{row[f'recall_{n}']}/3" for n in args.recall)
        print(
            f"| {row['format']} | {per_token:,.0f} | {row['perplexity']:.3f} | {row['kl']:.5f} | {row['standard_error']:.5f} "
            f"| {quarters} | {row['top1']:.4f} | {recalled} |", flush=True,
        )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a quantized KV cache costs a model: KL by position, perplexity, top-1, recall over distance, and bytes a token.

    python benchmarks/kv_cache.py MODEL_DIR --text FILE --calibration FILE [--formats "int8" "k=int8,v=int4" ...]
                                  [--recall 2000 6000] [--outliers F] [--json OUT]

Weights stay in float. Only static scales need `--calibration`. The windows are those of benchmarks/accuracy.py (of the
documents that are as long as `--window`), read `--chunk` tokens at a time: a chunk sees its own tokens as floats and all before
it as they are stored. `--chunk 0`: a window at a time, which sees all tokens, its own too, as they would be stored.

Recall: ten sentences stand at ten depths of so many tokens of text, and greedy decoding must give their last words; so many of
those that the float model gives. --outliers F: in every head two of the keys' channels (a pair that rotary embedding turns) are
F times as large, and those of its queries F times smaller, which changes nothing in float.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import qpass
from qpass.cache import CACHE_ARGUMENT
from qpass.numerics import fake_quantize
from qpass.recipe import kv_specs

DEFAULT = (
    "int8", "fp8_e4m3", "int8:static", "k=int8,v=int4:channel:asym", "int4:channel:asym", "int4:channel:asym:rotated",
    "int4:g32:asym", "int4:g32:asym:rotated", "int4", "int3", "int2", "int2:g32:asym",
)  # fmt: skip
#: What is said, and how it ends: the question is all before the end.
FACTS = (
    (" My locker number is", " 58213"), (" The password of the garden gate is", " PELICAN"),
    (" Doctor Quimby lives in the town of", " Aberlour"), (" The spare key hangs behind the", " barometer"),
    (" The ferry to Lindholm leaves at", " 06:45"), (" The captain's parrot is called", " Magellan"),
    (" The treasure is buried under the old", " windmill"), (" Flight 417 departs from gate", " B29"),
    (" The secret ingredient of the soup is", " saffron"), (" Aunt Matilda was born in the year", " 1873"),
)  # fmt: skip


class Rounded(DynamicCache):
    """Keys and values of one pass, each token as it would be stored."""

    def __init__(self, config: Any, k: str | None, v: str | None, both: str | None) -> None:
        super().__init__(config=config)
        self.specs = kv_specs(k, v, both, "kv_cache.py")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = (fake_quantize(x, spec) for x, spec in zip((key_states, value_states), self.specs, strict=True))
        return k, v


def halves_of(text: str) -> dict[str, str]:
    """Arguments of KVCache."""
    return dict(part.split("=", 1) for part in text.split(",")) if text.startswith("k=") else {"format": text}


def new_cache(config: Any, length: int, text: str | None, calibration: Any, chunk: int = 1) -> Any:
    if text is None:
        return DynamicCache(config=config)
    halves = halves_of(text)
    if not chunk:
        return Rounded(config, halves.get("k"), halves.get("v"), halves.get("format"))
    cache = qpass.KVCache(config, length, **halves)
    return cache.calibrate(*calibration) if "static" in text else cache


@torch.no_grad()
def by_chunks(model: Any, ids: Tensor, cache: Any, chunk: int, keep: int = 0) -> Tensor:
    parts = ids.split(chunk, 1)
    return torch.cat(
        [model(p, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=keep).logits for p in parts], 1
    )


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
def recalls(model: Any, tokenizer: Any, words: list[int], length: int, make: Any) -> list[bool]:
    """Which of the facts come back from a text that holds them all."""

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    each, ids = length // len(FACTS), []
    for i, (question, answer) in enumerate(FACTS):
        sentence = encoded(f"{question}{answer}.")
        ids += words[i * each : (i + 1) * each - len(sentence)] + sentence
    longest = max(len(encoded(q)) + len(encoded(a)) for q, a in FACTS)
    read = make(len(ids) + longest + 1)
    by_chunks(model, torch.tensor([ids]), read, 512, keep=1)
    found = []
    for question, answer in FACTS:
        cache, token, given, wanted = copy.deepcopy(read), torch.tensor([encoded(question)]), [], encoded(answer)
        for _ in wanted:
            token = model(token, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            given.append(int(token))
        found.append(given == wanted)
    return found


def compare(reference: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: KL, the log-probabilities, whether the likeliest next token is the same."""
    return (reference.exp() * (reference - log_q)).sum(-1), log_q, log_q.argmax(-1) == reference.argmax(-1)


def _recalled(row: dict[str, Any], in_float: dict[str, Any], key: str) -> str:
    """What is recalled of what the float model recalls."""
    both = sum(a and b for a, b in zip(row[key], in_float[key], strict=True))
    return f"{both}/{sum(in_float[key])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="text for static scales, other than --text")
    parser.add_argument("--formats", nargs="*", default=DEFAULT)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--outliers", type=float, default=1.0)
    parser.add_argument("--recall", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.chunk and (args.recall or any("static" in text for text in args.formats)):
        parser.error("--chunk 0 rounds tokens as they come: no static scales, no recall")
    if not args.calibration and any("static" in text for text in args.formats):
        parser.error("static scales come from data: give --calibration, other documents than --text")
    for halves in map(halves_of, args.formats):
        kv_specs(halves.get("k"), halves.get("v"), halves.get("format"), "--formats")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.outliers != 1:
        with_key_outliers(model, args.outliers)

    def windows(path: str) -> Tensor:
        documents = [d for d in Path(path).read_text().split("<|endoftext|>\n") if d.strip()]
        rows = [tokenizer(d, add_special_tokens=False).input_ids[: args.window] for d in documents]
        return torch.tensor([row for row in rows if len(row) == args.window][: args.windows])

    ids = windows(args.text)
    calibration = (model, [windows(args.calibration)] if args.calibration else [])
    words = tokenizer(Path(args.text).read_text()[:60000], add_special_tokens=False).input_ids
    formats = (None, *args.formats)
    measured: dict[str | None, list[tuple[Tensor, float, float]]] = {text: [] for text in formats}
    sizes: dict[str | None, float] = {}
    for window in ids.split(1):  # one at a time: the logits of a long one take gigabytes
        chunk = args.chunk or args.window
        reference = by_chunks(model, window, DynamicCache(config=model.config), chunk).log_softmax(-1)[0]
        for text in formats:
            cache = new_cache(model.config, window.shape[1], text, calibration, args.chunk)
            found = []
            for part, p in zip(window.split(chunk, 1), reference.split(chunk), strict=True):
                found.append(compare(p, by_chunks(model, part, cache, chunk).log_softmax(-1)[0]))
            kl, log_q, same = (torch.cat(x) for x in zip(*found, strict=True))
            loss = -log_q[:-1].gather(-1, window[0, 1:, None]).mean()
            measured[text].append((kl, float(loss), float(same.float().mean())))
            if isinstance(cache, qpass.KVCache):
                sizes[text] = cache.nbytes / window.shape[1]
            elif not isinstance(cache, Rounded):  # which stores nothing
                sizes[text] = sum(2 * la.keys[0, :, 0].nbytes for la in cache.layers)
    rows: list[dict[str, Any]] = []
    for text in formats:
        kl = torch.stack([k for k, _, _ in measured[text]])
        losses, same = (torch.tensor(x) for x in list(zip(*measured[text], strict=True))[1:])
        row: dict[str, Any] = {
            "format": text or "float", "bytes_per_token": sizes.get(text), "kl": float(kl.mean()),
            "kl_by_quarter": [float(q.mean()) for q in kl.chunk(4, 1)], "perplexity": float(losses.mean().exp()),
            "standard_error": float(kl.mean(1).std() / len(ids) ** 0.5), "top1": float(same.mean()),
        }  # fmt: skip
        for length in args.recall:
            make = lambda n, text=text: new_cache(model.config, n, text, calibration)  # noqa: E731
            row[f"recall_{length}"] = recalls(model, tokenizer, words, length, make)
        rows.append(row)
        quarters = " ".join(f"{q:.5f}" for q in row["kl_by_quarter"])
        recalled = " ".join(_recalled(row, rows[0], f"recall_{n}") for n in args.recall)
        quality = (
            f"{row['perplexity']:.3f} | {row['kl']:.5f} | {row['standard_error']:.5f} | {quarters} | {row['top1']:.4f}"
        )
        print(f"| {row['format']} | {sizes.get(text, 0):,.0f} | {quality} | {recalled} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

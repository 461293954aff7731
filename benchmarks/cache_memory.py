"""Peak resident memory of decoding behind a long context, for each format of the KV cache, beside what qpass.plan_memory says.

    python benchmarks/cache_memory.py [--tokens 32768] [--formats float int8 int4 ...] [--json OUT]

A random Llama (8 layers, 4 heads of 64) reads so many tokens, 256 at a time, and decodes eight more. Each format in a process of
its own. prefill, decode: the most that was resident meanwhile, less what was before the first token of the cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass
from qpass.cache import CACHE_ARGUMENT
from qpass.memory import return_freed_heap

CONFIG = LlamaConfig(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
    vocab_size=8000, max_position_embeddings=1 << 17,
)  # fmt: skip
_CHUNK = 256


def _memory(of: str) -> int:
    """VmRSS: resident bytes now. VmHWM: the most since the last `_forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(of))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


@torch.no_grad()
def measure(text: str, tokens: int) -> dict[str, float]:
    """Of one format, in this process."""
    torch.manual_seed(0)
    spec = None if text == "float" else text
    model = qpass.quantize(LlamaForCausalLM(CONFIG).eval(), qpass.Recipe.uniform("int8", kv=spec))
    room = tokens + 64
    small = qpass.KVCache(CONFIG, room, spec)
    for step in (_CHUNK, _CHUNK, 1, 1):  # compiled before anything is counted
        model(torch.zeros((1, step), dtype=torch.long), **{CACHE_ARGUMENT: small}, logits_to_keep=1)
    del small
    return_freed_heap()
    _forget_peak()
    before = _memory("VmRSS")
    cache = qpass.KVCache(CONFIG, room, spec)
    for start in range(0, tokens, _CHUNK):
        model(torch.randint(0, 8000, (1, min(_CHUNK, tokens - start))), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    prefill = _memory("VmHWM") - before
    return_freed_heap()
    _forget_peak()
    for _ in range(8):
        model(torch.zeros((1, 1), dtype=torch.long), **{CACHE_ARGUMENT: cache})
    plan = qpass.plan_memory(CONFIG, "int8", context=room, kv=spec, dtype=torch.float32).cache
    return {"planned": plan.bytes, "nominal": plan.nominal_bytes, "allocated": cache.nbytes, "prefill": prefill,
            "decode": _memory("VmHWM") - before}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument(
        "--formats", nargs="*", default=["float", "int8", "fp8_e4m3", "int4", "int4:channel:asym", "int2"]
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens)))
        return
    rows = []
    columns = ("planned", "nominal", "allocated", "prefill", "decode")
    print("| format | " + " | ".join(f"{c} MB" for c in columns) + " |\n|---|---|---|---|---|---|")
    for text in args.formats:
        command = [sys.executable, __file__, "--one", text, "--tokens", str(args.tokens)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        row = json.loads(out)
        rows.append({"format": text, "tokens": args.tokens, **row})
        print(f"| `{text}` | " + " | ".join(f"{row[c] / 1e6:,.1f}" for c in columns) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

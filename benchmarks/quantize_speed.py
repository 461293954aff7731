"""How fast weights are rounded to nearest, beside reading them: a Llama of 418 M random weights, in memory.

    python benchmarks/quantize_speed.py [--json FILE]

Each matrix as qpass.quantize takes it: checked numbers, codes, signal to noise. The capture of the graph comes before that, and
takes the same for weights of any size. The read bandwidth is that of a sum over 256 MB, measured between the formats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass
from qpass.spec import parse_spec
from qpass.store import quantize_group

RECIPES = (
    "int8",
    "int8:g32:scale=fp16",
    "int4:g128",
    "int4:g32:asym",
    "int3:g128",
    "nf4",
    "fp4_e2m1",
    "fp8_e4m3",
    "mxfp4",
    "nvfp4",
)


def best(function: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=32,
        num_key_value_heads=4, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    big = torch.randn(64 << 20)
    rows: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = [p.detach() for p in model(dtype).parameters() if p.dim() == 2]
        size = sum(w.nbytes for w in weights)
        for recipe in RECIPES:
            spec = parse_spec(recipe)
            bandwidth = big.nbytes / best(big.sum, 5)
            seconds = best(lambda spec=spec, weights=weights: [quantize_group([w], spec) for w in weights])
            name = f"{str(dtype).removeprefix('torch.')} to {recipe}"
            rows[name] = {"seconds": seconds, "GB/s": size / seconds / 1e9, "of bandwidth": size / seconds / bandwidth}
            share = rows[name]["of bandwidth"]
            print(f"{name:32} {seconds * 1e3:7.0f} ms  {size / seconds / 1e9:6.2f} GB/s  {share:.2f} of reading")
    whole = model(torch.float32)
    start = time.perf_counter()
    qpass.quantize(whole, "int8")
    rows["whole call, int8"] = {"seconds": time.perf_counter() - start}
    print(f"qpass.quantize, with the capture of the graph: {rows['whole call, int8']['seconds']:.2f} s")
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

"""Run in a process of its own by test_checkpoint.py: resident memory of qpass.quantize_checkpoint.

python -m tests.checkpoint_probe FOLDER RECIPE    prints bytes: {"float", "final", "block", "recorded", "peak"}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass
from tests.memory_probe import peak_memory, resident

HIDDEN, FFN, LAYERS, TOKENS, BATCHES = 1024, 2816, 20, 512, 4


def write(folder: Path, hidden: int = HIDDEN) -> int:
    """About 300 M random parameters in fp32, or fewer; -> the bytes of a layer, the largest repeated block."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=FFN * hidden // HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.model.layers[0].parameters())


def main(folder: str, recipe: str) -> None:
    source, small, target = (Path(folder) / name for name in ("source", "small", "target"))
    write(small, hidden=128)  # of as many nodes: what Dynamo takes for a graph is not what is measured
    block = write(source)
    ids = [torch.randint(4096, (1, TOKENS), generator=torch.Generator().manual_seed(i)) for i in range(BATCHES)]
    given = None if recipe == "int8" else ids
    qpass.quantize_checkpoint(small, Path(folder) / "warm", recipe, calibration=given)
    base = resident()
    with peak_memory() as peak:
        qpass.quantize_checkpoint(source, target, recipe, calibration=given)
    stored = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    # of each call the residual stream is held, and inside of the feed-forward network gate, up and their product
    recorded = 0 if given is None else BATCHES * TOKENS * 4 * (2 * HIDDEN + 3 * FFN)
    recorded += 4 * FFN * FFN * 4 if "gptq" in recipe else 0  # sums of products, ordered, their inverse and its factor
    whole = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    print(json.dumps({"float": whole, "final": stored, "block": block, "recorded": recorded, "peak": peak[0] - base}))


if __name__ == "__main__":
    main(*sys.argv[1:])

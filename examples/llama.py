"""A Llama of transformers in four bits with a cache in eight: bytes before and after, what it writes, saved and loaded again.

python examples/llama.py [folder of a model] [--recipe int4+kv=int8] [--inner inductor]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass

TINYPY = Path(__file__).parent / "tinypy"
PROMPT = "def read(self, size=-1):\n    if self.closed:\n        raise ValueError("


def complete(model: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt and 40 greedy tokens."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0]))


def cache_bytes(report: Any) -> float:
    """Bytes that a token takes in the caches of all layers."""
    return sum(site.bytes_per_token or 0 for site in report.sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=TINYPY)
    parser.add_argument("--recipe", default="int4+kv=int8")
    parser.add_argument("--inner", default="eager", help="what compiles the rest: inductor starts slowly and runs fast")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    before = sum(p.nbytes for p in model.parameters())
    print(f"float\n{complete(model, tokenizer, PROMPT)}\n")

    model = qpass.quantize(model, args.recipe, inner=args.inner)
    print(f"{args.recipe}\n{complete(model, tokenizer, PROMPT)}\n")
    report = qpass.report(model)
    after = report.resident_float + report.resident_quantized
    print(f"weights: {before:,} bytes before, {after:,} after ({before / after:.1f} times smaller)")
    print(f"cache: {cache_bytes(report):,.0f} bytes a token")

    with tempfile.TemporaryDirectory() as folder:
        told = qpass.save(model, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        loaded = qpass.load(folder, inner=args.inner)
        same = complete(loaded, tokenizer, PROMPT) == complete(model, tokenizer, PROMPT)
        print(f"saved: {size:,} bytes, {told}; loaded again it writes {'the same' if same else 'something else'}")


if __name__ == "__main__":
    main()

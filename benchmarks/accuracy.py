"""What each format costs a model: KL, perplexity and top-1 on validation windows, and bytes.

    python benchmarks/accuracy.py MODEL_DIR [--text FILE | --tokens FILE.npy] [--recipes int8,int4,...] [--json OUT]
                                  [--calibration FILE --calibration-windows 32]

`--text`: documents separated by lines of <|endoftext|>; the first `--window` tokens of each of the first `--windows`.
`--tokens`: a uint16 array, cut into windows. `--calibration`: text for recipes that need data ("int4:g128:gptq"); its documents
are cut into windows, and the first so many used; without it bits are given out by the weights alone. Formats whose products take
int8 activations are measured with float ones too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.algorithms.rounding import needs_data
from qpass.recipe import resolve_recipe
from qpass.spec import QuantSpec

DEFAULT = "int8,fp8_e4m3,int4:g128,int4:g128:asym,int4:g64:asym,int4:g32,nf4,int4"


def read_windows(args: argparse.Namespace) -> torch.Tensor:
    """[windows, window] token ids."""
    if args.tokens:
        ids = torch.from_numpy(np.load(args.tokens)[: args.windows * args.window].astype(np.int64))
        return ids.view(-1, args.window)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = Path(args.text).read_text().split("<|endoftext|>\n")
    rows = [tokenizer(d, add_special_tokens=False).input_ids[: args.window] for d in documents if d.strip()]
    return torch.tensor(rows[: args.windows])


def calibration_windows(args: argparse.Namespace) -> torch.Tensor | None:
    """[windows, window] token ids of the calibration text."""
    if not args.calibration:
        return None
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = Path(args.calibration).read_text().split("<|endoftext|>\n")
    rows = [tokenizer(d, add_special_tokens=False).input_ids for d in documents if d.strip()]
    cut = [row[i : i + args.window] for row in rows for i in range(0, len(row) - args.window + 1, args.window)]
    return torch.tensor(cut[: args.calibration_windows])


def read_recipe(text: str, calibrated: bool) -> qpass.Recipe:
    """A preset, a spec, or sites: "int4:g32:gptq;embedding=int8:g32;vocab=int8:g32;bits=5"."""
    spec, *sites = text.split(";")
    if not sites:
        return resolve_recipe(spec, calibrated)
    given: dict[str, Any] = dict(site.split("=", 1) for site in sites)
    bits = {"bits": float(given.pop("bits"))} if "bits" in given else {}
    return qpass.Recipe.uniform(spec, **given, **bits)


def needs_calibration(recipe: qpass.Recipe) -> bool:
    """Whether a site of it asks for data."""
    specs = [spec for spec in vars(recipe).values() if isinstance(spec, QuantSpec)]
    return recipe.bits is not None or any(needs_data(spec) for spec in specs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--tokens")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--recipes", default=DEFAULT)
    parser.add_argument("--calibration")
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--json")
    args = parser.parse_args()
    batches = read_windows(args).split(args.batch)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = {batch.data_ptr(): reference(batch).logits for batch in batches}
    data, results = calibration_windows(args), {}
    for recipe in args.recipes.split(","):
        start = time.perf_counter()
        resolved = read_recipe(recipe, data is not None)
        calibration = data.split(args.batch) if data is not None and needs_calibration(resolved) else None
        model = qpass.quantize(copy.deepcopy(reference), resolved, calibration=calibration, inner="eager")
        seconds = time.perf_counter() - start
        for compute in (None, "float"):
            with qpass.set_compute(compute):
                found = qpass.evaluate(model, lambda batch: logits[batch.data_ptr()], batches)
            size = qpass.report(model).resident_quantized + qpass.report(model).resident_float
            key = recipe if compute is None else f"{recipe}, {compute}"
            results[key] = found.to_json() | {"bytes": size, "quantizing_seconds": seconds}
            print(f"{recipe:18} {size / 1e6:7.1f} MB  {found}", flush=True)
            if "int8" not in found.compute.values():
                break
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

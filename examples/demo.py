"""What each format costs a small trained model, in bytes, accuracy and speed; then two models write the same function.

python examples/demo.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.measuring.compare import compare

MODEL = Path(__file__).parent / "tinypy"
#: Formats by round to nearest, the preset, and the preset with a quantized cache. tinypy forgives what ruins larger models.
RECIPES = ("int8", "fp8", "nf4", "int4:g128", "int4", "int4+kv=int8")
PROMPT = """def write(self, data):
    if self.closed:
        raise ValueError("""


def complete(recipe: str | None, tokenizer: Any) -> tuple[str, Any]:
    """The prompt and what the model makes of it, up to the end of the function; and the model."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if recipe is not None:
        model = qpass.quantize(model, recipe, inner="eager")
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=48, do_sample=False, pad_token_id=0)
    return PROMPT + tokenizer.decode(out[0, ids.input_ids.shape[1] :]).split("\n\n")[0], model


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    console.width = max(console.width, 120)
    found = compare(
        MODEL, RECIPES, MODEL / "validation.txt", window=512, windows=16, dtype="float32", inner="eager", context=64
    )
    console.print(found.__rich__(), highlight=False)
    console.print(
        "Speed is that of qpass's CPU kernels with the rest of the model eager, in a model of a few MB.\n", style="dim"
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {recipe or "float": complete(recipe, tokenizer) for recipe in (None, "int4+kv=int8")}
    console.print(Columns([Panel(text, title=name, width=58) for name, (text, _) in texts.items()]))
    model = texts["int4+kv=int8"][1]
    console.print("What was done, site by site and in the graph (qpass.report, qpass.diff):")
    console.print(qpass.report(model).__rich__(), highlight=False)
    console.print(qpass.diff(model).summary(), markup=False)


if __name__ == "__main__":
    main()

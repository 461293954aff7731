"""What each format costs a small trained model, in bytes, accuracy and speed; then two models write the same function.

python examples/demo.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass

MODEL = Path(__file__).parent / "tinypy"
WINDOW, BATCH, NEW_TOKENS = 512, 16, 48
PROMPT = """def write(self, data):
    if self.closed:
        raise ValueError("""
#: Row of the table -> recipe; None is the float model. Plain round to nearest on every matrix, for comparison by format.
ROWS: dict[str, qpass.Recipe | None] = {
    "fp32": None,
    "bf16": None,
    "int8": qpass.Recipe.uniform("int8"),
    "fp8": qpass.Recipe.uniform("fp8_e4m3"),
    "int4 g128": qpass.Recipe.uniform("int4:g128"),
    "nf4": qpass.Recipe.uniform("nf4:g64"),
    "int4 g128, int8 cache": qpass.Recipe.uniform("int4:g128", kv="int8"),
}


def load(dtype: torch.dtype = torch.float32) -> Any:
    """The shipped model."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()


def weight_bytes(model: Any) -> int:
    """Bytes of all weights as they are in memory."""
    return sum(getattr(p, "stored_nbytes", p.nbytes) for p in model.parameters())


def with_cache(model: Any, recipe: qpass.Recipe | None) -> Callable[[torch.Tensor], Any]:
    """The model as a function of token ids; with the recipe's cache format, if it has one, inside the window too."""
    if recipe is None or recipe.kv_specs is None:
        return lambda ids: model(ids, use_cache=False)
    return lambda ids: model(ids, past_key_values=qpass.KVCache(model.config, WINDOW, format=recipe.k))


def tokens_per_second(model: Any, ids: torch.Tensor) -> float:
    """Greedy decoding at batch 1, second run."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
                       do_sample=False, pad_token_id=0)  # fmt: skip
        seconds = time.perf_counter() - start
    return NEW_TOKENS / seconds


def complete(model: Any, tokenizer: Any) -> str:
    """The prompt and what the model makes of it, up to the end of the function."""
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return PROMPT + tokenizer.decode(out[0, ids.input_ids.shape[1] :]).split("\n\n")[0]


@torch.no_grad()
def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=110)
    reference, tokenizer = load(), AutoTokenizer.from_pretrained(MODEL)
    ids = torch.from_numpy(np.load(MODEL / "validation.npy").astype(np.int64)).view(-1, WINDOW)
    batches = ids.split(BATCH)
    console.print(f"tinypy on {ids.numel():,} tokens of Python source, round to nearest at every matrix\n")
    logits = [reference(batch, use_cache=False).logits for batch in batches]
    known = {batch.data_ptr(): out for batch, out in zip(batches, logits, strict=True)}

    def reference_logits(batch: torch.Tensor) -> torch.Tensor:
        return known[batch.data_ptr()]

    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    table = Table("", "bytes", "perplexity", "KL", "top-1", "tokens/s", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    models: dict[str, Any] = {}
    for name, recipe in ROWS.items():
        model = models[name] = load(torch.bfloat16 if name == "bf16" else torch.float32)
        if recipe is not None:
            qpass.quantize(model, recipe, inner="eager")
        ours = reference_logits if name == "fp32" else with_cache(model, recipe)
        found = qpass.evaluate(ours, reference_logits, batches)
        speed = tokens_per_second(model, prompt)
        numbers = (
            f"{weight_bytes(model):,}",
            f"{found.perplexity:.3f}",
            f"{found.kl:.5f}",
            f"{found.top1:.4f}",
            f"{speed:.0f}",
        )
        table.add_row(name, *numbers)
    console.print(table)
    console.print(
        "Speed is that of qpass's CPU kernels with the rest of the model eager, in a model of a few MB.\n", style="dim"
    )
    panels = [Panel(complete(models[name], tokenizer), title=name, width=54) for name in ("fp32", "int4 g128")]
    console.print(Columns(panels))
    console.print("qpass.diff of the int4 model with an int8 cache")
    console.print(qpass.diff(models["int4 g128, int8 cache"]).summary(), markup=False)


if __name__ == "__main__":
    main()

"""What llama.cpp loses with the files that benchmarks/decode_cpu.py times: all matrices, the table too, in one type.

    python benchmarks/accuracy_llama_cpp.py --model FOLDER --text validation.txt [--kinds Q8_0 Q4_0]

The windows are those of benchmarks/accuracy_page.py. MB without the vocabulary, perplexity, top-1, KL per token.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_page import documents
from engines import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass


def logits_of(file: Path, threads: int, window: int) -> Any:
    """A function of token ids [1, S], S at most `window`: logits [1, S, V]."""
    import llama_cpp

    llama = llama_cpp.Llama(str(file), n_ctx=window, n_batch=window, n_threads=threads, n_threads_batch=threads, logits_all=True,
                            verbose=False)  # fmt: skip

    def logits(ids: torch.Tensor) -> torch.Tensor:
        llama.reset()
        llama.eval(ids[0].tolist())
        return torch.from_numpy(np.array(llama.scores[: ids.shape[1]]))[None]

    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=["Q8_0", "Q4_0"])
    args = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        sys.exit("llama-cpp-python or gguf is not installed")
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = documents(args.text, AutoTokenizer.from_pretrained(args.model))[:8]
    windows = [torch.tensor([row[:1024]]) for row in rows]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            file = Path(folder, f"{kind}.gguf")
            write_gguf(file, reference, kind)
            found = qpass.evaluate(logits_of(file, torch.get_num_threads(), 1024), reference, windows)
            print(f"{kind}: {file.stat().st_size / 1e6:.1f} MB, {found}", flush=True)


if __name__ == "__main__":
    main()

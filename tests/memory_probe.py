"""Run in a process of its own by test_memory.py: resident memory around qpass.quantize of a model saved on disk.

python -m tests.memory_probe MODEL_DIR RECIPE    prints {"after": x, "peak": x} as shares of the fp32 weights
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import qpass
from tests.models import build


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(folder: str, recipe: str) -> None:
    qpass.quantize(build("llama"), "int4:g32", inner="eager")  # Dynamo and its imports are not what is measured
    base, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = sum(p.nbytes for p in model.parameters())
    watcher = threading.Thread(target=watch)
    watcher.start()
    qpass.quantize(model, recipe, inner="eager")
    done.set()
    watcher.join()
    print(json.dumps({"after": (resident() - base) / weights, "peak": (peak - base) / weights, "weights": weights}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run in a process of its own by test_memory.py: resident memory around qpass.quantize of a model saved on disk.

python -m tests.memory_probe MODEL_DIR RECIPE    prints {"after": x, "peak": x} as shares of the fp32 weights
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import qpass
from tests.models import build


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list of one number: the most resident bytes of this process within the block, looked at every 2 ms."""
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def main(folder: str, recipe: str) -> None:
    qpass.quantize(build("llama"), "int4:g32", inner="eager")  # Dynamo and its imports are not what is measured
    base = resident()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = sum(p.nbytes for p in model.parameters())
    with peak_memory() as peak:
        qpass.quantize(model, recipe, inner="eager")
    print(json.dumps({"after": (resident() - base) / weights, "peak": (peak[0] - base) / weights, "weights": weights}))


if __name__ == "__main__":
    main(*sys.argv[1:])

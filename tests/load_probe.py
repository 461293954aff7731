"""Run in a process of its own by test_artifact.py: resident memory and time of qpass.load and a first call.

python -m tests.load_probe ARTIFACT WARM_UP_ARTIFACT    prints {"artifact", "peak", "load_seconds", "read_seconds"}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import qpass
from tests.memory_probe import peak_memory, resident


def main(folder: str, small: str) -> None:
    ids = torch.zeros((1, 8), dtype=torch.long)
    with torch.no_grad():
        qpass.load(small, inner="eager")(ids)  # torch, transformers, Dynamo: as much for any model
    files = list(Path(folder).glob("*.safetensors"))
    start = time.perf_counter()
    for file in files:
        file.read_bytes()
    read = time.perf_counter() - start
    base = resident()
    with peak_memory() as peak:
        start = time.perf_counter()
        model = qpass.load(folder, inner="eager")
        loaded = time.perf_counter() - start
        with torch.no_grad():
            model(ids)
    size = sum(file.stat().st_size for file in files)
    print(json.dumps({"artifact": size, "peak": peak[0] - base, "load_seconds": loaded, "read_seconds": read}))


if __name__ == "__main__":
    main(*sys.argv[1:])

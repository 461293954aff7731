"""Saves that are interrupted: `kills FOLDER COUNT` kills a save at random moments; `fill FOLDER` saves until the disk is full.

python -m tests.save_probe kills FOLDER COUNT
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import qpass
from tests.models import build

SHARD = 20_000


def models() -> list[torch.nn.Module]:
    """Two that differ, so that the old artifact and the new one do."""
    torch.set_num_threads(1)  # a team of threads does not live on in a forked process
    return [qpass.quantize(build("llama"), recipe, inner="eager") for recipe in ("int8", "int4:g16")]


def kills(folder: Path, count: int) -> dict[str, object]:
    """How many saves were killed before their end, and how often what was there then was the old artifact or the new one."""
    both = models()
    hashes = [qpass.save(model, folder, shard_bytes=SHARD) for model in both]
    begun = time.perf_counter()
    qpass.save(both[0], folder, shard_bytes=SHARD)
    whole = time.perf_counter() - begun
    generator, present = random.Random(0), hashes[0]
    found = {"killed": 0, "old": 0, "new": 0}
    for i in range(count):
        wanted = (i + 1) % 2
        child = os.fork()
        if not child:
            qpass.save(both[wanted], folder, shard_bytes=SHARD)
            os._exit(0)
        time.sleep(generator.uniform(0, 3 * whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found["killed"] += os.WIFSIGNALED(status)
        now = qpass.verify(folder)
        assert now in (present, hashes[wanted]), f"round {i}: neither the old nor the new"
        found["new" if now != present else "old"] += 1
        present = now
    qpass.save(both[0], folder, shard_bytes=SHARD)
    return found | {"left": [p.name for p in folder.parent.iterdir()], "count": count}


def fill(folder: Path) -> dict[str, object]:
    """What a save onto a disk without room for a second artifact leaves."""
    old, new = models()
    first = qpass.save(old, folder, shard_bytes=SHARD)
    try:
        qpass.save(new, folder, shard_bytes=SHARD)
        failed = ""
    except OSError as error:
        failed = os.strerror(error.errno or 0)
    return {"failed": failed, "old": qpass.verify(folder) == first, "left": [p.name for p in folder.parent.iterdir()]}


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    result = kills(Path(where), int(rest[0])) if what == "kills" else fill(Path(where))
    print(json.dumps(result))

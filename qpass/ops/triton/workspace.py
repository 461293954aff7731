"""Counters by which programs that share a sum find out who is last. They are 0 before and after every kernel.

A kernel must not share counters with one that may run at the same time. Outside of CUDA graphs launches take turns through a
ring, so large that a launch which still runs has long ended when its turn comes again. A graph keeps those it was captured with
for good: it takes them from a second piece of memory, never twice.

Neither may be allocated from the memory of a graph (`outside_of_graphs`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass.memory import outside_of_graphs

#: Of 4 bytes each. A launch takes as many as it has tiles of outputs, up to some thousand.
_RING, _OF_GRAPHS = 1 << 18, 1 << 22


@dataclass
class _Counters:
    ring: Tensor
    of_graphs: Tensor
    next_in_ring: int = 0
    next_of_graphs: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: int, captured: bool) -> Tensor | None:
        with self.lock:
            if captured:
                start = self.next_of_graphs
                if start + count > len(self.of_graphs):
                    return None
                self.next_of_graphs += count
                return self.of_graphs[start : start + count]
            start = self.next_in_ring if self.next_in_ring + count <= len(self.ring) else 0
            self.next_in_ring = start + count
            return self.ring[start : start + count]


_made: dict[torch.device, _Counters] = {}
_making = threading.Lock()


def counters(count: int, device: torch.device) -> Tensor | None:
    """[count] int32 zeros that no kernel uses at the same time; None where there are none: then a sum is not shared."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _made.get(device)
    if found is None:
        if captured:  # memory cannot be allocated now
            return None
        with _making:
            found = _made.get(device) or _make(device)
    return found.take(count, captured) if count <= _RING else None


def _make(device: torch.device) -> _Counters:
    def zeros(size: int) -> Tensor:
        return outside_of_graphs(lambda: torch.zeros(size, dtype=torch.int32, device=device))

    ring, of_graphs = zeros(_RING), zeros(_OF_GRAPHS)
    _made[device] = _Counters(ring, of_graphs)
    return _made[device]

"""What benchmarks/gpu.py measures: formats, sizes, and how a call is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qpass.quantized import Quantized
from qpass.spec import parse_spec
from qpass.weights import quantize_weight

#: Formats of weights, in the order of their weight, and of caches.
WEIGHTS = ("int8", "int4:g128", "int4:g32:asym", "nf4", "fp8_e4m3:channel")
MORE_WEIGHTS = ("mxfp8", "mxfp4", "nvfp4", "int3:g128", "int5:g32:asym:scale=fp16")
OTHER_WEIGHTS = ("int2:g32:asym", "int6:g32:asym:scale=fp16", "fp4_e2m1", "fp8_e5m2")
WRITTEN_OUT = "int8 written out"
CACHES = ("int8", "fp8_e4m3:channel", "int4:channel:asym")
#: Codes times codes.
PAIRS = ("int8@int8", "fp8_e4m3:channel@fp8_e4m3:channel", "int4:channel@int8:asym")
#: Of a sum of some thousand products in bfloat16, by the largest result; of float32.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of what is measured alone."""

    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocab: int = 128256
    full_layers: int = 32
    rows: tuple[int, ...] = (1, 8, 64)
    more_rows: tuple[int, ...] = (16, 128, 512)
    contexts: tuple[int, ...] = (128, 8192, 100_000)
    prompts: tuple[int, ...] = (2048, 8192)
    repeats: int = 20
    copies: int = 8

    @property
    def head(self) -> int:
        return self.hidden // self.heads


TINY = Shape(128, 128, 4, 2, 96, 2, (1, 3), (70,), (8, 40), (20,), 2, 2)


def seconds_of(calls: Sequence[Callable[[], Any]], device: str, repeats: int) -> float:
    """Median time of one of `calls`, which are made in turn so that none finds its weights in a cache; on a GPU in one graph."""
    for call in calls:
        call()
    if device == "cpu":
        return statistics.median(one(call) for _ in range(repeats) for call in calls)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[3:])


def one(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stored_on(device: str, rows: int, columns: int, text: str, seed: int) -> Quantized:
    """A random weight of training's size."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device=device) * 0.02
    return quantize_weight(values, parse_spec(text))

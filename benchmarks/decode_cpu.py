"""A decode step on the CPU: qpass beside transformers, torchao, llama.cpp and onnxruntime, on the same Llama.

    python benchmarks/decode_cpu.py [--model FOLDER] [--artifact FOLDER] [--contexts 128 2048] [--batches 1 4] [--prefill 512]
                                    [--engines REGEX] [--isa avx2] [--rounds 7] [--json build/decode_cpu.json]
                                    [--chart docs/decode_cpu.svg] [--profile] [--wrapper cpp]

`--model`: a Llama of transformers; without it, one of 418 M random weights. `--artifact`: the same model as `qpass quantize` made
it, say with calibration data, is one more engine.

Every round takes some steps of each engine in turn, so that all see the same machine; medians and quartiles over all steps.
`bandwidth`: bytes of weights and cache that a step must read, by its time, as a share of the measured read bandwidth.
`error`: largest difference of a logit from the float model's, by the largest logit, on the first token. Engines that are not
installed are named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from chart import bars
from engines import (
    Engine,
    Step,
    is_read,
    of_llama_cpp,
    of_onnxruntime,
    of_qpass,
    of_quantized,
    of_torchao,
    of_transformers,
    random_llama,
)
from transformers import AutoModelForCausalLM

import qpass
from qpass.ops.cpu.build import use_isa

#: Llama shape of 418 M weights read in a step.
SHAPE = {"layers": 8, "hidden": 2048, "ffn": 5632, "heads": 32, "key_heads": 4, "vocab": 32000}
_FLOAT = "torch.compile fp32"
_READ = "reading memory"
#: Timed steps of an engine's turn; a prefill is long enough to be one.
_STEPS = 3


def engines(
    reference: Any, wanted: str, threads: int, wrapper: str, artifact: Path | None
) -> tuple[list[Engine], dict[str, str]]:
    """Those whose name matches, and why others are absent. `wrapper`: Inductor's, "python" or "cpp"."""
    count = sum(p.numel() for n, p in reference.named_parameters() if p.dim() > 1 and is_read(reference, n))

    def plain(dtype: torch.dtype, compiled: bool) -> Callable[[str], Engine]:
        model = reference if dtype == torch.float32 else copy.deepcopy(reference).to(dtype)
        return lambda name: of_transformers(name, model, dtype, compiled, count * dtype.itemsize)

    known: dict[str, Callable[[str], Engine | str]] = {
        "transformers fp32": plain(torch.float32, False),
        "transformers bf16": lambda n: plain(torch.bfloat16, False)(n),
        _FLOAT: plain(torch.float32, True),
        "torch.compile bf16": lambda n: plain(torch.bfloat16, True)(n),
        "torchao int8": lambda n: of_torchao(n, reference, 8),
        "torchao int4 g128": lambda n: of_torchao(n, reference, 4),
        "llama.cpp Q8_0": lambda n: of_llama_cpp(n, reference, "Q8_0", threads),
        "llama.cpp Q4_0": lambda n: of_llama_cpp(n, reference, "Q4_0", threads),
        "onnxruntime int4 g128 (products only)": lambda n: of_onnxruntime(n, reference, threads),
        "qpass int8": lambda n: of_qpass(n, reference, "int8"),
        "qpass int8, int8 products": lambda n: of_qpass(n, reference, "int8", compute="int8"),
        "qpass int8:channel": lambda n: of_qpass(n, reference, "int8:channel"),
        "qpass w8a8": lambda n: of_qpass(n, reference, "w8a8"),
        "qpass int4": lambda n: of_qpass(n, reference, "int4"),
        "qpass int4:g128": lambda n: of_qpass(n, reference, "int4:g128"),
        "qpass int4:g32:asym": lambda n: of_qpass(n, reference, "int4:g32:asym"),
        "qpass nf4": lambda n: of_qpass(n, reference, "nf4"),
        "qpass fp8": lambda n: of_qpass(n, reference, "fp8"),
        "qpass int8, int8 cache": lambda n: of_qpass(n, reference, "int8", kv="int8"),
        "qpass int4, int8 cache": lambda n: of_qpass(n, reference, "int4", kv="int8"),
        "qpass int4:g128, int4 cache": lambda n: of_qpass(n, reference, "int4:g128", kv="int4"),
    }
    if artifact is not None and f"qpass {artifact.name}" in known:
        raise SystemExit(f"{artifact}: there is an engine of this name; rename the folder")
    if artifact is not None:
        known[f"qpass {artifact.name}"] = lambda n: of_quantized(n, qpass.load(artifact).float())
    found, absent = [], {}
    for name, make in known.items():
        if not re.search(wanted, name):
            continue
        engine = make(name)
        if isinstance(engine, str):
            absent[name] = engine
            print(f"absent: {name}: {engine}")
        else:
            found.append(replace(engine, cpp_wrapper=wrapper == "cpp"))
    return found, absent


@torch.no_grad()
def compare(found: list[Engine], batch: int, context: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """`rows` tokens at once for each of `batch` sequences behind `context` tokens; a row of the table for each engine.

    The read bandwidth is that of a sum over 512 MB, which takes its turn in every round.
    """
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    by_name = {e.name: e for e in found}
    room = rounds * (_STEPS + 1) + 3 if rows == 1 else rows
    first: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (batch, rows), generator=generator)
    for e in found:
        if context > e.largest or (batch > 1 and "llama.cpp" in e.name):
            continue
        qpass.set_compute(e.compute)
        with torch._inductor.config.patch(cpp_wrapper=e.cpp_wrapper):
            first[e.name] = e.start(batch, 0, context + room)(ids)  # of the same capacity, so of the same graphs
            steps[e.name] = e.start(batch, context, room)
            for _ in range(2 if rows == 1 else 0):
                steps[e.name](ids)
    computes = {e.name: e.compute for e in found}
    memory = torch.ones(1 << 27)
    steps[_READ] = lambda _: memory.sum()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            time.sleep(0.2)  # threads of the engine before may still spin
            qpass.set_compute(computes.get(name))
            if rows == 1:
                step(ids)
            elif name in by_name:  # a prompt has a cache of its own
                step = by_name[name].start(batch, context, room)
            for _ in range(_STEPS if rows == 1 else 1):
                start = time.perf_counter()
                step(ids)
                taken[name].append(time.perf_counter() - start)
    table = []
    bandwidth = memory.nbytes / statistics.median(taken.pop(_READ))
    for name, seconds in taken.items():
        e, median = by_name[name], statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4)
        read = e.bytes_read + batch * context * e.cache_bytes_per_token
        row = {
            "engine": name, "batch": batch, "context": context, "rows": rows, "ms": median * 1e3,
            "ms_quartiles": [quartiles[0] * 1e3, quartiles[2] * 1e3], "tokens_per_second": batch * rows / median,
            "bytes": read, "read_bandwidth": bandwidth, "bandwidth_share": read / median / bandwidth if rows == 1 else None,
            "speedup": statistics.median(taken[_FLOAT]) / median if _FLOAT in taken else None,
            "error": _error(first.get(name), first.get(_FLOAT)),
        }  # fmt: skip
        table.append(row)
    return table


def _error(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float | None:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return float((ours - theirs).abs().max() / theirs.abs().max())


def show(table: list[dict[str, Any]], title: str) -> None:
    print(f"\n{title}, read bandwidth {table[0]['read_bandwidth'] / 1e9:.1f} GB/s")
    print(f"{'':38} {'ms':>8} {'quartiles':>15} {'tok/s':>8} {'x float':>8} {'MB':>6} {'bandwidth':>9} {'error':>8}")
    for r in sorted(table, key=lambda r: -r["ms"]):
        share = "" if r["bandwidth_share"] is None else f"{r['bandwidth_share']:.2f}"
        speedup = "" if r["speedup"] is None else f"{r['speedup']:.2f}"
        error = "" if r["error"] is None else f"{r['error']:.4f}"
        low, high = r["ms_quartiles"]
        print(
            f"{r['engine']:38} {r['ms']:8.2f} {low:7.2f}-{high:7.2f} {r['tokens_per_second']:8.1f} {speedup:>8} "
            f"{r['bytes'] / 1e6:6.0f} {share:>9} {error:>8}",
            flush=True,
        )


@torch.no_grad()
def profile(engine: Engine, context: int) -> dict[str, float]:
    """Milliseconds of one step: in the kernels of qpass by operator, in the kernels of Inductor, and between them."""
    torch._dynamo.reset()
    step, ids = engine.start(1, context, 40), torch.ones(1, 1, dtype=torch.long)
    for _ in range(5):
        step(ids)
    start = time.perf_counter()
    for _ in range(10):
        step(ids)
    whole = (time.perf_counter() - start) * 100
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(10):
            step(ids)
    parts = {e.key: e.cpu_time_total / 10e3 for e in recorded.key_averages() if e.key.startswith("qpass::")}
    return {"step": whole, **parts, "everything else": whole - sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--engines", default=".")
    parser.add_argument("--isa")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--json", type=Path, default=Path("build/decode_cpu.json"))
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--wrapper", choices=["python", "cpp"], default="python",
        help="Inductor's, of all graphs; in C++ it compiles for minutes",
    )  # fmt: skip
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # all engines share the code of transformers
    threads = torch.get_num_threads()
    with use_isa(args.isa) if args.isa else contextlib.nullcontext():
        isa = qpass.doctor().kernels["isa"]
        print(f"{threads} threads, kernels {isa}")
        if args.model:
            reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        else:
            reference = random_llama(**{**SHAPE, "layers": args.layers})
        found, absent = engines(reference, args.engines, threads, args.wrapper, args.artifact)
        results: list[dict[str, Any]] = []
        profiles: dict[str, dict[str, float]] = {}

        def save() -> None:  # after each table: a whole run takes an hour
            about = {"model": args.model and args.model.name, "machine": platform.machine(), "threads": threads, "isa": isa,
                     "wrapper": args.wrapper,
                     "torch": torch.__version__, "absent": absent}  # fmt: skip
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**about, "rows": results, "profiles": profiles}, indent=1))

        for batch, context in [(1, c) for c in args.contexts] + [(b, args.contexts[0]) for b in args.batches if b > 1]:
            table = compare(found, batch, context, 1, args.rounds)
            results += table
            show(table, f"decode, batch {batch}, behind {context} tokens")
            save()
        for rows in args.prefill:
            chosen = [e for e in found if "cache" not in e.name]
            results += compare(chosen, 1, 0, rows, min(args.rounds, 5))
            show([r for r in results if r["rows"] == rows], f"prefill of {rows} tokens")
            save()
        for e in found if args.profile else ():
            if e.name.startswith("qpass"):
                profiles[e.name] = profile(e, args.contexts[0])
                print(e.name, {k: round(v, 2) for k, v in profiles[e.name].items()})
                save()
    if args.chart and args.contexts:
        first = [r for r in results if r["batch"] == 1 and r["context"] == args.contexts[0] and r["rows"] == 1]
        rates = [(r["engine"], r["tokens_per_second"]) for r in first]
        bars(rates, args.chart, f"tokens a second, batch 1, {args.contexts[0]} tokens of context, {isa}")


if __name__ == "__main__":
    main()

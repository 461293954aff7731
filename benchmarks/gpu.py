"""qpass on a GPU beside torch in bfloat16 and torchao: correct first, then how near to what the device can do.

    python benchmarks/gpu.py [--minutes 9] [--layers 4] [--only REGEX] [--json OUT] [--page docs/performance.md]
    python benchmarks/gpu.py --check [--sanitize]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --tiny        its own logic, kernels in Triton's interpreter

Checks the kernels against float64 with fresh inputs in bfloat16 and poisoned outputs, and stops if one is wrong. --check does
only that, in all types (--sanitize: also under compute-sanitizer, for accesses outside of memory and for races in the shared
memory of a program), and counts the kernels of a layer of a decode step, which may be 7. Then: what a copy and a bfloat16 product
reach; linears of 1 to 512 rows alone, attention alone over a long cache, the rounding of weights; a decode step of a random Llama
of the shape of an 8B model in CUDA graphs, with float and quantized caches; prompts; memory. `fraction`: of the copy's bandwidth
at which the bytes that must be read are read, or of the bfloat16 product's operations a second.

The model has --layers of the 32 layers, so that compiling leaves time to measure; `ms of 32` counts the rest from these, with the
vocabulary projection measured alone. --layers 32 is the whole. What the minutes do not reach is named, and measured by the next
run with the same --json, device and versions. --page writes the tables of the JSON into a page, between `<!-- gpu -->` and
`<!-- /gpu -->`, and a chart beside it, as `python benchmarks/gpu_page.py JSON PAGE` does without measuring.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_checks as checks
import gpu_kernels
import gpu_steps as steps
import torch
from gpu_page import Row, write_page
from gpu_shape import CACHES, MORE_WEIGHTS, OTHER_WEIGHTS, PAIRS, TINY, TOLERANCE, WEIGHTS, WRITTEN_OUT, Shape

import qpass


class Run:
    """What is measured and how long it may take; rows as they come, saved after each stage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.only, self.path = args.device, args.tiny, args.only, args.json
        self.shape = TINY if args.tiny else Shape()
        self.layers = min(args.layers, self.shape.full_layers)
        self.end = time.monotonic() + 60 * args.minutes
        self.rows: list[Row] = []
        self.missing: list[str] = []
        self.ceilings: dict[str, float] = {}
        self.heads: dict[tuple[str, int], float] = {}  # seconds of the vocabulary projection, by engine and batch
        self.about = {**about_device(self.device), "layers": self.layers, "sources": sources()}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if any(before.get(key) != value for key, value in self.about.items()):
                held = f"results of {before.get('device')} with other versions, sources or layers"
                sys.exit(f"{self.path} holds {held}: give another --json")
            self.rows, self.ceilings, self.missing = before["rows"], before["ceilings"], before["missing"]

    def measure(self, name: str, make: Callable[[], Row]) -> None:
        """One row, if no run before has it; what fails or comes too late is named instead."""
        if not re.search(self.only, name) or any(row["name"] == name for row in self.rows):
            return
        self.missing = [entry for entry in self.missing if not entry.startswith(f"{name}: ")]
        if time.monotonic() > self.end:
            self.missing.append(f"{name}: no time left")
            return
        try:
            self.rows.append({"name": name, **make()})
            print(json.dumps(self.rows[-1]), flush=True)
        except Exception as error:  # of a peer, or of a kernel: the rest is worth measuring
            self.missing.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(self.missing[-1], flush=True)

    def of_bandwidth(self, seconds: float, size: int) -> Row:
        """Time, bytes, and the fraction of the copy's bandwidth."""
        share = size / seconds / self.ceilings["copy_bytes_per_second"]
        return {"us": seconds * 1e6, "bytes": size, "fraction": share}

    def save(self) -> None:
        """All rows so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"ceilings": self.ceilings, "missing": self.missing, "rows": self.rows}
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**self.about, **found}, indent=1))
        unfinished.replace(self.path)


def sources() -> str:
    """Of all code of qpass: rows of one file were measured with the same."""
    digest = hashlib.sha256()
    for path in sorted(Path(qpass.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def about_device(device: str) -> Row:
    """Names and versions."""
    versions = {}
    for name in ("torch", "triton", "torchao", "transformers"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            continue
    if device == "cpu":
        return {"device": "CPU, interpreted", "versions": versions}
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    return {"device": found.name, "capability": capability, "cuda": torch.version.cuda, "versions": versions}


def sanitize() -> None:
    """The checks again, of small sizes, under NVIDIA's tools for memory and races; stops at the first that finds something.

    Each tensor is an allocation of its own there, so that what lies outside of it is nobody's."""
    if shutil.which("compute-sanitizer") is None:
        sys.exit("--sanitize: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    for tool in ("memcheck", "racecheck"):
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            __file__,
            "--check",
            "--tiny",
        ]
        print(" ".join(command), flush=True)
        if subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode:
            sys.exit(f"{tool} found something")


def check(run: Run, thorough: bool) -> bool:
    """Every format, few rows and many, odd shapes, products that programs share; False, and which, if one is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # and new memory holds NaN
    wrong, seeds = [], itertools.count(int(time.time()), 2)
    sizes = [(37, 128), (40, 2048)] if run.tiny else [(1024, 4096), (37, 160), (4097, 1056)][: 3 if thorough else 2]
    dtypes = [*TOLERANCE] if thorough and not run.tiny else [torch.bfloat16]
    rows = run.shape.rows if run.tiny else (*run.shape.rows, 200)

    def compare(name: str, error: float, most: float) -> None:
        if not error <= most:
            wrong.append(f"{name}: {error:.2e}")

    formats = (*WEIGHTS, *MORE_WEIGHTS, *(OTHER_WEIGHTS if thorough else ()))
    for text, (outputs, columns), dtype in itertools.product(formats, sizes, dtypes):
        for m, around in itertools.product(rows, (False, True) if outputs == sizes[0][0] else (False,)):
            error = checks.check_linear(text, m, dtype, run.device, outputs, columns, next(seeds), around)
            compare(f"linear {text} {dtype} [{m}, {columns}] x {outputs}, around it: {around}", error, TOLERANCE[dtype])
        error = checks.check_rows(text, dtype, columns, run.device, next(seeds))
        compare(f"rows of {columns} in {text} {dtype}", error, TOLERANCE[dtype])
    for text, m in itertools.product(PAIRS, rows):
        error = checks.check_pair(text, m, 48, 256, run.device, next(seeds))
        compare(f"{text}, {m} rows", error, TOLERANCE[torch.bfloat16])
    sizes = [(1, 70), (3, 700)] if run.tiny else [(1, 5), (1, 9001), (4, 1000), (1, 100_000), (40, 500)]
    for text in CACHES:
        for queries, tokens in sizes:
            error = checks.check_attention(text, queries, tokens, run.shape, run.device, next(seeds))
            compare(f"attention {text}, {queries} over {tokens}", error, 1.5e-2)
        for batch, new in ((1, 1), (3, 5)):
            if what := checks.check_append(text, batch, new, run.shape, run.device, next(seeds)):
                wrong.append(f"append {text} of {batch} x {new} tokens: {what}")
        if what := checks.check_rounding(text, run.shape.head, run.device, next(seeds)):
            wrong.append(f"rounding to {text}: {what}")
    torch.use_deterministic_algorithms(False)
    for line in wrong:
        print("WRONG", line)
    return not wrong


#: Of a layer of a decode step: q, k and v; rotary embedding and cache; attention; its output; gate and up; down; at times a norm.
MOST_KERNELS = 7


def check_kernels_per_layer(run: Run) -> bool:
    """What each further layer of a decode step launches; False, and of which engine, if it is more than it may be."""
    wrong = []
    for engine in [e for e in steps.engines(compiles=True) if e.cache is not None][: len(CACHES)]:
        for batch in (1, 8, 64):
            one, three = (steps.kernels_of_step(engine, layers, batch, run.device) for layers in (1, 3))
            print(f"{engine.name}, batch {batch}: {(three - one) / 2} kernels a layer", flush=True)
            if (three - one) / 2 > MOST_KERNELS:
                wrong.append(f"{engine.name}, batch {batch}")
            _forget()
    for name in wrong:
        print("WRONG", f"{name}: more than {MOST_KERNELS} kernels a layer")
    return not wrong


def kernels(run: Run) -> None:
    """Linears, attention and rounding alone."""
    shape, device = run.shape, run.device
    for rows in (*shape.rows, *shape.more_rows):
        alone = (WRITTEN_OUT,) if rows == 1 and device != "cpu" else ()
        for text in ("bf16", *WEIGHTS, *(MORE_WEIGHTS if rows in shape.rows else ()), *alone):
            run.measure(
                f"linear {text}, {rows} rows",
                lambda t=text, r=rows: run.of_bandwidth(*gpu_kernels.time_linear(t, r, shape, device)),
            )
    tokens = shape.contexts[-1]
    for text in ("bf16", *CACHES):
        run.measure(
            f"attention {text}, {tokens} tokens",
            lambda t=text: run.of_bandwidth(*gpu_kernels.time_attention(t, tokens, shape, device)),
        )
    for text in WEIGHTS:
        run.measure(
            f"rounding to {text}", lambda t=text: run.of_bandwidth(*gpu_kernels.time_quantization(t, shape, device))
        )


def decode(run: Run, batch: int, context: int) -> None:
    """A step of every engine."""
    for engine in steps.engines(compiles=run.device != "cpu"):
        name = f"decode {engine.name}, batch {batch}, {context} tokens"
        if engine.cache is None and not _fits(run, batch, context):
            if re.search(run.only, name):
                run.missing.append(f"{name}: a float cache does not fit")
            continue
        run.measure(name, lambda e=engine: _decode(run, e, batch, context))
        _forget()


def _fits(run: Run, batch: int, context: int) -> bool:
    if run.device == "cpu":
        return True
    return steps.float_cache_bytes(run.shape, run.layers, batch, context) < 0.6 * torch.cuda.mem_get_info()[0]


def _decode(run: Run, engine: steps.Engine, batch: int, context: int) -> Row:
    shape, on_gpu = run.shape, run.device != "cpu"
    head = _head_seconds(run, engine, batch)
    model = engine.prepare(steps.random_llama(shape, run.layers, run.device))
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    step, cache = steps.decode_step(model, engine, batch, context, 3 * shape.repeats + 16, run.device)
    seconds = steps.time_steps(step, run.device, shape.repeats)
    weights = steps.weight_bytes(model)
    row: Row = {
        "ms": seconds * 1e3,
        "ms_of_32": _whole(run, seconds, head) * 1e3,
        **run.of_bandwidth(seconds, weights + cache),
        "weight_bytes": weights,
        "cache_bytes": cache,
    }
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        profile = steps.profile_of(step)
        if engine.name.startswith("qpass"):
            steps.check_captured(profile, batch)
        row |= {"kernels": profile.kernels, "graphs": profile.graphs, "copied_bytes": profile.copied}
    return row


def prompts(run: Run) -> None:
    """Reading a prompt without a cache: of torch, torchao, weights alone, and with quantized activations."""
    chosen = ("torch.compile bf16", "qpass int8", "qpass int4:g128", *(f"qpass {pair}" for pair in PAIRS))
    for tokens in run.shape.prompts:
        for engine in steps.engines(compiles=run.device != "cpu"):
            if engine.name in chosen or engine.name.startswith("torchao"):
                run.measure(f"prompt {engine.name}, {tokens} tokens", lambda e=engine, t=tokens: _prompt(run, e, t))
                _forget()


def _prompt(run: Run, engine: steps.Engine, tokens: int) -> Row:
    head = _head_seconds(run, engine, 1)
    model = engine.prepare(steps.random_llama(run.shape, run.layers, run.device))
    ids = torch.randint(0, 90, (1, tokens), device=run.device)

    def read() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    seconds = steps.time_steps(read, run.device, max(3, run.shape.repeats // 4))
    multiplied = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    share = 2 * multiplied * tokens / seconds / run.ceilings["bf16_operations_per_second"]
    return {"ms": seconds * 1e3, "ms_of_32": _whole(run, seconds, head) * 1e3, "fraction": share}


def _head_seconds(run: Run, engine: steps.Engine, rows: int) -> float:
    """Of the vocabulary projection as the engine has it; 0 where all layers are measured."""
    key = (engine.name.partition(", ")[0], rows)
    if key not in run.heads and run.layers < run.shape.full_layers:
        run.heads[key] = steps.time_head(engine, rows, run.shape, run.device)
        _forget()
    return run.heads.get(key, 0.0)


def _whole(run: Run, seconds: float, head: float) -> float:
    """Seconds of all layers and the vocabulary projection, from those of some layers and it."""
    head = min(head, seconds)
    return (seconds - head) / run.layers * run.shape.full_layers + head


def _forget() -> None:
    """Compiled code and memory of the engine before."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(run: Run) -> None:
    """All stages, the most telling first."""
    shape, device = run.shape, run.device
    run.ceilings = run.ceilings or gpu_kernels.ceilings(shape, device)
    print(json.dumps(run.ceilings), flush=True)
    kernels(run)
    run.save()
    first, rest = shape.contexts[0], shape.contexts[1:]
    for batch, context in [(shape.rows[0], first), (shape.rows[0], rest[-1]), *((b, first) for b in shape.rows[1:])]:
        decode(run, batch, context)
        run.save()
    prompts(run)
    run.save()
    for batch, context in [(b, c) for c in rest for b in shape.rows if (b, c) != (shape.rows[0], rest[-1])]:
        decode(run, batch, context)
        run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default=".")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--check", action="store_true", help="only whether the kernels are right")
    parser.add_argument("--sanitize", action="store_true", help="also under compute-sanitizer")
    args = parser.parse_args()
    if args.device == "cpu":
        from qpass.ops.triton.triton_private import interpreted, mend_interpreter

        if not (args.tiny and interpreted()):
            sys.exit("on the CPU it runs with --tiny and TRITON_INTERPRET=1")
        mend_interpreter()
    torch._dynamo.config.recompile_limit = 64  # all engines share the code of transformers
    run = Run(args)
    if not check(run, args.check):
        sys.exit(1)
    print("every kernel is right", flush=True)
    if args.sanitize:
        sanitize()
    if args.check:
        if args.device != "cpu" and not args.tiny and not check_kernels_per_layer(run):
            sys.exit(1)
        return
    measure(run)
    run.save()
    if args.page:
        write_page(json.loads(args.json.read_text()), args.page)


if __name__ == "__main__":
    main()

"""qpass on a GPU beside torch in bfloat16 and torchao: correct first, then how near to what the device can do.

    python benchmarks/gpu.py [--minutes 9] [--layers 4] [--only REGEX] [--sanitize] [--json OUT] [--page docs/performance.md]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --tiny        its own logic, kernels in Triton's interpreter

Checks every kernel against float64 with fresh inputs and poisoned outputs, and stops if one is wrong (--sanitize: also under
compute-sanitizer, for accesses outside of memory and for races); --check does only that, and counts the kernels of a layer of a
decode step, which may be 7. Then: what a copy and a bfloat16 product reach; linears of 1, 8 and 64 rows alone, attention alone
over a long cache, the rounding of weights; a decode step of a random Llama of the shape of an 8B model in CUDA graphs, with float
and quantized caches; prompts; memory. `fraction`: of the copy's bandwidth at which the bytes that must be read are read, or of
the product's operations a second.

The model has --layers of the 32 layers, so that compiling leaves time to measure; `ms of 32` counts the rest from these, with the
vocabulary projection measured alone. --layers 32 is the whole. What the minutes do not reach is named. --page writes the tables
of the JSON into a page, between `<!-- gpu -->` and `<!-- /gpu -->`, and a chart beside it; alone with an existing --json it
measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_parts as parts
import torch
from gpu_page import Row, write_page
from gpu_parts import CACHES, MORE_WEIGHTS, TINY, TOLERANCE, WEIGHTS, WRITTEN_OUT, Shape


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

    def measure(self, name: str, make: Callable[[], Row]) -> None:
        """One row; what fails or comes too late is named instead."""
        if not re.search(self.only, name):
            return
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
        about = {**about_device(self.device), "layers": self.layers, "ceilings": self.ceilings, "missing": self.missing}
        self.path.write_text(json.dumps({**about, "rows": self.rows}, indent=1))


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
    """The checks again, of small sizes, under NVIDIA's tools for memory and races; stops at the first that finds something."""
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
        if subprocess.run(command).returncode:
            sys.exit(f"{tool} found something")


def check(run: Run) -> bool:
    """Every format, few rows and many, odd shapes; False, and which, if one is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # and new memory holds NaN
    wrong, seed = [], int(time.time())
    sizes = [(37, 96), (130, 256)] if run.tiny else [(1024, 4096), (4097, 1056), (37, 33)]
    for text in (*WEIGHTS, *MORE_WEIGHTS):
        for outputs, columns in sizes:
            for rows in run.shape.rows if run.tiny else (*run.shape.rows, 200):
                for dtype in (torch.bfloat16,) if run.tiny else TOLERANCE:
                    columns = max(columns, 128)
                    for around in (False, True)[: 2 if outputs == sizes[0][0] else 1]:
                        seed += 2
                        error = parts.check_linear(text, rows, dtype, run.device, outputs, columns, seed, around)
                        if not error <= TOLERANCE[dtype]:
                            name = f"linear {text} {dtype} [{rows}, {columns}] x {outputs}, around it: {around}"
                            wrong.append(f"{name}: {error:.2e}")
    for text in CACHES:
        for queries, tokens in (
            ((1, 70), (3, 200)) if run.tiny else ((1, 5), (1, 9001), (4, 1000), (1, 100_000), (40, 500))
        ):
            error = parts.check_attention(text, queries, tokens, run.shape, run.device, seed := seed + 1)
            if not error <= 1.5e-2:
                wrong.append(f"attention {text}, {queries} over {tokens}: {error:.2e}")
        for batch, new in ((1, 1), (3, 5)):
            if what := parts.check_append(text, batch, new, run.shape, run.device, seed := seed + 1):
                wrong.append(f"append {text} of {batch} x {new} tokens: {what}")
    torch.use_deterministic_algorithms(False)
    for line in wrong:
        print("WRONG", line)
    return not wrong


#: Of a layer of a decode step: q, k and v; rotary embedding and cache; mask; attention; its output; gate and up; down.
MOST_KERNELS = 7


def check_kernels_per_layer(run: Run) -> bool:
    """What each further layer of a decode step launches; False, and of which engine, if it is more than it may be."""
    wrong = []
    for engine in parts.engines(compiles=True):
        if engine.cache is not None:
            one, three = (parts.kernels_of_step(engine, layers, run.device) for layers in (1, 3))
            print(f"{engine.name}: {(three - one) / 2} kernels a layer", flush=True)
            if (three - one) / 2 > MOST_KERNELS:
                wrong.append(engine.name)
            _forget()
    for name in wrong:
        print("WRONG", f"{name}: more than {MOST_KERNELS} kernels a layer")
    return not wrong


def kernels(run: Run) -> None:
    """Linears, attention and rounding alone."""
    shape, device = run.shape, run.device
    for rows in shape.rows:
        for text in ("bf16", *WEIGHTS, *MORE_WEIGHTS, *((WRITTEN_OUT,) if rows == 1 else ())):
            run.measure(
                f"linear {text}, {rows} rows",
                lambda t=text, r=rows: run.of_bandwidth(*parts.time_linear(t, r, shape, device)),
            )
    tokens = shape.contexts[-1]
    for text in ("bf16", *CACHES):
        run.measure(
            f"attention {text}, {tokens} tokens",
            lambda t=text: run.of_bandwidth(*parts.time_attention(t, tokens, shape, device)),
        )
    for text in WEIGHTS:
        run.measure(f"rounding to {text}", lambda t=text: run.of_bandwidth(*parts.time_quantization(t, shape, device)))


def decode(run: Run, batch: int, context: int, vocab_seconds: dict[str, float]) -> None:
    """One step of every engine, at one batch and context."""
    for engine in parts.engines(compiles=run.device != "cpu"):
        name = f"decode {engine.name}, batch {batch}, {context} tokens"
        if engine.cache is None and not _fits(run, batch, context):
            if re.search(run.only, name):
                run.missing.append(f"{name}: a float cache does not fit")
            continue
        run.measure(name, lambda e=engine: _decode(run, e, batch, context, vocab_seconds))
        _forget()


def _fits(run: Run, batch: int, context: int) -> bool:
    if run.device == "cpu":
        return True
    return parts.float_cache_bytes(run.shape, run.layers, batch, context) < 0.6 * torch.cuda.mem_get_info()[0]


def _decode(run: Run, engine: parts.Engine, batch: int, context: int, vocab_seconds: dict[str, float]) -> Row:
    on_gpu = run.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = engine.prepare(parts.random_llama(run.shape, run.layers, run.device))
    step, cache = parts.decode_step(model, engine, batch, context, 3 * run.shape.repeats + 16, run.device)
    seconds = parts.time_steps(step, run.device, run.shape.repeats)
    weights = parts.weight_bytes(model)
    row: Row = {
        "ms": seconds * 1e3,
        **run.of_bandwidth(seconds, weights + cache),
        "weight_bytes": weights,
        "cache_bytes": cache,
    }
    vocab = min(vocab_seconds.get(engine.name, 0.0), seconds)
    row["ms_of_32"] = ((seconds - vocab) / run.layers * run.shape.full_layers + vocab) * 1e3
    if on_gpu:
        profile = parts.profile_of(step)
        row |= {"kernels_per_layer": profile.kernels / run.layers, "graphs": profile.graphs, "copies": profile.copies}
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def _vocab_seconds(run: Run) -> dict[str, float]:
    """Of the vocabulary projection alone at one row, by engine."""
    shape = Shape(**{**vars(run.shape), "ffn": run.shape.vocab, "copies": 2})
    found = {}
    for engine in parts.engines(compiles=False):
        text = (
            "bf16" if "bf16" in engine.name else engine.name.removeprefix("qpass ").partition(",")[0].partition("@")[0]
        )
        if not engine.name.startswith("torchao"):
            found[engine.name] = parts.time_linear(text, 1, shape, run.device)[0]
    return found


def prompts(run: Run) -> None:
    """Reading a prompt without a cache: of torch, of weights alone, and with quantized activations."""
    chosen = (
        "torch.compile bf16",
        "qpass int8",
        "qpass int4:g128",
        "qpass int8@int8",
        "qpass fp8_e4m3:channel@fp8_e4m3:channel",
    )
    for tokens in run.shape.prompts:
        for engine in parts.engines(compiles=run.device != "cpu"):
            if engine.name in chosen:
                run.measure(f"prompt {engine.name}, {tokens} tokens", lambda e=engine, t=tokens: _prompt(run, e, t))
                _forget()


def _prompt(run: Run, engine: parts.Engine, tokens: int) -> Row:
    model = engine.prepare(parts.random_llama(run.shape, run.layers, run.device))
    ids = torch.randint(0, 90, (1, tokens), device=run.device)

    def read() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    seconds = parts.time_steps(read, run.device, max(3, run.shape.repeats // 4))
    multiplied = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    share = 2 * multiplied * tokens / seconds / run.ceilings["bf16_operations_per_second"]
    return {"ms": seconds * 1e3, "fraction": share}


def _forget() -> None:
    """Compiled code and memory of the engine before."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(run: Run) -> None:
    """All stages, the most telling first."""
    shape, device = run.shape, run.device
    run.ceilings = parts.ceilings(shape, device)
    print(json.dumps(run.ceilings), flush=True)
    kernels(run)
    run.save()
    vocab = _vocab_seconds(run)
    first, rest = shape.contexts[0], shape.contexts[1:]
    for batch, context in [(shape.rows[0], first), (shape.rows[0], rest[-1]), *((b, first) for b in shape.rows[1:])]:
        decode(run, batch, context, vocab)
        run.save()
    prompts(run)
    run.save()
    for batch, context in [(b, c) for c in rest for b in shape.rows if (b, c) != (shape.rows[0], rest[-1])]:
        decode(run, batch, context, vocab)
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
    if not (args.page and args.json.exists()):
        if args.device == "cpu":
            from qpass.ops.triton.triton_private import interpreted, mend_interpreter

            if not (args.tiny and interpreted()):
                sys.exit("on the CPU it runs with --tiny and TRITON_INTERPRET=1")
            mend_interpreter()
        torch._dynamo.config.recompile_limit = 64  # all engines share the code of transformers
        run = Run(args)
        if not check(run):
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

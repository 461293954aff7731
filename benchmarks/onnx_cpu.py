"""Decode in onnxruntime on the CPU: qpass's exports of one model beside onnxruntime's own quantizer on the float export.

    python benchmarks/onnx_cpu.py [--model DIR] [--contexts 128 2048] [--prefill 512] [--rounds 7] [--threads 2]
                                  [--json build/onnx_cpu.json]

Every round takes some steps of each file in turn, so that all see the same machine; medians and quartiles over all steps. A round
in which other processes were busy is taken again.
"onnxruntime intN" is MatMulNBitsQuantizer: symmetric, blocks of 32, int8 activations in the products (accuracy level 4, with
which qpass's exports run too); its embedding and its cache stay float. "qpass int8" has a scale a row, "qpass int4" zero points,
and eight bits in the embedding and the vocabulary projection; "qpass int4:g32" has the format of "onnxruntime int4" everywhere.
A table that the vocabulary projection is tied to is transposed in the float export, so that the quantizer passes over that
product; for "intN" the transposed table is a weight of its own, which it quantizes, for "intN, tied as exported" it is not.
A prefill gives the logits of all its tokens. `error`: largest difference of these from the float export's, by the largest logit.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_files import (
    TINYPY,
    about,
    cache_bytes_per_token,
    cache_feeds,
    file_bytes,
    float_model,
    quantized_by_onnxruntime,
    seconds_of_others,
    text_ids,
    token_feeds,
    untie,
)
from qpass_export import export_onnx, load
from qpass_export.session import SESSION

from qpass.recipe import Recipe

_FLOAT = "float"
_EIGHT = Recipe.uniform("int8:channel")
_FOUR = Recipe.uniform("int4:g32:asym", embedding="int8:g32", vocab="int8:g32")
#: Name of a qpass export -> its recipe, and the bits of onnxruntime's quantizer that it is beside.
_RECIPES: dict[str, tuple[Recipe, int]] = {
    "qpass int8": (_EIGHT, 8),
    "qpass int4": (_FOUR, 4),
    "qpass int4:g32": (Recipe.uniform("int4:g32"), 4),
    "qpass int8, int8 cache": (replace(_EIGHT, kv="int8"), 8),
    "qpass int4, int8 cache": (replace(_FOUR, kv="int8"), 4),
}
#: Timed steps of a file's turn; a prefill is long enough to be one.
_STEPS = 5
#: A round is quiet if other processes took less than so much of one core; so many times the rounds are tried, and so many seconds
#: each waits for a quiet one.
_QUIET, _PATIENCE, _WAIT = 0.05, 5, 60


@dataclass(frozen=True)
class File:
    """An ONNX file and its session. `peer`: the file of onnxruntime's quantizer with the same bits."""

    name: str
    session: Any
    nbytes: int
    peer: str | None = None


def files(model_folder: Path, folder: Path, threads: int) -> list[File]:
    """Every way of exporting the model, in sessions with the same options."""
    found = []

    def add(name: str, path: Path, peer: str | None = None) -> None:
        found.append(File(name, load(path, threads=threads), file_bytes(path), peer))
        print(f"exported: {name}", flush=True)

    source = export_onnx(float_model(model_folder), folder / "float", "ort-cpu").path
    add(_FLOAT, source)
    tied = untie(onnx.load(source))
    for bits in (8, 4):
        for untied in (True, False) if tied else (False,):
            name = f"onnxruntime int{bits}" + (", tied as exported" if tied and not untied else "")
            path = folder / f"{bits}-{untied}" / source.name
            path.parent.mkdir()
            shutil.copy(source.with_name(SESSION), path.parent)  # the options of `source`, which load() reads
            quantized_by_onnxruntime(source, path, bits, untied)
            add(name, path)
    for i, (name, (recipe, bits)) in enumerate(_RECIPES.items()):
        exported = export_onnx(float_model(model_folder), folder / str(i), "ort-cpu", recipe)
        add(name, exported.path, f"onnxruntime int{bits}")
    return found


def round_of(found: list[File], feeds: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Seconds of some steps of each file in turn; the first step of a turn is not counted, if there are several."""
    taken: dict[str, list[float]] = {}
    for f in found:
        time.sleep(0.2)  # threads of the session before may still spin
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            f.session.run(None, feeds[f.name])
            seconds.append(time.perf_counter() - start)
        taken[f.name] = seconds[1:] or seconds
    return taken


def taken_by_others(run: Callable[[], Any]) -> tuple[float, Any]:
    """The share of a core that other processes took during a call, and what it returns."""
    others, start = seconds_of_others(), time.perf_counter()
    result = run()
    return (seconds_of_others() - others) / (time.perf_counter() - start), result


def compare(found: list[File], ids: np.ndarray, context: int, rounds: int) -> list[dict[str, Any]]:
    """ids [1, S] at once behind `context` tokens; a row of the table for each file.

    Rounds are taken until enough were quiet, and the quietest count.
    """
    feeds = {f.name: token_feeds(f.session, ids, context) | cache_feeds(f.session, context) for f in found}
    count = ids.shape[1]
    steps = _STEPS + 1 if count == 1 else 1
    round_of(found, feeds, steps)
    done: list[tuple[float, dict[str, list[float]]]] = []
    while sum(share <= _QUIET for share, _ in done) < rounds and len(done) < rounds * _PATIENCE:
        waited = 0
        while taken_by_others(lambda: time.sleep(1))[0] > _QUIET and waited < _WAIT:
            waited += 1
        done.append(taken_by_others(lambda: round_of(found, feeds, steps)))
    chosen = sorted(done, key=lambda d: d[0])[:rounds]
    seconds = {f.name: [s for _, taken in chosen for s in taken[f.name]] for f in found}
    medians = {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()}
    table = []
    for f in found:
        quartiles = statistics.quantiles(seconds[f.name], n=4)
        table.append({
            "file": f.name, "context": context, "rows": count, "ms": medians[f.name] * 1e3,
            "ms_quartiles": [quartiles[0] * 1e3, quartiles[2] * 1e3],
            "times_float": medians[_FLOAT] / medians[f.name],
            "times_onnxruntime": None if f.peer is None else medians[f.peer] / medians[f.name],
            "cores_taken_by_others": chosen[-1][0],
        })  # fmt: skip
    return table


def errors(found: list[File], ids: np.ndarray) -> dict[str, float]:
    """Of the logits of a prefill of ids [1, S]."""
    expected, worst = None, {}
    for f in found:
        logits = f.session.run(["logits"], token_feeds(f.session, ids, 0) | cache_feeds(f.session, 0))[0]
        expected = logits if expected is None else expected  # the float export's: it is the first
        worst[f.name] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return worst


def show(table: list[dict[str, Any]], title: str) -> None:
    print(f"\n{title}; other processes took up to {table[0]['cores_taken_by_others']:.2f} of a core")
    print(f"{'':34} {'ms':>8} {'quartiles':>17} {'x float':>8} {'x onnxruntime':>14}")
    for r in table:
        low, high = r["ms_quartiles"]
        peer = "" if r["times_onnxruntime"] is None else f"{r['times_onnxruntime']:.2f}"
        print(f"{r['file']:34} {r['ms']:8.2f} {low:8.2f}-{high:8.2f} {r['times_float']:8.2f} {peer:>14}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINYPY)
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("build/onnx_cpu.json"))
    args = parser.parse_args()
    logging.disable(logging.INFO)  # the quantizer names every node
    ids = text_ids(args.model)[None, : args.prefill].numpy()
    content = about(float_model(args.model)) | {"threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        found = files(args.model, Path(folder), args.threads)
        worst, rows = errors(found, ids), []
        for context in args.contexts:
            rows += (table := compare(found, ids[:, :1], context, args.rounds))
            show(table, f"decode behind {context} tokens")
        rows += (table := compare(found, ids, 0, min(args.rounds, 5)))
        show(table, f"prefill of {args.prefill} tokens")
    print(f"\n{'':34} {'MB':>8} {'cache bytes/token':>18} {'error':>8}")
    described = {}
    for f in found:
        cache = cache_bytes_per_token(f.session)
        print(f"{f.name:34} {f.nbytes / 1e6:8.1f} {cache:18} {worst[f.name]:8.4f}")
        described[f.name] = {
            "bytes": f.nbytes, "cache_bytes_per_token": cache, "error": worst[f.name], "peer": f.peer,
        }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**content, "files": described, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

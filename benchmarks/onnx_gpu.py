"""Exports for a GPU: checked against the torch model, then a decode step timed, in onnxruntime's CUDA and TensorRT providers.

    python benchmarks/onnx_gpu.py [--model DIR] [--targets ort-cuda tensorrt] [--files REGEX] [--contexts 128 2048]
                                  [--rounds 7] [--provider NAME] [--json build/onnx_gpu.json]

Each file is checked by the rules of its target first. Where the target's provider is there (or another is given, --provider
CPUExecutionProvider for a trial without a GPU), its logits of a prompt and some decode steps are compared with those of the torch
model quantized by the same recipe, in float32: `error` is the largest difference by the largest logit, allowed is 0.1, since the
files compute in half precision. Then rounds take some steps of each file in turn; medians and quartiles over all. The cache is
bound on the device, and every step of a row is behind the same number of tokens. The exit status is 1 if a file breaks a rule,
fails to run or differs by more than allowed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx_files import (
    TINYPY,
    about,
    cache_bytes_per_token,
    cache_feeds,
    file_bytes,
    float_model,
    processor,
    text_ids,
    token_feeds,
)
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from qpass_export import TARGETS, export_onnx, load
from qpass_export.rules import violations
from transformers.cache_utils import DynamicCache

import qpass
from qpass.cache import CACHE_ARGUMENT
from qpass.errors import QpassError
from qpass.recipe import Recipe

_STATIC = "int8, static int8 cache"
#: Target -> name of a file -> recipe.
_FILES: dict[str, dict[str, str | Recipe | None]] = {
    "ort-cuda": {
        "float": None,
        "int8": "int8",
        "int4:g32": Recipe.uniform("int4:g32"),
        "fp8": "fp8",
        "nf4": "nf4",
        "nvfp4": Recipe.uniform("nvfp4", embedding="int8"),
        _STATIC: "int8",
    },
    "tensorrt": {"float": None}
    | {spec: Recipe.uniform(spec, embedding="fp16") for spec in ("int8", "int4:g128", "fp8_e4m3:channel", "nvfp4")},
}
_BOUND = 0.1
_PROMPT, _CHECKED = 12, 8
#: Timed steps of a file's turn.
_STEPS = 10


class Bound:
    """A session whose cache stays on `device`."""

    def __init__(self, session: Any, device: str) -> None:
        self.session, self.device = session, device
        self.names = [o.name for o in session.get_outputs()]

    def put(self, cache: dict[str, np.ndarray]) -> dict[str, Any]:
        return {n: onnxruntime.OrtValue.ortvalue_from_numpy(x, self.device, 0) for n, x in cache.items()}

    def bind(self, ids: np.ndarray, context: int, past: dict[str, Any]) -> Any:
        """ids [1, S] behind `context` tokens; logits go to the host."""
        binding = self.session.io_binding()
        for name, value in token_feeds(self.session, ids, context).items():
            binding.bind_cpu_input(name, value)
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.names:
            binding.bind_output(name, self.device if name.startswith("present.") else "cpu")
        return binding

    def run(self, binding: Any) -> None:
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def step(self, ids: np.ndarray, context: int, past: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Its logits, and the cache of the next step."""
        binding = self.bind(ids, context, past)
        self.run(binding)
        outputs = dict(zip(self.names, binding.get_outputs(), strict=True))
        after = {n.replace("present.", "past_key_values."): v for n, v in outputs.items() if n.startswith("present.")}
        return outputs["logits"].numpy(), after


def error(bound: Bound, model: Any, cache: Any, ids: torch.Tensor) -> float:
    """Largest difference of a logit from torch's, by the largest logit, over a prompt and decode steps on ids [N]."""
    past, context, worst = bound.put(cache_feeds(bound.session, 0)), 0, 0.0
    for count in (_PROMPT, *[1] * _CHECKED):
        given = ids[None, context : context + count]
        with torch.no_grad(), qpass.set_compute("float"):
            expected = model(given, **{CACHE_ARGUMENT: cache}, use_cache=True).logits.float().numpy()
        logits, past = bound.step(given.numpy(), context, past)
        difference = np.abs(logits.astype(np.float32) - expected).max() / np.abs(expected).max()
        worst, context = max(worst, float(np.nan_to_num(difference, nan=np.inf))), context + count
    return worst


def made(args: argparse.Namespace, target: str, name: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """The row of one file, exported and checked, and its session if that gives what torch gives."""
    recipe, model = _FILES[target][name], float_model(args.model)
    scales: Any = None
    cache = None
    if name == _STATIC:
        calibration = text_ids(args.model, "calibration.txt")[:2048].reshape(4, 512)
        with torch.no_grad():
            cache = qpass.KVCache(model.config, 64, "int8:static").calibrate(model, [calibration])
        scales = cache.scales
    row: dict[str, Any] = {"target": target, "file": name}
    try:
        exported = export_onnx(model, folder / f"{target}-{len(list(folder.iterdir()))}", target, recipe, cache=cache)
    except QpassError as refusal:
        return row | {"state": f"refused: {refusal}"}, None
    row |= {"bytes": file_bytes(exported.path), "violations": violations(exported.path, target)}
    wanted = args.provider or TARGETS[target].provider
    if wanted not in onnxruntime.get_available_providers():
        return row | {"state": "rule-checked only"}, None
    try:
        bound = Bound(load(exported.path, provider=wanted), "cpu" if wanted == "CPUExecutionProvider" else "cuda")
        row["cache_bytes_per_token"] = cache_bytes_per_token(bound.session)
        reference = float_model(args.model)
        if recipe is not None:
            reference = qpass.quantize(reference, recipe, inner="eager")
        own = DynamicCache(config=model.config)
        if scales is not None:
            own = qpass.KVCache(model.config, 64, "int8:static", scales=scales)
        row["error"] = error(bound, reference, own, text_ids(args.model))
    except NoKernel as missing:
        return row | {"state": f"no kernel in this provider: {_first_line(missing)}"}, None
    except Exception as failure:  # of any kind: the other files are still of interest
        return row | {"state": f"FAILED: {_first_line(failure)}"}, None
    if row["error"] > _BOUND:
        return row | {"state": f"FAILED: logits differ by {row['error']:.3f} of the largest, allowed is {_BOUND}"}, None
    return row | {"state": "checked"}, bound


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0][:160]


def timed(found: dict[str, Bound], context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step behind `context` tokens: median and quartiles, for each file."""
    ids = np.ones((1, 1), np.int64)
    bindings = {n: b.bind(ids, context, b.put(cache_feeds(b.session, context))) for n, b in found.items()}
    taken: dict[str, list[float]] = {name: [] for name in found}
    for i in range(rounds + 1):  # the first is not counted: TensorRT builds its engine there
        for name, bound in found.items():
            time.sleep(0.1)
            bound.run(bindings[name])
            for _ in range(_STEPS):
                start = time.perf_counter()
                bound.run(bindings[name])
                if i:
                    taken[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: dict(zip(("low", "ms", "high"), statistics.quantiles(times, n=4), strict=True))
        for name, times in taken.items()
    }


def device_name(provider: str | None) -> str:
    if provider == "CPUExecutionProvider":
        return processor()
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    if shutil.which("nvidia-smi") is None:
        return "no GPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or "no GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINYPY)
    parser.add_argument("--targets", nargs="+", choices=list(_FILES), default=list(_FILES))
    parser.add_argument("--files", default=".", help="regular expression on their names")
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--provider", help="instead of the targets' own")
    parser.add_argument("--json", type=Path, default=Path("build/onnx_gpu.json"))
    args = parser.parse_args()
    rows, times = [], []
    for target in args.targets:
        wanted = args.provider or TARGETS[target].provider
        if wanted not in onnxruntime.get_available_providers():
            print(f"{target}: rule-checked only: this onnxruntime has no {wanted}", flush=True)
        found: dict[str, Bound] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in (n for n in _FILES[target] if re.search(args.files, n)):
                row, bound = made(args, target, name, Path(folder))
                rows.append(row)
                if bound is not None:
                    found[name] = bound
                broken = row.get("violations", [])
                rules = f"{len(broken)} BROKEN RULES, {broken[0]}; " if broken else ""
                difference = f", error {row['error']:.4f}" if bound is not None else ""
                print(f"{target:9} {name:24} {rules}{row['state']}{difference}", flush=True)
            for context in args.contexts if found else ():
                print(f"\n{target}, {wanted}, decode behind {context} tokens, ms")
                for name, ms in timed(found, context, args.rounds).items():
                    times.append({"target": target, "file": name, "context": context, **ms})
                    print(f"{name:24} {ms['ms']:8.3f}  {ms['low']:8.3f}-{ms['high']:8.3f}", flush=True)
    content = about(float_model(args.model)) | {"device": device_name(args.provider), "provider": args.provider}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**content, "bound": _BOUND, "files": rows, "rows": times}, indent=1) + "\n")
    if any(row.get("violations") or row["state"].startswith("FAILED") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Everything that is measured of one recipe, in a process of its own: bytes, memory, speed, and what it costs.

python -m qpass.measuring.job JOB.json RESULT.json
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qpass.backend import QPass
from qpass.errors import QpassError
from qpass.folders import load_float, load_quantized
from qpass.graph.torch_private import compile_in_place
from qpass.measuring.evaluate import Evaluation, evaluate
from qpass.measuring.kept_logits import KeptLogits
from qpass.measuring.speed import measure_speed, weight_bytes
from qpass.pretrained import load_tokenizer, longest_input
from qpass.recipe import resolve_recipe
from qpass.store import guards_beside_the_lookup
from qpass.texts import read_windows

#: What a recipe is called that is none.
FLOAT = "float"


@dataclass(frozen=True)
class Job:
    """One recipe (FLOAT: none) of the model in folder `model`, on the first `windows` windows of `window` tokens of `data`.

    `reference`: a file of KeptLogits. `dtype`: of the float model ("auto": as it is stored). `inner`: what compiles the rest.
    `context`, `steps`: of the timed decoding; no steps: none.
    """

    model: str
    recipe: str
    data: str
    reference: str
    calibration: str | None = None
    window: int | None = None
    windows: int = 8
    dtype: str = "auto"
    inner: str = "inductor"
    context: int = 128
    steps: int = 32


@dataclass(frozen=True)
class Measured:
    """What one recipe gave. `bytes`: of all weights as stored; `peak_rss`: bytes of the process until it had quantized and
    decoded; `cache_bytes`: of the KV cache, a token; rates in tokens a second, None where not timed; `seconds`: of all of it."""

    recipe: str
    bytes: int
    peak_rss: int
    evaluation: Evaluation
    seconds: float
    cache_bytes: float | None = None
    tokens_per_second: float | None = None
    prompt_per_second: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        low, high = self.evaluation.kl_interval
        return asdict(self) | {"kl_low": low, "kl_high": high}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        """What `to_json` gave."""
        fields = {name: value for name, value in data.items() if name not in ("kl_low", "kl_high", "evaluation")}
        found = dict(data["evaluation"]) | {"window_kls": tuple(data["evaluation"]["window_kls"])}
        return cls(evaluation=Evaluation(**found), **fields)


def windows_of(model: str, data: str, window: int | None, windows: int, most: int = 1024) -> list[Tensor]:
    """The windows that a job is measured on. `window`: None for `most`, or as many as the model has positions.

    Raises `QpassError` for windows that the model has no positions for.
    """
    longest = longest_input(model)
    if window is None:
        window = min(most, longest or most)
    if longest is not None and window > longest:
        raise QpassError(f"windows of {window} tokens: the model has {longest} positions; take shorter ones")
    return read_windows(data, load_tokenizer(Path(model)), window, windows)


def measure(job: Job) -> Measured:
    """Quantize, decode, then compare with the kept logits. Raises what these raise."""
    start = time.perf_counter()
    batches = windows_of(job.model, job.data, job.window, job.windows)
    calibration = None if job.calibration is None else Path(job.calibration)
    recipe = None if job.recipe == FLOAT else resolve_recipe(job.recipe, calibration is not None)
    if recipe is None:
        model = load_float(Path(job.model), job.dtype)
        if job.inner == "inductor":
            model.compile()
    else:
        model = load_quantized(Path(job.model), job.recipe, calibration=calibration, dtype=job.dtype, inner=job.inner)
    speed = measure_speed(model, recipe, job.context, job.steps) if job.steps else None
    peak = peak_rss()
    if job.inner == "inductor":  # graphs of whole windows: their speed is not asked for
        model._compiled_call_impl = None
        if recipe is not None:
            compile_in_place(model, QPass(recipe, inner="eager"), guards_beside_the_lookup)
    found = evaluate(model, KeptLogits(job.reference), batches)
    timed: tuple[Any, ...] = ()
    if speed is not None:
        cache = speed.cache_bytes / speed.cache_tokens
        timed = cache, speed.tokens_per_second, speed.prompt_tokens_per_second
    return Measured(job.recipe, weight_bytes(model), peak, found, time.perf_counter() - start, *timed)


def peak_rss() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(job: str, result: str) -> None:
    """Write the result whole, or not at all; what went wrong goes into "<result>.error"."""
    try:
        found = measure(Job(**json.loads(Path(job).read_text())))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        Path(f"{result}.error").write_text(
            first if isinstance(error, QpassError) else f"{type(error).__name__}: {first}"
        )
        raise SystemExit(1) from error
    unfinished = f"{result}.{os.getpid()}"
    Path(unfinished).write_text(json.dumps(found.to_json(), indent=1))
    os.replace(unfinished, result)


if __name__ == "__main__":
    main(*sys.argv[1:])

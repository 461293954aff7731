"""qpass.compare: several recipes of one model side by side, each measured in a process of its own; a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qpass.artifact.checkpoint import identity_of
from qpass.errors import QpassError
from qpass.folders import check_data, check_model, load_float
from qpass.graph.torch_private import check_inner
from qpass.measuring.job import FLOAT, Job, Measured, windows_of
from qpass.measuring.kept_logits import keep_logits
from qpass.measuring.speed import WARM
from qpass.pretrained import longest_input
from qpass.printing import number_table, printed
from qpass.recipe import resolve_recipe


@dataclass(frozen=True)
class Comparison:
    """Recipes in the order that they were asked for, the float model first. `print` shows table and plot, `to_json()` gives plain
    data, `to_html(path)` a page. `data`: what it was measured on, in words."""

    model: str
    data: str
    rows: tuple[Measured, ...]

    @property
    def frontier(self) -> tuple[Measured, ...]:
        """Rows that no other beats in bytes of weights and cache and in KL, from large to small; without the float model."""
        rows = [row for row in self.rows if row.recipe != FLOAT and not math.isnan(row.evaluation.kl)]
        best = [row for row in rows if not any(_beats(other, row) for other in rows)]
        return tuple(sorted(best, key=lambda row: -row.bytes))

    def to_json(self) -> dict[str, Any]:
        """The rows, and the recipes on the frontier, as plain data."""
        rows = [row.to_json() for row in self.rows]
        return {"model": self.model, "data": self.data, "rows": rows, "frontier": [r.recipe for r in self.frontier]}

    def to_html(self, path: str | Path | None = None) -> str:
        """The frontier as a plot, and the table, in one file that needs no network; written to `path`, if given."""
        from qpass.seeing.html.page import page

        return page("compare", self.model, self.to_json(), path)

    def _repr_html_(self) -> str:
        from qpass.seeing.html.page import in_notebook

        return in_notebook(self.to_html())

    def __rich__(self) -> Any:
        from rich.console import Group

        table = number_table(*_COLUMNS)
        best = self.frontier
        for row in self.rows:
            table.add_row(*_cells(row), "*" if row in best else "")
        lines: list[Any] = [f"{self.model}, {self.data}", table]
        if best:
            lines.append(
                "* none of the others is smaller and loses less; +- is the 95 % interval of the KL over the windows"
            )
        return Group(*lines, *_plot(self.rows, best))

    def __str__(self) -> str:
        return printed(self)


def _beats(a: Measured, b: Measured) -> bool:
    """Whether `a` is nowhere worse than `b`, and somewhere better."""
    mine, other = ((row.bytes, row.cache_bytes or 0, row.evaluation.kl) for row in (a, b))
    return mine != other and all(m <= o for m, o in zip(mine, other, strict=True))


#: Files beside the weights: tokenizer, templates, configs.
_SMALL = 64 << 20
_COLUMNS = (
    "recipe", "MB", "cache B/token", "peak RSS MB", "KL", "+-", "perplexity", "top-1", "tokens/s", "prompt", "",
)  # fmt: skip


def _cells(row: Measured) -> list[str]:
    found = row.evaluation
    rates = (row.tokens_per_second, row.prompt_per_second)
    return [
        row.recipe,
        f"{row.bytes / 1e6:,.1f}",
        "" if row.cache_bytes is None else f"{row.cache_bytes:,.0f}",
        f"{row.peak_rss / 1e6:,.0f}",
        f"{found.kl:.5f}",
        f"{found.kl_interval[1] - found.kl:.5f}" if len(found.window_kls) > 1 else "",
        f"{found.perplexity:.3f}",
        f"{found.top1:.4f}",
        *("" if rate is None else f"{rate:,.1f}" for rate in rates),
    ]


def _plot(rows: Sequence[Measured], best: Sequence[Measured], width: int = 64, height: int = 12) -> list[str]:
    """Bytes to the right, log10 of the KL upwards; letters for the rows, capitals for the frontier."""
    points = [row for row in rows if row.recipe != FLOAT and row.evaluation.kl > 0]
    if len(points) < 2:
        return []
    xs, ys = [row.bytes for row in points], [math.log10(row.evaluation.kl) for row in points]
    left, right, low, high = min(xs), max(xs), math.floor(min(ys)), math.ceil(max(ys))
    canvas = [[" "] * width for _ in range(height)]
    names = []
    for i, (row, x, y) in enumerate(zip(points, xs, ys, strict=True)):
        letter = chr(ord("a") + i % 26)
        letter = letter.upper() if row in best else letter
        names.append(f"{letter} {row.recipe}")
        column = round((x - left) / max(1, right - left) * (width - 1))
        line = round((high - y) / max(1, high - low) * (height - 1))
        canvas[line][column] = letter
    axis = [f"1e{high:+03d} |", *["      |"] * (height - 2), f"1e{low:+03d} |"]
    lines = [f"{label}{''.join(line)}".rstrip() for label, line in zip(axis, canvas, strict=True)]
    ends = f"{left / 1e6:,.0f} MB", f"{right / 1e6:,.0f} MB"
    return [
        "", "KL", *lines, "      +" + "-" * width, f"       {ends[0]}{ends[1].rjust(width - len(ends[0]))}",
        "  ".join(names),
    ]  # fmt: skip


def compare(
    model: str | Path,
    recipes: Sequence[str],
    data: str | Path,
    *,
    calibration: str | Path | None = None,
    reference: str | Path | None = None,
    folder: str | Path | None = None,
    window: int | None = None,
    windows: int = 8,
    dtype: str = "auto",
    inner: str = "inductor",
    context: int = 128,
    steps: int = 32,
    on_row: Callable[[Measured], None] = lambda row: None,
) -> Comparison:
    """Measure recipes of the transformers model in folder `model` on the text file `data`.

    `recipes`: presets, specs, YAML files, each perhaps with changes ("int4+kv=int8"); those that take data get `calibration`.
    `reference`: a file where the float model's logits are kept for further calls; by default one that is deleted at the end.
    `folder`: where results are kept, by default in the user's cache; a call with the same model, data and settings on this
    machine takes what is there, so that a killed run goes on. `dtype`: of the float model, by default as it is stored. `window`,
    `windows`: tokens (None: 1,024, or as many as the model has positions), and how many. `context`, `steps`: of the timed
    decoding (`steps=0`: none). `on_row`: is told of each row.
    Raises `QpassError` for a recipe that does not exist, before anything is measured, and for one that fails, after the others.
    """
    model, data = Path(model), Path(data)
    check_model(model)
    check_inner(inner)
    asked = [recipe for recipe in dict.fromkeys(recipes) if recipe != FLOAT]
    for recipe in asked:
        check_data(resolve_recipe(recipe, calibration is not None), recipe, calibration is not None)
    longest = longest_input(model)
    if steps and longest is not None and context + steps + WARM > longest:
        raise QpassError(f"context {context} and {steps} steps: the model has {longest} positions; take fewer")
    text = None if calibration is None else str(Path(calibration).resolve())
    job = Job(str(model.resolve()), FLOAT, str(data.resolve()), "", text, window, windows, dtype, inner, context, steps)
    batches = windows_of(job.model, job.data, window, windows)
    kept = Path(folder) if folder is not None else _cache_folder() / "compare"
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QpassError(f"{kept}: cannot be written ({error.strerror}); give another folder for results") from None
    identity = f"{identity_of(model)} {dtype}"
    known = _surroundings(model, identity, [job.data, *([] if text is None else [text])])
    jobs = [replace(job, recipe=recipe) for recipe in (FLOAT, *asked)]
    paths = [kept / f"{_key(j, known)}.json" for j in jobs]
    logits = Path(reference) if reference is not None else kept / f"{_key(job, known)}.safetensors"
    rows: list[Measured] = []
    failures: list[str] = []
    for each, path in zip(jobs, paths, strict=True):
        if not path.is_file():
            keep_logits(logits, identity, batches, lambda: load_float(model, dtype))
            wrong = _run(replace(each, reference=str(logits.resolve())), path)
            if wrong is not None:
                failures.append(f"{each.recipe}: {wrong}")
                continue
        rows.append(replace(Measured.from_json(json.loads(path.read_text())), recipe=each.recipe))
        on_row(rows[-1])
    if reference is None and not failures:
        logits.unlink(missing_ok=True)
    if failures:
        raise QpassError("compare: " + "; ".join(failures))
    what = f"{sum(b.numel() for b in batches):,} tokens of {data.name} in {len(batches)} windows"
    return Comparison(model.name, what, tuple(rows))


def _run(job: Job, path: Path) -> str | None:
    """Measure a job in a process of its own, whose progress is seen where somebody looks; -> what went wrong."""
    failed = Path(f"{path}.error")
    failed.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(job), file)
        file.flush()
        command = [sys.executable, "-W", "ignore", "-m", "qpass.measuring.job", file.name, str(path)]
        seen = None if sys.stderr.isatty() else subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=seen)
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
    if status == 0:
        return None
    if failed.is_file():
        reason = failed.read_text()
        failed.unlink()
        return reason
    return f"ended by signal {-status}; is memory short?" if status < 0 else f"ended with status {status}"


def _surroundings(model: Path, identity: str, texts: Sequence[str]) -> list[str]:
    """What results depend on beside the job: model, tokenizer, texts, this machine, versions, qpass's own code."""
    small = [path for path in sorted(model.iterdir()) if path.is_file() and path.stat().st_size < _SMALL]
    code = sorted(path for path in Path(__file__).parents[1].rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    digest = hashlib.sha256()
    for path in (*small, *map(Path, texts), *code):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    versions = [f"{name} {version(name)}" for name in ("qpass-torch", "torch", "transformers")]
    return [identity, digest.hexdigest(), *versions, platform.node(), platform.machine(), str(torch.get_num_threads())]


def _key(job: Job, known: Sequence[str]) -> str:
    """Changes with all that a result depends on."""
    recipe = job.recipe if job.recipe == FLOAT else resolve_recipe(job.recipe, job.calibration is not None).to_dict()
    own = asdict(job) | {"recipe": recipe, "model": "", "data": "", "calibration": job.calibration is not None}
    return hashlib.sha256(json.dumps([own, *known], sort_keys=True).encode()).hexdigest()[:20]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpass"

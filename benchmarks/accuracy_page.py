"""What each algorithm keeps, as docs/accuracy.md: tinypy as it is, tinypy with planted outliers, and a model of your own.

    python benchmarks/accuracy_page.py [--model DIR --text validation.txt --calibration calibration.txt] [--only REGEX]
                                       [--page docs/accuracy.md]

Results are kept in benchmarks/results/accuracy.json; a run goes on where the last one ended. `--only REGEX`: what to measure,
`--again REGEX`: what to measure anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import needs_calibration, read_recipe
from accuracy_torchao import PAIRS, THEIRS, installed
from chart import Point, scatter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.recipe import PRESETS

TINYPY = Path(__file__).parent.parent / "examples" / "tinypy"
RESULTS = Path(__file__).parent / "results" / "accuracy.json"
#: Column -> format; asymmetric, as the papers have it, on every matrix.
GRIDS = {"W4 g128": "int4:g128", "W4 channel": "int4:channel", "W3 g128": "int3:g128", "W2 g64": "int2:g64"}
METHODS = {
    "round to nearest": "{}:asym", "range search": "{}:asym:search", "HQQ": "{}:zero=float:hqq", "GPTQ": "{}:asym:gptq",
    "AWQ": "{}:asym:awq", "AWQ, search": "{}:asym:awq:search", "AWQ, GPTQ": "{}:asym:awq:gptq",
    "AWQ, search, GPTQ": "{}:asym:awq:search:gptq",
}  # fmt: skip
EIGHT = {
    "weights int8": "int8:channel", "weights int8 g32": "int8:g32", "weights fp8 (cast)": "fp8_e4m3",
    "weights fp8, scale a row": "fp8_e4m3:channel", "weights int8, GPTQ": "int8:gptq", "weights fp8, scale a row, GPTQ":
    "fp8_e4m3:channel:gptq", "W8A8, a scale a token": "int8@int8", "W8A8, a scale a token, smooth": "int8:smooth@int8",
    "W8A8 in groups of 32": "int8:g32@int8:g32", "W8A8 static": "int8@int8:static",
    "W8A8 static, smooth": "int8:smooth@int8:static", "W8A8 static by mse": "int8@int8:static:mse",
    "fp8 weights and activations, a scale a token": "fp8_e4m3:channel@fp8_e4m3:channel",
    "weights int8 g32, activations int8, a scale a token": "int8:g32@int8",
    "weights int8 g32, activations fp8, a scale a token": "int8:g32@fp8_e4m3:channel",
    "fp8 static": "fp8_e4m3:channel@fp8_e4m3:static", "W4A8 (g32, activations g32)": "int4:g32:asym@int8:g32",
}  # fmt: skip


#: Sizes of a real model: name -> recipe. AWQ and GPTQ with bits given out, beside what needs no data.
FRONTIER = {
    "preset int8": "int8:g32:scale=fp16", "int8 g64": "int8:g64:scale=fp16", "int8, a scale a row": "int8:channel",
    "preset int5": "int4:g32:asym:awq:gptq;bits=6.1", "preset int4": "int4:g32:asym:awq:gptq;bits=5.35",
    "preset int3": "int4:g32:asym:awq:gptq;bits=4.65", "preset int5, no data": "int5", "preset int4, no data": "int4",
    "preset int3, no data": "int3", "int4 g32, tables int8 g32": "int4:g32:asym;embedding=int8:g32;vocab=int8:g32",
    "int4 g128": "int4:g128", "bits 5.4, GPTQ": "int4:g32:asym:gptq;bits=5.4",
    "bits 5.4, round to nearest": "int4:g32:asym;bits=5.4", "bits 4.1": "int4:g32:asym:awq:gptq;bits=4.1",
}  # fmt: skip
#: The model that is compared with llama.cpp, and drawn.
DRAWN = "SmolLM2-135M-Instruct"
#: llama.cpp (llama-cpp-python 0.3.36) on the same weights and windows: MB without the vocabulary, perplexity, top-1, KL. It
#: rounds activations to 8 bits too, and takes larger types where 576 is no multiple of 256.
LLAMA_CPP = {
    "Q8_0": (142.8, 22.675, 0.9565, 0.00421), "Q6_K": (136.4, 22.823, 0.9310, 0.01008),
    "Q5_K_M": (110.1, 23.548, 0.8661, 0.04765), "Q4_K_M": (103.5, 24.095, 0.8470, 0.06627),
    "Q4_1": (96.4, 29.491, 0.6975, 0.28253), "Q3_K_M": (91.5, 26.870, 0.7392, 0.19333),
    "IQ4_NL": (90.1, 27.509, 0.7366, 0.21264), "Q4_0": (89.7, 29.160, 0.6670, 0.32717), "Q2_K": (86.2, 32.364, 0.6072, 0.44921),
    "Q4_0, the table too": (75.8, 31.464, 0.6123, 0.41449),
}  # fmt: skip
#: With inputs of products rounded to int8, as weights below eight bits are multiplied on a CPU unless told otherwise.
IN_INT8 = {
    name: f"{FRONTIER[name]};compute=int8"
    for name in ("preset int8", "preset int4", "preset int4, no data", "int4 g128")
}
#: What is measured of a model of one's own, which takes minutes each, and not all of it.
SMALL = (*FRONTIER.values(), *IN_INT8.values(), "int8@int8", "int8:smooth@int8", "int8:g32@int8:g32", "int8@int8:static",
         "int8:smooth@int8:static", "int8:g32@int8", "int8:g32@fp8_e4m3:channel", "fp8_e4m3", "fp8_e4m3:channel",
         "fp8_e4m3:channel@fp8_e4m3:channel", "int4:g128:asym",
         "int4:g128:asym:gptq", "int4:g128:asym:awq:gptq", "int3:g128:asym", "int3:g128:asym:awq:gptq")  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model with the windows it is calibrated and measured on."""

    name: str
    make: Callable[[], Any]
    calibration: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    later: tuple[Tensor, ...] = ()


def tinypy(outliers: bool) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(TINYPY)
    ids = tokenizer((TINYPY / "calibration.txt").read_text(), return_tensors="pt").input_ids[0]
    count = min(48, len(ids) // 512)
    calibration = ids[: count * 512].view(-1, 512).split(8)
    validation = (
        torch.from_numpy(np.load(TINYPY / "validation.npy").astype(np.int64))[: 64 * 512].view(-1, 512).split(8)
    )

    def make() -> Any:
        model = AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval()
        if outliers:
            plant_outliers(model)
        return model

    return Subject("tinypy with outliers" if outliers else "tinypy", make, tuple(calibration), tuple(validation))


@torch.no_grad()
def plant_outliers(model: Any, factor: float = 32.0, share: float = 0.02) -> None:
    """Make some channels large, and what reads them as much smaller: the function stays the same. Llama's names."""
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> Tensor:
        scale = torch.ones(n)
        scale[torch.randperm(n, generator=generator)[: max(1, round(share * n))]] = factor
        return scale

    for layer in model.model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj)),
        ):
            scale = some(len(norm.weight))
            norm.weight *= scale
            for reader in readers:
                reader.weight /= scale
        scale = some(ffn.up_proj.out_features)
        ffn.up_proj.weight *= scale[:, None]
        ffn.down_proj.weight /= scale


def documents(folder: Path, tokenizer: Any) -> list[list[int]]:
    texts = folder.read_text().split("<|endoftext|>\n")
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts if text.strip()]


def own(folder: Path, text: Path, calibration: Path) -> Subject:
    """To measure: the first 1,024 tokens of the first eight documents, and eight windows of the later ones; to calibrate: windows
    of all documents."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = documents(text, tokenizer)
    validation, later = [torch.tensor([row[:1024]]) for row in rows[:8]], _windows(rows[8:])
    windows = _windows(documents(calibration, tokenizer))
    step = max(1, len(windows) // 24)
    return Subject(
        folder.name, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        tuple(windows[::step][:24]), tuple(validation), tuple(later[:: max(1, len(later) // 8)][:8]),
    )  # fmt: skip


def _windows(rows: Sequence[list[int]]) -> list[Tensor]:
    return [torch.tensor([row[i : i + 1024]]) for row in rows for i in range(0, len(row) - 1023, 1024)]


def quantized(reference: Any, recipe: str, calibration: Sequence[Tensor]) -> tuple[Any, int | None]:
    """What a recipe, or a name of torchao's, makes of a copy of a model; its size if it is ours."""
    model = copy.deepcopy(reference)
    if recipe in THEIRS:
        THEIRS[recipe](model, calibration)
        return model, None
    resolved = read_recipe(recipe, calibrated=False)
    data = calibration if needs_calibration(resolved) and recipe not in PRESETS else None
    model = qpass.quantize(model, resolved, calibration=data, inner="eager")
    report = qpass.report(model)
    return model, report.resident_quantized + report.resident_float


@torch.no_grad()
def measure(subject: Subject, recipes: Sequence[str], known: dict[str, Any], only: str, again: str | None) -> None:
    """KL, perplexity, top-1 of each recipe, in float compute unless it says `;compute=int8`; what is known already stays."""
    wanted = [r for r in recipes if f"{subject.name}|{r}" not in known or (again and re.search(again, r))]
    wanted = [r for r in wanted if re.search(only, r)]
    if not wanted:
        return
    reference = subject.make()
    batches = (*subject.validation, *subject.later)
    logits = {batch.data_ptr(): reference(batch, use_cache=False).logits for batch in batches}
    for recipe in wanted:
        start = time.perf_counter()
        plain, _, compute = recipe.partition(";compute=")
        model, size = quantized(reference, plain, subject.calibration)
        seconds = time.perf_counter() - start
        with qpass.set_compute(compute or "float"):
            found, *later = (qpass.evaluate(model, lambda batch: logits[batch.data_ptr()], windows)
                             for windows in (subject.validation, subject.later) if windows)  # fmt: skip
        result = found.to_json() | {"bytes": size, "seconds": seconds}
        known[f"{subject.name}|{recipe}"] = result | ({"later": later[0].to_json()} if later else {})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{subject.name:22} {recipe:44} {(size or 0) / 1e6:7.2f} MB {found} ({seconds:.0f} s)", flush=True)


def interval(values: Sequence[float], other: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % bootstrap interval over windows: of the mean, or of the share of `other`'s mean that is gone (paired)."""
    generator = np.random.default_rng(0)
    x = np.array(values)
    picked = generator.integers(len(x), size=(2000, len(x)))
    found = x[picked].mean(1)
    if other is not None:
        found = 1 - found / np.array(other)[picked].mean(1)
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def row(name: str, result: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    low, high = interval(result["window_kls"])
    digits = 5 if result["kl"] < 0.1 else 3
    cells = [name, f"{result['bytes'] / 1e6:.2f}", f"{result['perplexity']:.3f}", f"{result['top1']:.4f}",
             f"{result['kl']:.{digits}f}", f"{low:.{digits}f} .. {high:.{digits}f}"]  # fmt: skip
    if baseline is None:
        return f"| {' | '.join(cells)} | |"
    gone = interval(result["window_kls"], baseline["window_kls"])
    share = 1 - result["kl"] / baseline["kl"]
    return f"| {' | '.join(cells)} | {share:.0%} ({gone[0]:.0%} .. {gone[1]:.0%}) |"


def tables(subject: str, known: dict[str, Any]) -> list[str]:
    """What is known of a subject, as markdown."""
    head = ["| | MB | perplexity | top-1 | KL | 95 % interval | loss removed |", "|---|---|---|---|---|---|---|"]
    lines: list[str] = []
    for column, base in GRIDS.items():
        recipes = {name: text.format(base) for name, text in METHODS.items()}
        there = {name: known[f"{subject}|{r}"] for name, r in recipes.items() if f"{subject}|{r}" in known}
        plain = there.get("round to nearest")
        if plain is not None:
            lines += [f"\n{column}\n", *head]
            lines += [row(name, result, None if result is plain else plain) for name, result in there.items()]
    eight = {name: known[f"{subject}|{r}"] for name, r in EIGHT.items() if f"{subject}|{r}" in known}
    if eight:
        lines += ["\n8 bits, and activations\n", *head, *(row(name, result, None) for name, result in eight.items())]
    frontier = {name: known[f"{subject}|{r}"] for name, r in FRONTIER.items() if f"{subject}|{r}" in known}
    if len(frontier) > 3:
        sized = [(result["bytes"] / 1e6, row(name, result, None)) for name, result in frontier.items()]
        if subject == DRAWN:  # of these very weights
            sized += [(mb, f"| *llama.cpp {name}* | {mb:.2f} | {ppl:.3f} | {top1:.4f} | {kl:.5f} | | |")
                      for name, (mb, ppl, top1, kl) in LLAMA_CPP.items()]  # fmt: skip
        lines += ["\nSizes, beside llama.cpp's\n", *head, *(line for _, line in sorted(sized, reverse=True))]
        if subject == DRAWN:
            lines += ["\n![KL against size: qpass and llama.cpp](frontier.svg)"]
    rounded = {name: known[f"{subject}|{r}"] for name, r in IN_INT8.items() if f"{subject}|{r}" in known}
    if rounded:
        lines += ["\nProducts with inputs rounded to int8, as speed is measured\n", *head]
        lines += [row(name, result, None) for name, result in rounded.items()]
    return lines


def on_later_documents(subject: str, known: dict[str, Any]) -> list[str]:
    """What was measured on two sets of documents, as markdown."""
    head = "| | KL | top-1 | later documents: KL | 95 % interval | top-1 |"
    lines = ["\nOn later documents of the same text\n", head, "|---|---|---|---|---|---|"]
    for name, recipe in FRONTIER.items():
        result = known.get(f"{subject}|{recipe}", {})
        if later := result.get("later"):
            low, high = interval(later["window_kls"])
            cells = [
                name,
                f"{result['kl']:.5f}",
                f"{result['top1']:.4f}",
                f"{later['kl']:.5f}",
                f"{low:.5f} .. {high:.5f}",
            ]
            lines.append(f"| {' | '.join(cells)} | {later['top1']:.4f} |")
    return lines if len(lines) > 3 else []


def beside_torchao(subject: str, known: dict[str, Any]) -> list[str]:
    """Our results and torchao's on the same grids, as markdown."""
    head = "| | KL | 95 % interval | top-1 | torchao: KL | 95 % interval | top-1 | KL less than torchao's |"
    lines = ["\nBeside torchao 0.18, the embedding in float\n", head, "|---|---|---|---|---|---|---|---|"]
    for name, (recipe, _) in PAIRS.items():
        ours, theirs = (known.get(f"{subject}|{key}") for key in (recipe, f"torchao:{name}"))
        if ours is None or theirs is None:
            continue
        digits = 5 if max(ours["kl"], theirs["kl"]) < 0.1 else 3
        cells = [name]
        for result in (ours, theirs):
            low, high = interval(result["window_kls"])
            cells += [f"{result['kl']:.{digits}f}", f"{low:.{digits}f} .. {high:.{digits}f}", f"{result['top1']:.4f}"]
        low, high = interval(ours["window_kls"], theirs["window_kls"])
        cells.append(f"{1 - ours['kl'] / theirs['kl']:.0%} ({low:.0%} .. {high:.0%})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []


HEAD = """# What each algorithm keeps

KL(float || quantized) per token in nats, in float compute, with 95 % bootstrap intervals over the windows; the share of the loss
of round to nearest that an algorithm removes, paired by window. Sizes are those of all weights as stored. Calibration and
measurement are on different documents. `make accuracy` measures it anew. Presets are with calibration data unless it says that
there are none.

AWQ by itself gains nothing on tinypy as it is. It has no outliers to protect, and on the vocabulary projection the squared error
that AWQ lowers (of the logits of tinypy, from .040 to .024) is not what counts: weighted by the probabilities it grows (.0167 to
.0197). AWQ's authors leave that layer in float; with GPTQ behind it, it gains there too. At two bits search and GPTQ do not go
together: a range that is cut for rounding to nearest leaves GPTQ no room for what it makes up. HQQ knows no inputs: where a few
columns carry most of the output (planted outliers) it chooses worse than round to nearest. It begins at integer zero points, as
its authors' code does for four bits: from those of the range it lost twice as much there.

The tables beside torchao are of the same grids (round to nearest shows it), matrices, calibration and windows; its GPTQ is run
without the GPU that it asks for (benchmarks/accuracy_torchao.py). Ours is ahead by the order of columns: with them as they come,
it is level with torchao's (W4 g128: .00340 and .00334, with outliers .01284 and .01287). Where theirs keeps more: its AWQ leaves
the vocabulary projection of tinypy unscaled, which is better there. KLs of GPTQ differ by up to 5 % with the number of threads,
as sums are rounded differently.

The rows "bits 5.4" and "bits 4.1" of SmolLM2 were measured with a format for each weight. In the others weights that one operator
reads share one, which is faster and loses a little more (bits 5.35: .0326 before). "Seed 1" is the same model with its channels
permuted and scaled in another way (`examples/smollm2.py --seed 1`): what it computes is the same, its weights round differently.
"""


def page(subjects: Sequence[str], known: dict[str, Any]) -> str:
    lines = [HEAD]
    for subject in subjects:
        lines += [f"\n## {subject}", *tables(subject, known)]
        lines += [*on_later_documents(subject, known), *beside_torchao(subject, known)]
    return "\n".join(lines) + "\n"


def draw_frontier(known: dict[str, Any], path: Path) -> None:
    """KL against bytes of the real model, beside llama.cpp's files."""
    there = {name: known.get(f"{DRAWN}|{recipe}") for name, recipe in FRONTIER.items()}
    points = [Point(f"llama.cpp {name}", mb, kl, ours=False) for name, (mb, _, _, kl) in LLAMA_CPP.items()]
    points += [
        Point(name, found["bytes"] / 1e6, found["kl"], ours=True, line="with data" if "awq" in FRONTIER[name] else "")
        for name, found in there.items()
        if found is not None
    ]
    scatter(points, path, f"{DRAWN}: KL to the float model, by size", "MB (10^6 bytes; float: 538)", "KL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--only", default=".")
    parser.add_argument("--again")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    whole = [*(text.format(base) for base in GRIDS.values() for text in METHODS.values()), *EIGHT.values()]
    whole += [recipe for recipe, _ in PAIRS.values()]
    if installed():
        whole += THEIRS
    else:
        print("torchao is not installed: what is not known of it is left out of the table beside it")
    names = ["tinypy", "tinypy with outliers"]
    if args.model:
        subject = own(args.model, args.text, args.calibration)
        names.append(subject.name)
        measure(subject, SMALL, known, args.only, args.again)
    else:
        for outliers in (False, True):
            measure(tinypy(outliers), whole, known, args.only, args.again)
    names = list(dict.fromkeys([*names, *(key.partition("|")[0] for key in known)]))
    if args.page:
        args.page.write_text(page(names, known))
        draw_frontier(known, args.page.parent / "frontier.svg")


if __name__ == "__main__":
    main()

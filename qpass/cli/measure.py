"""Commands that measure: what a recipe costs, which of several to take, which site is to blame, how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qpass.cli.base import (
    Calibration,
    Data,
    Dtype,
    Inner,
    Json,
    Model,
    Page,
    RecipeOption,
    Recipes,
    Source,
    Window,
    Windows,
    app,
    check_dtype,
    check_page,
    deliver,
    show,
    split,
)
from qpass.errors import Breach, QpassError

Reference = Annotated[
    Path | None,
    typer.Option(help="Folder of the float model, or a file that keeps its logits (made if it is not there)"),
]


@app.command(name="eval")
def evaluate(
    source: Source,
    data: Data,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    reference: Reference = None,
    max_kl: Annotated[float | None, typer.Option(help="Exit with 1 if the KL, nats a token, is above", min=0.0)] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Exit with 1 if the share of equal top tokens is below", min=0.0, max=1.0)
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a site stays in float against the recipe")
    ] = False,
    window: Window = None,
    windows: Windows = 8,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """KL, perplexity and top-1 agreement of the quantized model with the float one; exit status 1 if a limit does not hold."""
    import qpass
    from qpass.folders import load_quantized
    from qpass.testing import left_in_float

    check_dtype(dtype)
    batches, floats = _reference(source, data, reference, window, windows, dtype)
    model = load_quantized(source, recipe, calibration=calibration, dtype=dtype)
    found = qpass.evaluate(model, floats, batches)
    show(found, as_json)
    breaches = found.breaches(max_kl, min_top1) + (left_in_float(model) if strict else [])
    if breaches:
        raise Breach("; ".join(breaches))


@app.command()
def compare(
    model: Model,
    data: Data,
    recipes: Recipes = "int8,fp8,nf4,int4",
    calibration: Calibration = None,
    reference: Annotated[
        Path | None, typer.Option(help="File that keeps the float model's logits for further calls")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where results are kept; by default in the user's cache")] = None,
    window: Window = None,
    windows: Windows = 8,
    dtype: Dtype = "auto",
    inner: Inner = "inductor",
    context: Annotated[int, typer.Option(help="Tokens before those whose decoding is timed", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Tokens whose decoding is timed; 0: none", min=0)] = 32,
    output: Page = None,
    as_json: Json = False,
) -> None:
    """Recipes side by side: bytes, peak memory, KL with its interval, perplexity, top-1, speed. A killed run goes on."""
    from qpass.measuring.compare import compare as run

    check_page(output)
    check_dtype(dtype)
    found = run(model, split(recipes), data, calibration=calibration, reference=reference, folder=folder, window=window,
                windows=windows, dtype=dtype, inner=inner, context=context, steps=steps)  # fmt: skip
    deliver(found, output, as_json)


@app.command()
def blame(
    source: Source,
    data: Data,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of the float model, for an artifact")] = None,
    top: Annotated[int | None, typer.Option(help="Sites that are shown", min=1)] = None,
    window: Window = None,
    windows: Windows = 4,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Sites by the KL that is recovered when each is restored to float, and the recipe line that fixes the worst."""
    import qpass
    from qpass.folders import is_artifact, load_float, load_quantized
    from qpass.measuring.job import windows_of

    if is_artifact(source) and reference is None:
        raise QpassError(
            f"{source}: an artifact holds no float weights; give --reference, the folder of its float model"
        )
    check_dtype(dtype)
    batches = windows_of(str(reference or source), str(data), window, windows, most=256)
    model = load_quantized(source, recipe, calibration=calibration, dtype=dtype)
    floats = load_float(reference or source, str(next(model.parameters()).dtype).removeprefix("torch."))
    show(qpass.blame(model, floats, batches, top=top), as_json)


@app.command()
def bench(
    source: Source,
    recipes: Annotated[str | None, typer.Option(help="Recipes, separated by commas; an artifact has its own")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Tokens whose decoding is timed", min=1)] = 64,
    calibration: Calibration = None,
    dtype: Dtype = "auto",
    inner: Inner = "inductor",
    as_json: Json = False,
) -> None:
    """Time prompts and decode steps at batch 1: of the float model, compiled, and of each recipe, one after the other."""
    from qpass.folders import is_artifact
    from qpass.measuring.bench import bench as run

    if is_artifact(source) and recipes is not None:
        raise QpassError(f"{source}: an artifact has its recipe already; leave --recipes out")
    check_dtype(dtype)
    chosen = None if is_artifact(source) else split(recipes or "int8,int4")
    show(run(source, chosen, context, steps, calibration=calibration, dtype=dtype, inner=inner), as_json)


def _reference(
    source: Path, data: Path, given: Path | None, window: int | None, windows: int, dtype: str
) -> tuple[Any, Any]:
    """The windows, and what gives float logits for them."""
    from qpass.artifact.checkpoint import identity_of
    from qpass.folders import is_artifact, load_float
    from qpass.measuring.job import windows_of
    from qpass.measuring.kept_logits import KeptLogits, keep_logits

    artifact = is_artifact(source)
    if artifact and given is None:
        raise QpassError(
            f"{source}: an artifact holds no float weights; give --reference, the folder of its float model or kept logits"
        )
    if given is not None and not given.exists() and (artifact or given.suffix != ".safetensors"):
        made = f"a file of logits ends in .safetensors, and is made by qpass eval {'FLOAT' if artifact else source} --reference"
        raise QpassError(f"{given}: there is no such folder or file ({made})")
    batches = windows_of(str(source), str(data), window, windows)
    if given is not None and given.is_dir():
        return batches, load_float(given, dtype)
    if given is None:
        return batches, load_float(source, dtype)
    if artifact:
        return batches, KeptLogits(given)
    return batches, keep_logits(given, f"{identity_of(source)} {dtype}", batches, lambda: load_float(source, dtype))


@app.command()
def warmup(
    artifact: Annotated[Path, typer.Argument(help="Folder that qpass wrote")],
    context: Annotated[int, typer.Option(help="Tokens of the prompt", min=1)] = 128,
    as_json: Json = False,
) -> None:
    """Compile what an artifact's first calls need into torch's caches on disk; the time to the first token before and after."""
    from qpass.folders import is_artifact
    from qpass.measuring.first_token import warm_up
    from qpass.progress import working

    if not is_artifact(artifact):
        raise QpassError(f"{artifact}: no artifact of qpass; quantize the model first: qpass quantize {artifact} OUT")
    with working("two processes, one after the other, up to their first tokens"):
        found = warm_up(artifact, context)
    show(found, as_json)

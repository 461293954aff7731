"""Commands that measure: what a recipe costs, which of several to take, which site is to blame, how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qpass.cli.base import (
    Calibration,
    Data,
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
    max_kl: Annotated[float | None, typer.Option(help="Exit with 1 if the KL is above")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Exit with 1 if the top-1 agreement is below")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a site stays in float against the recipe")
    ] = False,
    window: Window = 1024,
    windows: Windows = 8,
    as_json: Json = False,
) -> None:
    """KL, perplexity and top-1 agreement of the quantized model with the float one; exit status 1 if a limit does not hold."""
    import qpass
    from qpass.folders import load_quantized

    batches, floats = _reference(source, data, reference, window, windows)
    model = load_quantized(source, recipe, calibration=calibration, strict=strict)
    found = qpass.evaluate(model, floats, batches)
    show(found, as_json)
    breaches = found.breaches(max_kl, min_top1)
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
    window: Window = 1024,
    windows: Windows = 8,
    inner: Inner = "inductor",
    context: Annotated[int, typer.Option(help="Tokens before those whose decoding is timed", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Tokens whose decoding is timed; 0: none", min=0)] = 32,
    output: Page = None,
    as_json: Json = False,
) -> None:
    """Recipes side by side: bytes, peak memory, KL with its interval, perplexity, top-1, speed. A killed run goes on."""
    from qpass.measuring.compare import compare as run

    check_page(output)
    found = run(model, split(recipes), data, calibration=calibration, reference=reference, folder=folder, window=window,
                windows=windows, inner=inner, context=context, steps=steps)  # fmt: skip
    deliver(found, output, as_json)


@app.command()
def blame(
    source: Source,
    data: Data,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of the float model, for an artifact")] = None,
    top: Annotated[int | None, typer.Option(help="Sites that are shown", min=1)] = None,
    window: Window = 256,
    windows: Windows = 4,
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
    batches = windows_of(str(reference or source), str(data), window, windows)
    model = load_quantized(source, recipe, calibration=calibration)
    show(qpass.blame(model, load_float(reference or source), batches, top=top), as_json)


@app.command()
def bench(
    source: Source,
    recipes: Annotated[str | None, typer.Option(help="Recipes, separated by commas; an artifact has its own")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Tokens whose decoding is timed", min=1)] = 64,
    inner: Inner = "inductor",
    as_json: Json = False,
) -> None:
    """Time prompts and decode steps at batch 1: of the float model, compiled, and of each recipe, one after the other."""
    from qpass.folders import is_artifact
    from qpass.measuring.bench import bench as run

    if is_artifact(source) and recipes is not None:
        raise QpassError(f"{source}: an artifact has its recipe already; leave --recipes out")
    show(run(source, None if is_artifact(source) else split(recipes or "int8,int4"), context, steps, inner), as_json)


def _reference(source: Path, data: Path, given: Path | None, window: int, windows: int) -> tuple[Any, Any]:
    """The windows, and what gives float logits for them."""
    from qpass.artifact.checkpoint import identity_of
    from qpass.folders import is_artifact, load_float
    from qpass.measuring.job import windows_of
    from qpass.measuring.kept_logits import KeptLogits, keep_logits

    if is_artifact(source) and given is None:
        raise QpassError(
            f"{source}: an artifact holds no float weights; give --reference, the folder of its float model or kept logits"
        )
    batches = windows_of(str(source), str(data), window, windows)
    if given is not None and given.is_dir():
        return batches, load_float(given)
    if given is None:
        return batches, load_float(source)
    if is_artifact(source):
        return batches, KeptLogits(given)
    return batches, keep_logits(given, identity_of(source), batches, lambda: load_float(source))


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

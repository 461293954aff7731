"""The command `qpass`: look at recipes, and at what one does to a transformers model on disk."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from qpass.errors import QpassError, nearest

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Model = Annotated[Path, typer.Argument(help="Folder of a transformers model")]
RecipeOption = Annotated[str, typer.Option(help="Preset, spec for every weight, or YAML file")]
Json = Annotated[bool, typer.Option("--json", help="Plain data instead of a table")]


def _show(result: Any, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        Console().print(
            result.__rich__() if hasattr(result, "__rich__") else str(result),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _load(model: Path) -> tuple[Any, Any]:
    """(model in fp32, tokenizer). Raises `QpassError` if the folder holds none, or transformers is missing."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise QpassError("transformers is not installed: pip install 'qpass-torch[hf]'") from None
    if not (model / "config.json").is_file():
        raise QpassError(f"{model}: no transformers model there (config.json is missing)")
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)


def _extension(group: str, name: str) -> Any:
    """What another package does for the command line: qpass knows it by its entry point only."""
    found = {e.name: e for e in entry_points(group=group)}
    if name not in found:
        raise QpassError(f"format {name}: {nearest(name, {'compressed-tensors', *found})}")
    try:
        return found[name].load()
    except ImportError as error:
        raise QpassError(f"format {name}: {error.name} is not installed: pip install 'qpass-torch[{name}]'") from None


def _quantized(model: Path, recipe: str) -> Any:
    import qpass

    quantized, _ = _load(model)
    inputs = quantized.dummy_inputs
    quantized = qpass.quantize(quantized, recipe, inner="eager")
    quantized(**inputs)  # captured once: the report and the diff are of real graphs
    return quantized


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers, what qpass uses of it, and why."""
    import qpass

    _show(qpass.doctor(), as_json)


@app.command()
def recipes(as_json: Json = False) -> None:
    """Each preset, and what it is with calibration data: formats of the sites, stored bits per element in rows of 4096."""
    from rich.console import Console
    from rich.table import Table

    from qpass.recipe import CALIBRATED, PRESETS, WEIGHT_KINDS

    rows = PRESETS | {f"{name}, with data": recipe for name, recipe in CALIBRATED.items()}
    if as_json:
        print(json.dumps({name: recipe.to_dict() for name, recipe in rows.items()}, indent=1))
        return
    table = Table("preset", box=None)
    for kind in (*WEIGHT_KINDS, "kv", "bits given out"):
        table.add_column(kind, overflow="fold")
    for name, recipe in rows.items():
        specs = [getattr(recipe, kind) for kind in (*WEIGHT_KINDS, "k")]
        cells = ("float" if s is None else f"{s} ({s.effective_bits(4096):.2f})" for s in specs)
        table.add_row(name, *cells, "" if recipe.bits is None else f"{recipe.bits} on average")
    Console().print(table)


@app.command()
def report(model: Model, recipe: RecipeOption = "int8", as_json: Json = False) -> None:
    """Every site of a model under a recipe: format, bytes, SQNR, or why it stays in float."""
    import qpass

    _show(qpass.report(_quantized(model, recipe)), as_json)


@app.command()
def diff(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model; or an ONNX file")],
    other: Annotated[Path | None, typer.Argument(help="The ONNX file that it became")] = None,
    recipe: RecipeOption = "int8",
    as_json: Json = False,
) -> None:
    """The captured graph before and after, repeated blocks folded; or two ONNX files, float and quantized."""
    import qpass

    if other is not None:
        _show(_extension("qpass.diffs", "onnx")(model, other), as_json)
        return
    _show(qpass.diff(_quantized(model, recipe)), as_json)


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Text; documents apart by lines of <|endoftext|>")],
    recipe: RecipeOption = "int8",
    window: Annotated[int, typer.Option(help="Tokens taken of each document")] = 1024,
    windows: Annotated[int, typer.Option(help="Documents taken")] = 8,
    as_json: Json = False,
) -> None:
    """KL, perplexity and top-1 agreement of the quantized model with the float one."""
    import torch

    import qpass

    if not data.is_file():
        raise QpassError(f"{data}: no such file")
    reference, tokenizer = _load(model)
    documents = [d for d in data.read_text().split("<|endoftext|>") if d.strip()]
    rows = [tokenizer(d.lstrip("\n"), add_special_tokens=False).input_ids[:window] for d in documents[:windows]]
    batches = [torch.tensor([row]) for row in rows if len(row) > 1]
    _show(qpass.evaluate(qpass.quantize(_load(model)[0], recipe, inner="eager"), reference, batches), as_json)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a transformers model in float")],
    target: Annotated[Path, typer.Argument(help="Folder of the artifact; one that is there is replaced")],
    recipe: RecipeOption = "int8",
    calibration: Annotated[Path | None, typer.Option(help="Text; documents apart by lines of <|endoftext|>")] = None,
    like: Annotated[Path | None, typer.Option(help="An artifact whose formats are taken instead of a recipe")] = None,
) -> None:
    """Quantize a checkpoint into an artifact, in little memory. The same call after an interruption goes on."""
    import qpass

    found = qpass.quantize_checkpoint(source, target, recipe, calibration=calibration, like=like)
    typer.echo(f"{target}: {sum(f.stat().st_size for f in target.iterdir()):,} bytes, {found}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Folder that qpass wrote; for onnx also a transformers model")],
    folder: Annotated[Path, typer.Argument(help="Folder of the export")],
    to: Annotated[
        str, typer.Option("--format", help="onnx; or compressed-tensors, for vLLM and transformers")
    ] = "compressed-tensors",
    target: Annotated[str | None, typer.Option(help="onnx: ort-cpu, ort-cuda or tensorrt")] = None,
    recipe: Annotated[str | None, typer.Option(help="onnx: what a float model is quantized by")] = None,
    check: Annotated[bool, typer.Option("--verify", help="onnx: run it, and compare with the torch graph")] = False,
    as_json: Json = False,
) -> None:
    """Write a model for another engine, and say what that cannot take."""
    import qpass

    if to == "compressed-tensors":
        if target or recipe or check:
            raise QpassError("--target, --recipe and --verify are of --format onnx")
        typer.echo(str(qpass.export_compressed_tensors(qpass.load(source, inner="eager"), folder)))
        return
    _show(_extension("qpass.exporters", to)(source, folder, target, recipe, check), as_json)


@app.command()
def verify(artifact: Annotated[Path, typer.Argument(help="Folder that qpass wrote")]) -> None:
    """Read every byte of an artifact and compare it with what was written."""
    import qpass

    typer.echo(f"{artifact}: whole, {qpass.verify(artifact)}")


def main() -> None:
    """The entry point: errors in one line on stderr, exit status 2."""
    try:
        app()
    except QpassError as error:
        typer.echo(f"qpass: {error}", err=True)
        raise SystemExit(2) from None

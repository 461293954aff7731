"""Commands that look: at what a model would take, at recipes and machines, at sites and graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qpass.cli.base import Dtype, Json, Page, RecipeOption, Source, app, check_dtype, check_page, deliver, show
from qpass.cli.extensions import extension
from qpass.errors import Breach, QpassError
from qpass.recipe import WEIGHT_KINDS, Recipe
from qpass.spec import QuantSpec, parse_spec


@dataclass(frozen=True)
class Recipes:
    """Recipes by name, as a table of sites."""

    rows: dict[str, Recipe]

    def to_json(self) -> dict[str, Any]:
        """Name -> what `Recipe.from_yaml` reads."""
        return {name: recipe.to_dict() for name, recipe in self.rows.items()}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("preset", box=None)
        for kind in (*WEIGHT_KINDS, "kv", "bits given out"):
            table.add_column(kind, overflow="fold")
        for name, recipe in self.rows.items():
            cells = (
                _held(getattr(recipe, kind), recipe.bits is not None and kind != "k") for kind in (*WEIGHT_KINDS, "k")
            )
            table.add_row(name, *cells, "" if recipe.bits is None else f"{recipe.bits} on average")
        return table


def _held(spec: QuantSpec | None, given_out: bool) -> str:
    """A format with its bits; of a weight that bits are given out to, those that it may become."""
    from qpass.bits import LADDER

    if spec is None:
        return "float"
    if given_out and spec.format.kind == "uniform":
        first, last = (parse_spec(LADDER[i]) for i in (0, -1))
        return ":".join([f"{first.format.name} .. {last.format.name}:{last.granularity}", *spec.algorithms])
    return f"{spec} ({spec.effective_bits(4096):.2f})"


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="config.json, folder of a model, or a size: 8b, 70b, 70b-gqa")],
    recipe: Annotated[str, typer.Option(help="Preset, spec or YAML file, perhaps with changes: int4+kv=int8")] = "int8",
    context: Annotated[int, typer.Option(help="Tokens that the KV cache has room for", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences", min=1)] = 1,
    kv: Annotated[str | None, typer.Option(help="Format of the KV cache, if the recipe gives none")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Say whether it fits: 80GB, 24GiB")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Devices of the decode floor, by name; all that are known")
    ] = None,
    dtype: Dtype = "auto",
    calibrated: Annotated[bool, typer.Option("--calibrated", help="What the preset is with calibration data")] = False,
    as_json: Json = False,
) -> None:
    """Bytes of every kind of site, whether it fits, what a smaller format saves, how fast a step can be. Nothing is loaded."""
    import torch

    from qpass.planning.memory import Planner
    from qpass.planning.outlook import named_devices, outlook, parse_bytes
    from qpass.progress import working

    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    devices = named_devices(device or ())
    check_dtype(dtype)
    floats = None if dtype == "auto" else getattr(torch, dtype)
    with working("tracing the model without weights"):
        found = outlook(Planner(model, context, batch, floats), recipe, kv, memory, devices, calibrated)
    show(found, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers, what qpass uses of it, and why."""
    import qpass

    show(qpass.doctor(), as_json)


@app.command()
def recipes(as_json: Json = False) -> None:
    """Each preset, and what it is with calibration data: formats of the sites, stored bits per element in rows of 4096."""
    from qpass.recipe import CALIBRATED, PRESETS

    show(Recipes(PRESETS | {f"{name}, with data": recipe for name, recipe in CALIBRATED.items()}), as_json)


@app.command()
def report(
    model: Source, recipe: RecipeOption = None, dtype: Dtype = "auto", output: Page = None, as_json: Json = False
) -> None:
    """Every site of a model: format, bytes, SQNR, ranges seen in calibration, or why it stays in float."""
    import qpass

    check_page(output)
    check_dtype(dtype)
    found = qpass.report(_captured(model, recipe, dtype))
    deliver(found, output, as_json)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a model or an artifact, or an ONNX file")],
    b: Annotated[Path | None, typer.Argument(metavar="[B]", help="Another, that A is compared with")] = None,
    recipe: RecipeOption = None,
    dtype: Dtype = "auto",
    output: Page = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if they differ, 0 if not, as git does")
    ] = False,
    as_json: Json = False,
) -> None:
    """Graphs side by side: of A before and after quantizing, of two models or artifacts, or of two ONNX files.

    A alone, or a float model A with --recipe: before and after. A and B: what B computes against what A does.
    """
    import qpass

    check_page(output)
    check_dtype(dtype)
    if b is None:
        found = qpass.diff(_captured(a, recipe, dtype))
    elif a.suffix == ".onnx" or b.suffix == ".onnx":
        if recipe is not None:
            raise QpassError("--recipe is of models, not of ONNX files")
        if a.suffix != b.suffix:
            raise QpassError(f"{a} and {b}: an ONNX file is compared with another one")
        found = extension("qpass.diffs", "onnx")(a, b)
    else:
        found = qpass.diff(*(_side(side, recipe, dtype) for side in (a, b)))
    deliver(found, output, as_json)
    if exit_code and not found.same:
        raise Breach(f"{a} and {b or recipe or 'int8'}: the graphs differ")


def _captured(source: Path, recipe: str | None, dtype: str) -> Any:
    """The model quantized, after a call: reports and diffs are of graphs that were really captured."""
    from qpass.folders import load_quantized
    from qpass.progress import working

    model = load_quantized(source, recipe, dtype=dtype)
    with working("capturing the graph"):
        model(**model.dummy_inputs)
    return model


def _side(source: Path, recipe: str | None, dtype: str) -> Any:
    """An artifact, or a float model; quantized if there is a recipe."""
    from qpass.folders import is_artifact, load_float

    if is_artifact(source):
        return _captured(source, None, "auto")
    return load_float(source, dtype) if recipe is None else _captured(source, recipe, dtype)

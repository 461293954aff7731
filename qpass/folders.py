"""Models and artifacts on disk, as the command line is given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpass.algorithms.rounding import needs_data
from qpass.api import quantize
from qpass.artifact.load import load
from qpass.artifact.manifest import NAME
from qpass.errors import QpassError
from qpass.pretrained import check_config, load_pretrained
from qpass.progress import working
from qpass.recipe import Recipe, resolve_recipe


def is_artifact(folder: Path) -> bool:
    """Whether qpass wrote it."""
    return (folder / NAME).is_file()


def check_model(folder: Path) -> None:
    """Raises `QpassError` for what is no folder of a transformers model in float."""
    check_config(folder)
    if is_artifact(folder):
        raise QpassError(f"{folder}: an artifact of qpass; give the folder of its float model")


def load_float(folder: Path, dtype: str = "auto") -> Any:
    """The model of a folder; see `load_pretrained`. Raises `QpassError` for an artifact."""
    check_model(folder)
    return load_pretrained(folder, dtype)


def load_quantized(
    source: Path,
    recipe: str | Path | Recipe | None,
    *,
    calibration: Path | None = None,
    dtype: str = "auto",
    inner: str = "eager",
) -> Any:
    """An artifact as it is, or a float model quantized by `recipe` (int8 if there is none).

    Raises `QpassError` for a recipe, data or a dtype beside an artifact, which has its own.
    """
    if not is_artifact(source):
        chosen = resolve_recipe(recipe or "int8", calibration is not None)
        check_data(chosen, recipe or "int8", calibration is not None)
        return quantize(load_float(source, dtype), chosen, calibration=calibration, inner=inner)
    if recipe is not None or calibration is not None or dtype != "auto":
        raise QpassError(f"{source}: an artifact has its recipe already; leave recipe, calibration and dtype out")
    with working(f"loading {source}"):
        return load(source, inner=inner)


def check_data(recipe: Recipe, name: object, calibrated: bool) -> None:
    """Raises `QpassError` for a recipe that chooses by data where there are none."""
    if not calibrated and any(needs_data(spec) for spec in recipe.weight_specs):
        raise QpassError(f"recipe {name}: it chooses by data: give --calibration, a text")


def recipe_for(source: Path, recipe: str | Path | Recipe | None, calibrated: bool = False) -> Recipe:
    """What `load_quantized` quantizes by."""
    from qpass.artifact.manifest import read_manifest

    return resolve_recipe(read_manifest(source).recipe if is_artifact(source) else recipe or "int8", calibrated)

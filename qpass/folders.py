"""Models and artifacts on disk, as the command line is given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpass.api import quantize
from qpass.artifact.load import load
from qpass.artifact.manifest import NAME
from qpass.errors import QpassError
from qpass.progress import working
from qpass.recipe import Recipe, resolve_recipe


def is_artifact(folder: Path) -> bool:
    """Whether qpass wrote it."""
    return (folder / NAME).is_file()


def check_model(folder: Path) -> None:
    """Raises `QpassError` for what is no folder of a transformers model in float."""
    if not (folder / "config.json").is_file():
        raise QpassError(f"{folder}: no transformers model there (config.json is missing)")
    if is_artifact(folder):
        raise QpassError(f"{folder}: an artifact of qpass; give the folder of its float model")


def load_float(folder: Path, dtype: str = "float32") -> Any:
    """The causal model of a folder. Raises `QpassError` if the folder holds none, or transformers is missing."""
    check_model(folder)
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise QpassError("transformers is not installed: pip install 'qpass-torch[hf]'") from None
    logging.disable_progress_bar()
    try:
        with working(f"loading {folder}"):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise QpassError(f"{folder}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def load_tokenizer(folder: Path) -> Any:
    """Raises `QpassError` if the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise QpassError(f"{folder}: no tokenizer there: {str(error).splitlines()[0]}") from None


def load_quantized(
    source: Path,
    recipe: str | Path | Recipe | None,
    *,
    calibration: Path | None = None,
    strict: bool = False,
    inner: str = "eager",
) -> Any:
    """An artifact as it is, or a float model quantized by `recipe` (int8 if there is none).

    Raises `QpassError` for a recipe or data beside an artifact, which has its own.
    """
    if not is_artifact(source):
        return quantize(load_float(source), recipe or "int8", calibration=calibration, strict=strict, inner=inner)
    if recipe is not None or calibration is not None:
        raise QpassError(f"{source}: an artifact has its recipe already; leave recipe and calibration out")
    return load(source, inner=inner)


def recipe_of(source: Path, recipe: str | Path | Recipe | None, calibrated: bool = False) -> Recipe:
    """What `load_quantized` quantizes by."""
    from qpass.artifact.manifest import read_manifest

    return resolve_recipe(read_manifest(source).recipe if is_artifact(source) else recipe or "int8", calibrated)

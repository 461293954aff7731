"""Commands that write: artifacts, exports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qpass.cli.base import Calibration, Json, Model, RecipeOption, app, show
from qpass.cli.extensions import extension
from qpass.errors import QpassError


@dataclass(frozen=True)
class Written:
    """A folder that was written, or found whole. `hash`: of all that is in it."""

    folder: str
    bytes: int
    hash: str

    @classmethod
    def at(cls, folder: Path, hash: str) -> Written:
        """What lies in a folder."""
        return cls(str(folder), sum(f.stat().st_size for f in folder.iterdir() if f.is_file()), hash)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.folder}: {self.bytes:,} bytes, {self.hash}"


@app.command()
def quantize(
    source: Model,
    target: Annotated[Path, typer.Argument(help="Folder of the artifact; one that is there is replaced")],
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    like: Annotated[Path | None, typer.Option(help="An artifact whose formats are taken instead of a recipe")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A site that stays in float against the recipe is an error")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take: memory, disk, minutes")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into an artifact, in little memory. The same call after an interruption goes on."""
    import qpass

    if like is not None and recipe is not None:
        raise QpassError("--like takes the formats of an artifact: leave --recipe out")
    if dry_run:
        from qpass.planning.dry_run import estimate

        show(estimate(source, target, recipe or "int8", calibration=calibration, like=like), as_json)
        return
    found = qpass.quantize_checkpoint(
        source, target, recipe or "int8", calibration=calibration, like=like, strict=strict
    )
    show(Written.at(target, found), as_json)


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
    kv: Annotated[
        str | None,
        typer.Option(help="compressed-tensors: fp8_e4m3:static or int8:static, scales for the engine's cache"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="compressed-tensors: text that these scales are from")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for another engine, and say what that cannot take."""
    import qpass
    from qpass.folders import is_artifact

    if to == "compressed-tensors":
        if target or recipe or check:
            raise QpassError("--target, --recipe and --verify are of --format onnx")
        if not is_artifact(source):
            raise QpassError(f"{source}: no artifact of qpass; quantize the model first: qpass quantize {source} OUT")
        model = qpass.load(source, inner="eager")
        show(qpass.export_compressed_tensors(model, folder, _calibrated_cache(model, kv, calibration)), as_json)
        return
    if kv is not None or calibration is not None:
        raise QpassError("--kv and --calibration are of --format compressed-tensors")
    show(extension("qpass.exporters", to)(source, folder, target, recipe, check), as_json)


def _calibrated_cache(model: Any, kv: str | None, calibration: Path | None) -> Any:
    from qpass.cache import KVCache
    from qpass.calibration import WINDOW, batches_of

    if (kv is None) != (calibration is None):
        raise QpassError("--kv and --calibration go together: scales of the engine's cache are from that text")
    if kv is None or calibration is None:
        return None
    return KVCache(model.config, WINDOW, kv).calibrate(model, batches_of(calibration, model))


@app.command()
def verify(artifact: Annotated[Path, typer.Argument(help="Folder that qpass wrote")], as_json: Json = False) -> None:
    """Read every byte of an artifact and compare it with what was written."""
    import qpass

    show(Written.at(artifact, qpass.verify(artifact)), as_json)

"""qpass.quantize_checkpoint: from a folder of float weights to an artifact, in little memory; a killed run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qpass.api import quantize_module
from qpass.artifact.manifest import read_manifest, sha256_of, sync
from qpass.artifact.save import absolute, check_target, save
from qpass.backend import QPass
from qpass.calibration import Data, batches_of
from qpass.errors import QpassError
from qpass.memory import give_back_large_blocks
from qpass.observers import Observed
from qpass.packing import as_bytes
from qpass.pretrained import load_pretrained
from qpass.qtensor import Outcome
from qpass.quantized import PART_NAMES, Quantized
from qpass.recipe import WEIGHT_KINDS, Recipe
from qpass.sites.group import WeightGroup
from qpass.store import Kept, Made

_KEY, _BITS = "key.json", "bits.json"


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Recipe | Mapping[str, Any] = "int8",
    *,
    calibration: Data | None = None,
    like: str | Path | None = None,
    strict: bool = False,
) -> str:
    """Quantize the transformers model in folder `source` into the artifact `target`; returns its hash.

    Weights are mapped from the safetensors files and read as they are quantized, so memory holds the quantized model and the
    largest group of float weights, and with `calibration` what its calls need. `like`: an artifact of the same architecture,
    whose format for every weight is taken, bits that were given out among them, instead of `recipe`. What is made lies in
    "<target>.unfinished" until the end: the same call after a kill goes on from there, to the same hash. Raises `QpassError` if
    that folder belongs to another recipe, source or other calibration data, and for what `quantize` and `save` refuse.
    """
    source, target = absolute(source), absolute(target)
    check_target(target)
    give_back_large_blocks()
    model = load_pretrained(source)
    backend = QPass(recipe if like is None else recipe_of(like), strict=strict, inner="eager")
    batches = None if calibration is None else [_plain(batch) for batch in batches_of(calibration, model)]
    data = None if batches is None else hash_of_data(batches)
    if batches is not None:
        backend.use_data()
    unfinished = Unfinished(target.with_name(f"{target.name}.unfinished"))
    try:
        unfinished.begin(
            {
                "source": identity_of(source),
                "recipe": json.dumps(backend.recipe.to_dict(), sort_keys=True),
                "calibration": data,
                "versions": f"qpass {version('qpass-torch')}, torch {torch.__version__}",
            }
        )
        quantize_module(model, backend, calibration=batches, kept=unfinished)
        done = save(model, target, calibration=data)
        shutil.rmtree(unfinished.folder)  # with the lock held: nobody else begins in it
    finally:
        unfinished.leave()
    return done


def recipe_of(folder: str | Path) -> Recipe:
    """The recipe that gives every weight the format that it has in an artifact."""
    manifest = read_manifest(Path(folder))
    content = {name: value for name, value in manifest.recipe.items() if name != "bits"}
    tied, overrides = set(manifest.aliases.values()), {}
    for name, entry in manifest.weights.items():
        if name in tied:  # by its kinds: which of its names a graph has for it is not known here
            content |= dict.fromkeys({entry.kind, *entry.roles} & {*WEIGHT_KINDS}, entry.spec)
        else:
            overrides[name] = entry.spec
    return Recipe(**{**content, "overrides": overrides | content.get("overrides", {})})


class Unfinished(Kept):
    """The weights that were made so far, each group in a file of its own, and what they were made for."""

    goes_on = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[str] | None = None

    def begin(self, key: Mapping[str, str | None]) -> None:
        """Raises `QpassError` if what is there was made for something else."""
        path = self.folder / _KEY
        if self.folder.is_dir() and any(self.folder.iterdir()) and not path.is_file():
            raise QpassError(f"{self.folder}: holds something else than an unfinished artifact; move it away")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise QpassError(
                f"{self.folder}: another process is at work on it; wait for it, or give another target"
            ) from None
        self._lock = lock
        before: Any = None
        if self._made_something():
            try:
                before = json.loads(path.read_text())
            except ValueError:
                raise QpassError(f"{path}: damaged; delete the folder to begin anew") from None
        if not isinstance(before, dict):
            self._write(_KEY, json.dumps(key).encode())
            return
        for name, value in key.items():
            if before.get(name) != value:
                raise QpassError(
                    f"{self.folder}: was begun with another {name}; give the same as then to go on, or delete the folder"
                )

    def leave(self) -> None:
        """Let others work on it; a folder in which nothing was made goes."""
        if self._lock is not None:
            if not self._made_something():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def _made_something(self) -> bool:
        return any(self.folder.glob("*.safetensors")) or (self.folder / _BITS).is_file()

    def bits(self) -> dict[str, str] | None:
        path = self.folder / _BITS
        return json.loads(path.read_text()) if path.is_file() else None

    def keep_bits(self, specs: dict[str, str]) -> None:
        self._write(_BITS, json.dumps(specs).encode())

    def has(self, group: WeightGroup) -> bool:
        return self._content(group) is not None

    def get(self, group: WeightGroup) -> list[Made] | None:
        from safetensors.torch import load

        content = self._content(group)
        if content is None:
            return None
        made = []
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for i, outcome in enumerate(json.loads(header["__metadata__"]["outcomes"])):
            parts = [tensors.get(f"{i}.{p}") for p in PART_NAMES]
            types = group.spec.stored_parts
            typed = [p if p is None or j not in types else p.view(types[j]) for j, p in enumerate(parts)]
            seen = None if outcome["observed"] is None else Observed(**outcome["observed"])
            decibels = math.inf if outcome["sqnr_db"] is None else outcome["sqnr_db"]
            made.append(Made(Quantized(*typed), Outcome(decibels, outcome["seconds"], seen)))
        return made

    def put(self, group: WeightGroup, made: Sequence[Made]) -> None:
        from safetensors.torch import save

        tensors = {
            f"{i}.{part}": as_bytes(tensor).contiguous().clone()
            for i, one in enumerate(made)
            for part, tensor in zip(PART_NAMES, one.quantized.all_parts, strict=True)
            if tensor is not None
        }
        outcomes = [asdict(one.outcome) for one in made]
        for outcome in outcomes:
            outcome["sqnr_db"] = outcome["sqnr_db"] if math.isfinite(outcome["sqnr_db"]) else None
        content = save(tensors, {"outcomes": json.dumps(outcomes)})
        self._write(f"{self._name(group)}-{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def _name(self, group: WeightGroup) -> str:
        return hashlib.sha256(json.dumps([str(group.spec), *group.names]).encode()).hexdigest()[:32]

    def _content(self, group: WeightGroup) -> bytes | None:
        """What is kept of a group, if it is what was written; otherwise it is made again."""
        for path in self.folder.glob(f"{self._name(group)}-*.safetensors"):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem.partition("-")[2]:
                return content
            path.unlink()
        return None

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        new = self.folder / f"{name}.new"
        new.write_bytes(content)
        sync(new)
        os.replace(new, self.folder / name)


def hash_of_data(batches: Sequence[Any]) -> str:
    """SHA-256 of calibration batches: of their tensors and the names of arguments."""
    digest = hashlib.sha256()
    for batch in batches:
        items = sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]
        for name, value in items:
            text = (
                f"{value.dtype} {list(value.shape)} {sha256_of(value.cpu())}"
                if isinstance(value, Tensor)
                else repr(value)
            )
            digest.update(f"{name} {text}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def identity_of(source: Path) -> str:
    """Changes when the checkpoint does: names, sizes and times of its files, their headers, its config."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for path in sorted((*source.glob("*.safetensors"), *source.glob("*.bin"))):
        known = path.stat()
        with path.open("rb") as file:
            head = file.read(8)
            header = file.read(min(int.from_bytes(head, "little"), 1 << 26)) if path.suffix == ".safetensors" else b""
        digest.update(f"{path.name} {known.st_size} {known.st_mtime_ns}\n".encode() + header)
    return digest.hexdigest()

"""qpass.json: what an artifact holds, with the SHA-256 of all of it. What is read here is not trusted."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from qpass.errors import QpassError

NAME = "qpass.json"
#: What config.json names as the quantization method.
METHOD = "qpass"
#: The version of the format of artifacts that is written; all up to it are read. 2 has a hash of the versions too.
VERSION = 2
#: A manifest of a model of thousands of tensors is a few megabytes.
_LARGEST = 1 << 28
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\Z")
_SHA = re.compile(r"[0-9a-f]{64}\Z")


class QpassFormatError(QpassError):
    """An artifact that is damaged, or is none."""


@dataclass(frozen=True)
class WeightEntry:
    """A quantized Parameter. Its parts are the tensors "<name>.<part>"; `input`: what calibration saw, of `Observed`."""

    spec: str
    shape: list[int]
    dtype: str
    transposed: bool
    kind: str
    roles: list[str]
    sqnr_db: float | None
    input: dict[str, Any] | None = None


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as it lies in `file`; `sha256` of its bytes."""

    file: str
    dtype: str
    shape: list[int]
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """`head`: bytes that `sha256` is of, from the start: all of a file, or the header of one whose tensors have their own."""

    size: int
    head: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of an artifact. `aliases`: further names of a tied Parameter -> its first. `groups`: weights that one operator reads,
    as the rows of one buffer. `calibration`: SHA-256 of the data.

    `versions` are for people, and do not enter the hash.
    """

    recipe: dict[str, Any]
    weights: dict[str, WeightEntry]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    aliases: dict[str, str]
    groups: list[list[str]]
    calibration: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of everything but the versions: equal for equal models, recipes and data."""
        content = asdict(self)
        del content["versions"]
        return hashlib.sha256(_canonical(content).encode()).hexdigest()

    def text(self, version: int = VERSION) -> str:
        """What qpass.json holds, to the byte, in a version of the format."""
        hashes = {"hash": self.hash}
        if version > 1:
            hashes["versions_hash"] = hashlib.sha256(_canonical(self.versions).encode()).hexdigest()
        return _canonical({"qpass_artifact": version, **hashes, **asdict(self)}) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Raises `QpassFormatError` for a folder without manifest, and for one that was changed by a single byte."""
    path = folder / NAME
    if not path.is_file():
        raise QpassFormatError(f"{folder}: no qpass artifact there ({NAME} is missing)")
    check_file(folder, NAME)
    if path.stat().st_size > _LARGEST:
        raise QpassFormatError(f"{path}: {path.stat().st_size:,} bytes are too many for a manifest")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        version = content.get("qpass_artifact")
        if not isinstance(version, int) or version < 1:
            raise ValueError("it names no version of the format")
        if version > VERSION:
            raise QpassFormatError(
                f"{path}: format {version}, written by a newer qpass; this one reads up to {VERSION}"
            )
        given = {f.name: content[f.name] for f in fields(Manifest)}
        for name, kind in (("weights", WeightEntry), ("tensors", TensorEntry), ("files", FileEntry)):
            given[name] = {key: _made(kind, value) for key, value in given[name].items()}
        manifest: Manifest = _made(Manifest, given)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QpassFormatError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    if manifest.text(version).encode() != raw:
        raise QpassFormatError(f"{path}: damaged: its hash is not that of its content; copy the artifact again")
    for name in manifest.files:
        check_file(folder, name)
    for entry in manifest.tensors.values():
        if entry.file not in manifest.files or not _SHA.match(entry.sha256):
            raise QpassFormatError(f"{path}: damaged: a tensor in {entry.file!r}, which is none of its files")
    return manifest


def check_file(folder: Path, name: str) -> None:
    """Raises `QpassFormatError` for a name that leads out of the folder, a link, and what is no plain file."""
    path = folder / name
    if not _FILE.match(name):
        raise QpassFormatError(f"{folder}: {name!r} is no name of a file in it; refused")
    if path.is_symlink() or (path.exists() and (not path.is_file() or path.stat().st_nlink > 1)):
        raise QpassFormatError(f"{path}: a link, or no plain file; refused")
    if not path.exists():
        raise QpassFormatError(f"{path}: missing; copy the artifact again")


def check_head(folder: Path, name: str, entry: FileEntry) -> None:
    """Raises `QpassFormatError` if a file's size or its head is not what the manifest says."""
    path = folder / name
    if path.stat().st_size != entry.size:
        raise QpassFormatError(f"{path}: {path.stat().st_size:,} bytes, not {entry.size:,}; copy the artifact again")
    if not 0 <= entry.head <= min(entry.size, _LARGEST):
        raise QpassFormatError(f"{path}: a header of {entry.head:,} bytes; refused")
    with path.open("rb") as file:
        if hashlib.sha256(file.read(entry.head)).hexdigest() != entry.sha256:
            raise QpassFormatError(f"{path}: damaged: not the bytes that were written; copy the artifact again")


def head_of(path: Path, tensors: bool) -> FileEntry:
    """The entry of a file; `tensors`: a safetensors file, whose head is its header: 8 bytes of length and JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = 8 + int.from_bytes(file.read(8), "little") if tensors else size
        file.seek(0)
        return FileEntry(size, head, hashlib.sha256(file.read(head)).hexdigest())


def sha256_of(tensor: Tensor) -> str:
    """Of the bytes of a tensor, row by row."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor, row by row; a view where it lies so on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sync(path: Path) -> None:
    """Have a file, or the entries of a folder, on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True)


def _made(kind: type, content: Mapping[str, Any]) -> Any:
    """A dataclass of JSON, each field of the type that it says."""
    hints = get_type_hints(kind)
    if not isinstance(content, dict) or content.keys() != hints.keys():
        raise TypeError(f"{kind.__name__} with fields {sorted(content)}")
    for name, value in content.items():
        if not _is(value, hints[name]):
            raise TypeError(f"{kind.__name__}.{name} is {value!r:.60}")
    return kind(**content)


def _is(value: Any, hint: Any) -> bool:
    arguments: tuple[Any, ...] = getattr(hint, "__args__", ())
    origin = getattr(hint, "__origin__", None)
    if origin is list:
        return isinstance(value, list) and all(_is(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and _is(v, arguments[1]) for k, v in value.items())
    if hint is Any:
        return True
    if arguments:  # a union
        return any(_is(value, one) for one in arguments)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)

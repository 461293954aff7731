"""The tensors of an artifact, each checked as it is read, in the memory where it will be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from qpass.artifact.manifest import FileEntry, Manifest, QpassFormatError, TensorEntry, bytes_of, check_head, sha256_of
from qpass.artifact.save import DTYPES
from qpass.errors import QpassError
from qpass.memory import for_huge_pages
from qpass.progress import track
from qpass.quantized import PART_NAMES


@contextmanager
def damaged(what: object) -> Iterator[None]:
    """Content that is well formed and means nothing raises many things in many libraries."""
    try:
        yield
    except QpassError:
        raise
    except Exception as error:
        raise QpassFormatError(f"{what}: {type(error).__name__}: {error}") from None


def rows_of_groups(manifest: Manifest) -> dict[str, Tensor]:
    """Memory for the parts of weights that one operator reads, behind each other as it wants them."""
    room: dict[str, Tensor] = {}
    for names in manifest.groups:
        for part in PART_NAMES[:4]:
            keys = [f"{name}.{part}" for name in names]
            entries = [manifest.tensors[key] for key in keys if key in manifest.tensors]
            alike = len({(entry.dtype, *entry.shape[1:]) for entry in entries}) == 1 and all(e.shape for e in entries)
            if alike and len(entries) == len(names):
                whole = _empty([sum(entry.shape[0] for entry in entries), *entries[0].shape[1:]], entries[0].dtype)
                room |= zip(keys, whole.split([entry.shape[0] for entry in entries]), strict=True)
    return room


def _empty(shape: list[int], dtype: str) -> Tensor:
    return for_huge_pages(torch.empty(shape, dtype=getattr(torch, dtype), device="cpu"))


def tensors_of(
    folder: Path, manifest: Manifest, room: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, its bytes checked: in the memory that `room` has for it, or in its own."""
    for name, file in manifest.files.items():
        check_head(folder, name, file)
    by_file: dict[str, list[str]] = {}
    for name, entry in manifest.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    for file_name in track(sorted(by_file), "qpass: reading"):
        path, names = folder / file_name, by_file[file_name]
        with path.open("rb", buffering=0) as stream:
            with damaged(path):
                starts = _starts(stream, manifest.files[file_name], {name: manifest.tensors[name] for name in names})
            for name, start in starts.items():
                tensor = _read(stream, start, manifest.tensors[name], room.get(name))
                if tensor is None:
                    raise QpassFormatError(f"{path}: {name} is damaged; copy the artifact again")
                yield name, tensor


def _starts(stream: FileIO, file: FileEntry, entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Where each tensor begins in a safetensors file, in this order. They lie behind each other, from the header to the end.

    Raises `QpassFormatError` for a header that says something else than `entries`.
    """
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    at, starts = file.head, {}
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        entry = entries.get(name)
        if entry is None:
            raise QpassFormatError(f"{name}, which the manifest does not know")
        size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        said = {"dtype": DTYPES[getattr(torch, entry.dtype)], "shape": entry.shape}
        said["data_offsets"] = [at - file.head, at - file.head + size]
        if header[name] != said or size < 0:
            raise QpassFormatError(f"{name} is {header[name]}, not {said}")
        starts[name], at = at, at + size
    if 8 + length != file.head or starts.keys() != entries.keys() or at != file.size:
        raise QpassFormatError("it holds other tensors than the manifest says")
    return starts


def _read(stream: FileIO, start: int, entry: TensorEntry, tensor: Tensor | None) -> Tensor | None:
    """A tensor as the manifest has it; None if other bytes lie there. It is read, not mapped: a new mapping is read in small
    pieces, and what was checked could change before it is used."""
    tensor = _empty(entry.shape, entry.dtype) if tensor is None else tensor
    stream.seek(start)
    rest = bytes_of(tensor)
    while rest:
        count = stream.readinto(rest)
        if not count:
            return None
        rest = rest[count:]
    return tensor if sha256_of(tensor) == entry.sha256 else None

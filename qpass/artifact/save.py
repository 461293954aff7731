"""qpass.save: a quantized model into a folder, which is the old one or the new one at every moment."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.artifact.manifest import (
    METHOD,
    NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    WeightEntry,
    bytes_of,
    head_of,
    read_manifest,
    sync,
)
from qpass.errors import QpassError
from qpass.finish import RECIPE
from qpass.graph.torch_private import original_module
from qpass.packing import as_bytes
from qpass.qstate import QState
from qpass.qtensor import QTensor
from qpass.quantized import PART_NAMES
from qpass.registry import captured

#: Bytes of one file of tensors.
SHARD_BYTES = 4 << 30
#: What tokenizers and processors of transformers are made of; links and files above these bytes stay behind.
_CARRIED = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|preprocessor|processor|video_preprocessor|normalizer|"
    r"spiece|sentencepiece|source|target).*\.(json|txt|model|spm|tiktoken|jinja|bpe)|.*\.(tiktoken|spm|model|vocab|bpe)|licen[sc]e.*",
    re.IGNORECASE,
)
_LARGEST_CARRIED = 1 << 27
#: Buffers that a module computes itself are stored up to these bytes: they may have been computed, or moved to a type, otherwise.
_LARGEST_COMPUTED = 1 << 24
_RENAME_EXCHANGE = 2  # linux/fs.h
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def save(
    model: nn.Module, folder: str | Path, *, calibration: str | None = None, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write a model that `qpass.quantize` made: codes, scales, what is left in float, config and tokenizer. Returns its hash.

    `calibration`: SHA-256 of the data that it was calibrated on, for the record. An artifact that is there is replaced in one
    step; a folder with anything else is refused. Raises `QpassError` for a model that is not quantized, or keeps a quantized
    cache of its own.
    """
    folder, model = absolute(folder), original_module(model)
    check_target(folder)
    names, aliases = _names(model)
    if not any(isinstance(value, QTensor) for value in names.values()):
        raise QpassError("qpass.save: no weight is quantized: model = qpass.quantize(model, recipe) first")
    decisions = captured(model, "qpass.save").decisions
    weights: dict[str, WeightEntry] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in names.items():
        if not isinstance(value, QTensor):
            tensors[name] = value.detach()
            continue
        for part, tensor in zip(PART_NAMES, value.quantized.all_parts, strict=True):
            if tensor is not None:
                tensors[f"{name}.{part}"] = as_bytes(tensor.detach())
        decision, outcome = decisions.of(value), value.outcome
        weights[name] = WeightEntry(
            str(value.spec), list(value.shape), str(value.dtype).removeprefix("torch."), value.transposed,
            "linear" if decision is None else decision.site.kind, [] if decision is None else list(decision.site.roles),
            outcome.sqnr_db if math.isfinite(outcome.sqnr_db) else None,
            None if outcome.observed is None else asdict(outcome.observed),
        )  # fmt: skip
    recipe = (getattr(model, RECIPE, None) or captured(model, "qpass.save").recipe).to_dict()
    with replacing(folder, lambda name: name == NAME or name.startswith("qpass-")) as staging:
        entries = _write_tensors(tensors, staging, shard_bytes)
        carry(model, staging, {"quantization_config": {"quant_method": METHOD}})
        files: dict[str, FileEntry] = {}
        for path in sorted(staging.iterdir()):
            if path.suffix == ".safetensors" or path.name == "config.json":  # the others their own tools write again
                files[path.name] = head_of(path, path.suffix == ".safetensors")
            sync(path)
        manifest = Manifest(recipe, weights, entries, files, aliases, _groups(names), calibration, _versions())
        (staging / NAME).write_text(manifest.text())
        sync(staging / NAME)
        sync(staging)
    return manifest.hash


def _names(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored by its first name: Parameters and buffers, but for large ones that the module computes; further names."""
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True).keys()
    kept = {
        n: b
        for n, b in buffers.items()
        if n in persistent or (b.nbytes <= _LARGEST_COMPUTED and b.dtype in DTYPES)  # others the class computes
    }
    for name, value in sorted({**places, **kept}.items()):
        if isinstance(value, QState):
            raise QpassError(
                f"qpass.save: {name} is a quantized cache that the module keeps; save the model before it is used"
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            found[name] = value
    return found, aliases


def _groups(names: Mapping[str, Tensor]) -> list[list[str]]:
    """Weights that are row ranges of one buffer, in the order of rows."""
    found: dict[int, list[tuple[int, str]]] = {}
    for name, value in names.items():
        if isinstance(value, QTensor) and value.base is not None:
            found.setdefault(id(value.base), []).append((value.quantized.data.data_ptr(), name))
    return sorted([name for _, name in sorted(members)] for members in found.values() if len(members) > 1)


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> dict[str, TensorEntry]:
    """Into files of `shard_bytes` at most, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    entries = {}
    for i, names in enumerate(shards):
        file = f"qpass-{i + 1:05}.safetensors"
        hashes = write_safetensors({name: tensors[name] for name in names}, folder / file)
        for name in names:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            entries[name] = TensorEntry(file, dtype, list(tensors[name].shape), hashes[name])
    return entries


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Tensors one by one, with no copy of them all (safetensors.torch.save_file wants one of what shares memory); -> SHA-256 of
    each."""
    return stream_safetensors(tensors, tensors.__getitem__, path, metadata)


def stream_safetensors(
    described: Mapping[str, Tensor],
    tensor_of: Callable[[str], Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`write_safetensors` of tensors that are made when their turn comes; `described`: type and shape of each, on any device.

    The format: length of the header, 8 bytes; the header, JSON; the tensors (github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    order = sorted(described, key=lambda name: (-described[name].dtype.itemsize, name))  # so each is aligned
    for name in order:
        tensor = described[name]
        if tensor.dtype not in DTYPES:
            raise QpassError(f"qpass.save: {name} is {tensor.dtype}, which safetensors does not hold")
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = bytes_of(tensor_of(name))
            hashes[name] = hashlib.sha256(content).hexdigest()
            file.write(content)
    return hashes


def carry(model: nn.Module, folder: Path, described: Mapping[str, Any]) -> None:
    """What lies beside the weights of a model (tokenizer, templates), generation_config.json, config.json with `described`."""
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", "") or ""
    if name and Path(name).is_dir():
        for path in sorted(Path(name).iterdir()):
            small = path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST_CARRIED
            if small and _CARRIED.fullmatch(path.name):
                shutil.copyfile(path, folder / path.name)
    elif name:
        _carry_tokenizer(name, folder)
    if config is not None and hasattr(config, "to_json_string"):
        content = json.loads(config.to_json_string(use_diff=True)) | {
            "architectures": [type(model).__name__],
            **described,
        }
        for key in ("transformers_weights", "transformers_version"):  # the same model whatever wrote it
            content.pop(key, None)
        content.setdefault("dtype", str(next(model.parameters()).dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        (folder / "generation_config.json").write_text(generation.to_json_string(use_diff=True))


def _carry_tokenizer(name: str, folder: Path) -> None:
    """Of a model that came from the hub: what is in the local cache."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name, local_files_only=True).save_pretrained(folder)
    except (OSError, ValueError):
        warnings.warn(f"{name}: no tokenizer in the local cache; put it into {folder} yourself", stacklevel=3)


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("qpass-torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_target(folder: Path) -> None:
    """Raises `QpassError` for a folder that holds anything but an artifact."""

    def is_artifact(folder: Path) -> bool:
        try:
            read_manifest(folder)
        except QpassError:
            return False
        return True

    check_folder(folder, is_artifact, "a qpass artifact")


def absolute(folder: str | Path) -> Path:
    """With a name of its own, whatever the working directory; links are not followed."""
    return Path(os.path.abspath(folder))


def check_folder(folder: Path, is_replaceable: Callable[[Path], bool], what: str) -> None:
    """Raises `QpassError` for a folder that holds anything but what may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise QpassError(f"{folder}: is no folder; give another name")
    if folder.is_dir() and any(folder.iterdir()) and not is_replaceable(folder):
        raise QpassError(f"{folder}: holds something else than {what}; give another name, or empty it")


@contextmanager
def replacing(folder: Path, is_own: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place in one step at the end; gone if anything fails.

    What else lies in the old one goes over to the new one, but for what `is_own` says of a name: written by an earlier save. What
    a killed process left beside it is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.saving-"
    for left in folder.parent.glob(f"{prefix}*"):
        process = left.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder.parent))
    try:
        yield staging
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if not is_own(path.name) and not (staging / path.name).exists():
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, staging / path.name, symlinks=True)
                else:
                    shutil.copy2(path, staging / path.name, follow_symlinks=False)
        staging.chmod(0o777 & ~_umask())
        if folder.exists():
            _exchange(staging, folder)
        else:
            staging.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step, where the system can; otherwise in two."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if hasattr(libc, "renameat2") and not libc.renameat2(here, bytes(new), here, bytes(old), _RENAME_EXCHANGE):
        return
    aside = new.with_name(f"{new.name}-old")
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now

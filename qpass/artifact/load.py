"""qpass.load: a model from an artifact, without its float weights; qpass.verify: all bytes of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qpass.artifact.manifest import Manifest, QpassFormatError, check_head, read_manifest, sha256_of
from qpass.backend import QPass
from qpass.decisions import Decision
from qpass.errors import QpassError
from qpass.finish import finish
from qpass.memory import drop_mapped_pages, for_huge_pages, return_freed_heap
from qpass.numerics import PART_NAMES, Quantized
from qpass.observers import Observed
from qpass.progress import track
from qpass.qtensor import Outcome, QTensor
from qpass.recipe import resolve_recipe
from qpass.sites.core import Site
from qpass.spec import QuantSpec, parse_spec


def verify(folder: str | Path) -> str:
    """Read every byte of an artifact; returns its hash. Raises `QpassFormatError` that names the first damage."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for _ in _tensors(folder, manifest):
        pass
    return manifest.hash


def load(
    folder: str | Path, model: nn.Module | None = None, *, inner: str = "inductor", mode: str | None = None
) -> nn.Module:
    """The model that was saved in `folder`, quantized and compiled in place; its float weights are never made.

    `model`: a skeleton of the same class, for classes that are not transformers' (its Parameters may be on the meta device).
    Nothing is unpickled, no code of the model is imported, no network is asked. Raises `QpassFormatError` for a damaged artifact
    before anything of it is used, `QpassError` for a skeleton that does not fit.
    """
    folder = Path(folder)
    verify_heads(folder)
    return fill(_skeleton(folder) if model is None else model, folder, inner, mode)


def verify_heads(folder: Path) -> None:
    """What `verify` raises of the manifest, the small files and the headers of the others."""
    for name, file in read_manifest(folder).files.items():
        check_head(folder, name, file)


def leave_out(module: nn.Module, folder: Path) -> None:
    """Put Parameters without elements where quantized ones will be, so that nobody makes float ones for them."""
    manifest = read_manifest(folder)
    places = _places(module)
    for name in (*manifest.weights, *(alias for alias, first in manifest.aliases.items() if first in manifest.weights)):
        if name not in places:
            raise QpassError(f"{folder}: {name} has no place in {type(module).__name__}: another class?")
        owner, last = places[name]
        owner._parameters[last] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        owner._is_hf_initialized = True  # type: ignore[assignment]
    module._keys_to_ignore_on_load_unexpected = {rf"\.({'|'.join(PART_NAMES)})$"}  # type: ignore[assignment]
    ends = {re.escape(name) for name in (*manifest.weights, *manifest.aliases)}
    module._keys_to_ignore_on_load_missing = ends  # type: ignore[assignment]


def fill(module: nn.Module, folder: Path, inner: str = "inductor", mode: str | None = None) -> nn.Module:
    """Put what is stored in `folder` into the places of `module`, and have it compiled; see `load`."""
    manifest = read_manifest(folder)
    tensors = dict(_tensors(folder, manifest))
    backend = QPass(resolve_recipe(manifest.recipe), inner=inner, mode=mode)
    places = _places(module)
    stored = tensors.keys() | manifest.weights.keys() | manifest.aliases.keys()
    for name, (owner, last) in places.items():
        value = owner._parameters.get(last, owner._buffers.get(last))
        needed = value is not None and (
            last in owner._parameters or value.is_meta
        )  # buffers that are not stored are computed
        if needed and name not in stored:
            raise QpassError(f"{folder}: has no {name}, which {type(module).__name__} needs: another class, or sizes?")
    made: dict[str, Tensor] = {}
    for name, entry in manifest.weights.items():
        spec = parse_spec(entry.spec)
        parts = [tensors.pop(f"{name}.{part}", None) for part in PART_NAMES]
        quantized = Quantized(*_typed(parts, spec))  # type: ignore[arg-type]
        weight = QTensor(quantized, spec, torch.Size(entry.shape), getattr(torch, entry.dtype), entry.transposed)
        seen = None if entry.input is None else Observed(**entry.input)
        weight.outcome = Outcome(float("nan") if entry.sqnr_db is None else entry.sqnr_db, 0.0, seen)
        made[name] = nn.Parameter(weight, requires_grad=False)
        site = Site(entry.kind, name, tuple(entry.roles), tuple(entry.shape))
        backend.decisions.adopt(made[name], Decision(site, spec))
    for name, value in tensors.items():
        owner, last = places.get(name, (module, ""))
        made[name] = nn.Parameter(value, requires_grad=False) if last in owner._parameters else value
    for name, value in [*made.items(), *((alias, made[first]) for alias, first in manifest.aliases.items())]:
        _put(module, places, name, value, folder)
    return_freed_heap()
    return finish(module.eval(), backend)


class _ParametersUntouched(TorchDispatchMode):
    """Within it what would be written to a Parameter is not: its memory is never touched, so the system gives none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], nn.Parameter) and func._schema.is_mutable:
            return args[0]
        return func(*args, **(kwargs or {}))


def _skeleton(folder: Path) -> nn.Module:
    """The module that config.json describes, its buffers computed, its Parameters without memory."""
    try:
        import transformers
    except ImportError:
        raise QpassError("qpass.load: transformers is not installed; give load(folder, model=skeleton)") from None
    if not (folder / "config.json").is_file():
        raise QpassError(f"{folder}: no config.json; give load(folder, model=skeleton) for a class of your own")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise QpassFormatError(f"{folder}/config.json: {error}") from None
    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise QpassError(f"{folder}: transformers has no class {names[0]!r}; give load(folder, model=skeleton)")
    with _ParametersUntouched(), torch.device("cpu"):
        model: nn.Module = found(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _tensors(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own, its bytes checked."""
    from safetensors import SafetensorError, safe_open

    for name, file in manifest.files.items():
        check_head(folder, name, file)
    by_file: dict[str, list[str]] = {}
    for name, entry in manifest.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    for file_name in track(sorted(by_file), "qpass: reading"):
        try:
            with safe_open(folder / file_name, framework="pt") as file:
                if set(file.keys()) != set(by_file[file_name]):
                    raise QpassFormatError(f"{folder / file_name}: holds other tensors than the manifest says")
                for name in by_file[file_name]:
                    mapped, entry = file.get_tensor(name), manifest.tensors[name]
                    same = str(mapped.dtype) == f"torch.{entry.dtype}" and list(mapped.shape) == entry.shape
                    if not same or sha256_of(mapped) != entry.sha256:
                        raise QpassFormatError(f"{folder / file_name}: {name} is damaged; copy the artifact again")
                    yield name, for_huge_pages(torch.empty_like(mapped)).copy_(mapped)
                    drop_mapped_pages(mapped)
        except SafetensorError as error:
            raise QpassFormatError(f"{folder / file_name}: damaged: {error}") from None


def _typed(parts: list[Tensor | None], spec: QuantSpec) -> list[Tensor | None]:
    """The parts of a weight with the types that its spec gives them: 8-bit floats are stored as bytes."""
    dtypes = spec.stored_parts
    return [p if p is None or i not in dtypes else p.view(dtypes[i]) for i, p in enumerate(parts)]


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> the module that holds a Parameter or buffer, and its name there."""
    found = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name in (*owner._parameters, *owner._buffers):
            found[f"{prefix}.{name}" if prefix else name] = owner, name
    return found


def _put(module: nn.Module, places: dict[str, tuple[nn.Module, str]], name: str, value: Tensor, folder: Path) -> None:
    if name not in places:
        raise QpassError(f"{folder}: {name} has no place in {type(module).__name__}: another class?")
    owner, last = places[name]
    old = owner._parameters.get(last, owner._buffers.get(last))
    if old is not None and old.numel() and old.shape != value.shape:
        raise QpassError(f"{folder}: {name} is {list(value.shape)}, in {type(module).__name__} {list(old.shape)}")
    if last in owner._parameters:
        owner._parameters[last] = value  # type: ignore[assignment]
    else:
        owner._buffers[last] = value

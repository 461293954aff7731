"""qpass.load: a model from an artifact, without its float weights; qpass.verify: all bytes of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qpass.artifact.manifest import (
    Manifest,
    QpassFormatError,
    WeightEntry,
    check_file,
    check_head,
    read_manifest,
)
from qpass.artifact.reading import damaged, rows_of_groups, tensors_of
from qpass.artifact.save import absolute
from qpass.backend import QPass
from qpass.decisions import Decision
from qpass.errors import QpassError
from qpass.finish import finish
from qpass.memory import return_freed_heap
from qpass.observers import Observed
from qpass.ops import reference
from qpass.qtensor import Outcome, QTensor
from qpass.quantized import PART_NAMES, Quantized
from qpass.recipe import resolve_recipe
from qpass.sites.core import Site
from qpass.spec import parse_spec
from qpass.store import fuse
from qpass.weights import as_rows

#: Keys of a config that choose code.
_CHOICES = re.compile(
    "implementation|kernel|auto_map|custom_pipelines|quantization_config|transformers_weights|fusion_config"
)
_NAME = re.compile(r"[a-z_]{1,30}\Z")
#: Bytes of buffers that a module may compute when it is made (tables of cosines, masks).
_MOST_COMPUTED = 1 << 30


def verify(folder: str | Path) -> str:
    """Read every byte of an artifact; returns its hash. Raises `QpassFormatError` that names the first damage."""
    folder = absolute(folder)
    manifest = read_manifest(folder)
    for _ in tensors_of(folder, manifest):
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
    folder = absolute(folder)
    manifest = verify_heads(folder)
    return fill(_skeleton(folder, manifest) if model is None else model, folder, inner, mode)


def verify_heads(folder: Path) -> Manifest:
    """What `verify` raises of the manifest, config.json and the headers of the other files."""
    manifest = read_manifest(folder)
    for name, file in manifest.files.items():
        check_head(folder, name, file)
    return manifest


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
    module._keys_to_ignore_on_load_unexpected |= {re.escape(n) for n in dict(module.named_buffers())}  # type: ignore[operator]


def fill(module: nn.Module, folder: Path, inner: str = "inductor", mode: str | None = None) -> nn.Module:
    """Put what is stored in `folder` into the places of `module`, and have it compiled; see `load`."""
    manifest = read_manifest(folder)
    with damaged(f"{folder}: its groups"):
        room = rows_of_groups(manifest)
    tensors = dict(tensors_of(folder, manifest, room))
    with damaged(f"{folder}: the recipe"):
        backend = QPass(resolve_recipe(manifest.recipe), inner=inner, mode=mode)
    places = _places(module)
    stored = tensors.keys() | manifest.weights.keys() | manifest.aliases.keys()
    for name, (owner, last) in places.items():
        value = owner._parameters.get(last, owner._buffers.get(last))
        needed = value is not None and (last in owner._parameters or value.is_meta)  # other buffers are computed
        if needed and name not in stored:
            raise QpassError(f"{folder}: has no {name}, which {type(module).__name__} needs: another class, or sizes?")
    made: dict[str, Tensor] = {}
    grouped = {name for names in manifest.groups for name in names}
    for names in (*manifest.groups, *([name] for name in manifest.weights if name not in grouped)):
        with damaged(f"{folder}: {', '.join(names)}"):
            entries = [manifest.weights[name] for name in names]
            parts = [{part: tensors.pop(f"{name}.{part}", None) for part in PART_NAMES} for name in names]
            weights = [_weight(entry, each) for entry, each in zip(entries, parts, strict=True)]
            del parts
            fuse(weights)  # now, not at the first call, when torch holds what they were
            for name, entry, weight in zip(names, entries, weights, strict=True):
                made[name] = nn.Parameter(weight, requires_grad=False)
                site = Site(entry.kind, name, tuple(entry.roles), tuple(entry.shape))
                backend.decisions.adopt(made[name], Decision(site, weight.spec))
    for name, value in tensors.items():
        owner, last = places.get(name, (module, ""))
        made[name] = nn.Parameter(value, requires_grad=False) if last in owner._parameters else value
    for alias, first in manifest.aliases.items():
        if first not in made:
            raise QpassFormatError(f"{folder}: {alias} stands for {first}, which is not there")
        made[alias] = made[first]
    for name, value in made.items():
        _put(module, places, name, value, folder)
    return_freed_heap()
    return finish(module.eval(), backend)


def _weight(entry: WeightEntry, parts: dict[str, Tensor | None]) -> QTensor:
    """A QTensor whose parts have the types and shapes that its spec gives them."""
    spec, dtype = parse_spec(entry.spec), getattr(torch, entry.dtype)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise QpassFormatError(f"a weight of type {entry.dtype!r}")
    if not all(_NAME.match(word) for word in (entry.kind, *entry.roles)):
        raise QpassFormatError(f"a weight of kind {entry.kind!r}, {entry.roles}")
    size = torch.Size(entry.shape)
    rows = as_rows(torch.empty(size, device="meta"), entry.transposed)
    like = dict(zip(spec.stored_parts, reference.quantized_like(rows, str(spec)), strict=True))
    typed: list[Tensor | None] = []
    for i, part in enumerate(PART_NAMES):
        tensor, wanted = parts[part], like.get(i)
        if i >= 4:  # of the input
            fits = tensor is None or ((tensor.is_floating_point() or part == "input_zero_point") and tensor.dim() == 2)
        elif tensor is None or wanted is None:
            fits = tensor is wanted
        else:
            tensor = tensor.view(wanted.dtype) if tensor.dtype == torch.uint8 else tensor
            shapes = (
                wanted.shape,
                (len(rows), *wanted.shape[1:]),
            )  # what is one for all is repeated where weights share a buffer
            fits = tensor.dtype == wanted.dtype and tensor.shape in shapes
        if not fits:
            raise QpassFormatError(f"{part} is not what {spec} has for a weight of {entry.shape}")
        typed.append(tensor)
    seen = None if entry.input is None else Observed(**entry.input)
    weight = QTensor(Quantized(*typed), spec, size, dtype, entry.transposed)  # type: ignore[arg-type]
    weight.outcome = Outcome(float("nan") if entry.sqnr_db is None else entry.sqnr_db, 0.0, seen)
    return weight


class _ParametersUntouched(TorchDispatchMode):
    """Within it what would be written to a Parameter is not: its memory is never touched, so the system gives none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], nn.Parameter) and func._schema.is_mutable:
            return args[0]
        return func(*args, **(kwargs or {}))


def _skeleton(folder: Path, manifest: Manifest) -> nn.Module:
    """The module that config.json describes, its buffers computed, its Parameters without memory."""
    try:
        import transformers
    except ImportError:
        raise QpassError("qpass.load: transformers is not installed; give load(folder, model=skeleton)") from None
    if "config.json" not in manifest.files:
        raise QpassError(f"{folder}: no config.json; give load(folder, model=skeleton) for a class of your own")
    with damaged(folder / "config.json"):
        content = _without_choices(json.loads((folder / "config.json").read_text()))
        config = transformers.CONFIG_MAPPING[content["model_type"]].from_dict(content)
        name = (getattr(config, "architectures", None) or [""])[0]
        found = getattr(transformers, str(name), None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise QpassError(f"{folder}: transformers has no class {name!r}; give load(folder, model=skeleton)")
        _check_depth(content, folder, len(manifest.tensors))
        with torch.device("meta"):
            sketch = found(config)
        _check_sketch(sketch, folder, manifest)
        with _ParametersUntouched(), torch.device("cpu"):
            model: nn.Module = found(config)
    config.name_or_path = str(folder)
    path = folder / "generation_config.json"
    if path.exists():
        check_file(folder, path.name)
        with damaged(path):
            model.generation_config = transformers.GenerationConfig.from_dict(json.loads(path.read_text()))
    return model


def _without_choices(content: Any) -> Any:
    """A config without what has transformers fetch and run code: kernels by name, classes of its own."""
    if isinstance(content, dict):
        return {k: _without_choices(v) for k, v in content.items() if not _CHOICES.search(k)}
    return [_without_choices(v) for v in content] if isinstance(content, list) else content


def _check_depth(content: Any, folder: Path, tensors: int) -> None:
    """Raises `QpassFormatError` for more layers than there are tensors: modules take time and memory even without weights."""
    if isinstance(content, dict):
        for key, value in content.items():
            if "layers" in key and isinstance(value, int) and value > tensors:
                raise QpassFormatError(f"{folder}/config.json: {key} is {value}, for {tensors} tensors; refused")
            _check_depth(value, folder, tensors)


def _check_sketch(sketch: nn.Module, folder: Path, manifest: Manifest) -> None:
    """Raises `QpassError` before memory is taken for a module that the artifact does not fill, or that computes gigabytes."""
    computed = 0
    for name, (owner, last) in _places(sketch).items():
        value = owner._parameters.get(last, owner._buffers.get(last))
        known = manifest.aliases.get(name, name)
        if value is None:
            continue
        entry = manifest.weights.get(known) or manifest.tensors.get(known)
        if entry is not None and list(value.shape) != entry.shape:
            raise QpassError(f"{folder}: {name} is {entry.shape}, in {type(sketch).__name__} {list(value.shape)}")
        if entry is None and last in owner._parameters:
            raise QpassError(f"{folder}: has no {name}, which {type(sketch).__name__} needs: another class, or sizes?")
        computed += value.nbytes if last in owner._buffers else 0
    if computed > _MOST_COMPUTED:
        raise QpassFormatError(f"{folder}/config.json: buffers of {computed:,} bytes would be computed; refused")


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

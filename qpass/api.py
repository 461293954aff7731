"""qpass.quantize: replace the float weights of a model by QTensors and compile it in place. qpass.diff: see what it did."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from qpass.algorithms.rounding import check_data_free, needs_data
from qpass.backend import BACKENDS, QPass
from qpass.calibration import Data, NothingLeft, batches_of, record
from qpass.decisions import Decision
from qpass.errors import QpassError
from qpass.exported import quantize_program
from qpass.finish import finish
from qpass.graph.expand import expand
from qpass.graph.torch_private import (
    as_plain_module,
    backend_of,
    copy_captured,
    errors_through_dynamo,
    isolated,
    original_module,
)
from qpass.memory import drop_mapped_pages, own_copy, own_memory, return_freed_heap
from qpass.module_state import OwnState, find_held
from qpass.observers import InputStats
from qpass.passes import parameter_nodes
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.ready import check_ready
from qpass.recipe import Recipe
from qpass.replay import places_of, quantize_in_order
from qpass.seeing.diff import Diff
from qpass.seeing.sides import Side, diff_of, diff_of_two, side_in_float, side_of
from qpass.sites.group import WeightGroup, each_once, group_weights
from qpass.store import Kept, fuse, quantize_group
from qpass.weights import as_rows, check_weight, memory_of

#: A group of weights and the Parameters that it stands for.
Planned = tuple[WeightGroup, list[Tensor]]
#: `memory_of` a Parameter -> every place that holds it: tied weights have several.
Owners = Mapping[tuple[Any, ...], Sequence[tuple[nn.Module, str]]]
#: Tokens of the run that captures the graph when no inputs are given.
_CAPTURE_TOKENS = 8


@overload
def quantize(
    model: nn.Module,
    recipe: str | Path | Recipe | Mapping[str, Any] = ...,
    *,
    inputs: Any = ...,
    calibration: Data | None = ...,
    strict: bool = ...,
    inner: str = ...,
    mode: str | None = ...,
) -> nn.Module: ...
@overload
def quantize(
    model: ExportedProgram,
    recipe: str | Path | Recipe | Mapping[str, Any] = ...,
    *,
    calibration: Data | None = ...,
    strict: bool = ...,
) -> ExportedProgram: ...
def quantize(
    model: nn.Module | ExportedProgram,
    recipe: str | Path | Recipe | Mapping[str, Any] = "int8",
    *,
    inputs: Any = None,
    calibration: Data | None = None,
    strict: bool = False,
    inner: str = "inductor",
    mode: str | None = None,
) -> nn.Module | ExportedProgram:
    """Quantize `model` in place: Parameters become QTensors, the float weights are freed, calls are compiled.

    The graph is captured by one short float run; `inputs` (a tensor, a tuple or a dict of arguments) is what it is run on, by
    default a few token ids. `calibration`: data for algorithms that read them ("int4:g128:gptq"): batches of token ids [B, S], or
    dicts of arguments, where tokens that `attention_mask` leaves out do not count; or all ids [N, S]; or text files. A recipe
    with kv makes `generate(ids)` use a KVCache of that format. The other arguments are those of `QPass`. Returns `model`; the
    same call again changes nothing. Of an ExportedProgram a quantized copy is returned, with the stored weights as buffers; it is
    not compiled, and takes `calibration` and `strict` only.
    Raises `QpassError`, the model unchanged, for what cannot be quantized: a weight with NaN, on the meta device, already
    quantized, no site at all.
    """
    if isinstance(model, ExportedProgram):
        if inputs is not None:
            raise QpassError("qpass.quantize: an ExportedProgram takes no inputs: its graph is captured already")
        return quantize_program(model, recipe, strict, calibration)
    if not isinstance(model, nn.Module):
        raise QpassError(f"qpass.quantize: takes a torch.nn.Module or an ExportedProgram, got {type(model).__name__}")
    backend = QPass(recipe, strict=strict, inner=inner, mode=mode)
    return quantize_module(original_module(model), backend, inputs, calibration)


def quantize_module(
    module: nn.Module, backend: QPass, inputs: Any = None, calibration: Data | None = None, kept: Kept | None = None
) -> nn.Module:
    """`quantize` with a backend of one's own. `kept`: has what an earlier run has made, and is given what this one makes."""
    kept = kept or Kept()
    if calibration is not None:
        backend.use_data()
    if _is_done(module, backend):
        return module
    check_ready(module)
    own = OwnState(module)
    groups = _discover(module, backend, inputs, own)
    for group, params in groups:
        for name, flipped, param in zip(group.names, group.transposed, params, strict=True):
            if not kept.goes_on:  # or when its turn comes: nothing is lost then
                check_weight(as_rows(param, flipped), group.spec, name)
        if calibration is None:
            check_data_free(group.spec)
    owners = _owners(module)
    if calibration is not None:
        groups = _calibrated(module, backend, calibration, groups, owners, own, kept)
    for i in track(range(len(groups)), "qpass: quantizing"):
        group, params = groups[i]
        groups[i] = None  # type: ignore[call-overload]  # the float weights of a group are freed before the next
        _convert(group, params, owners, backend, kept)
        del params
    own.store()
    own_memory(module)
    return_freed_heap()
    return finish(module, backend)


def _calibrated(
    model: nn.Module, backend: QPass, data: Data, groups: list[Planned], owners: Owners, own: OwnState, kept: Kept
) -> list[Planned]:
    """Quantize what linears multiply, in the order of the graphs; -> the groups that are left (tables, what no batch used)."""
    try:
        runs = record(model, backend, batches_of(data, model), own)
    finally:
        own.undo()
    backend.begin_calibration(runs, kept)
    if backend.recipe.bits is not None:
        groups[:] = [single for group, params in groups for single in _as_decided(group, params, backend)]
    places = places_of(runs)
    left = each_once(groups, {one for key in places for one in key})
    for group, _ in left:
        if needs_data(group.spec):
            raise QpassError(
                f"{group.names[0]}: no batch of the calibration uses it (an expert that was not chosen?); add batches "
                "that do, or give this site a spec without data"
            )
    groups.clear()  # the float weights of a group are freed before the next
    quantize_in_order(
        runs, places, lambda group, params, stats: _convert(group, params, owners, backend, kept, stats), kept.has
    )
    return left


def _as_decided(group: WeightGroup, params: list[Tensor], backend: QPass) -> list[Planned]:
    """Each weight by itself, with the spec that was decided for it last."""
    singles: list[Planned] = []
    for i, param in enumerate(params):
        decision = backend.decisions.of(param)
        spec = group.spec if decision is None or decision.spec is None else decision.spec
        singles.append((replace(group.subset([i]), spec=spec), [param]))
    return singles


def diff(x: Any, other: Any = None) -> Diff:
    """The captured graphs of a model (or of torch.compile's result, or of a QPass), before against after.

    With `other`, the graphs of `x` as they are now against those of `other`: models, programs of torch.export, backends. A
    module that qpass has not seen is captured in float, by one short run. Raises `QpassError` if nothing was captured yet.
    """
    return diff_of(x) if other is None else diff_of_two(_side(x), _side(other))


def _side(x: Any) -> Side:
    model = original_module(x)
    unseen = isinstance(model, nn.Module) and not any(
        isinstance(p, QTensor) or any(b.decisions.of(p) is not None for b in BACKENDS) for p in model.parameters()
    )
    return side_in_float(model, _captured_in_float(model)) if unseen else side_of(x)


def _captured_in_float(model: nn.Module) -> list[Graph]:
    graphs: list[Graph] = []
    own = OwnState(model)

    def capture(captured: GraphModule, args: Sequence[Any]) -> Any:
        gm = copy_captured(captured)
        expand(gm)
        graphs.append(gm.graph)
        own.see(gm.graph, args, [])
        return captured.forward

    try:
        with torch.no_grad(), as_plain_module(model):
            _call(torch.compile(model, backend=capture, dynamic=False, **isolated()), model, None)
    finally:
        own.undo()
    return graphs


def _is_done(model: nn.Module, backend: QPass) -> bool:
    """Whether this very call was made before: running a notebook cell again changes nothing."""
    before = backend_of(model)
    quantized = any(isinstance(p, QTensor) for p in model.parameters())
    return quantized and isinstance(before, QPass) and before.options == backend.options


def _discover(model: nn.Module, backend: QPass, inputs: Any, own: OwnState) -> list[Planned]:
    """Call the model once and plan every graph that is captured: what will be quantized, in which groups.

    The call runs in float, unless the first graph holds all of the model.
    """
    groups: list[Planned] = []
    seen: set[tuple[Any, ...]] = set()
    everything = {memory_of(p) for p in model.parameters()}
    see = weakref.WeakMethod(own.see)  # Dynamo keeps each backend that it is given, and own has the model

    def end(*args: Any) -> Any:
        raise NothingLeft

    def capture(captured: GraphModule, args: Sequence[Any]) -> Any:
        gm = copy_captured(captured)
        with errors_through_dynamo():
            plan = backend.plan_graph(gm, args, keeping=True)
        parameters = parameter_nodes(gm, args)
        by_name = {node.name: tensor for node, tensor in parameters.items()}
        planned = [(group, [by_name[name] for name in group.weights]) for group, _ in group_weights(plan, parameters)]
        groups.extend(each_once(planned, seen))
        specs = backend.recipe.kv_specs
        to_own = see()
        assert to_own is not None
        to_own(gm.graph, args, [] if specs is None else find_held(gm.graph, parameters, {}, specs)[0])
        return end if everything <= {memory_of(tensor) for tensor in parameters.values()} else captured.forward

    try:
        with torch.no_grad(), as_plain_module(model), suppress(NothingLeft):
            _call(torch.compile(model, backend=capture, **isolated()), model, inputs)
    finally:
        own.undo()
    groups = each_once(backend.planner.whole_groups(model), set()) or groups
    groups += _like_their_siblings(model, groups, backend)
    if not groups:
        raise QpassError(
            "nothing to quantize: no site of the model gets a format; give the recipe a format for a kind it has"
        )
    return groups


def _like_their_siblings(model: nn.Module, groups: list[Planned], backend: QPass) -> list[Planned]:
    """Weights that the call did not use, in a ModuleList whose other modules' are quantized: experts that were not chosen."""
    found = {memory_of(p): (group, i, p) for group, params in groups for i, p in enumerate(params)}
    names = {id(p): name for name, p in model.named_parameters()}
    extra: list[Planned] = []
    for modules in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        members = [(key, p.shape, p) for child in modules for key, p in child.named_parameters()]
        known = {(key, shape): found[memory_of(p)] for key, shape, p in members if memory_of(p) in found}
        for key, shape, param in members:
            if (key, shape) not in known or memory_of(param) in found or backend.decisions.of(param) is not None:
                continue
            group, i, sibling = known[key, shape]
            name = names[id(param)]
            spec = backend.decisions.like(param, sibling, name)
            if spec is not None:
                single = replace(group.subset([i]), weights=(name,), names=(name,), biases=(None,), spec=spec)
                extra.append((single, [param]))
                found[memory_of(param)] = single, 0, param
    return extra


def _call(compiled: Any, model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        compiled(**inputs)
    elif isinstance(inputs, tuple | list):
        compiled(*inputs)
    elif inputs is not None:
        compiled(inputs)
    else:
        given = getattr(model, "dummy_inputs", None)  # transformers models know theirs
        device = next(model.parameters()).device
        ids = torch.zeros((1, _CAPTURE_TOKENS), dtype=torch.long, device=device)
        try:
            if given:
                compiled(**{k: v.to(device) for k, v in given.items()})
            else:
                compiled(ids)
        except (QpassError, NothingLeft):
            raise
        except Exception as error:
            tried = f"its dummy_inputs {list(given)}" if given else f"token ids of shape {list(ids.shape)}"
            raise QpassError(
                f"{type(model).__name__} does not run on {tried}; pass inputs=... (a tensor, tuple or dict of its arguments)"
                f"\n{error}"
            ) from error


def _owners(model: nn.Module) -> Owners:
    owners: dict[tuple[Any, ...], list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                owners.setdefault(memory_of(param), []).append((module, name))
    return owners


def _convert(
    group: WeightGroup,
    params: list[Tensor],
    owners: Owners,
    backend: QPass,
    kept: Kept,
    stats: InputStats | None = None,
) -> list[QTensor]:
    """Put QTensors in the place of one group of float Parameters, as row ranges of one buffer."""
    stored = [as_rows(p, flipped) for p, flipped in zip(params, group.transposed, strict=True)]
    replacements = []
    done = kept.get(group)
    if done is None:
        for row, name in zip(stored, group.names, strict=True):
            if kept.goes_on:
                check_weight(row, group.spec, name)
        done = quantize_group(stored, group.spec, stats)
        kept.put(group, done)
    for param, flipped, made in zip(params, group.transposed, done, strict=True):
        own = made.quantized.map(own_copy)  # a format of 16 bits may be the checkpoint's
        replacement = QTensor(own, group.spec, param.shape, param.dtype, flipped)
        replacement.outcome = made.outcome
        replacements.append(replacement)
    fuse(replacements)
    for param, replacement in zip(params, replacements, strict=True):
        decision = backend.decisions.of(param)
        assert isinstance(decision, Decision)
        installed = nn.Parameter(replacement, requires_grad=False)
        for module, name in owners[memory_of(param)]:
            module._parameters[name] = installed
        backend.decisions.adopt(installed, decision)
        drop_mapped_pages(param)
    return replacements

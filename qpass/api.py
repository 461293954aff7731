"""qpass.quantize: replace the float weights of a model by QTensors and compile it in place. qpass.diff: see what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qpass.backend import Decision, QPass, captured, captures_of
from qpass.diff import Diff, diff_graphs
from qpass.errors import QpassError
from qpass.graph.torch_private import backend_of, compile_in_place, errors_through_dynamo, isolated, original_module
from qpass.memory import drop_mapped_pages, own_memory, return_freed_heap
from qpass.passes import parameter_nodes
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from qpass.sites.weight import WeightGroup, group_weights
from qpass.store import fuse, quantize_group
from qpass.weights import check_weight

#: Tokens of the run that captures the graph when no inputs are given.
_CAPTURE_TOKENS = 8


def quantize(
    model: nn.Module,
    recipe: str | Path | Recipe | Mapping[str, Any] = "int8",
    *,
    inputs: Any = None,
    strict: bool = False,
    inner: str = "inductor",
    mode: str | None = None,
) -> nn.Module:
    """Quantize `model` in place: Parameters become QTensors, the float weights are freed, calls are compiled.

    The graph is captured by one short float run; `inputs` (a tensor, a tuple or a dict of arguments) is what it is run
    on, by default a few token ids. A recipe with kv makes `generate(ids)` use a KVCache of that format. The other
    arguments are those of `QPass`. Returns `model`; the same call again changes nothing.
    Raises `QpassError`, the model unchanged, for what cannot be quantized: a weight with NaN, on the meta device, already
    quantized, a group larger than a row, no site at all.
    """
    if not isinstance(model, nn.Module):
        raise QpassError(f"qpass.quantize: takes a torch.nn.Module, got {type(model).__name__}")
    model = original_module(model)
    backend = QPass(recipe, strict=strict, inner=inner, mode=mode)
    if _is_done(model, backend):
        return model
    _refuse_unready(model)
    groups = _discover(model, backend, inputs)
    for group, params in groups:
        for name, flipped, param in zip(group.names, group.transposed, params, strict=True):
            check_weight(param.t() if flipped else param, group.spec, name)
    owners = _owners(model)
    for i in track(range(len(groups)), "qpass: quantizing"):
        group, params = groups[i]
        groups[i] = None  # type: ignore[call-overload]  # the float weights of a group are freed before the next
        _convert(group, params, owners, backend)
        del params
    own_memory(model)
    return_freed_heap()
    compile_in_place(model, backend)
    model._apply = _ApplyToFreshParameters(model)  # type: ignore[method-assign]
    _prepare_generate(model, backend.recipe)
    return model


def diff(x: Any) -> Diff:
    """The captured graphs of a model (or of torch.compile's result, or of a QPass), before against after.

    Raises `QpassError` if nothing was captured yet.
    """
    captures = captures_of(x, captured(x, "qpass.diff"))
    return Diff(tuple(diff_graphs(capture.before, capture.after) for capture in captures))


def _is_done(model: nn.Module, backend: QPass) -> bool:
    """Whether this very call was made before: running a notebook cell again changes nothing."""
    before = getattr(backend_of(model), "compiler_fn", None)
    quantized = any(isinstance(p, QTensor) for p in model.parameters())
    return quantized and isinstance(before, QPass) and before.options == backend.options


def _refuse_unready(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, QTensor):
            raise QpassError(f"{name}: the model is already quantized ({param.spec}); start from its float checkpoint")
        if param.is_meta:
            raise QpassError(f"{name}: the weight is on the meta device; load the real weights first")
        if type(param).__name__ == "DTensor" or type(param.data).__name__ == "DTensor":
            raise QpassError(f"{name}: the weight is a DTensor; quantize each rank's local model, before sharding")


def _discover(model: nn.Module, backend: QPass, inputs: Any) -> list[tuple[WeightGroup, list[Tensor]]]:
    """Run the model once in float and plan every graph that is captured: what will be quantized, in which groups."""
    groups: list[tuple[WeightGroup, list[Tensor]]] = []
    seen: set[int] = set()

    def capture(gm: GraphModule, args: Sequence[Any]) -> Any:
        with errors_through_dynamo():
            plan = backend.plan_graph(gm, args)
        parameters = parameter_nodes(gm, args)
        by_name = {node.name: tensor for node, tensor in parameters.items()}
        for group, _ in group_weights(plan, parameters):
            params = [by_name[name] for name in group.weights]
            new = [i for i, p in enumerate(params) if id(p) not in seen]
            seen.update(id(p) for p in params)
            if new:
                groups.append((group.subset(new), [params[i] for i in new]))
        return gm.forward

    previous, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        with torch.no_grad():
            _call(torch.compile(model, backend=capture, **isolated()), model, inputs)
    finally:
        model._compiled_call_impl = previous
    groups = backend.whole_groups(model) or groups
    if not groups:
        raise QpassError(
            "nothing to quantize: no site of the model gets a format; give the recipe a format for a kind it has"
        )
    return groups


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
        except QpassError:
            raise
        except Exception as error:
            tried = f"its dummy_inputs {list(given)}" if given else f"token ids of shape {list(ids.shape)}"
            raise QpassError(
                f"{type(model).__name__} does not run on {tried}; pass inputs=... (a tensor, tuple or dict of its arguments)"
                f"\n{error}"
            ) from error


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a Parameter -> every place that holds it: tied weights have several."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append((module, name))
    return owners


def _convert(
    group: WeightGroup, params: list[Tensor], owners: Mapping[int, list[tuple[nn.Module, str]]], backend: QPass
) -> None:
    """Put QTensors in the place of one group of float Parameters, as row ranges of one buffer."""
    stored = [p.t() if flipped else p for p, flipped in zip(params, group.transposed, strict=True)]
    replacements = []
    for param, flipped, (quantized, sqnr_db) in zip(
        params, group.transposed, quantize_group(stored, group.spec), strict=True
    ):
        replacement = QTensor(quantized, group.spec, param.shape, param.dtype, flipped)
        replacement.sqnr_db = sqnr_db
        replacements.append(replacement)
    fuse(replacements)
    for param, replacement in zip(params, replacements, strict=True):
        decision = backend.decision(param)
        assert isinstance(decision, Decision)
        installed = nn.Parameter(replacement, requires_grad=False)
        for module, name in owners[id(param)]:
            module._parameters[name] = installed
        backend.adopt(installed, decision)
        drop_mapped_pages(param)


def _prepare_generate(model: nn.Module, recipe: Recipe) -> None:
    """transformers' generate: our compiled call is not to be compiled again around it, and kv makes its own cache."""
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "_prepare_cache_for_generation"):
        return
    config.disable_compile = True
    if recipe.kv_specs is not None:
        from qpass.cache import CacheForGenerate

        model.__dict__["_prepare_cache_for_generation"] = CacheForGenerate(model, *recipe.kv_specs)


class _ApplyToFreshParameters:
    """Stands in for `model._apply`, which `.to()` calls: torch exchanges the contents of a tensor subclass, and refuses
    where a weak reference to it exists; Dynamo holds one to every Parameter it guards. New Parameters have none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        fresh: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, param in module._parameters.items():
                if isinstance(param, QTensor):
                    if id(param) not in fresh:
                        fresh[id(param)] = nn.Parameter(param.detach(), requires_grad=False)
                    module._parameters[name] = fresh[id(param)]
        return type(self.model)._apply(self.model, fn, recurse)

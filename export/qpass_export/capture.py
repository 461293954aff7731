"""One graph of a model for any batch, length and past: an ExportedProgram whose caches are inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qpass.errors import QpassError
from qpass.graph.torch_private import as_plain_module, shapes_only
from qpass.qstate import QState
from qpass.qtensor import QTensor

#: Sizes of the example that is traced: none of them is 0 or 1, which torch would take for constants, and none equals another.
BATCH, SEQUENCE, PAST = 2, 3, 5
#: Arguments of a decoder of transformers that an ONNX graph has as inputs, in the order of its inputs.
_DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Captured:
    """A program and the names of its inputs and outputs, one for each tensor.

    `caches`: how many of the last inputs, and of the last outputs, are keys and values: layer by layer, keys first. `weights`:
    by name, those that the program has in another type, as the model holds them: what is quantized is quantized from these.
    `state`: the first values of the last inputs, where these are buffers that the program writes to.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    caches: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    state: tuple[Tensor, ...] = field(default=(), repr=False)
    config: Any = field(default=None, repr=False)


def capture(model: nn.Module, inputs: Any = None, dtype: torch.dtype = torch.float32) -> Captured:
    """The program of `model`, whose weights may be QTensors.

    A decoder of transformers takes input_ids, attention_mask and position_ids, and keys and values of the tokens before. Any
    other module takes `inputs` (a tensor, a tuple, or a dict of arguments), by default its `dummy_inputs`; sizes of 2 and more
    are dynamic. Raises `QpassError` for a model that torch cannot export.
    """
    config = getattr(model, "config", None)
    decoder = inputs is None and _is_decoder(model)
    with _plain(model, dtype), torch.no_grad():
        arguments, past = _decoder_example(model) if decoder else (_example(model, inputs, dtype), [])
    names = list(arguments)
    returned: list[str] = []

    forward_of_model = model.forward  # the class's, or one that was put on this very model

    def forward(arguments: Mapping[str, Tensor], past: Sequence[Tensor]) -> list[Tensor]:
        if decoder:
            out, layers = _call_with_cache(forward_of_model, arguments, _cache_of(past))
            found = {"logits": out.logits}
            kept = [t for layer in layers for t in (layer.keys, layer.values)]
        else:
            found, kept = _named(forward_of_model(**arguments)), []
        returned[:] = found
        return [*found.values(), *kept]

    program, weights = _export(model, forward, arguments, past, dtype)
    layers = range(len(past) // 2)
    keys = [f"{i}.{half}" for i in layers for half in ("key", "value")]
    return Captured(
        program,
        (*names, *(f"past_key_values.{key}" for key in keys)),
        (*returned, *(f"present.{key}" for key in keys)),
        len(past),
        weights,
        config=config,
    )


def _export(
    model: nn.Module, forward: Any, arguments: dict[str, Tensor], past: list[Tensor], dtype: torch.dtype
) -> tuple[ExportedProgram, dict[str, Tensor]]:
    with _plain(model, dtype) as weights, torch.no_grad():
        own = model.__dict__.get("forward")
        model.__dict__["forward"] = forward
        try:
            shapes = {name: _dynamic(t) for name, t in arguments.items()}, [{0: Dim.AUTO, 2: Dim.AUTO} for _ in past]
            program = torch.export.export(model, (arguments, past), dynamic_shapes=shapes, strict=False)
        except QpassError:
            raise
        except Exception as error:
            given = {name: list(t.shape) for name, t in arguments.items()}
            raise QpassError(
                f"{type(model).__name__}: torch.export does not take it, called with {given}; pass other inputs=..., or change "
                f"what it says: {type(error).__name__}: {error}"
            ) from error
        finally:
            del model.__dict__["forward"]
            if own is not None:
                model.__dict__["forward"] = own
    return program, {name: weight for name, weight in weights.items() if name in program.state_dict}


def _dynamic(tensor: Tensor) -> dict[int, Any]:
    """Sizes that may change: all of ids, and all of floats but their last, which is a width of the model."""
    last = tensor.dim() - 1 if tensor.is_floating_point() else tensor.dim()
    return {i: Dim.AUTO for i, size in enumerate(tensor.shape[:last]) if size > 1}


@contextmanager
def _plain(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """`model` not compiled, its floats in `dtype`, with a float of no memory in the place of each QTensor; yields the Parameters
    that were exchanged, by name."""
    weights: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, QTensor) or _changes(p, dtype)
    }
    stands_in: dict[int, Tensor] = {}
    modules = list(model.modules())
    attributes = [(m, n, v) for m in modules for n, v in m.__dict__.items() if isinstance(v, Tensor)]
    for module, name, value in attributes:  # what a graph writes to is a buffer
        del module.__dict__[name]
        module._buffers[name] = value
    dicts: list[dict[str, Any]] = [held for m in modules for held in (m._parameters, m._buffers)]
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, n, v)
        for held in dicts
        for n, v in held.items()
        if v is not None and v.is_floating_point() and _changes(v, dtype)
    ]
    try:
        for held, name, value in places:
            if id(value) not in stands_in:
                if isinstance(value, QTensor):
                    plain = torch.zeros(1, dtype=dtype, device=value.device).expand(value.shape)
                elif isinstance(value, QState):
                    plain = value.dequantize().to(dtype)
                else:
                    plain = value.detach().to(dtype)
                stands_in[id(value)] = (
                    nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain
                )
            held[name] = stands_in[id(value)]
        with as_plain_module(model):
            yield weights
    finally:
        for held, name, value in places:
            held[name] = value
        for module, name, value in attributes:
            del module._buffers[name]
            module.__dict__[name] = value


def _changes(value: Tensor, dtype: torch.dtype) -> bool:
    """Half precision becomes `dtype`, and so does a Parameter; a buffer in float32 (the frequencies of rotary) stays."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return isinstance(value, QTensor | QState) or (value.dtype != dtype and (half or isinstance(value, nn.Parameter)))


# --- decoders of transformers -------------------------------------------------------------------------------------------


def _is_decoder(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers that takes a cache."""
    config = getattr(model, "config", None)
    takes = inspect.signature(type(model).forward).parameters
    decodes = hasattr(model, "generate") and "input_ids" in takes and bool({"cache", "past_key_values"} & takes.keys())
    return decodes and not getattr(config, "is_encoder_decoder", False)


def _decoder_example(model: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    takes = inspect.signature(type(model).forward).parameters
    device = next(model.parameters()).device
    given = {
        "input_ids": torch.zeros((BATCH, SEQUENCE), dtype=torch.long),
        "attention_mask": torch.ones((BATCH, PAST + SEQUENCE), dtype=torch.long),
        "position_ids": torch.arange(PAST, PAST + SEQUENCE).repeat(BATCH, 1),
    }
    arguments = {name: given[name].to(device) for name in _DECODER_INPUTS if name in takes}
    from transformers.cache_utils import DynamicCache, DynamicLayer

    ids = {"input_ids": arguments["input_ids"]}
    try:
        with shapes_only():  # a real product copies a weight of no memory
            _, layers = _call_with_cache(model.forward, ids, DynamicCache())
    except RuntimeError:  # torch knows no shapes for some operations on float32, of experts for one
        _, layers = _call_with_cache(model.forward, ids, DynamicCache())
    other = [type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer or layer.keys is None]
    if other or not layers:
        raise QpassError(
            f"{type(model).__name__}: the ONNX graph holds keys and values of every token, but the model keeps "
            f"{', '.join(sorted(set(other))) or 'no cache'}; pass inputs={{'input_ids': ids}} to export it without a cache"
        )
    halves = [t for layer in layers for t in (layer.keys, layer.values)]
    return arguments, [torch.zeros((BATCH, t.shape[1], PAST, t.shape[3]), dtype=t.dtype, device=device) for t in halves]


def _call_with_cache(forward: Any, arguments: Mapping[str, Tensor], cache: Any) -> tuple[Any, list[Any]]:
    """What the model returns, and the layers of the cache that comes with it."""
    from qpass.cache import CACHE_ARGUMENT

    out = forward(**arguments, **{CACHE_ARGUMENT: cache}, use_cache=True, return_dict=True)
    return out, getattr(getattr(out, CACHE_ARGUMENT, None), "layers", [])


def _cache_of(past: Sequence[Tensor]) -> Any:
    """A cache that holds the given keys and values as they are."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device, layer.keys, layer.values = keys.dtype, keys.device, keys, values
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


# --- other modules ------------------------------------------------------------------------------------------------------


def _example(model: nn.Module, inputs: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments by name; those of size 1 along the first dimension twice, so that the batch is dynamic."""
    takes = inspect.signature(model.forward).parameters
    if inputs is None and "input_ids" in takes:
        inputs = getattr(model, "dummy_inputs", None)
    if inputs is None:
        raise QpassError(f"{type(model).__name__}: pass inputs=... (a tensor, a tuple or a dict of its arguments)")
    if not isinstance(inputs, Mapping):
        values = inputs if isinstance(inputs, tuple | list) else (inputs,)
        if len(values) > len(takes):
            raise QpassError(f"{type(model).__name__}: {len(values)} inputs, but forward takes {', '.join(takes)}")
        inputs = dict(zip(takes, values, strict=False))
    wrong = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if wrong:
        raise QpassError(f"{type(model).__name__}: inputs[{wrong[0]!r}] is no tensor; an ONNX graph takes tensors")
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    same = {t.shape[0] for t in inputs.values() if t.dim()}
    return {n: t.repeat(2, *[1] * (t.dim() - 1)) if same == {1} and t.dim() > 1 else t for n, t in inputs.items()}


def _named(out: Any) -> dict[str, Tensor]:
    """The tensors that a model returns, by name."""
    if isinstance(out, Tensor):
        return {"output": out}
    items = out.items() if isinstance(out, Mapping) else ((f"output_{i}", value) for i, value in enumerate(out))
    return {str(name): value for name, value in items if isinstance(value, Tensor)}

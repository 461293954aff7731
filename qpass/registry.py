"""Backends by name and by options, and the backend behind a model: what `backend=qpass` and `report(model)` look up."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qpass.backend import BACKENDS, Capture, QPass
from qpass.errors import QpassError, nearest
from qpass.graph.torch_private import backend_of, errors_through_dynamo, original_module
from qpass.recipe import resolve_recipe
from qpass.store import anchor

#: Programs that were quantized: (report, diff), made once.
FINISHED: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_OPTIONS = ("recipe", "strict", "inner", "mode")
_instances: dict[tuple[Any, ...], QPass] = {}
_instances_lock = threading.Lock()


def backend_for(options: Mapping[str, Any] | None = None, mode: str | None = None) -> QPass:
    """The QPass behind `backend=qpass` with these torch.compile options: one for equal options."""
    options = dict(options or {})
    unknown = [k for k in options if k not in _OPTIONS]
    if unknown:
        raise QpassError(f"unknown option {unknown[0]!r}: {nearest(unknown[0], _OPTIONS)}")
    if mode is not None:
        options.setdefault("mode", mode)
    options["recipe"] = resolve_recipe(options.get("recipe", "int8"))
    key = tuple(sorted(options.items()))
    with _instances_lock:
        if key not in _instances:
            _instances[key] = QPass(**options)
        return _instances[key]


def dynamo_backend(gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend registered as "qpass", and what `backend=qpass` calls. Options: recipe, strict, inner, mode."""
    with errors_through_dynamo():
        return backend_for(kwargs.get("options"), kwargs.get("mode"))(gm, inputs)


def captured(x: Any, asker: str) -> QPass:
    """The backend behind a QPass, a compiled model or a plain one; the one used last, if several saw the model.

    Raises `QpassError`, in the name of `asker`, if none has captured anything.
    """
    given = backend_of(x)
    model = original_module(x)
    if isinstance(x, QPass) or isinstance(given, QPass):
        found = [x if isinstance(x, QPass) else given]
    else:
        params = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
        found = [b for b in BACKENDS if any(b.decisions.of(p) is not None for p in params)]
    found = sorted((b for b in found if b.captures or len(b.decisions)), key=lambda b: b.last_used)
    if found:
        return found[-1]
    raise QpassError(
        f"{asker}: nothing was captured yet: call the compiled model once. Was .generate called on torch.compile's wrapper? "
        "That runs the plain module: use model.compile(backend=qpass) or qpass.quantize(model) instead"
    )


def captures_of(x: Any, backend: QPass) -> list[Capture]:
    """The captures of `backend` in which Parameters of the model `x` take part; all of them if `x` is no model."""
    model = original_module(x)
    if not isinstance(model, torch.nn.Module):
        return backend.captures
    anchors = {id(anchor(p)) for p in model.parameters()}
    return [c for c in backend.captures if any(id(ref()) in anchors for ref in c.parameters)]

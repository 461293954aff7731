"""The last step of quantizing and of loading: a module of QTensors is compiled in place, and generate prepared."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from qpass.backend import QPass
from qpass.decisions import Decision
from qpass.graph.torch_private import compile_in_place
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from qpass.structure import Structure, needed_guards, watched

#: Attribute of a module: the recipe that its weights were quantized by, whatever compiles it, or a copy of it, later.
RECIPE = "_qpass_recipe"
#: What else is done to a finished module.
ON_FINISH: list[Callable[[nn.Module], None]] = []


def finish(module: nn.Module, backend: QPass) -> nn.Module:
    """Have calls of `module`, whose weights are QTensors, compiled by `backend`; returns it."""
    structure = Structure(module)
    backend.structure = weakref.ref(structure)
    call = compile_in_place(module, backend, partial(needed_guards, backend.structure))
    module._compiled_call_impl = watched(call, structure)
    module.__dict__[RECIPE] = backend.recipe
    module._apply = _ApplyToFreshParameters(module, backend)  # type: ignore[method-assign]
    _prepare_generate(module, backend.recipe)
    for also in ON_FINISH:
        also(module)
    return module


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

    def __init__(self, model: nn.Module, backend: QPass) -> None:
        self.model = model
        self.backend: QPass | None = backend

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model is not compiled, and has no backend."""
        return {"model": self.model, "backend": None}

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        fresh: dict[int, nn.Parameter] = {}
        decided: list[tuple[nn.Module, str, Decision | None]] = []
        for module in self.model.modules():
            for name, param in module._parameters.items():
                if isinstance(param, QTensor):
                    if id(param) not in fresh:
                        fresh[id(param)] = nn.Parameter(param.detach(), requires_grad=False)
                    decided.append((module, name, self.backend.decisions.of(param) if self.backend else None))
                    module._parameters[name] = fresh[id(param)]
        done: nn.Module = type(self.model)._apply(self.model, fn, recurse)
        for module, name, decision in decided:
            param = module._parameters[name]
            if self.backend is not None and decision is not None and param is not None:
                self.backend.decisions.adopt(param, decision)
        return done

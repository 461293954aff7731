"""Calibration data of qpass.quantize: the calls of a model, recorded as the graphs that they are captured in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qpass.backend import QPass
from qpass.errors import QpassError
from qpass.graph.torch_private import copy_captured, errors_through_dynamo, is_graph_fragment, isolated
from qpass.passes import parameter_nodes
from qpass.replay import Program, Run

#: Token ids [B, S], or the arguments of a call by name.
Batch = Tensor | Mapping[str, Any]


class _Recorded(Exception):
    """Ends a call whose whole graph is known: nothing need be computed."""


def record(model: nn.Module, backend: QPass, batches: Iterable[Batch]) -> list[Run]:
    """The calls `model(batch)`, captured but not computed (where the graph breaks: computed in float), as runs from the start.

    Raises `QpassError` if there is no batch, or one is no tensor and no mapping.
    """
    runs: list[Run] = []
    mask: Tensor | None = None

    def capture(captured: GraphModule, args: Sequence[Any]) -> Any:
        module, fragment = copy_captured(captured), is_graph_fragment(captured)
        with errors_through_dynamo():
            plan = backend.plan_graph(module, args)
        program = Program.of(module, plan, parameter_nodes(module, args))

        def call(*given: Any) -> Any:
            runs.append(Run(program, given, mask))
            if not fragment:
                raise _Recorded
            return captured.forward(*given)

        return call

    compiled = torch.compile(model, backend=capture, **isolated())
    with torch.no_grad(), _without_a_cache(model):
        for batch in batches:
            if not isinstance(batch, Tensor | Mapping):
                raise QpassError(
                    f"calibration: a batch is a {type(batch).__name__}; give token ids [batch, sequence] or a dict of arguments"
                )
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            with suppress(_Recorded):
                compiled(**batch) if isinstance(batch, Mapping) else compiled(batch)
    if not runs:
        raise QpassError("calibration: no batches; give token ids of shape [batch, sequence], or dicts of arguments")
    found = list(runs)
    runs.clear()  # Dynamo keeps `call`, which would keep every weight
    return found


@contextmanager
def _without_a_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model makes no cache, whose keys and values would be held to the end."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before  # type: ignore[union-attr]

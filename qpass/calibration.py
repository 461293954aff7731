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
from qpass.graph.torch_private import (
    as_plain_module,
    copy_captured,
    errors_through_dynamo,
    is_graph_fragment,
    isolated,
)
from qpass.module_state import OwnState
from qpass.passes import parameter_nodes
from qpass.replay import Program, Run

#: Token ids [B, S], or the arguments of a call by name.
Batch = Tensor | Mapping[str, Any]


class _Recorded(Exception):
    """Ends a call whose whole graph is known: nothing need be computed."""


def record(model: nn.Module, backend: QPass, batches: Iterable[Batch], own: OwnState) -> list[Run]:
    """The calls `model(batch)`, captured but not computed (where the graph breaks: computed in float), as runs from the start.

    `own`: keeps what such a call writes to. Raises `QpassError` if there is no batch, or one is no tensor and no mapping, or
    torch did not capture one.
    """
    runs: list[Run] = []
    mask: Tensor | None = None

    def capture(captured: GraphModule, args: Sequence[Any]) -> Any:
        module, fragment = copy_captured(captured), is_graph_fragment(captured)
        with errors_through_dynamo():
            plan = backend.plan_graph(module, args, keeping=True)
        program = Program.of(module, plan, parameter_nodes(module, args))

        def call(*given: Any) -> Any:
            runs.append(Run(program, program.arguments(given), mask))
            if not fragment:
                raise _Recorded
            own.see(module.graph, given, [])
            return captured.forward(*given)

        return call

    compiled = torch.compile(model, backend=capture, **isolated())
    with torch.no_grad(), _without_a_cache(model), as_plain_module(model):
        for i, batch in enumerate(batches):
            if not isinstance(batch, Tensor | Mapping):
                raise QpassError(
                    f"calibration: a batch is a {type(batch).__name__}; give token ids [batch, sequence] or a dict of arguments"
                )
            mask = _mask_of(batch)
            before = len(runs)
            with suppress(_Recorded):
                compiled(**batch) if isinstance(batch, Mapping) else compiled(batch)
            if len(runs) == before:
                raise QpassError(
                    f"calibration: batch {i} was not captured: past its limit of recompilations torch runs further kinds of "
                    "calls eagerly; give batches of one shape and the same arguments"
                )
    if not runs:
        raise QpassError("calibration: no batches; give token ids of shape [batch, sequence], or dicts of arguments")
    found = list(runs)
    runs.clear()  # Dynamo keeps `call`, which would keep every weight
    return found


def _mask_of(batch: Batch) -> Tensor | None:
    """Which tokens count; all of an encoder-decoder model, whose two sequences have masks of their own."""
    if not isinstance(batch, Mapping) or "decoder_input_ids" in batch:
        return None
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


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

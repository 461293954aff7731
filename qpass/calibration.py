"""Calibration data: the calls of a model, recorded as the graphs that they are captured in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qpass.errors import QpassError
from qpass.graph.torch_private import (
    as_plain_module,
    captured_code,
    copy_captured,
    errors_through_dynamo,
    is_argument,
    is_graph_fragment,
    isolated,
)
from qpass.module_state import OwnState
from qpass.passes import parameter_nodes
from qpass.replay import Program, Run
from qpass.sites.core import Plan

#: Token ids [B, S], or the arguments of a call by name.
Batch = Tensor | Mapping[str, Any]
#: What calibration takes: batches, token ids [N, S], or text files.
Data = Iterable[Any] | Tensor | np.ndarray | str | Path
#: Of a text: tokens of a window, windows that are used, and of token ids: rows of a batch.
WINDOW, WINDOWS, ROWS = 1024, 32, 4
#: What separates the documents of a text file.
_END = "<|endoftext|>"


def batches_of(data: Data, model: nn.Module) -> Iterable[Batch]:
    """Batches for `model`: of a DataLoader or any iterable, those that it gives; of token ids [N, S], some rows each; of text
    files (documents apart by lines of <|endoftext|>), WINDOWS evenly picked windows of WINDOW tokens, by the model's tokenizer.

    Raises `QpassError` for a file that is not there or too short, ids that are no matrix, a model without tokenizer.
    """
    if isinstance(data, str | Path):
        return _windows([data], model)
    if isinstance(data, list | tuple) and data and all(isinstance(d, Path) for d in data):
        return _windows(data, model)
    if isinstance(data, Tensor | np.ndarray):
        ids = torch.as_tensor(data)
        if ids.dim() != 2 or ids.is_floating_point():
            raise QpassError(
                f"calibration: ids of shape {list(ids.shape)}, {ids.dtype}; give token ids [windows, tokens]"
            )
        return ids.long().to(_device(model)).split(ROWS)
    return (_batch(item) for item in data)


def _batch(item: Any) -> Batch:
    """What a DataLoader of ids gives: a list of one tensor."""
    if isinstance(item, list | tuple) and len(item) == 1:
        item = item[0]
    return torch.as_tensor(item).long() if isinstance(item, np.ndarray) else item


def _windows(files: Sequence[str | Path], model: nn.Module) -> list[Tensor]:
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "name_or_path", "")
    texts = []
    for file in files:
        if not Path(file).is_file():
            raise QpassError(f"calibration: {file} is no file; give a text file, token ids, or batches")
        texts += Path(file).read_text().split(f"{_END}\n")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise QpassError(
            f"calibration: no tokenizer beside the model ({name or 'it has no name_or_path'}); give token ids"
        ) from error
    most = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    rows = [
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts if text.strip()
    ]
    windows = [row[i : i + most] for row in rows for i in range(0, len(row) - most + 1, most)]
    if not windows:
        raise QpassError(
            f"calibration: {', '.join(map(str, files))}: no document of {most} tokens; give more text, or token ids"
        )
    count = min(WINDOWS, len(windows))
    return [windows[i * len(windows) // count][None].to(_device(model)) for i in range(count)]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class Planner(Protocol):
    """What plans a captured graph: the backend."""

    def plan_graph(self, gm: GraphModule, inputs: Sequence[Any], keeping: bool = False) -> Plan:
        """See QPass."""


class NothingLeft(Exception):
    """Ends a call whose whole graph is known: nothing need be computed."""


def record(model: nn.Module, backend: Planner, batches: Iterable[Batch], own: OwnState) -> list[Run]:
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
            runs.append(Run(program, given, mask))
            if not fragment:
                raise NothingLeft
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
            mask = mask_of(batch)
            before = len(runs)
            with suppress(NothingLeft):
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


def mask_of(batch: Batch) -> Tensor | None:
    """Which tokens count; all of an encoder-decoder model, whose two sequences have masks of their own."""
    if not isinstance(batch, Mapping) or "decoder_input_ids" in batch:
        return None
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


@dataclass
class Recording:
    """Calls between the start and the end of `QPass.calibrate`, and the code that was captured for them."""

    runs: list[Run] = field(default_factory=list)
    codes: set[CodeType] = field(default_factory=set)

    def of_graph(self, captured: GraphModule, inputs: Sequence[Any], backend: Planner) -> Callable[..., Any]:
        """A captured graph in float whose calls are recorded. Tokens that argument attention_mask leaves out do not count."""
        module = copy_captured(captured)
        plan = backend.plan_graph(module, inputs)
        program = Program.of(module, plan, parameter_nodes(module, inputs))
        placeholders = captured.graph.find_nodes(op="placeholder")
        masks = [i for i, node in enumerate(placeholders) if is_argument(node, "attention_mask")]
        code = captured_code()
        if code is not None:
            self.codes.add(code)

        def call(*given: Any) -> Any:
            mask = given[masks[0]] if masks and isinstance(given[masks[0]], Tensor) else None
            self.runs.append(Run(program, given, mask))
            with torch.no_grad():
                return captured.forward(*given)

        return call


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

"""Calibration data: the calls of a model, recorded as the graphs that they are captured in."""

from __future__ import annotations

import math
import threading
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
from qpass.graph.expand import expand
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
from qpass.pretrained import load_tokenizer
from qpass.programs import Program, Run, tokens_of
from qpass.replay import BUDGET, Key
from qpass.sites.core import Plan
from qpass.texts import check_text, tokenized
from qpass.weights import memory_of

#: Token ids [B, S], or the arguments of a call by name.
Batch = Tensor | Mapping[str, Any]
#: What calibration takes: batches, token ids [N, S], or text files.
Data = Iterable[Any] | Tensor | np.ndarray | str | Path
#: Of a text: tokens of a window, windows that are used, and of token ids: rows of a batch.
WINDOW, WINDOWS, ROWS = 1024, 32, 4


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
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    for file in files:
        check_text(file)
    try:
        tokenizer = load_tokenizer(name)
    except QpassError as error:
        raise QpassError(
            f"calibration: no tokenizer beside the model ({name or 'it has no name_or_path'}); give token ids"
        ) from error
    most = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    rows = [row for file in files for row in tokenized(file, tokenizer)]
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
            check_recorded(runs)
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
class Seen:
    """What reached the weights of a site in the calls so far. `bad_call`: the first whose numbers were not all finite."""

    site: str
    tokens: int = 0
    low: float = math.inf
    high: float = -math.inf
    calls: int = 0
    bad_call: int | None = None

    def add(self, x: Tensor) -> None:
        """Take in tokens [tokens, K] of one more call."""
        call, self.calls = self.calls, self.calls + 1
        self.tokens += len(x)
        if not x.numel():
            return
        low, high = (float(end) for end in torch.aminmax(x))
        if math.isfinite(low) and math.isfinite(high):
            self.low, self.high = min(self.low, low), max(self.high, high)
        elif self.bad_call is None:
            self.bad_call = call


class Observer(nn.Module):
    """A node of a graph that runs inside of `QPass.calibrate`: what the weights of a site multiply passes it.

    `into`: where it is kept, which belongs to the site and is shared by all graphs; `mask`: of the call that runs.
    """

    def __init__(self, columns: bool) -> None:
        super().__init__()
        self.columns, self.into = columns, Seen("")
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        self.into.add(tokens_of(x.detach().mT if self.columns else x.detach(), self.mask))


@dataclass
class Recording:
    """Calls between the start and the end of `QPass.calibrate`, what their observers saw, and the code captured for them."""

    mask: str = "attention_mask"
    runs: list[Run] = field(default_factory=list)
    codes: set[CodeType] = field(default_factory=set)
    seen: dict[Key, Seen] = field(default_factory=dict)
    graphs: list[GraphModule] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def of_graph(self, captured: GraphModule, inputs: Sequence[Any], backend: Planner) -> Callable[..., Any]:
        """A captured graph in float with observers, whose calls are recorded. Tokens that the mask leaves out do not count."""
        module = copy_captured(captured)
        plan = backend.plan_graph(module, inputs)
        program = Program.of(module, plan, parameter_nodes(module, inputs))
        placeholders = captured.graph.find_nodes(op="placeholder")
        masks = [i for i, node in enumerate(placeholders) if is_argument(node, self.mask)]
        code = captured_code()
        if code is not None:
            self.codes.add(code)

        observed, observers = _with_observers(captured, program)
        self.graphs.append(observed)

        def call(*given: Any) -> Any:
            mask = given[masks[0]] if masks and isinstance(given[masks[0]], Tensor) else None
            with self.lock, torch.no_grad():
                run = Run(program, given, mask)
                for stop, observer in zip(program.stops, observers, strict=True):
                    key = tuple(memory_of(run.weights[w]) for w in stop.weights)
                    observer.into = self.seen.setdefault(key, Seen(stop.group.names[0]))
                    observer.mask = mask
                self.runs.append(run)
                check_recorded(self.runs)
                return observed.forward(*given)

        return call

    def check(self) -> None:
        """Raises `QpassError` for calls that nothing can be learnt from, before any weight is touched."""
        if not self.runs:
            raise QpassError("calibrate: no call of the compiled model inside of the block")
        for seen in self.seen.values():
            if seen.bad_call is not None:
                raise QpassError(
                    f"{seen.site}: its input in calibration call {seen.bad_call} holds NaN or inf; leave that batch out, or run "
                    "the model in a wider type"
                )


def _with_observers(captured: GraphModule, program: Program) -> tuple[GraphModule, list[Observer]]:
    """A copy of a captured graph with an observer before each of the program's stops."""
    observed = copy_captured(captured)
    expand(observed)
    nodes = {node.name: node for node in observed.graph.nodes}
    observers = []
    for i, stop in enumerate(program.stops):
        observer = Observer(stop.columns)
        observed.add_module(f"observer_{i}", observer)
        with observed.graph.inserting_before(nodes[program.nodes[stop.at].name]):
            node = observed.graph.call_module(f"observer_{i}", (nodes[stop.x.name],))
        node.meta["label"] = stop.group.names[0]
        observers.append(observer)
    observed.recompile()
    return observed, observers


def check_recorded(runs: Sequence[Run]) -> None:
    """Raises `QpassError` if the inputs of the calls so far take more than the budget."""
    held = sum(run.nbytes for run in runs)
    if held > BUDGET:
        raise QpassError(
            f"calibration: the inputs of {len(runs)} calls take {held / 1e9:.1f} GB, more than {BUDGET / 1e9:.1f}; give fewer or "
            "shorter batches (a model with graph breaks holds activations)"
        )


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

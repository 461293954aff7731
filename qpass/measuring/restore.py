"""A quantized model against the float one, on the same tokens, with any of its sites in another form: what blame measures.

The float model is captured once. Its graph is walked with the weights as they come back from storage, so that a site is
restored by giving it its float weight, and computed anew only from the node that first reads it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qpass.backend import QPass
from qpass.calibration import Batch, mask_of, record
from qpass.errors import QpassError
from qpass.graph.calls import LinearCall
from qpass.graph.torch_private import as_plain_module, copy_captured, isolated
from qpass.measuring.evaluate import POSITIONS, ids_and_mask, kl_of, logits_of
from qpass.measuring.walk import Form, Script, State, Walk
from qpass.module_state import OwnState
from qpass.passes import parameter_nodes
from qpass.programs import Program
from qpass.progress import track
from qpass.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """What the float model says of a batch: log-probabilities [tokens, V] where `valid` [B, S - 1]."""

    valid: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, batch: Batch, logits: Tensor) -> Target:
        """`logits`: [B, S, V]."""
        _, mask = ids_and_mask(batch)
        valid = mask[:, 1:] & mask[:, :-1]
        return cls(valid, logits[:, :-1][valid].float().log_softmax(-1))

    def kl(self, logits: Tensor) -> float:
        """Sum of KL(float || this) over the tokens, in nats."""
        kept, total = logits[:, :-1][self.valid], 0.0
        for q, p in zip(kept.split(POSITIONS), self.log_p.split(POSITIONS), strict=True):
            total += float(kl_of(p, q.float().log_softmax(-1)).sum(dtype=torch.float64))
        return total


@dataclass
class Contrast:
    """A site's input and output in the quantized run against the float one: sums of squares, and whether numbers went bad."""

    name: str
    signal: list[float] = field(default_factory=lambda: [0.0, 0.0])
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])
    bad: bool = False

    def add(self, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
        """(input, output) of the float run and of the quantized one."""
        for i, (p, q) in enumerate(zip(theirs, ours, strict=True)):
            if p.is_floating_point() and p.shape == q.shape:
                self.signal[i] += float(p.float().square().sum(dtype=torch.float64))
                self.noise[i] += float((p.float() - q.float()).square().sum(dtype=torch.float64))
        self.bad |= bool(theirs[1].isfinite().all()) and not bool(ours[1].isfinite().all())

    @property
    def errors(self) -> tuple[float, float]:
        """Relative error of the input (0 for what is looked up) and of the output."""
        before, after = (math.sqrt(n / s) if s else 0.0 for n, s in zip(self.noise, self.signal, strict=True))
        return before, after


@dataclass
class Whole:
    """Batches whose graphs hold all of the model."""

    calls: list[tuple[Script, list[Any], Batch]]
    names: Mapping[int, str]
    targets: list[Target] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Predicted positions."""
        return sum(len(t.log_p) for t in self.targets)

    @property
    def caches(self) -> list[str]:
        """Keys of the caches that are read, in order of layers."""
        return list(dict.fromkeys(key for script, *_ in self.calls for key, _ in script.reads.values()))

    def _walks(self, state: State) -> Iterator[Walk]:
        for script, given, batch in self.calls:
            yield Walk(script, given, mask_of(batch), self.names, state)

    def aim(self, state: State) -> None:
        """What this state gives is what all others are compared with."""
        self.targets = [
            Target.of(b, _of_outputs(w, b)) for w, (*_, b) in zip(self._walks(state), self.calls, strict=True)
        ]

    def kl(self, state: State) -> float:
        """Mean KL a token."""
        walks = zip(self._walks(state), self.calls, self.targets, strict=True)
        return sum(t.kl(_of_outputs(w, b)) for w, (*_, b), t in walks) / self.tokens

    def changed(self, state: State, forms: State) -> tuple[float, dict[str, float]]:
        """KL of a state, and with each of `forms` by itself: computed from its first use on."""
        total, each = 0.0, dict.fromkeys(forms, 0.0)
        steps = [(i, key) for i in range(len(self.calls)) for key in (*forms, None)]
        bar = iter(track(steps, "qpass: blame"))
        for walk, (*_, batch), target in zip(self._walks(state), self.calls, self.targets, strict=True):
            first = walk.first_reads()
            used = sorted((key for key in forms if key in first), key=lambda k: first[k])
            for key in used:
                next(bar)
                walk.before(first[key])
                each[key] += target.kl(_of_outputs(walk.fork({**state, key: forms[key]}), batch))
            kl = target.kl(_of_outputs(walk, batch))
            total += kl
            for key in forms.keys() - set(used):
                each[key] += kl
                next(bar)
            next(bar)
        next(bar, None)
        return total / self.tokens, {key: kl / self.tokens for key, kl in each.items()}

    def contrasts(self, floats: State, state: State) -> list[Contrast]:
        """Every site, in the order of the data."""
        found: dict[str, Contrast] = {}
        for theirs, ours in zip(self._walks(floats), self._walks(state), strict=True):
            for number, node in enumerate(theirs.program.nodes):
                match = theirs.script.matches.get(node)
                if match is None or match.weight not in theirs.names:
                    continue
                x = match.call.x if isinstance(match.call, LinearCall) else match.call.indices
                both: list[tuple[Any, Any]] = []
                for walk in (theirs, ours):
                    walk.before(number)
                    before = walk.value(x)
                    walk.before(number + 1)
                    both.append((before, walk.values.get(node)))
                if all(isinstance(pair[1], Tensor) for pair in both):
                    name = theirs.names[match.weight]
                    found.setdefault(name, Contrast(name)).add(*both)
        return list(found.values())


def _of_outputs(walk: Walk, batch: Batch) -> Tensor:
    """The logits [B, S, V] among what a graph returns."""
    shape = ids_and_mask(batch)[0].shape
    returned = torch.utils._pytree.tree_leaves(walk.outputs())
    fitting = [v for v in returned if isinstance(v, Tensor) and v.dim() == 3 and v.shape[:2] == shape]
    if not fitting:
        raise QpassError("qpass.blame: the model returns no logits of shape [batch, sequence, vocabulary]")
    return max(fitting, key=lambda v: v.shape[-1])


class Pieces:
    """Batches of a model with graph breaks: a float copy of it is called anew for every form, its graphs walked one by one."""

    def __init__(self, reference: nn.Module, batches: Sequence[Batch], site_of: Mapping[str, str]) -> None:
        self.model, self.batches = copy.deepcopy(reference), batches
        self.parameters = [(site_of[n], p) for n, p in self.model.named_parameters(remove_duplicate=False)]
        self.names = {id(p): name for name, p in self.parameters}
        self.state: State = {}
        self.targets: list[Target] = []
        self.caches: list[str] = []
        self.seen: list[tuple[str, Any, Any]] = []
        self.watching = False
        backend = QPass(Recipe.uniform("int8"), inner="eager")

        def capture(captured: GraphModule, args: Sequence[Any]) -> Any:
            module = copy_captured(captured)
            plan = backend.plan_graph(module, args, keeping=True)
            script = Script.of(Program.of(module, plan, parameter_nodes(module, args)))
            return lambda *given: self._run(script, given)

        self.compiled = torch.compile(self.model, backend=capture, **isolated())

    def _run(self, script: Script, given: Sequence[Any]) -> Any:
        walk = Walk(script, given, None, self.names, self.state)
        if self.watching:
            for number, node in enumerate(script.program.nodes):
                match = script.matches.get(node)
                if match is not None and match.weight in walk.names:
                    walk.before(number)
                    x = walk.value(match.call.x if isinstance(match.call, LinearCall) else match.call.indices)
                    walk.before(number + 1)
                    self.seen.append((walk.names[match.weight], x, walk.values.get(node)))
        return walk.outputs()

    @property
    def tokens(self) -> int:
        """Predicted positions."""
        return sum(len(t.log_p) for t in self.targets)

    def _logits(self, state: State) -> Iterator[Tensor]:
        self.state = state
        for name, param in self.parameters:  # torch runs some pieces eagerly, and there is no walk there
            form = state.get(name)
            if isinstance(form, Form):
                param.data = form.floats
        with as_plain_module(self.model):
            for batch in self.batches:
                yield logits_of(self.compiled, batch)

    def aim(self, state: State) -> None:
        """See `Whole`, here and below."""
        self.targets = [Target.of(b, x) for b, x in zip(self.batches, self._logits(state), strict=True)]

    def kl(self, state: State) -> float:
        """Mean KL a token."""
        return sum(t.kl(x) for t, x in zip(self.targets, self._logits(state), strict=True)) / self.tokens

    def changed(self, state: State, forms: State) -> tuple[float, dict[str, float]]:
        """KL of a state, and with each of `forms` by itself."""
        return self.kl(state), {key: self.kl({**state, key: forms[key]}) for key in track(list(forms), "qpass: blame")}

    def contrasts(self, floats: State, state: State) -> list[Contrast]:
        """Every site, in the order of the data, on the first batch."""
        both, self.watching = [], True
        for each in (floats, state):
            self.seen = []
            next(self._logits(each))
            both.append(self.seen)
        self.seen, self.watching = [], False
        found: dict[str, Contrast] = {}
        for (name, *theirs), (_, *ours) in zip(*both, strict=True):
            if isinstance(theirs[1], Tensor):
                found.setdefault(name, Contrast(name)).add(theirs, ours)
        return list(found.values())


def captured_once(
    reference: nn.Module, batches: Sequence[Batch], calls: Sequence[Batch], site_of: Mapping[str, str]
) -> Whole | Pieces:
    """The float model, captured for all of `calls`: `batches`, with caches where these are measured. `site_of`: a Parameter's
    name -> its site's, which tied ones share."""
    own = OwnState(reference)
    try:
        runs = record(reference, QPass(Recipe.uniform("int8"), inner="eager"), calls, own)
    finally:
        own.undo()
    if len(runs) != len(batches) or any(run.program.fragment for run in runs):
        return Pieces(reference, batches, site_of)
    scripts: dict[int, Script] = {}
    made, window = [], max((_window(call) for call in calls), default=0)
    for run, batch in zip(runs, batches, strict=True):
        script = scripts.setdefault(id(run.program), Script.of(run.program, window))
        values = {**run.weights, **run.values}
        made.append((script, [values[n] for n in run.program.nodes if n.op == "placeholder"], batch))
    names = {id(p): site_of[name] for name, p in reference.named_parameters(remove_duplicate=False)}
    return Whole(made, names)


def _window(call: Batch) -> int:
    """Tokens that its cache keeps in float."""
    layers = getattr(call.get("past_key_values"), "layers", ()) if isinstance(call, Mapping) else ()
    return max((getattr(layer, "window", 0) for layer in layers), default=0)

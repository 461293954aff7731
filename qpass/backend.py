"""The torch.compile backend: capture -> sites -> plan -> passes -> Inductor, and what it remembers of each model."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.bits import with_bits
from qpass.bundles import BundleInput, bundle_weights, input_sources
from qpass.calibration import Recording, Seen
from qpass.calling import Arguments, Held, Lookup, run_as_inference
from qpass.decisions import Decisions
from qpass.errors import QpassError
from qpass.graph.expand import expand
from qpass.graph.torch_private import (
    captured_code,
    check_inner,
    compile_inner,
    compiled_call,
    copy_captured,
    copy_graph,
    errors_through_dynamo,
    fake_like,
    fake_parts_of,
    fake_static,
    forget_code,
    frame_key,
    is_graph_fragment,
    pass_no_more,
    source_name,
    uses_cuda_graphs,
)
from qpass.graph.vocabulary import DROPOUTS, SDPA, argument, op_name, value_of
from qpass.made_caches import keep, made_and_changed
from qpass.module_state import hold_parts, restored
from qpass.observers import InputStats
from qpass.ops.cpu.library import bind
from qpass.passes import (
    Convert,
    GraphInput,
    StateInput,
    clean,
    fuse,
    parameter_nodes,
    run_passes,
    share_key_heads,
)
from qpass.programs import Run
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.ready import check_ready
from qpass.recipe import Recipe, resolve_recipe
from qpass.replay import places_of, quantize_in_order
from qpass.site_planner import SitePlanner
from qpass.sites.core import Edit, Plan
from qpass.sites.group import WeightGroup, group_weights
from qpass.sites.once import keep_readers_apart, share_masks
from qpass.sites.row import join_calls
from qpass.sites.written import write_out_products
from qpass.store import Kept, WeightStore, anchor, quantize_group
from qpass.structure import Structure
from qpass.weights import as_rows, check_weight

#: Every backend alive, so that `report(model)` finds the one that compiled it. Weak: nothing is kept by being listed.
BACKENDS: weakref.WeakSet[QPass] = weakref.WeakSet()
_clock = itertools.count(1)


@dataclass(frozen=True)
class Capture:
    """One graph that went through the pipeline: before and after, with what was found and done.

    `fragment`: it ends or begins at a graph break, so other parts of the model may run eagerly.
    """

    before: Graph
    after: Graph
    plan: Plan
    edits: tuple[Edit, ...]
    frame: str | None
    fragment: bool = False
    parameters: tuple[weakref.ref[Any], ...] = field(repr=False, default=())


class QPass:
    """A torch.compile backend that quantizes what it captures.

    `recipe`: a preset name, a spec for every weight, a mapping, a YAML file or a Recipe. `strict`: a site that stays in
    float although the recipe gives it a format is an error. `inner`: what compiles the rest ("inductor", "aot_eager",
    "eager"). `mode`: Inductor's mode. Raises `QpassError` for a recipe or an inner backend that does not exist.
    """

    def __init__(
        self,
        recipe: str | Path | Recipe | Mapping[str, Any] = "int8",
        strict: bool = False,
        inner: str = "inductor",
        mode: str | None = None,
    ) -> None:
        self.planner = SitePlanner(resolve_recipe(recipe), strict)
        self.inner, self.mode = inner, mode
        self._given = recipe
        check_inner(inner)
        self.store = WeightStore()
        self.captures: list[Capture] = []
        self.last_used = 0
        self._ready: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._lock = threading.RLock()
        #: Code that was captured; what is recorded between the start and the end of `calibrate`.
        self._codes: set[CodeType] = set()
        self._recording: Recording | None = None
        self.calibrated_in_pieces = False
        #: What the observers of the last `calibrate` saw, site by site.
        self.observed: tuple[Seen, ...] = ()
        #: Of the module that it compiles, and no other; while that lives.
        self.structure: weakref.ref[Structure] | None = None
        BACKENDS.add(self)

    @property
    def options(self) -> tuple[Recipe, bool, str, str | None]:
        """What it was made with: backends of equal options do the same."""
        return self.recipe, self.planner.strict, self.inner, self.mode

    @property
    def recipe(self) -> Recipe:
        """What each site gets. Of a preset it may be another one with calibration data: `use_data`."""
        return self.planner.recipe

    @property
    def decisions(self) -> Decisions:
        """What was decided for each Parameter."""
        return self.planner.decisions

    def __repr__(self) -> str:
        return f"QPass({self.recipe.to_dict()}, inner={self.inner!r})"

    # --- called by torch.compile ----------------------------------------------------------------------------------

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """Compile one captured graph. `options`: torch.compile's own `mode`."""
        mode = options.pop("mode", None) or self.mode
        with errors_through_dynamo(), self._lock:
            if options:
                raise QpassError(
                    f"unknown option {sorted(options)[0]!r}: set recipe, strict, inner, mode on qpass.QPass(...)"
                )
            code = captured_code()
            if code is not None:
                self._codes.add(code)
            if self._recording is not None:
                return self._recording.of_graph(gm, inputs, self)
            return self._convert(gm, inputs, mode)

    def use_data(self) -> None:
        """There will be calibration data: a preset that has another recipe for then is that from here on."""
        self.planner = self.planner.for_data(resolve_recipe(self._given, calibrated=True))

    @contextmanager
    def calibrate(self, mask: str = "attention_mask") -> Iterator[QPass]:
        """Inside of it calls run in float and are recorded; leaving it quantizes the weights on them, and the next call runs
        quantized. The calls are replayed then: their inputs are held until the end, those that the graph writes to as copies.

        `mask`: the name of the argument that says which tokens [B, S] count. Raises `QpassError` at the end if there was no
        call; what `qpass.quantize` with calibration raises.
        """
        if self._recording is not None:
            raise QpassError("calibrate: inside of calibrate; leave the first block before the next")
        for code in self._codes:
            forget_code(code)
        before = self.planner
        self.use_data()
        self._recording = recording = Recording(mask)
        done = False
        try:
            yield self
            self.observed = tuple(recording.seen.values())
            recording.check()
            self.begin_calibration(recording.runs)
            places = places_of(recording.runs)
            quantize_in_order(recording.runs, places, self.choose)
            done = True
        finally:
            if not done:
                self.planner = before
            self._recording = None
            recording.runs.clear()
            for code in recording.codes:
                forget_code(code)

    def begin_calibration(self, runs: Sequence[Run], kept: Kept | None = None) -> None:
        """Decide the formats of weights by recorded calls, if the recipe says `bits`. `kept`: may know what comes of it."""
        self.calibrated_in_pieces |= any(run.program.fragment for run in runs)
        if self.recipe.bits is not None:
            kept = kept or Kept()
            kept.keep_bits(with_bits(runs, self.recipe.bits, self.decisions, kept.bits()))

    def choose(self, group: WeightGroup, params: list[Tensor], stats: InputStats | None) -> list[QTensor]:
        """Quantize float weights that stay where they are, for the graphs that will be captured."""
        if any(isinstance(p, QTensor) for p in params):
            raise QpassError(f"{group.names[0]}: calibrate: the weight is quantized already; load the float model")
        rows = [as_rows(p.detach(), t) for p, t in zip(params, group.transposed, strict=True)]
        for row, name in zip(rows, group.names, strict=True):
            check_weight(row, group.spec, name)
        done = quantize_group(rows, group.spec, stats)
        for param, made in zip(params, done, strict=True):
            self.store.choose(param, made)
        return [
            QTensor(made.quantized, group.spec, p.shape, p.dtype, t)
            for p, t, made in zip(params, group.transposed, done, strict=True)
        ]

    def plan_graph(self, gm: GraphModule, inputs: Sequence[Any], keeping: bool = False) -> Plan:
        """Find the sites of a captured graph and decide each; nothing is rewritten but torch's own attention layers, which
        are written out. `inputs`: the real arguments. `keeping`: caches that the module keeps will be quantized in it.

        A fragment between graph breaks is read in the light of the whole model, where that can be traced.
        """
        expand(gm)
        _refuse_training(gm, inputs)
        self.last_used = next(_clock)
        call = compiled_call()
        if call is not None and call[0] not in self._ready:
            check_ready(call[0], quantized=True)
            self._ready.add(call[0])
        fragment = is_graph_fragment(gm)
        if fragment and call is not None:
            self.planner.see_whole(*call)
        parameters = parameter_nodes(gm, inputs)
        names = {
            node: self.decisions.name(param) or source_name(node) or node.name for node, param in parameters.items()
        }
        held = self.planner.held_in_float(gm.graph, parameters, names, keeping)
        return self.planner.plan(gm.graph, parameters, names, fragment, held)

    def _convert(self, gm: GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
        bind()
        original = copy_captured(gm)
        expand(original)
        before = copy_graph(original.graph)
        order = {node.name: i for i, node in enumerate(original.graph.find_nodes(op="placeholder"))}
        held = hold_parts(original, inputs)
        plan = self.plan_graph(original, held.inputs)
        placeholders = {node.name: node for node in original.graph.find_nodes(op="placeholder")}
        parameters = parameter_nodes(original, held.inputs)
        groups = [group for group, _ in group_weights(plan, parameters)]
        lookups = {g: Lookup(self.store, g, order, partial(self.decisions.learn, plan=plan, group=g)) for g in groups}
        for lookup in track(list(lookups.values()), "qpass: quantizing"):
            lookup(inputs)

        def fake_parts(group: WeightGroup) -> list[Tensor | None]:
            reference = value_of(placeholders[group.weights[0]])
            return [None if p is None else fake_like(reference, p) for p in lookups[group](inputs)]

        result = run_passes(original, plan, [Convert(parameters, fake_parts), share_key_heads, fuse, clean])
        after = copy_graph(result.graph_module.graph)
        made = made_and_changed(result.graph_module.graph)
        if self.inner == "inductor":
            share_masks(result.graph_module)
        join_calls(result.graph_module)
        if self.inner == "inductor":  # others would make floats of the whole weight
            write_out_products(result.graph_module)
            keep_readers_apart(result.graph_module)
        bundle_weights(result.graph_module, lambda group: lookups[group].entry(inputs).of_qtensors, fake_static)
        sources = input_sources(result.graph_module, list(order))
        structure = None if self.structure is None else self.structure()
        read = {source for source in sources if isinstance(source, int)}
        kept = Held(len(inputs), {} if structure is None else structure.keepers(gm, inputs, read), structure)
        pick = Arguments(sources, lookups, kept)
        fakes = {i: fake_parts_of(inputs[i], inputs[i].parts) for i in pick.states}
        examples = [
            fake_static(value) if isinstance(source, GraphInput | BundleInput)
            else fakes[source.argument][source.part] if isinstance(source, StateInput)
            else value
            for value, source in zip(pick(inputs), sources, strict=True)
        ]  # fmt: skip
        with torch.no_grad():
            compiled = compile_inner(result.graph_module, examples, self.inner, mode)
        self.captures = [c for c in self.captures if any(ref() is not None for ref in c.parameters) or not c.parameters]
        refs = tuple(weakref.ref(anchor(p)) for p in parameters.values())
        self.captures.append(
            Capture(before, after, plan, (*held.edits, *result.edits), frame_key(gm), is_graph_fragment(gm), refs)
        )
        finish = [partial(keep, positions=made, lent=uses_cuda_graphs(self.inner, mode))] if made else []
        finish += [partial(restored, returned=held.returned)] if held.returned else []
        if kept.places:
            pass_no_more(gm, kept.places)
        return partial(run_as_inference, compiled, pick, finish)


def _refuse_training(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Raises for what only makes sense in training: active dropout, an input that asks for its gradient."""
    for node in gm.graph.nodes:
        active = op_name(node) in DROPOUTS and argument(node, 2, "training", True) and argument(node, 1, "p", 0.5)
        if active or (op_name(node) in SDPA and argument(node, 4, "dropout_p", 0.0)):
            raise QpassError(f"{node.name}: active dropout; qpass compiles for inference: call model.eval() first")
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        leaf = isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_leaf
        # After a graph break an input may be a Parameter's view.
        if leaf and value.requires_grad and value._base is None:
            told = "this input requires grad; qpass compiles for inference: pass input.detach()"
            raise QpassError(f"{node.name}: {told}")

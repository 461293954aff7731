"""The torch.compile backend: capture -> sites -> plan -> passes -> Inductor, and what it remembers of each model."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.algorithms import NEED_DATA
from qpass.calling import Arguments, Lookup, run_as_inference
from qpass.errors import QpassError, nearest
from qpass.graph.expand import expand
from qpass.graph.torch_private import (
    WeakIdKeyDictionary,
    check_inner,
    compile_inner,
    compiled_call,
    copy_captured,
    copy_graph,
    errors_through_dynamo,
    fake_like,
    fake_parts_of,
    fake_static,
    frame_key,
    is_graph_fragment,
    source_name,
)
from qpass.graph.vocabulary import DROPOUTS, SDPA, argument, op_name, value_of
from qpass.graph.whole import trace_whole
from qpass.module_state import find_held, hold_parts, restored
from qpass.ops.cpu.library import bind
from qpass.passes import (
    Convert,
    GraphInput,
    StateInput,
    clean,
    input_sources,
    parameter_nodes,
    run_passes,
    share_key_heads,
)
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.ready import check_ready
from qpass.recipe import Recipe, resolve_recipe
from qpass.sites.classify import Context
from qpass.sites.core import Edit, Match, Plan, Site, Skip
from qpass.sites.find import find_sites
from qpass.sites.group import WeightGroup, group_weights
from qpass.spec import QuantSpec, parse_spec
from qpass.store import WeightStore, anchor

#: Every backend alive, so that `report(model)` finds the one that compiled it. Weak: nothing is kept by being listed.
BACKENDS: weakref.WeakSet[QPass] = weakref.WeakSet()
_clock = itertools.count(1)
_KEPT_BY_MODULE = (
    "the module keeps a float cache: model = qpass.quantize(model, recipe) stores quantized what is there before a call"
)


@dataclass(frozen=True)
class Decision:
    """What was decided for one Parameter, once, for all graphs that use it: a spec, or the reason for none."""

    site: Site
    spec: QuantSpec | None
    skip: Skip | None = None
    note: str = ""


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
        self.recipe, self.strict, self.inner, self.mode = resolve_recipe(recipe), strict, inner, mode
        check_inner(inner)
        self.store = WeightStore()
        self.captures: list[Capture] = []
        self._decisions: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.last_used = 0
        #: Models that were captured in fragments -> the weight groups of the whole, if it could be traced.
        self._whole: weakref.WeakKeyDictionary[torch.nn.Module, list[WeightGroup] | None] = weakref.WeakKeyDictionary()
        self._ready: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._lock = threading.RLock()
        BACKENDS.add(self)

    @property
    def options(self) -> tuple[Recipe, bool, str, str | None]:
        """What it was made with: backends of equal options do the same."""
        return self.recipe, self.strict, self.inner, self.mode

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
            return self._convert(gm, inputs, mode)

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
        if fragment:
            self._see_whole()
        parameters = parameter_nodes(gm, inputs)
        names = {node: self._name(param) or source_name(node) or node.name for node, param in parameters.items()}
        held = self._held_in_float(gm.graph, parameters, names, keeping)
        return self.plan_parameters(gm.graph, parameters, names, fragment, held)

    def plan_parameters(
        self, graph: Graph, parameters: Mapping[Node, Tensor], names: dict[Node, str], fragment: bool = False,
        held: Sequence[Skip] = (),
    ) -> Plan:  # fmt: skip
        """The plan of a graph whose Parameters are known. `fragment`: it is not all of the model. `held`: what is known of
        caches that it holds and that stay in float."""
        plan = self._plan(graph, parameters, names, fragment)
        tried = {skip.site.name for skip in held}
        others = (s for s in plan.skipped if s.site.kind != "kv" or s.site.name not in tried)
        plan = replace(plan, skipped=(*others, *held))
        self._check_coverage(plan, fragment, len(parameters))
        return plan

    def _plan(
        self, graph: Graph, parameters: Mapping[Node, Tensor], names: dict[Node, str], fragment: bool = False
    ) -> Plan:
        context = Context(*self._tables(), fragment)
        matches, skips = find_sites(graph, parameters, names, context, self.recipe.k is not None)
        decided = [self._decide(match, parameters) for match in matches]
        matches = [replace(m, site=d.site) for m, d in zip(matches, decided, strict=True)]
        specs = {d.site: d.spec for d in decided if d.spec is not None}
        skips += list({d.site: d.skip for d in decided if d.skip is not None}.values())
        self._remember(skips, names, parameters)
        return Plan(tuple(m for m in matches if m.site in specs), specs, tuple(skips))

    def _held_in_float(
        self, graph: Graph, parameters: Mapping[Node, Tensor], names: Mapping[Node, str], keeping: bool
    ) -> list[Skip]:
        """Why the caches that the module keeps are floats; `keeping`: those that can be are quantized soon."""
        specs = self.recipe.kv_specs
        states, skips = find_held(graph, parameters, names, specs)
        if specs is None:
            sites = [state.site for state in states] + [skip.site for skip in skips]
            return [Skip(site, "the recipe leaves kv in float", expected=True) for site in sites]
        return skips + [Skip(state.site, _KEPT_BY_MODULE, expected=keeping) for state in states]

    def _see_whole(self) -> None:
        """Decide every site of the module being compiled from its whole graph, once, before its first fragment."""
        call = compiled_call()
        if call is None or call[0] in self._whole:
            return
        model, args, kwargs = call
        whole = trace_whole(model, args, kwargs)
        if whole is None and getattr(model, "dummy_inputs", None):
            whole = trace_whole(model, (), {**model.dummy_inputs, "use_cache": False})  # type: ignore[dict-item]
        groups = []
        if whole is not None:
            plan = self._plan(whole.graph, whole.parameters, whole.names)
            groups = [group for group, _ in group_weights(plan, whole.parameters)]
        self._whole[model] = groups or None

    @property
    def in_pieces(self) -> list[str]:
        """Classes of models captured in fragments whose whole graph could not be traced: kinds are those of each piece."""
        return [type(model).__name__ for model, groups in self._whole.items() if groups is None]

    def whole_groups(self, model: torch.nn.Module) -> list[tuple[WeightGroup, list[Tensor]]]:
        """The weight groups of a model seen as a whole because of graph breaks; nothing otherwise."""
        params = dict(model.named_parameters(remove_duplicate=False))
        return [(group, [params[name] for name in group.names]) for group in self._whole.get(model) or ()]

    def _convert(self, gm: GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
        original = copy_captured(gm)
        expand(original)
        before = copy_graph(original.graph)
        order = {node.name: i for i, node in enumerate(original.graph.find_nodes(op="placeholder"))}
        held = hold_parts(original, inputs)
        plan = self.plan_graph(original, held.inputs)
        placeholders = {node.name: node for node in original.graph.find_nodes(op="placeholder")}
        parameters = parameter_nodes(original, held.inputs)
        groups = [group for group, _ in group_weights(plan, parameters)]
        lookups = {g: Lookup(self.store, g, order, partial(self.learn, plan=plan, group=g)) for g in groups}
        for lookup in track(list(lookups.values()), "qpass: quantizing"):
            lookup(inputs)

        def fake_parts(group: WeightGroup) -> list[Tensor | None]:
            reference = value_of(placeholders[group.weights[0]])
            return [None if p is None else fake_like(reference, p) for p in lookups[group](inputs)]

        result = run_passes(original, plan, [Convert(parameters, fake_parts), share_key_heads, clean])
        after = copy_graph(result.graph_module.graph)
        sources = input_sources(result.graph_module, list(order))
        pick = Arguments(sources, lookups)
        bind()
        fakes = {i: fake_parts_of(inputs[i], inputs[i].parts) for i in pick.states}
        examples = [
            fake_static(value) if isinstance(source, GraphInput)
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
        finish = partial(restored, returned=held.returned) if held.returned else None
        return partial(run_as_inference, compiled, pick, finish)

    # --- decisions ------------------------------------------------------------------------------------------------

    def decision(self, param: Tensor) -> Decision | None:
        """What was decided for a Parameter; None if no captured graph held it."""
        return self._decisions.get(anchor(param))

    def decide_like(self, param: Tensor, sibling: Tensor, name: str) -> QuantSpec | None:
        """Decide for a Parameter that no graph holds as for one that stands in the same place of a sibling module."""
        known = self.decision(sibling)
        assert known is not None
        self.adopt(param, self._fresh(replace(known.site, name=name)))
        return self._decisions[anchor(param)].spec

    def known_parameters(self) -> list[tuple[Any, Decision]]:
        """(Parameter, or the contents of a QTensor; what was decided) for all that are alive."""
        return list(self._decisions.items())

    def learn(self, params: Sequence[Tensor], plan: Plan, group: WeightGroup) -> None:
        """Parameters that a compiled graph meets for the first time (one block's graph serves all blocks of its class)."""
        sites = {m.weight.name: m.site for m in plan.matches if m.weight is not None}
        for param, name in zip(params, group.weights, strict=False):
            if self.decision(param) is None:
                self.adopt(param, Decision(sites[name], group.spec))

    def _name(self, param: Tensor) -> str | None:
        known = self.decision(param)
        return None if known is None else known.site.name

    def adopt(self, param: Tensor, decision: Decision) -> None:
        """Take over a decision for a Parameter that replaces the one it was made for."""
        self._decisions[anchor(param)] = decision

    def _tables(self) -> tuple[frozenset[int], frozenset[int]]:
        """(rows, identities) of the embedding tables of all graphs so far; where torch runs a part eagerly, of its modules."""
        known = {id(p): d.site.shape[0] for p, d in self._decisions.items() if "embedding" in d.site.roles}
        for model in (model for model, plan in self._whole.items() if plan is None):
            tables = (m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
            known |= {id(anchor(table)): table.shape[0] for table in tables}
        return frozenset(known.values()), frozenset(known)

    def _decide(self, match: Match, parameters: Mapping[Node, Tensor]) -> Decision:
        if match.weight is None:  # a cache that is quantized already: the spec is in the call
            return Decision(match.site, parse_spec(match.call.specs[0]))
        param = parameters[match.weight]
        known = self.decision(param)
        if known is None:
            known = Decision(match.site, param.spec) if isinstance(param, QTensor) else self._fresh(match.site)
        elif known.site.kind == "linear" and match.site.kind != "linear" and known.spec is None:
            known = self._fresh(match.site)
        roles = tuple(dict.fromkeys(known.site.roles + match.site.roles))
        known = replace(known, site=replace(known.site, roles=roles))
        self.adopt(param, known)
        return known

    def _fresh(self, site: Site) -> Decision:
        kinds = [site.kind] + [r for r in ("embedding", "vocab") if r in site.roles and r != site.kind]
        specs = [self.recipe.spec_for(kind, site.name) for kind in kinds]
        if kinds == ["embedding"]:  # rows that are looked up: no input says which columns count
            specs = [
                spec and replace(spec, algorithms=tuple(a for a in spec.algorithms if a not in NEED_DATA))
                for spec in specs
            ]
        columns = site.shape[-1]
        spec = max(specs, key=lambda s: (99, 0.0) if s is None else (s.format.bits, s.effective_bits(columns)))
        note = f"tied: {' and '.join(kinds)} share one table in {spec or 'float'}" if len(set(specs)) > 1 else ""
        if spec is None:
            reason = note or f"the recipe leaves {site.kind} in float"
            return Decision(site, None, Skip(site, reason, expected=True), note)
        return Decision(site, spec, None, note)

    def _remember(self, skips: Sequence[Skip], names: Mapping[Node, str], parameters: Mapping[Node, Tensor]) -> None:
        """Keep for each Parameter why it stays in float, or what of it does beside its quantized uses."""
        by_name = {names[node]: param for node, param in parameters.items()}
        for skip in skips:
            param = by_name.get(skip.site.name)
            if param is None or skip.site.kind == "kv":
                continue
            known = self.decision(param)
            if known is None:
                self.adopt(param, Decision(skip.site, None, skip))
            elif known.spec is not None:
                self.adopt(param, replace(known, note=skip.reason))

    def _check_coverage(self, plan: Plan, fragment: bool, parameters: int) -> None:
        unexpected = [s for s in plan.skipped if not s.expected]
        if self.strict and unexpected:
            lines = "\n".join(f"  {s.site.kind} {s.site.name}: {s.reason}" for s in unexpected)
            raise QpassError(
                f"{unexpected[0].site.name}: stays in float ({len(unexpected)} sites, strict=True)\n{lines}"
            )
        names = [s.name for s in (*plan.specs, *(skip.site for skip in plan.skipped))]
        for glob, _ in self.recipe.overrides:
            if not fragment and not any(fnmatchcase(name, glob) for name in names):
                raise QpassError(f"recipe: override {glob!r}: no site has such a name; {nearest(glob, names)}")
        weights = [m for m in plan.matches if m.weight is not None]
        if not fragment and not weights:
            reasons = "".join(f"\n  {s.site.name}: {s.reason}" for s in plan.skipped)
            raise QpassError(
                f"nothing to quantize: no site of the captured graph ({parameters} Parameters) gets a format; "
                f"give the recipe a format for a kind that the model has{reasons}"
            )


def _refuse_training(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Raises for what only makes sense in training: active dropout, an input that asks for its gradient."""
    for node in gm.graph.nodes:
        active = op_name(node) in DROPOUTS and argument(node, 2, "training", True) and argument(node, 1, "p", 0.5)
        if active or (op_name(node) in SDPA and argument(node, 4, "dropout_p", 0.0)):
            raise QpassError(f"{node.name}: active dropout; qpass compiles for inference: call model.eval() first")
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        leaf = isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_leaf
        if (
            leaf and value.requires_grad and value._base is None
        ):  # a Parameter's view may be an input after a graph break
            raise QpassError(
                f"{node.name}: this input requires grad; qpass compiles for inference: pass input.detach()"
            )

"""The plan of a captured graph: its sites, what the recipe gives each, and why others stay in float."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qpass.bits import spread_bits
from qpass.decisions import Decision, Decisions
from qpass.errors import Breach, QpassError, nearest
from qpass.graph.whole import trace_whole
from qpass.module_state import find_held
from qpass.recipe import Recipe
from qpass.sites.classify import Context
from qpass.sites.core import Match, Plan, Skip
from qpass.sites.find import find_sites
from qpass.sites.group import WeightGroup, group_weights
from qpass.store import anchor

_KEPT_BY_MODULE = (
    "the module keeps a float cache: model = qpass.quantize(model, recipe) stores quantized what is there before a call"
)


class SitePlanner:
    """Plans graphs by one recipe, and remembers what it decided for each Parameter.

    `strict`: a site that stays in float although the recipe gives it a format is an error. `with_data`: calibration decides what
    the recipe leaves open.
    """

    def __init__(self, recipe: Recipe, strict: bool = False, with_data: bool = False) -> None:
        self.recipe, self.strict, self.with_data = recipe, strict, with_data
        #: What was decided for each Parameter.
        self.decisions = Decisions(recipe)
        #: Models that were captured in fragments -> the weight groups of the whole, if it could be traced.
        self._wholes: weakref.WeakKeyDictionary[torch.nn.Module, list[WeightGroup] | None] = weakref.WeakKeyDictionary()

    def for_data(self, recipe: Recipe) -> SitePlanner:
        """The same from here on with calibration data; with nothing decided, if `recipe` is another then."""
        planner = SitePlanner(recipe, self.strict, with_data=True)
        if recipe == self.recipe:
            planner.decisions, planner._wholes = self.decisions, self._wholes
        return planner

    def plan(
        self, graph: Graph, parameters: Mapping[Node, Tensor], names: dict[Node, str], fragment: bool = False,
        held: Sequence[Skip] = (),
    ) -> Plan:  # fmt: skip
        """The plan of a graph whose Parameters are known. `fragment`: it is not all of the model. `held`: what is known of
        caches that it holds and that stay in float. Raises `QpassError` where the recipe fits nothing, `Breach` if strict."""
        plan = self._plan(graph, parameters, names, fragment)
        tried = {skip.site.name for skip in held}
        others = (s for s in plan.skipped if s.site.kind != "kv" or s.site.name not in tried)
        plan = replace(plan, skipped=(*others, *held))
        self._check_coverage(plan, fragment, len(parameters))
        return plan

    def _plan(
        self, graph: Graph, parameters: Mapping[Node, Tensor], names: dict[Node, str], fragment: bool = False
    ) -> Plan:
        tables = self.decisions.tables()
        for model in self._in_pieces():  # torch runs parts of these eagerly
            weights = (m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
            tables |= {id(anchor(weight)): weight.shape[0] for weight in weights}
        context = Context(frozenset(tables.values()), frozenset(tables), fragment)
        matches, skips = find_sites(graph, parameters, names, context, self.recipe.k is not None)
        decided = [self.decisions.decide(match, parameters) for match in matches]
        if self.recipe.bits is not None and not self.with_data:
            first = _as_plan(matches, decided, skips)
            by_name = {node.name: tensor for node, tensor in parameters.items()}
            groups = [(g, [by_name[name] for name in g.weights]) for g, _ in group_weights(first, parameters)]
            spread_bits(groups, self.recipe.bits, self.decisions)
            decided = [self.decisions.decide(match, parameters) for match in matches]
        self.decisions.remember(skips, names, parameters)
        return _as_plan(matches, decided, skips)

    def held_in_float(
        self, graph: Graph, parameters: Mapping[Node, Tensor], names: Mapping[Node, str], keeping: bool
    ) -> list[Skip]:
        """Why the caches that the module keeps are floats; `keeping`: those that can be are quantized soon."""
        specs = self.recipe.kv_specs
        states, skips = find_held(graph, parameters, names, specs)
        if specs is None:
            sites = [state.site for state in states] + [skip.site for skip in skips]
            return [Skip(site, "the recipe leaves kv in float", expected=True) for site in sites]
        return skips + [Skip(state.site, _KEPT_BY_MODULE, expected=keeping) for state in states]

    def see_whole(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide every site of a module from its whole graph, once, before its first fragment."""
        if model in self._wholes:
            return
        whole = trace_whole(model, args, kwargs)
        if whole is None and getattr(model, "dummy_inputs", None):
            whole = trace_whole(model, (), {**model.dummy_inputs, "use_cache": False})  # type: ignore[dict-item]
        groups = []
        if whole is not None:
            plan = self._plan(whole.graph, whole.parameters, whole.names)
            groups = [group for group, _ in group_weights(plan, whole.parameters)]
        self._wholes[model] = groups or None

    @property
    def in_pieces(self) -> list[str]:
        """Classes of models captured in fragments whose whole graph could not be traced: kinds are those of each piece."""
        return [type(model).__name__ for model in self._in_pieces()]

    def _in_pieces(self) -> list[torch.nn.Module]:
        return [model for model, groups in self._wholes.items() if groups is None]

    def whole_groups(self, model: torch.nn.Module) -> list[tuple[WeightGroup, list[Tensor]]]:
        """The weight groups of a model seen as a whole because of graph breaks; nothing otherwise."""
        params = dict(model.named_parameters(remove_duplicate=False))
        return [(group, [params[name] for name in group.names]) for group in self._wholes.get(model) or ()]

    def _check_coverage(self, plan: Plan, fragment: bool, parameters: int) -> None:
        unexpected = [s for s in plan.skipped if not s.expected]
        if self.strict and unexpected:
            first = unexpected[0]
            others = "".join(f"\n  {s.site.kind} {s.site.name}: {s.reason}" for s in unexpected[1:])
            more = f"; so do {len(unexpected) - 1} more" if others else ""
            raise Breach(f"{first.site.name}: stays in float, {first.reason}{more} (strict=True){others}")
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


def _as_plan(matches: Sequence[Match], decided: Sequence[Decision], skips: Sequence[Skip]) -> Plan:
    matches = [replace(m, site=d.site) for m, d in zip(matches, decided, strict=True)]
    specs = {d.site: d.spec for d in decided if d.spec is not None}
    left = list({d.site: d.skip for d in decided if d.skip is not None}.values())
    return Plan(tuple(m for m in matches if m.site in specs), specs, (*skips, *left))

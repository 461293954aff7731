"""What is decided for each Parameter, once, for all graphs that use it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from qpass.algorithms.rounding import NEED_DATA
from qpass.graph.torch_private import WeakIdKeyDictionary
from qpass.qtensor import QTensor
from qpass.recipe import Recipe
from qpass.sites.core import Match, Plan, Site, Skip
from qpass.sites.group import WeightGroup
from qpass.spec import QuantSpec, parse_spec
from qpass.store import anchor


@dataclass(frozen=True)
class Decision:
    """What was decided for one Parameter, once, for all graphs that use it: a spec, or the reason for none. `final`: bits were
    given out to it."""

    site: Site
    spec: QuantSpec | None
    skip: Skip | None = None
    note: str = ""
    final: bool = False


class Decisions:
    """Parameter -> Decision, by identity, for as long as the Parameter lives."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._decisions: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __len__(self) -> int:
        return len(self._decisions)

    def of(self, param: Tensor) -> Decision | None:
        """What was decided for a Parameter; None if no captured graph held it."""
        return self._decisions.get(anchor(param))

    def like(self, param: Tensor, sibling: Tensor, name: str) -> QuantSpec | None:
        """Decide for a Parameter that no graph holds as for one that stands in the same place of a sibling module."""
        known = self.of(sibling)
        assert known is not None
        self.adopt(param, self._fresh(replace(known.site, name=name)))
        return self._decisions[anchor(param)].spec

    def items(self) -> list[tuple[Any, Decision]]:
        """(Parameter, or the contents of a QTensor; what was decided) for all that are alive."""
        return list(self._decisions.items())

    def learn(self, params: Sequence[Tensor], plan: Plan, group: WeightGroup) -> None:
        """Parameters that a compiled graph meets for the first time (one block's graph serves all blocks of its class)."""
        sites = {m.weight.name: m.site for m in plan.matches if m.weight is not None}
        for param, name in zip(params, group.weights, strict=False):
            if self.of(param) is None:
                self.adopt(param, Decision(sites[name], group.spec))

    def name(self, param: Tensor) -> str | None:
        """The display name of a Parameter that was seen."""
        known = self.of(param)
        return None if known is None else known.site.name

    def adopt(self, param: Tensor, decision: Decision) -> None:
        """Take over a decision for a Parameter that replaces the one it was made for."""
        self._decisions[anchor(param)] = decision

    def tables(self) -> dict[int, int]:
        """Identity -> rows of the embedding tables of all graphs so far."""
        return {id(p): d.site.shape[0] for p, d in self._decisions.items() if "embedding" in d.site.roles}

    def decide(self, match: Match, parameters: Mapping[Node, Tensor]) -> Decision:
        """For one use of a Parameter: what was decided before, or by the recipe."""
        if match.weight is None:  # a cache that is quantized already: the spec is in the call
            return Decision(match.site, parse_spec(match.call.specs[0]))
        param = parameters[match.weight]
        known = self.of(param)
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
        if kinds == ["embedding"]:  # rows that are looked up multiply no input
            specs = [spec and replace(_without(spec, NEED_DATA), activations=None) for spec in specs]
        elif "embedding" in kinds:  # columns scaled for the projection's inputs would cost the rows that are looked up
            specs = [spec and _without(spec, {"awq"}) for spec in specs]
        columns = site.shape[-1]
        spec = max(specs, key=lambda s: (99, 0.0) if s is None else (s.format.bits, s.effective_bits(columns)))
        note = f"tied: {' and '.join(kinds)} share one table in {spec or 'float'}" if len(set(specs)) > 1 else ""
        if spec is None:
            reason = note or f"the recipe leaves {site.kind} in float"
            return Decision(site, None, Skip(site, reason, expected=True), note)
        return Decision(site, spec, None, note)

    def remember(self, skips: Sequence[Skip], names: Mapping[Node, str], parameters: Mapping[Node, Tensor]) -> None:
        """Keep for each Parameter why it stays in float, or what of it does beside its quantized uses."""
        by_name = {names[node]: param for node, param in parameters.items()}
        for skip in skips:
            param = by_name.get(skip.site.name)
            if param is None or skip.site.kind == "kv":
                continue
            known = self.of(param)
            if known is None:
                self.adopt(param, Decision(skip.site, None, skip))
            elif known.spec is not None:
                self.adopt(param, replace(known, note=skip.reason))


def _without(spec: QuantSpec, algorithms: Collection[str]) -> QuantSpec:
    return replace(spec, algorithms=tuple(a for a in spec.algorithms if a not in algorithms))

"""Which weights the output of a model depends on most.

To second order KL(p || p') = 1/2 E[(sum_t g_t . dW x_t)^2], where x is the input of a linear, dW what rounding changes in its
weight, and g the derivative by its output of the log-probability of tokens drawn from the model. With rounding errors that are
independent of each other this is 1/2 sum_ik F_ik dW_ik^2, where F_ik = E[(sum_t g_ti x_tk)^2] is the diagonal of the Fisher
information: a number for every weight and format, known before anything is quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qpass import ranks
from qpass.blocks import block_sums
from qpass.errors import QpassError
from qpass.granularity import PerGroup
from qpass.graph.calls import LinearCall
from qpass.graph.vocabulary import value_of
from qpass.numerics import fake_quantize
from qpass.programs import Run
from qpass.progress import track
from qpass.sites.core import Match
from qpass.spec import QuantSpec
from qpass.weights import CHUNK_ELEMENTS, as_rows, memory_of

#: Elements of a row whose information is kept as one: those that share a scale where bits are given out.
GROUP = 32
#: Tokens whose derivatives are taken: their mean settles fast, and each costs three forward passes.
TOKENS = 8192


@dataclass
class Sensitivity:
    """Of a weight [N, K]: its diagonal Fisher information a token, the mean over each GROUP of a row [N, blocks]. Of a table that
    is looked up: the mean squares of the derivatives by the looked-up values [K]."""

    weight: Tensor
    transposed: bool
    fisher: Tensor | None = None
    looked_up: Tensor | None = None

    @property
    def columns(self) -> int:
        """K."""
        return int(self.weight.shape[-2 if self.transposed else -1])

    def loss(self, spec: QuantSpec) -> float:
        """What rounding to nearest adds to the KL per token, to second order."""
        rows = as_rows(self.weight.detach(), self.transposed)
        step, total = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1])), 0.0
        fisher = None if self.fisher is None else _for_rows(self.fisher, len(rows))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step].float()
            off = (chunk - fake_quantize(chunk, spec)).square()
            if fisher is not None:
                total += float((block_sums(off, PerGroup(GROUP)) * fisher[start : start + step]).sum())
            if self.looked_up is not None:
                total += float((off @ self.looked_up).sum()) / len(rows)
        return total / 2


def _for_rows(fisher: Tensor, rows: int) -> Tensor:
    """For all experts what was seen of them together; for a part of a packed weight, its mean for all rows."""
    if rows % len(fisher) == 0:
        return fisher.repeat(rows // len(fisher), 1)
    return fisher.mean(0, keepdim=True).expand(rows, -1)


def measure(runs: Sequence[Run]) -> dict[tuple[object, ...], Sensitivity]:
    """`memory_of` a weight -> its Sensitivity, on so many of the calls as hold TOKENS tokens, evenly picked.

    Raises `QpassError` if the graph cannot be differentiated.
    """
    found: dict[tuple[object, ...], Sensitivity] = {}
    generator = torch.Generator().manual_seed(ranks.rank())
    of_program: dict[tuple[int, tuple[int, ...]], list[Run]] = {}
    for run in runs:  # one graph may serve several layers
        of_program.setdefault((id(run.program), tuple(map(id, run.weights.values()))), []).append(run)
    picked: list[tuple[Run, float]] = []
    for same in of_program.values():
        wanted = max(1, min(len(same), round(TOKENS * len(same) / sum(map(_tokens, same)))))
        picked += [(same[i * len(same) // wanted], 1 / wanted) for i in range(wanted)]
    for run, share in track(picked, "qpass: measuring sensitivity"):
        try:
            _one(run, found, generator, share)
        except RuntimeError as error:
            raise QpassError(f"recipe: bits need derivatives of the model, which fail: {error}") from error
    ranks.check_same("derive weights", [f"{list(k.weight.shape)} {k.fisher is None}" for k in found.values()])
    for known in found.values():
        known.fisher = None if known.fisher is None else ranks.total(known.fisher) / ranks.count()
        known.looked_up = None if known.looked_up is None else ranks.total(known.looked_up) / ranks.count()
    return found


def _tokens(run: Run) -> int:
    """Of a call: as its mask says, or the ids that it is given."""
    if run.mask is not None:
        return int(run.mask.sum())
    given = [v for v in run.values.values() if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()]
    return max((v.numel() for v in given), default=1)


def _one(run: Run, found: dict[tuple[object, ...], Sensitivity], generator: torch.Generator, share: float) -> None:
    outputs = [n for n in run.program.module.graph.output_node().all_input_nodes if isinstance(value_of(n), Tensor)]
    watched: dict[Node, list[Match]] = {}
    for match in run.program.plan.matches:
        if match.weight is not None:
            watched.setdefault(match.node, []).append(match)

    of_weights = run.weights.keys() | run.program.of_weights

    def watch(node: Node, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not value.requires_grad and any(n in of_weights for n in node.all_input_nodes):
            value = value.requires_grad_().clone()  # what may be written to
        for match in watched.get(node, ()):
            _hook(match, run, value, found, share)
        return value

    with torch.enable_grad():
        values = run.whole(outputs, watch)
        loss = _log_likelihood([v for v in values if v.is_floating_point()], run, generator)
        loss.backward()
    run.back()


def _hook(match: Match, run: Run, value: Tensor, found: dict[tuple[object, ...], Sensitivity], share: float) -> None:
    """Have the derivative by `value` taken in when it is there."""
    assert match.weight is not None
    weight, call = run.weights[match.weight], match.call
    transposed = isinstance(call, LinearCall) and call.transposed
    known = found.setdefault(memory_of(weight), Sensitivity(weight, transposed))
    x = run.values[call.x].detach() if isinstance(call, LinearCall) else None

    def take(gradient: Tensor) -> None:
        if not isinstance(call, LinearCall) or x is None:
            mine = run.without_padding(gradient).float().square().mean(0) * share
            known.looked_up = mine if known.looked_up is None else known.looked_up + mine
            return
        mine = _fisher(call, run, x, gradient) * share
        same = known.fisher is not None and known.fisher.shape == mine.shape
        known.fisher = known.fisher + mine if same else mine  # type: ignore[operator]

    value.register_hook(take)


def _fisher(call: LinearCall, run: Run, x: Tensor, gradient: Tensor) -> Tensor:
    """[N, blocks] of one call. Tokens of a sequence share the error of a weight, so their products are summed before they are
    squared; of what goes to experts it is not known which belong together."""
    if call.columns:
        x, gradient = x.mT, gradient.mT
    whole = PerGroup(GROUP)
    sizes = block_sums(torch.ones_like(x[..., :1, :].reshape(-1, x.shape[-1])[:1].float()), whole)
    if call.route is not None or x.dim() not in (2, 3):
        outputs, inputs = (run.without_padding(t).float().square().mean(0) for t in (gradient, x))
        return outputs[:, None] * (block_sums(inputs[None], whole) / sizes)
    x, gradient = (t.float() if t.dim() == 3 else t.float()[None] for t in (x, gradient))
    if run.mask is not None and run.mask.shape == x.shape[:2]:
        gradient = gradient * run.mask[..., None]
    tokens = x.shape[0] * x.shape[1] if run.mask is None else int(run.mask.sum())
    total = sum(block_sums((g.mT @ rows).square(), whole) for g, rows in zip(gradient, x, strict=True))
    return total / sizes / tokens


def _log_likelihood(outputs: Sequence[Tensor], run: Run, generator: torch.Generator) -> Tensor:
    """Of tokens drawn from the model, where it gives logits; of others a random projection, which stands for all."""
    rows = {m.site.shape[1 if isinstance(m.call, LinearCall) and m.call.transposed else 0]
            for m in run.program.plan.matches if "vocab" in m.site.roles}  # fmt: skip
    loss = torch.zeros(())
    for output in outputs:
        if not output.requires_grad:
            continue
        if output.shape[-1] in rows:
            logits = run.without_padding(output).float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
            loss = loss.to(output.device) - logits.log_softmax(-1).gather(1, drawn).sum()
        else:
            loss = (
                loss.to(output.device)
                + (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
            )
    if not loss.requires_grad:
        raise QpassError("recipe: bits need derivatives of the model, and none of its outputs has one; leave bits out")
    return loss

"""qpass.evaluate: what quantization costs, against the float model, on real text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.progress import track
from qpass.report import report

#: Positions whose logits are compared at a time: bounds the float32 temporaries at a large vocabulary.
_POSITIONS = 256


@dataclass(frozen=True)
class Evaluation:
    """Next-token statistics over all predicted positions.

    `kl`: mean KL(reference || model) per token in nats, `kl_standard_error` over the windows. `perplexity`,
    `reference_perplexity`: exp of the mean negative log-likelihood. `top1`: share of positions with the same argmax.
    `compute`: format -> what its products were computed in. `window_kls`: mean KL of each window (of intervals and pairs).
    """

    kl: float
    kl_standard_error: float
    perplexity: float
    reference_perplexity: float
    top1: float
    tokens: int
    compute: dict[str, str]
    window_kls: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.5f} +- {self.kl_standard_error:.5f}, perplexity {self.perplexity:.3f} "
            f"(reference {self.reference_perplexity:.3f}), top-1 {self.top1:.4f}, {self.tokens} tokens"
            + "".join(f", {name} in {compute}" for name, compute in self.compute.items())
        )


@torch.no_grad()
def evaluate(model: Any, reference: Any, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> Evaluation:
    """Compare `model` with `reference` on `batches` of token ids [B, S] (or dicts with input_ids and attention_mask).

    Both are called with the same batch and return logits [B, S, V] (or an object with `.logits`). Each row is a window of
    its own. Raises `QpassError` if there is no batch, or a row has no next token.
    """
    windows: list[tuple[float, int]] = []  # (summed KL, tokens)
    nll = torch.zeros(2, dtype=torch.float64)
    same = tokens = 0
    for batch in track(batches, "qpass: evaluating"):
        ids, mask = _ids_and_mask(batch)
        valid = mask[:, 1:] & mask[:, :-1]
        ours, theirs = (_logits(m, batch)[:, :-1][valid] for m in (model, reference))
        targets = ids[:, 1:][valid]
        kl = torch.empty(len(targets), dtype=torch.float64)
        for start in range(0, len(targets), _POSITIONS):
            at = slice(start, start + _POSITIONS)
            q, p = (x[at].float().log_softmax(-1) for x in (ours, theirs))
            nll -= torch.stack([x.gather(-1, targets[at, None]).sum(dtype=torch.float64) for x in (q, p)]).cpu()
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            kl[at] = (p.exp() * (p - q)).sum(-1).double().cpu()
        counts = valid.sum(-1).tolist()
        windows += [(float(row.sum()), n) for row, n in zip(kl.split(counts), counts, strict=True) if n]
        tokens += len(targets)
    if not tokens:
        raise QpassError("qpass.evaluate: no batch with at least two tokens; pass token ids of shape [batch, sequence]")
    means = torch.tensor([total / n for total, n in windows], dtype=torch.float64)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    ppl = (nll / tokens).exp()
    mean = sum(total for total, _ in windows) / tokens
    return Evaluation(
        mean, error, float(ppl[0]), float(ppl[1]), same / tokens, tokens, _computes(model), tuple(means.tolist())
    )


def _computes(model: Any) -> dict[str, str]:
    """Format -> compute of the quantized sites of a model that qpass compiled."""
    try:
        sites = report(model).sites
    except QpassError:
        return {}
    return {s.format: s.compute for s in sites if s.format is not None and s.compute is not None}


def _ids_and_mask(batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _logits(model: Any, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise QpassError("qpass.evaluate: the model returns no logits of shape [batch, sequence, vocabulary]")
    return logits

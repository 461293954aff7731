"""qpass.evaluate: what quantization costs, against the float model, on real text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.progress import track
from qpass.registry import captured
from qpass.seeing.report import report

#: Positions whose logits are compared at a time: bounds the float32 temporaries at a large vocabulary.
POSITIONS = 256
#: Tokens of a window that are read at a time where the cache is quantized: those of one call see each other as floats.
CHUNK = 64
#: Student's t, two-sided 95 %, for 1 to 30 degrees of freedom, then the normal distribution's.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042, 1.960,
)  # fmt: skip


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

    @property
    def kl_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean KL, by Student's t over the windows; the mean itself for one window."""
        n = len(self.window_kls)
        half = _T95[min(n - 2, len(_T95) - 1)] * self.kl_standard_error if n > 1 else 0.0
        return max(0.0, self.kl - half), self.kl + half

    def breaches(self, max_kl: float | None = None, min_top1: float | None = None) -> list[str]:
        """What of the limits does not hold, in words; nothing if all do. A number that is no number breaks its limit."""
        found = []
        if max_kl is not None and not self.kl <= max_kl:
            found.append(f"KL {self.kl:.5f} is above {max_kl:g}")
        if min_top1 is not None and not self.top1 >= min_top1:
            found.append(f"top-1 {self.top1:.4f} is below {min_top1:g}")
        return found

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
    its own. A model of transformers whose recipe quantizes the KV cache reads it CHUNK tokens at a time through such a cache:
    the tokens of a chunk see each other as floats, and all before as they are stored.
    Raises `QpassError` if there is no batch, or a row has no next token.
    """
    windows: list[tuple[float, int]] = []  # (summed KL, tokens)
    nll = torch.zeros(2, dtype=torch.float64)
    same = tokens = 0
    both = _as_it_runs(model), partial(logits_of, reference)
    for batch in track(batches, "qpass: evaluating"):
        ids, mask = ids_and_mask(batch)
        valid = mask[:, 1:] & mask[:, :-1]
        ours, theirs = (logits(batch)[:, :-1][valid] for logits in both)
        targets = ids[:, 1:][valid]
        kl = torch.empty(len(targets), dtype=torch.float64)
        for start in range(0, len(targets), POSITIONS):
            at = slice(start, start + POSITIONS)
            q, p = (x[at].float().log_softmax(-1) for x in (ours, theirs))
            nll -= torch.stack([x.gather(-1, targets[at, None]).sum(dtype=torch.float64) for x in (q, p)]).cpu()
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            kl[at] = kl_of(p, q).double().cpu()
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


def _as_it_runs(model: Any) -> Any:
    """`model` as a function of a batch; through a KVCache, CHUNK tokens at a time, if its recipe quantizes the cache."""
    try:
        specs = captured(model, "qpass.evaluate").recipe.kv_specs
    except QpassError:  # not one of ours
        specs = None
    if specs is None or not hasattr(model, "generation_config"):
        return partial(logits_of, model)
    from qpass.cache import CACHE_ARGUMENT, KVCache

    def logits(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        ids, mask = ids_and_mask(batch)
        cache = KVCache(model.config, ids.shape[1], k=specs[0], v=specs[1])
        parts, end = [], 0
        for part in ids.split(CHUNK, 1):
            end += part.shape[1]
            seen = {"attention_mask": mask[:, :end].long()} if isinstance(batch, Mapping) else {}
            parts.append(logits_of(partial(model, use_cache=True, **seen, **{CACHE_ARGUMENT: cache}), part))
        return torch.cat(parts, 1)

    return logits


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [.., V]."""
    return (p.exp() * (p - q)).sum(-1)


def _computes(model: Any) -> dict[str, str]:
    """Format -> compute of the quantized sites of a model that qpass compiled."""
    try:
        sites = report(model).sites
    except QpassError:
        return {}
    return {s.format: s.compute for s in sites if s.format is not None and s.compute is not None}


def ids_and_mask(batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] of a batch, and which of them count."""
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def logits_of(model: Any, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """[B, S, V] for a batch. Raises `QpassError` if the model returns something else."""
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise QpassError("qpass.evaluate: the model returns no logits of shape [batch, sequence, vocabulary]")
    return logits

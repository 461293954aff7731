"""For tests of one's own: a quantized model must stay close to the float one, or the test fails and says by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from qpass.errors import QpassError
from qpass.measuring.evaluate import Evaluation, evaluate
from qpass.registry import captured, captures_of


def assert_close_to_float(
    model: Any,
    reference: Any,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    max_kl: float | None = None,
    min_top1: float | None = None,
    strict: bool = False,
) -> Evaluation:
    """`qpass.evaluate`, as an assertion: what `qpass eval --max-kl --min-top1 --strict` checks.

    `max_kl`: nats a token. `min_top1`: share of positions with the same most likely token. `strict`: no site stays in float that
    the recipe gives a format. Raises `AssertionError` with every limit that does not hold, `QpassError` if none is given.
    """
    if max_kl is None and min_top1 is None and not strict:
        raise QpassError("assert_close_to_float: give max_kl, min_top1 or strict=True; otherwise nothing can fail")
    found = evaluate(model, reference, batches)
    broken = found.breaches(max_kl, min_top1)
    if strict:
        broken += left_in_float(model)
    if broken:
        raise AssertionError(f"{'; '.join(broken)} ({found})")
    return found


def left_in_float(model: Any) -> list[str]:
    """The sites that stay in float although the recipe gives them a format, with the reason."""
    backend = captured(model, "qpass.testing")
    skips = (skip for capture in captures_of(model, backend) for skip in capture.plan.skipped if not skip.expected)
    return list(dict.fromkeys(f"{skip.site.kind} {skip.site.name} stays in float: {skip.reason}" for skip in skips))

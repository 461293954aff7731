"""Code that nobody adapted: the same sites in every spelling, and the logits of the dequantized model."""

from __future__ import annotations

import pytest
import torch

import qpass
from tests.models import INT8, build_family, dequantized_copy, logits_of, tokens
from tests.plain import CACHED, PLAIN


@pytest.mark.parametrize("name", PLAIN)
def test_sites_and_logits(name: str) -> None:
    model, expected = build_family(PLAIN[name]), {}
    sites = PLAIN[name].sites
    fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
    reference = dequantized_copy(model, lambda _: INT8)
    with torch.no_grad():
        ours, theirs = logits_of(fast(tokens())), logits_of(reference(tokens()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    rows = {row.name: row for row in qpass.report(fast).sites}
    used = {n: row for n, row in rows.items() if row.kind != "kv" and "did not use" not in (row.skipped or "")}
    for key in used:
        pattern = max((p for p in sites if p in key), key=len)
        expected[key] = sites[pattern]
    kinds = {
        n: "+".join(k for k in ("embedding", "vocab") if k in roles) or kind for n, (kind, roles) in expected.items()
    }
    assert {n: row.kind for n, row in used.items()} == kinds
    assert not [row for row in used.values() if row.skipped]
    caches = [row for row in rows.values() if row.kind == "kv"]
    assert bool(caches) == (name in CACHED)
    assert all("float" in str(row.skipped) for row in caches)

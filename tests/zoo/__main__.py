"""Run the zoo: `python -m tests.zoo [--inner eager] [--page docs/architectures.md] [class ...]`.

Prints a line for each architecture. Fails for an architecture that does not pass and is not known to, or the reverse.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tests.zoo.check import check_quietly
from tests.zoo.configs import OTHER_ARCHITECTURES, causal_architectures
from tests.zoo.table import KNOWN, write_table


def main(names: list[str], inner: str, page: str | None) -> int:
    """Check `names`, or everything. Returns how many outcomes are other than known."""
    wanted = names or [*causal_architectures(), *OTHER_ARCHITECTURES]
    outcomes = []
    # Each worker is replaced after a while: what transformers and Dynamo keep of a class is not given back.
    with get_context("spawn").Pool(2, maxtasksperchild=20) as pool:
        for o in pool.imap(partial(check_quietly, inner=inner), wanted):
            outcomes.append(o)
            print(f"{o.name}: {o.cause or 'ok'} {o.sites} {o.error:.1e} {o.seconds} s", flush=True)
    if page:
        Path(page).write_text(write_table(outcomes))
    surprises = [o.name for o in outcomes if o.passed == (o.name in KNOWN)]
    print(
        f"{sum(o.passed for o in outcomes)} of {len(outcomes)} pass; other than known: {', '.join(surprises) or 'none'}"
    )
    return len(surprises)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="tiny models of every architecture, quantized and compared")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--inner", default="aot_eager")
    parser.add_argument("--page", help="write the table of all outcomes to this file")
    given = parser.parse_args()
    sys.exit(min(1, main(given.names, given.inner, given.page)))

"""Run the zoo: `python -m tests.zoo [class ...]`. Prints a line for each architecture and writes build/zoo.json."""

from __future__ import annotations

import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.zoo.check import Outcome, check
from tests.zoo.configs import OTHER_ARCHITECTURES, causal_architectures


def _worker(name: str) -> Outcome:
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    return check(name)


def main(names: list[str]) -> int:
    """Check `names`, or everything; print a line each, keep all in build/zoo.json. Returns how many fail."""
    wanted = names or [*causal_architectures(), *OTHER_ARCHITECTURES]
    outcomes = []
    with ProcessPoolExecutor(2, max_tasks_per_child=25) as pool:
        for outcome in pool.map(_worker, wanted):
            outcomes.append(outcome)
            print(
                f"{outcome.name}: {outcome.cause or 'ok'} {outcome.sites} {outcome.error:.1e} {outcome.seconds} s",
                flush=True,
            )
    outcomes.sort(key=lambda o: wanted.index(o.name))
    Path("build").mkdir(exist_ok=True)
    Path("build/zoo.json").write_text(json.dumps([o.to_json() for o in outcomes], indent=1))
    passed = sum(o.passed for o in outcomes)
    print(f"{passed} of {len(outcomes)} pass")
    return len(outcomes) - passed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))

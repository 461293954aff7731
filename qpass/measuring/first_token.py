"""How long a fresh process takes to its first token, and how much of that compiled code on disk saves.

python -m qpass.measuring.first_token ARTIFACT CONTEXT STEPS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass.printing import number_table, printed


@dataclass(frozen=True)
class FirstToken:
    """Seconds of one process, from its start: `imported`, `loaded`, `first` token, `steady`: when steps compile no more."""

    imported: float
    loaded: float
    first: float
    steady: float


@dataclass(frozen=True)
class Warmth:
    """A first process, which compiled what was not there yet, and another one after it. `print` shows both."""

    filled: FirstToken
    warm: FirstToken

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def __rich__(self) -> Any:
        table = number_table("seconds from its start", "imported", "loaded", "first token", "steady")
        for name, run in (("this time", self.filled), ("from now on", self.warm)):
            table.add_row(name, *(f"{x:.1f}" for x in (run.imported, run.loaded, run.first, run.steady)))
        return table

    def __str__(self) -> str:
        return printed(self)


def warm_up(artifact: str | Path, context: int = 128, steps: int = 8) -> Warmth:
    """Have torch's caches on disk hold what an artifact's first calls compile, and measure a process before and after.

    The caches are Inductor's and AOTAutograd's (TORCHINDUCTOR_CACHE_DIR), and hold for this machine, version of torch and
    artifact. Raises `QpassError` if the artifact does not run.
    """
    return Warmth(*(_in_a_process(Path(artifact), context, steps) for _ in range(2)))


def _in_a_process(artifact: Path, context: int, steps: int) -> FirstToken:
    command = [sys.executable, "-m", __name__, str(artifact.resolve()), str(context), str(steps), str(time.time())]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"ended with {ended.returncode}"]
        raise QpassError(f"{artifact}: {lines[-1].removeprefix('qpass.errors.QpassError: ')}")
    return FirstToken(**json.loads(ended.stdout.splitlines()[-1]))


def _main(artifact: str, context: int, steps: int, begun: float) -> None:
    import torch

    import qpass
    from qpass.folders import recipe_for
    from qpass.generate import generate

    times = [time.time() - begun]
    model: Any = qpass.load(artifact)
    times.append(time.time() - begun)
    ids = torch.ones((1, context), dtype=torch.long)
    model.generation_config.eos_token_id = None
    for number, _ in enumerate(generate(model, ids, steps, recipe=recipe_for(Path(artifact), None))):
        if number in (0, steps - 1):
            times.append(time.time() - begun)
    print(json.dumps(dict(zip(("imported", "loaded", "first", "steady"), times, strict=True))))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))

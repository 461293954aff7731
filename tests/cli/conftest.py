"""The command as it is typed: arguments in, exit status, stdout and stderr out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import qpass
from qpass.cli import main

TINYPY = Path(__file__).parents[2] / "examples" / "tinypy"
DATA = str(TINYPY / "validation.txt")
#: Enough text to compare by, in a second.
SHORT = ("--window", "64", "--windows", "2")


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        status = ended.value.code
        assert isinstance(status, int)
        out, err = capsys.readouterr()
        return Ended(status, out, err)

    return run


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinypy in int4 with an int8 cache."""
    folder = tmp_path_factory.mktemp("artifacts") / "int4"
    model = AutoModelForCausalLM.from_pretrained(TINYPY, dtype="auto").eval()
    qpass.save(qpass.quantize(model, "int4+kv=int8", inner="eager"), folder)
    return folder

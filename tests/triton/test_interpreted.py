"""Without a GPU: the tests of this folder once more, in a process whose kernels Triton interprets on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qpass.ops.triton.triton_private import interpreted

#: Those that run kernels.
RUN = (
    "test_linear.py",
    "test_around.py",
    "test_rows.py",
    "test_attention.py",
    "test_quantizing.py",
    "test_appending.py",
)


@pytest.mark.skipif(torch.cuda.is_available() or interpreted(), reason="the kernels are run by the tests themselves")
@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernels_in_the_interpreter(marks: str) -> None:
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *(str(Path(__file__).parent / name) for name in RUN),
            "-q",
            "-m",
            marks,
            "-p",
            "no:cacheprovider",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout

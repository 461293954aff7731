"""The instruction sets that tests of the CPU kernels run on."""

from __future__ import annotations

from typing import Any

import pytest

from qpass.ops.cpu.build import available_isas


def isas() -> list[Any]:
    """Those of this machine, each compiled for it; AVX-512 without VNNI, where there is VNNI, behind `make test-long`."""
    found = available_isas()
    beside = {"avx512"} if "avx512-vnni" in found else set()
    return [pytest.param(isa, marks=pytest.mark.long) if isa in beside else isa for isa in found]

"""Machine code for GPUs, made without one: what operators launch is recorded on CPU tensors, then compiled as it would be."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qpass.ops.triton import caches, launching, operators

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1"}  # fmt: skip
#: Instructions of tensor cores: of a warp, of a warp group on sm_90, of a program on sm_100.
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def compiled(self, capability: int) -> Code:
        """For sm_<capability>, specialized as a launch specializes: multiples of 16 and the number 1."""
        names = self.kernel.arg_names
        constant = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, values, multiples = {}, {}, {}
        for i, name in enumerate(names):
            value = self.arguments[name]
            if name in constant or value is None or (isinstance(value, int) and value == 1):
                signature[name], values[(i,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], multiple = f"*{TYPES[value.dtype]}", True
            elif isinstance(value, float):
                signature[name], multiple = "fp32", False
            else:
                signature[name], multiple = "i32" if abs(value) < 1 << 31 else "i64", value % 16 == 0
            if multiple:
                multiples[(i,)] = [["tt.divisibility", 16]]
        names = ("num_warps", "num_stages", "debug", "sanitize_overflow")
        options = {name: self.arguments[name] for name in names if name in self.arguments}
        source = ASTSource(self.kernel, signature=signature, constexprs=values, attrs=multiples)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return Code.of(made)


@dataclass(frozen=True)
class Code:
    """What was made: instructions of the machine, and how often; registers of a thread; bytes of shared memory."""

    ptx: str
    instructions: Counter[str]
    #: Of the longest loop.
    in_loop: Counter[str]
    registers: int
    shared: int

    @classmethod
    def of(cls, made: Any) -> Code:
        """Read from what Triton's compiler returns."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
            ).stdout
            usage = subprocess.run(
                [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True
            ).stdout
        registers = re.search(r"REG:(\d+)", usage)
        assert registers is not None
        return cls(
            made.asm["ptx"], Counter(_instructions(text)), Counter(_loop(text)), int(registers[1]), made.metadata.shared
        )

    def count(self, *prefixes: str) -> int:
        """Instructions that begin so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    @property
    def loop_length(self) -> int:
        """Instructions of the longest loop."""
        return self.in_loop.total()

    @property
    def spills(self) -> int:
        """Accesses to local memory in that loop. A few before and after it cost nothing that counts."""
        return sum(n for name, n in self.in_loop.items() if name.startswith(("LDL", "STL")))


def _instructions(text: str) -> list[str]:
    """Names of the instructions of disassembled code."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", text)


def _loop(text: str) -> list[str]:
    """Instructions of the longest stretch that a branch jumps back over, or of everything where there is no loop."""
    lines, seen, longest = text.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            seen[label[1]] = i
        if (branch := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)) and branch[1] in seen:
            inside = _instructions("\n".join(lines[seen[branch[1]] : i + 1]))
            longest = max(longest, inside, key=len)
    return longest or _instructions(text)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*given: Any, **named: Any) -> None:
            self.launches.append(
                Launch(self.kernel, grid, dict(zip(self.kernel.arg_names, given, strict=False)) | named)
            )

        return record


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels that operators launch on CPU tensors from here on, instead of running them, as on an NVIDIA GPU."""
    from qpass.ops.triton.triton_private import interpreted

    if interpreted():
        pytest.skip("kernels are interpreted in this process")
    recorded: list[Launch] = []
    for file, names in launching.KERNELS.items():
        module = launching.kernels_of(file)
        for name in names:
            monkeypatch.setattr(module, name, _Recorder(getattr(module, name), recorded))
    monkeypatch.setattr(launching, "runs_on", lambda device: True)
    for module in (launching, operators, caches):
        monkeypatch.setattr(module, "permutes_bytes", lambda device: True)
    return recorded

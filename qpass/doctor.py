"""qpass.doctor: what this machine offers, what qpass uses of it, and why."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qpass.compute import int8_by_default
from qpass.ops.cpu.build import Missing, available_isas, find_compiler, kernels
from qpass.ops.cpu.library import bind

#: Packages whose version matters to what qpass does.
_PACKAGES = ("torch", "transformers", "triton", "torchao", "onnx", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Diagnosis:
    """`print` shows it, `to_json` gives plain data. `problems`: what keeps qpass from its best, and what to do.

    `kernels`: the CPU kernels in use: instruction set, file, compiler, seconds it took to have them, whether calls like an
    earlier one go through Python; or the reason there are none. `isas`: all that the machine can run. `int8_compute`:
    formats multiplied with int8 activations by default.
    """

    machine: str
    threads: int
    packages: dict[str, str]
    gpus: tuple[str, ...]
    isas: tuple[str, ...]
    kernels: dict[str, Any]
    int8_compute: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        kernels = ", ".join(f"{k}: {v}" for k, v in self.kernels.items())
        lines = [
            f"machine       {self.machine}, {self.threads} threads (torch.set_num_threads)",
            f"packages      {', '.join(f'{k} {v}' for k, v in self.packages.items())}",
            f"GPU           {', '.join(self.gpus) or 'none'}",
            f"CPU kernels   {kernels}",
            f"can also run  {', '.join(self.isas)}",
            f"int8 compute  {', '.join(self.int8_compute)} (qpass.set_compute changes it)",
        ]
        return "\n".join(lines + [f"problem       {p}" for p in self.problems])


def doctor() -> Diagnosis:
    """Look at the machine. Builds the CPU kernels if they are not there yet."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found, problems = kernels(), []
    if isinstance(found, Missing):
        used: dict[str, Any] = {"none": found.reason}
        advice = "look at that message" if find_compiler() else "install g++ or clang++, or set CXX"
        problems.append(f"quantized models run through the slow reference: {found.reason}; {advice}")
    else:
        used = {
            "isa": found.isa,
            "compiler": found.compiler,
            "file": str(found.path),
            "seconds": round(found.seconds, 2),
            "calls": f"through Python: {reason}" if (reason := bind()) else "without Python",
        }
        if not found.openmp:
            problems.append("the compiler has no OpenMP: the kernels run on one thread; install it (libomp for clang)")
    if {"onnxruntime", "onnxruntime-gpu"} <= packages.keys():
        problems.append("onnxruntime and onnxruntime-gpu are both installed and share one import name: uninstall one")
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return Diagnosis(
        machine,
        torch.get_num_threads(),
        packages,
        gpus,
        tuple(available_isas()),
        used,
        tuple(int8_by_default()),
        tuple(problems),
    )

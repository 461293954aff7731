"""What each runtime takes: one row a target, one rule a format. A refusal names the site, the reason and what would do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qpass.errors import QpassError, nearest
from qpass.granularity import PerAxis, PerGroup, PerTensor
from qpass.spec import QuantSpec


@dataclass(frozen=True)
class Refusal:
    """Why a runtime does not take a format, and the nearest spec that it takes."""

    reason: str
    instead: str


Rule = Callable[[QuantSpec], Refusal | None]


@dataclass(frozen=True)
class Target:
    """One runtime.

    `dtype`: of activations and scales. `contrib`: whether it has onnxruntime's own operators. `linear`, `embedding`, `kv`: the
    rules of its places. `grouped_query`: attention appends to its cache itself (GroupQueryAttention). `float8_blocks`: it
    multiplies fp8 weights (MatMulBlockQuantizedFp8Weight). `options`: of an onnxruntime session that runs the file.
    """

    name: str
    provider: str
    opset: int
    dtype: torch.dtype
    contrib: bool
    linear: Rule
    embedding: Rule
    kv: Rule
    grouped_query: bool = False
    float8_blocks: bool = False
    options: tuple[tuple[str, str], ...] = ()

    @property
    def ir_dtype(self) -> ir.DataType:
        """`dtype` in ONNX's words."""
        return ir.DataType.FLOAT16 if self.dtype == torch.float16 else ir.DataType.FLOAT

    def opset_for(self, specs: Iterable[QuantSpec]) -> int:
        """The opset of the file: four-bit floats exist from 23 on."""
        return 23 if not self.contrib and any(spec.format.name == "nvfp4" for spec in specs) else self.opset

    def check(self, specs: Iterable[tuple[str, str, QuantSpec]]) -> None:
        """Raises `QpassError` for the first of (kind of site, its name, spec) that the runtime cannot run."""
        rules = {"embedding": self.embedding, "kv": self.kv}
        for kinds, name, spec in specs:
            for kind in kinds.split("+"):  # a tied table is two
                refusal = _blocks_of_inputs(spec) or rules.get(kind, self.linear)(spec)
                if refusal is not None:
                    raise QpassError(
                        f"{self.name}: {name} ({kinds}) in {spec}: {refusal.reason}; "
                        f"the nearest that works is {refusal.instead!r}"
                    )


#: Smallest and largest block that onnxruntime's kernels for MatMulNBits have.
CPU_BLOCKS, CUDA_BLOCKS = (16, 256), (16, 128)

_FP4 = {"fp4_e2m1", "mxfp4", "nvfp4"}


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def _blocks_of_inputs(spec: QuantSpec) -> Refusal | None:
    if spec.activations is None or not spec.activations.in_blocks:
        return None
    return Refusal("ONNX rounds no inputs to blocks whose scales have 8 bits", str(spec).split("@")[0])


def _blocks(spec: QuantSpec, least: int, most: int) -> Refusal | None:
    """MatMulNBits has blocks of powers of two."""
    size = spec.group_size
    if size and not (least <= size <= most and _power_of_two(size)):
        near = min((s for s in (16, 32, 64, 128, 256) if least <= s <= most), key=lambda s: abs(s - size))
        return Refusal(
            f"groups of {size}: its kernels have blocks of {least} to {most}, powers of two", _with_group(spec, near)
        )
    return None


def _with_group(spec: QuantSpec, size: int) -> str:
    asym = ":zero=float" if spec.float_zero else ":asym" if not spec.symmetric else ""
    return f"{spec.format.name}:g{size}{asym}"


def _ort_cpu_linear(spec: QuantSpec) -> Refusal | None:
    if spec.format.name in _FP4:
        return Refusal("onnxruntime's CPU provider has no four-bit floats", "nf4")
    if spec.float_zero and spec.format.bits > 4:
        return Refusal(
            "MatMulNBits has float zero points for four bits only", _with_group(spec, 32).replace("zero=float", "asym")
        )
    if spec.format.kind == "uniform" and isinstance(spec.granularity, PerGroup):
        return _blocks(spec, *CPU_BLOCKS)
    if spec.format.name == "nf4" and not _power_of_two(spec.group_size):
        return Refusal(f"groups of {spec.group_size}: MatMulBnb4 has blocks of powers of two", "nf4:g64")
    return None


def _ort_cpu_embedding(spec: QuantSpec) -> Refusal | None:
    return Refusal("onnxruntime's CPU provider has no four-bit floats", "nf4") if spec.format.name in _FP4 else None


def _ort_cpu_kv(spec: QuantSpec) -> Refusal | None:
    if spec.is_identity:
        return None if spec.format.name != "bf16" else Refusal("few of its operators take bfloat16", "fp16")
    if spec.static:
        return None if spec.format.name == "int8" else Refusal("static fp8 has no Concat", "int8:static")
    if spec.format.kind == "float8":
        return Refusal("ONNX joins no fp8 tensors (Concat)", "int8")
    if (
        spec.format.name not in ("int8", "int4")
        or not isinstance(spec.granularity, PerAxis | PerGroup)
        or spec.float_zero
    ):
        return Refusal("tokens need a scale of their own, in int8 or int4", "int4:g32:asym:rotated")
    return None


def _ort_cuda_linear(spec: QuantSpec) -> Refusal | None:
    weights = str(spec).split("@")[0]
    if spec.activations is not None:
        return Refusal("its CUDA provider has no kernels for quantized activations", weights)
    if spec.format.name in ("mxfp4", "fp4_e2m1", "mxfp8", "fp8_e5m2"):
        return Refusal("its CUDA provider has no kernel for it", "nf4" if spec.format.bits == 4 else "int8")
    if spec.float_zero and spec.format.bits > 4:
        return Refusal(
            "MatMulNBits has float zero points for four bits only", _with_group(spec, 32).replace("zero=float", "asym")
        )
    if spec.format.kind == "uniform":
        return _blocks(spec, *CUDA_BLOCKS)
    return None


def _ort_cuda_kv(spec: QuantSpec) -> Refusal | None:
    if spec.format.name == "fp16":
        return None
    if not spec.static:
        return Refusal("GroupQueryAttention reads scales from calibration only", "int8:static")
    return None if spec.format.name == "int8" else Refusal("the file holds integers", "int8:static")


def _tensorrt_linear(spec: QuantSpec) -> Refusal | None:
    activations = spec.activations
    if spec.is_identity:
        return None
    if spec.has_zero_point or (activations is not None and activations.has_zero_point):
        return Refusal("TensorRT wants all zero points to be 0", "int4:g128" if spec.format.bits <= 4 else "int8")
    if activations is not None and not activations.static:
        return Refusal("TensorRT wants scales of activations from calibration", "int8:smooth@int8:static")
    if spec.format.name == "nf4":
        return Refusal("TensorRT has no table of values", "int4:g128")
    if spec.format.name in ("mxfp4", "fp4_e2m1"):
        return Refusal("TensorRT has four-bit floats as NVFP4 only", "nvfp4")
    if spec.format.kind == "uniform" and spec.format.bits <= 4:
        if spec.group_size != 128 or activations is not None:
            return Refusal("TensorRT takes four bits in blocks of 128, for weights only", "int4:g128")
        return None
    if spec.format.kind == "uniform" and not isinstance(spec.granularity, PerAxis | PerTensor):
        return Refusal("TensorRT takes int8 with a scale for each row or for the tensor", "int8")
    if spec.format.name in ("mxfp8", "fp8_e5m2"):
        return Refusal("TensorRT takes fp8 as E4M3 with float scales", "fp8_e4m3:channel")
    return None


def _tensorrt_embedding(spec: QuantSpec) -> Refusal | None:
    return None if spec.is_identity else Refusal("TensorRT gathers rows of floats only", "fp16")


def _tensorrt_kv(spec: QuantSpec) -> Refusal | None:
    return None if spec.is_identity else Refusal("TensorRT keeps a float cache", "fp16")


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "ort-cpu", "CPUExecutionProvider", 23, torch.float32, True,
            _ort_cpu_linear, _ort_cpu_embedding, _ort_cpu_kv,
        ),
        Target(
            "ort-cuda", "CUDAExecutionProvider", 21, torch.float16, True,
            _ort_cuda_linear, _ort_cpu_embedding, _ort_cuda_kv, grouped_query=True, float8_blocks=True,
        ),
        Target(
            "tensorrt", "TensorrtExecutionProvider", 21, torch.float16, False,
            _tensorrt_linear, _tensorrt_embedding, _tensorrt_kv,
        ),
    )
}  # fmt: skip


def get_target(name: str) -> Target:
    """The target called `name`; `QpassError` with the nearest name if there is none."""
    if name not in TARGETS:
        raise QpassError(f"unknown target {name!r}: {nearest(str(name), TARGETS)}")
    return TARGETS[name]

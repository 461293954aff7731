"""What benchmarks/onnx_cpu.py and benchmarks/onnx_gpu.py share: models, inputs of a session, onnxruntime's own quantizer."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINYPY = Path(__file__).parents[1] / "examples" / "tinypy"
TYPES = {
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16,
}  # fmt: skip


def float_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_ids(folder: Path, name: str = "validation.txt") -> torch.Tensor:
    """[N] token ids of Python code."""
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    ids: torch.Tensor = tokenizer((TINYPY / name).read_text(), return_tensors="pt").input_ids[0]
    return ids


def file_bytes(path: Path) -> int:
    """Of the model and its external data."""
    return sum(p.stat().st_size for p in (path, path.with_name(path.name + ".data")) if p.exists())


def caches(session: Any) -> list[Any]:
    return [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]


def cache_bytes_per_token(session: Any) -> int:
    return sum(i.shape[1] * i.shape[3] * np.dtype(TYPES[i.type]).itemsize for i in caches(session))


def token_feeds(session: Any, ids: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """Those inputs for ids [1, S] behind `context` tokens that are no cache."""
    count = ids.shape[1]
    given = {
        "input_ids": ids,
        "attention_mask": np.ones((1, context + count), np.int64),
        "position_ids": np.arange(context, context + count)[None],
    }
    takes = {i.name for i in session.get_inputs()}
    return {name: value for name, value in given.items() if name in takes}


def cache_feeds(session: Any, context: int) -> dict[str, np.ndarray]:
    """A cache of `context` tokens with random keys and values: a prefill as long would take minutes."""
    rng, found = np.random.default_rng(0), {}
    for i in caches(session):
        shape, dtype = (1, i.shape[1], context, i.shape[3]), TYPES[i.type]
        if np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            found[i.name] = rng.integers(limits.min, limits.max, shape, dtype)
        elif i.name.endswith("_scale"):
            found[i.name] = np.full(shape, 0.01, dtype)
        else:
            found[i.name] = rng.standard_normal(shape, np.float32).astype(dtype)
    return found


def untie(model: onnx.ModelProto) -> bool:
    """Each MatMul that reads a transposed table gets a copy of it as its weight. Whether there was one."""
    graph = model.graph
    tables = {i.name: i for i in graph.initializer}
    transposed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in tables}
    found = False
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposed:
            table = onnx.numpy_helper.to_array(tables[transposed[node.input[1]]])
            name = f"{node.name}.weight"
            graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), name))
            node.input[1] = name
            found = True
    return found


def quantized_by_onnxruntime(source: Path, target: Path, bits: int, untied: bool) -> None:
    """A float file through MatMulNBitsQuantizer, as symmetric integers in blocks of 32."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    if untied:
        untie(model)
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def seconds_of_others() -> float:
    """Of processor time that other processes (and other guests of the host) have had; 0 where the kernel does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, _, _, stolen = (int(v) for v in stat.read_text().split()[1:9])
    return (user + nice + system + stolen) / os.sysconf("SC_CLK_TCK") - time.process_time()


def processor() -> str:
    """Its name, from /proc/cpuinfo where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def about(model: Any) -> dict[str, Any]:
    """What the numbers are of."""
    count = sum(p.numel() for p in model.parameters())
    return {
        "model": f"{model.config.model_type}, {count / 1e6:.1f} M parameters",
        "processor": processor(),
        "platform": platform.platform(),
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }

"""qpass.export_compressed_tensors: a checkpoint that vLLM serves and transformers' reader of compressed-tensors loads.

The format: github.com/vllm-project/compressed-tensors. Integers below 8 bits, and of 8 bits without quantized activations, are
packed into int32 words; int8 and fp8 with quantized activations are stored as they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qpass.artifact.manifest import METHOD
from qpass.artifact.save import absolute, carry, check_folder, replacing, write_safetensors
from qpass.errors import QpassError
from qpass.granularity import PerGroup, PerTensor
from qpass.graph.torch_private import original_module
from qpass.numerics import codes_of
from qpass.packing import pack
from qpass.qtensor import QTensor
from qpass.registry import captured
from qpass.spec import QuantSpec

FORMAT = "compressed-tensors"
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"


@dataclass(frozen=True)
class Written:
    """What an export did: module -> format, and weight -> why it is written in 16 bits."""

    quantized: dict[str, str]
    floats: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.quantized)} linears quantized"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.floats.items():
            reasons.setdefault(reason, []).append(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        lines += [f"in 16 bits, {why}: {', '.join(dict.fromkeys(names))}" for why, names in reasons.items()]
        return "\n".join(lines)


def export_compressed_tensors(model: nn.Module, folder: str | Path, cache: Any = None) -> Written:
    """Write a quantized model as compressed-tensors, its integers and scales as they are; those of five and six bits in eight, of
    two and three in four.

    `cache`: a KVCache with calibrated static scales ("fp8_e4m3:static", "int8:static"), for the engine's own cache: one scale
    for the keys of a layer and one for the values, the largest of the heads' and channels'.
    What that format or vLLM has no form for is written as the 16-bit floats (32-bit in a 32-bit model) that its codes stand for,
    and listed: tables, the vocabulary projection, codebooks, microscaling, float zero points, scales of columns. Raises
    `QpassError` for a model that is not quantized, a cache without scales for every layer, and a folder with anything but an
    earlier export.
    """
    folder, model = absolute(folder), original_module(model)
    check_folder(folder, _is_export, "an export")
    linears: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            linears.setdefault(id(m.weight), []).append(name)
    if not any(isinstance(p, QTensor) for p in model.parameters()):
        raise QpassError(
            "export_compressed_tensors: no weight is quantized: model = qpass.quantize(model, recipe) first"
        )
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tables |= {id(output.weight)} if output is not None else set()
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, list[str]] = {}
    written = Written({}, {})
    for name, param in model.named_parameters():
        if not isinstance(param, QTensor):
            tensors[name] = param.detach()
            continue
        modules = linears.get(id(param), [])
        reason = "a table or the vocabulary projection" if id(param) in tables else _why_not(param, bool(modules))
        if reason is not None:
            tensors[name] = param.dequantize()
            written.floats[name] = reason
            continue
        scheme, stored = _stored(param)
        for module in modules:  # one weight may be that of several
            tensors.update({f"{module}.{part}": tensor for part, tensor in stored.items()})
            schemes.setdefault(json.dumps(scheme, sort_keys=True), []).append(module)
            written.quantized[module] = str(param.spec)
    scales = {} if cache is None else _cache_scales(model, cache)
    tensors |= scales
    names = dict(model.named_buffers())
    tensors |= {n: names[n] for n in model.state_dict(keep_vars=True) if n in names}
    ignored = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in written.quantized]
    with replacing(folder, lambda name: name.endswith(".safetensors")) as staging:
        carry(
            model, staging, {"quantization_config": _config(schemes, ignored, _cache_scheme(cache) if scales else None)}
        )
        write_safetensors(tensors, staging / "model.safetensors", {"format": "pt"})
    return written


def _is_export(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        return False
    try:
        found = json.loads(path.read_text())["quantization_config"]
        return bool(found["quant_method"] == FORMAT and found["producer"] == METHOD)
    except (ValueError, KeyError, TypeError):
        return False


def _why_not(weight: QTensor, is_linear: bool) -> str | None:
    """What of a weight compressed-tensors has no form for."""
    spec, q = weight.spec, weight.quantized
    if not is_linear or weight.transposed or weight.dim() != 2:
        return "not the weight of an nn.Linear"
    if spec.format.kind == "uniform" and spec.float_zero:
        return "zero points between the integers"
    if not (spec.format.kind == "uniform" or spec.format.name == "fp8_e4m3"):
        return f"{spec.format.name}"
    if q.column_scale is not None:
        return "scales of columns"
    if spec.group_size and weight.shape[1] % spec.group_size:
        return f"a row of {weight.shape[1]} is no multiple of the group"
    if isinstance(spec.granularity, PerTensor) and spec.format.bits < 8:
        return "one scale for the tensor"
    activations = spec.activations
    if activations is not None and (spec.group_size or activations.group_size or not activations.symmetric):
        return f"activations {activations}"
    if activations is not None and activations.format.kind != spec.format.kind:
        return f"activations {activations} beside {spec.format.name}"
    if spec.format.name == "fp8_e4m3" and (spec.group_size or (activations is None and q.scale is None)):
        return "fp8 without a scale for each row"
    return None


def _stored(weight: QTensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The scheme of a linear, and its tensors by their names in compressed-tensors."""
    spec, q = weight.spec, weight.quantized
    columns, bits = weight.shape[1], spec.container_bits
    scheme = {"weights": _arguments(spec), "input_activations": None}
    rows = weight.shape[0]
    scale = torch.ones(rows, 1) if q.scale is None else q.scale
    if isinstance(spec.granularity, PerTensor):  # which weights that are read together repeat for each row
        scale = scale.reshape(-1)[:1]
    parts = {"weight_scale": scale}
    if spec.activations is not None:
        scheme["input_activations"] = _arguments(spec.activations, of_inputs=True)
        if q.input_scale is not None:
            parts["input_scale"] = q.input_scale.reshape(1)
        elif spec.activations.static:  # left wide: the input stays in float
            scheme["input_activations"] = None
    if spec.format.kind == "float8":
        return {**scheme, "format": FLOATS}, {"weight": q.data.view(torch.float8_e4m3fn), **parts}
    codes, zero = codes_of(q, spec, columns)
    if scheme["input_activations"] is not None and bits == 8:
        return {**scheme, "format": INTEGERS}, {"weight": codes, **parts}
    half = 1 << (bits - 1)
    parts["weight_packed"] = _words(codes.to(torch.int16) + half, bits)
    parts["weight_shape"] = torch.tensor(list(weight.shape))
    if zero is not None:  # packed down the rows
        parts["weight_zero_point"] = _words((zero.to(torch.int16) + half).T, bits).T.contiguous()
    return {**scheme, "format": PACKED}, parts


def _words(unsigned: Tensor, bits: int) -> Tensor:
    """[N, K] codes -> int32 [N, ceil(K * bits / 32)]: one stream of bits for each row, as in qpass.packing."""
    width = -(-unsigned.shape[1] * bits // 32)
    padded = pad(unsigned.to(torch.uint8), (0, -unsigned.shape[1] % 32))
    stream = pack(padded, bits) if bits < 8 else padded
    return stream.contiguous().view(torch.int32)[:, :width].contiguous()


def _arguments(spec: QuantSpec, of_inputs: bool = False) -> dict[str, Any]:
    """QuantizationArgs of compressed-tensors."""
    if isinstance(spec.granularity, PerGroup):
        strategy = "group"
    elif isinstance(spec.granularity, PerTensor) or (of_inputs and spec.static):
        strategy = "tensor"
    else:
        strategy = "token" if of_inputs else "channel"
    bits = spec.format.bits if of_inputs else spec.container_bits
    return {
        "num_bits": bits, "type": "int" if spec.format.kind == "uniform" else "float", "strategy": strategy,
        "symmetric": spec.symmetric, "group_size": spec.group_size or None, "dynamic": of_inputs and not spec.static,
    }  # fmt: skip


def _cache_scales(model: nn.Module, cache: Any) -> dict[str, Tensor]:
    """ "<attention>.k_scale" and ".v_scale" [1] of each layer."""
    decisions = captured(model, "export_compressed_tensors").decisions
    keys = [name for name, p in model.named_parameters() if (d := decisions.of(p)) and "k" in d.site.roles]
    if len(keys) != len(cache.scales) or None in cache.scales:
        there = sum(pair is not None for pair in cache.scales)
        raise QpassError(
            f"export_compressed_tensors: scales for {there} of {len(keys)} layers; give a cache of static scales: "
            'qpass.KVCache(model.config, 1024, "fp8_e4m3:static").calibrate(model, batches)'
        )
    found = {}
    for name, pair in zip(keys, cache.scales, strict=True):
        attention = name.rpartition(".")[0].rpartition(".")[0]
        for half, scale in zip("kv", pair, strict=True):
            found[f"{attention}.{half}_scale"] = scale.amax().reshape(1).float()
    return found


def _cache_scheme(cache: Any) -> dict[str, Any]:
    if cache.k_spec != cache.v_spec:
        raise QpassError(
            f"export_compressed_tensors: keys in {cache.k_spec}, values in {cache.v_spec}: that format has one for both"
        )
    kind = "float" if cache.k_spec.format.kind == "float8" else "int"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}


def _config(
    schemes: dict[str, list[str]], ignored: list[str], cache_scheme: dict[str, Any] | None = None
) -> dict[str, Any]:
    groups = {
        f"group_{i}": json.loads(scheme) | {"targets": names} for i, (scheme, names) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": FORMAT, "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed", "config_groups": groups, "ignore": ignored, "producer": METHOD,
        **({} if cache_scheme is None else {"kv_cache_scheme": cache_scheme}),
    }  # fmt: skip

"""torchao's algorithms on the models of accuracy_page.py: an implementation that shares no code with this one.

    python benchmarks/accuracy_torchao.py     both GPTQs on one layer with correlated inputs

Its GPTQ asks for a GPU, and for mslk to choose the scales of a group and to pack four bits; what it computes needs neither. Its
asserts are compiled out, codes are not packed, and scales are those of torchao's plain integers.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

#: Changes the linears of a model (Llama's names), given calibration batches.
Quantizer = Callable[[Any, Sequence[Tensor]], None]


def installed() -> bool:
    return importlib.util.find_spec("torchao") is not None


@dataclass(frozen=True)
class Grid:
    """Integers of so many bits, in groups of a row or (0) whole rows."""

    bits: int
    group: int
    symmetric: bool = False

    @property
    def config(self) -> Any:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

        granularity = PerGroup(self.group) if self.group else PerAxis(0)
        mapping = MappingType.SYMMETRIC if self.symmetric else MappingType.ASYMMETRIC
        return IntxWeightOnlyConfig(getattr(torch, f"int{self.bits}"), granularity, mapping)

    def nearest(self, weight: Tensor) -> Any:
        """[N, K] -> torchao's tensor, rounded to nearest."""
        from torchao.quantization.quant_api import _intx_weight_only_quantize_tensor

        return _intx_weight_only_quantize_tensor(weight.detach().contiguous(), self.config)


def _run(model: Any, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        model(batch, use_cache=False)


def _linears(model: nn.Module, kind: type[nn.Module] = nn.Linear) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _set(linear: nn.Module, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)


def nearest(model: Any, batches: Sequence[Tensor], grid: Grid) -> None:
    for linear in _linears(model):
        _set(linear, grid.nearest(linear.weight).dequantize())


def hqq(model: Any, batches: Sequence[Tensor], grid: Grid) -> None:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as choose

    for linear in _linears(model):
        weight, group = linear.weight.detach(), grid.group or linear.in_features
        kept = {"compute_dtype": torch.float32, "device": "cpu", "raw_output": True}
        codes, scale, zero, _ = choose(weight, grid.bits, group, **kept)
        _set(linear, ((codes.unflatten(-1, (-1, group)) - zero[..., None]) * scale[..., None]).flatten(-2))


def awq(model: Any, batches: Sequence[Tensor], grid: Grid) -> None:
    """The last step of its API wants a tensor that multiplies its input; here the weight is divided instead."""
    from torchao.prototype.awq import AWQConfig
    from torchao.prototype.awq.core import AWQObservedLinear
    from torchao.quantization import quantize_

    quantize_(model, AWQConfig(grid.config, step="prepare"))
    _run(model, batches)
    for linear in _linears(model, AWQObservedLinear):
        columns = linear.act_obs.calculate_qparams()
        _set(linear, grid.nearest(linear.weight * columns).dequantize() / columns)
        linear.act_obs.inputs.clear()
        linear.act_obs.forward = lambda *given: None  # it would go on keeping every input


def gptq(model: Any, batches: Sequence[Tensor], grid: Grid) -> None:
    """Block after block, as its example does; the vocabulary projection last."""
    from torchao.prototype.gptq.observer import GPTQObserverTensor

    for stage in (*model.model.layers, model.lm_head):
        for linear in _linears(stage):
            _set(linear, GPTQObserverTensor.from_hp(linear.weight.detach()))
        _run(model, batches)
        for linear in _linears(stage):
            _set(linear, gptq_weight(linear.weight.hessian, linear.weight.hp_data, grid))


def gptq_weight(hessian: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """[K, K], [N, K] -> the weight that its GPTQ makes, in float. Both are overwritten."""
    from torchao.prototype.gptq import api
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    group = grid.group or weight.shape[1]
    # scales of a group are taken from what of it lies in one block
    config = api.GPTQConfig(base_config=Int8WeightOnlyConfig())
    config.gptq_quantize_block_size = max(group, config.gptq_quantize_block_size)
    if grid.bits < 8:
        config.base_config = Int4WeightOnlyConfig(group_size=group)

    def scales(rows: Tensor, size: int) -> tuple[None, Tensor, Tensor]:
        found = Grid(grid.bits, size, grid.symmetric).nearest(rows)
        lowest = (-(2 ** (grid.bits - 1)) - found.zero_point.float()) * found.scale
        return None, found.scale.mT, lowest.mT + 8 * found.scale.mT

    def codes(*given: Any) -> Tensor:  # of its sixteen, the lowest are those of fewer bits
        return api._int4_row_quantize_zp_precomputed_qparams(*given).clamp(max=2**grid.bits - 9)

    replaced = {"int4_row_quantize_zp": scales, "_int4_row_quantize_zp_precomputed_qparams": codes}
    scope = vars(api) | replaced | {"pack_int4": lambda chosen: chosen}
    exec(compile(inspect.getsource(api.gptq_quantize), api.__file__, "exec", optimize=1), scope)
    with mock.patch.object(torch.cuda, "synchronize"):
        found = scope["gptq_quantize"](hessian, weight, config)
    if grid.bits == 8:
        return found.dequantize()
    return api._int4_row_dequantize_zp(found.qdata, found.scale, found.zero_point, group)


def w8a8(model: Any, batches: Sequence[Tensor], smooth: bool) -> None:
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if smooth:
        quantize_(model, SmoothQuantConfig(base, step="prepare"))
        _run(model, batches)
    quantize_(model, SmoothQuantConfig(base, step="convert") if smooth else base)


_METHODS: dict[str, tuple[str, Callable[..., None]]] = {
    "round to nearest": ("{}:asym", nearest), "GPTQ": ("{}:asym:gptq", gptq), "AWQ": ("{}:asym:awq", awq),
    "HQQ": ("{}:zero=float:hqq", hqq),
}  # fmt: skip
_GRIDS = {
    "W4 g128": ("int4:g128", Grid(4, 128)), "W4 channel": ("int4:channel", Grid(4, 0)), "W3 g128": ("int3:g128", Grid(3, 128)),
    "W2 g64": ("int2:g64", Grid(2, 64)),
}  # fmt: skip
_ROWS = Grid(8, 0, symmetric=True)
#: Name -> (our recipe, torchao's quantizer): the same grid, every matrix but the embedding.
PAIRS: dict[str, tuple[str, Quantizer]] = {
    f"{column}, {name}": (f"{recipe.format(base)};embedding=fp32", partial(method, grid=grid))
    for column, (base, grid) in _GRIDS.items()
    for name, (recipe, method) in _METHODS.items()
    if name != "AWQ" or column == "W4 g128"  # minutes each
} | {
    "W8 channel, round to nearest": ("int8;embedding=fp32", partial(nearest, grid=_ROWS)),
    "W8 channel, GPTQ": ("int8:gptq;embedding=fp32", partial(gptq, grid=_ROWS)),
    "W8A8": ("int8@int8;embedding=fp32", partial(w8a8, smooth=False)),
    "W8A8, smooth": ("int8:smooth@int8;embedding=fp32", partial(w8a8, smooth=True)),
}
#: What torchao's are kept as, beside recipes.
THEIRS: dict[str, Quantizer] = {f"torchao:{name}": quantizer for name, (_, quantizer) in PAIRS.items()}


def main() -> None:
    """Relative errors of the output of one layer, 256 x 256, on 2048 tokens of a decaying spectrum."""
    from qpass.algorithms.gptq import Gptq
    from qpass.numerics import choose_qparams, dequantize, fake_quantize
    from qpass.spec import parse_spec

    torch.manual_seed(0)
    mix = torch.arange(1, 257)[:, None] ** -1.0 * torch.linalg.qr(torch.randn(256, 256)).Q
    x, weight = torch.randn(2048, 256) @ mix, torch.randn(256, 256)
    for column, (base, grid) in _GRIDS.items():
        spec = parse_spec(f"{base}:asym")
        ours = Gptq(x.mT @ x).quantize(weight, spec, choose_qparams(weight, spec))
        made = {"round to nearest": (fake_quantize(weight, spec), grid.nearest(weight).dequantize()),
                "GPTQ": (dequantize(ours, spec, 256), gptq_weight(x.mT @ x, weight.clone(), grid))}  # fmt: skip
        for name, pair in made.items():
            errors = (float((x @ (w - weight).mT).norm() / (x @ weight.mT).norm()) for w in pair)
            print("{:10} {:16} {:.5f}, torchao's {:.5f}".format(column, name, *errors))


if __name__ == "__main__":
    main()

"""Weights in a file: what qpass stores, to the bit, and what runtimes compute with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from qpass_export import export_onnx, load

import qpass
from qpass.numerics import codes_of, scale_values
from qpass.spec import parse_spec
from qpass.weights import quantize_weight
from tests.export.micro import Tied, one_embedding, one_linear, reference, stored

UNIFORM = [
    "int8:channel", "int8:tensor", "int8:asym", "int8:g32", "int8:g32:asym", "int8:g64:scale=fp16", "int6:g32", "int5:g32:asym",
    "int4:g32", "int4:g32:asym", "int4:g64:asym", "int4:channel", "int4:channel:asym", "int3:g32", "int3:g16:asym",
    "int2:g32:asym", "int4:g32:dq",
]  # fmt: skip
FLOATS = ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3:channel", "fp8_e4m3:g32", "mxfp8", "bf16", "fp16"]
OWN = ["nf4:g32", "nf4:g32:dq", "int4:g32:zero=float", "int3:g32:zero=float"]
#: float32 sums of 96 products, against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _x(columns: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", UNIFORM + FLOATS + OWN)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_linear_computes_with_the_stored_weight(spec: str, bias: bool, tmp_path: Path) -> None:
    model, x = one_linear(bias=bias), _x()
    exported = export_onnx(model, tmp_path, recipe=spec, inputs=x)
    weight = stored(model.layer.weight, parse_spec(spec))
    expected = x.double() @ weight.T + (model.layer.bias.double() if bias else 0)
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), **CLOSE)
    if spec not in OWN:  # nothing but the specification's operators
        (by_onnx,) = reference(exported.path, {"x": x.numpy()})
        np.testing.assert_allclose(by_onnx, expected.detach().numpy(), **CLOSE)


@pytest.mark.parametrize("columns", [24, 40, 72, 100], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("spec", ["int4:g32:asym", "int8:g32", "int4:g128", "int8:channel", "int4:g32:zero=float"])
def test_groups_that_do_not_divide_a_row(spec: str, columns: int, tmp_path: Path) -> None:
    model, x = one_linear(columns), _x(columns)
    export_onnx(model, tmp_path, recipe=spec, inputs=x)
    expected = x.double() @ stored(model.layer.weight, parse_spec(spec)).T + model.layer.bias.double()
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), **CLOSE)


@pytest.mark.parametrize("spec", [s for s in UNIFORM if "dq" not in s])
def test_integers_scales_and_zero_points_are_those_of_qpass(spec: str, tmp_path: Path) -> None:
    model, parsed = one_linear(), parse_spec(spec)
    exported = export_onnx(model, tmp_path, recipe=spec, inputs=_x())
    parts = quantize_weight(model.layer.weight.detach(), parsed)
    codes, zero = codes_of(parts, parsed, 96)
    read = {i.name: numpy_helper.to_array(i) for i in onnx.load(exported.path).graph.initializer}
    assert np.array_equal(read["layer.weight.quantized"].astype(np.int8), codes.T.numpy())
    assert np.array_equal(read["layer.weight.scale"].reshape(-1), scale_values(parts.scale, None).T.reshape(-1).numpy())
    if zero is not None:
        assert np.array_equal(read["layer.weight.zero_point"].astype(np.int8).reshape(-1), zero.T.reshape(-1).numpy())
    held = 4 if parsed.format.bits <= 4 else 8
    kind = next(i for i in onnx.load(exported.path).graph.initializer if i.name == "layer.weight.quantized").data_type
    assert kind == {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[held]


@pytest.mark.parametrize("spec", UNIFORM + FLOATS + OWN)
def test_an_embedding_gathers_and_then_dequantizes(spec: str, tmp_path: Path) -> None:
    model, ids = one_embedding(), torch.tensor([[0, 7, 49], [7, 7, 1]])
    exported = export_onnx(model, tmp_path, recipe=spec, inputs=ids)
    expected = stored(model.layer.weight, parse_spec(spec))[ids].float().numpy()
    (found,) = load(tmp_path).run(None, {"x": ids.numpy()})
    np.testing.assert_array_equal(found, expected)
    (by_onnx,) = reference(exported.path, {"x": ids.numpy()})
    np.testing.assert_array_equal(by_onnx, expected)
    sizes = {i.name: np.prod(i.dims) for i in onnx.load(exported.path).graph.initializer}
    gathered = next(n for n in onnx.load(exported.path).graph.node if n.op_type == "Gather" and n.input[0] in sizes)
    assert sizes[gathered.input[0]] <= 50 * 96, "rows are picked before they are floats"


@pytest.mark.parametrize("columns", [96, 72], ids=lambda k: f"K{k}")
@pytest.mark.parametrize(
    "spec", ["int8:channel", "int8:g32", "int8:g32:asym", "int4:g32", "int4:g32:asym", "int4:channel"]
)
def test_a_tied_table_is_stored_once(spec: str, columns: int, tmp_path: Path) -> None:
    model, ids = Tied(columns=columns), torch.tensor([[0, 7, 49], [7, 7, 1]])
    exported = export_onnx(model, tmp_path, recipe=spec, inputs=ids)
    table = stored(model.table.weight, parse_spec(spec))
    expected = torch.tanh(table[ids]) @ table.T
    (found,) = load(tmp_path, exact=True).run(None, {"ids": ids.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), **CLOSE)
    codes = [i for i in onnx.load(exported.path).graph.initializer if np.prod(i.dims) >= 64 * columns // 2]
    assert len(codes) == 1


@pytest.mark.parametrize("spec", ["fp16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "nf4:g32", "int8:g32"])
def test_a_tied_table_of_any_format_is_read_alike(spec: str, tmp_path: Path) -> None:
    model, ids = Tied(64, 64), torch.tensor([[0, 7, 49], [7, 7, 1]])
    export_onnx(model, tmp_path, recipe=spec, inputs=ids)
    table = stored(model.table.weight, parse_spec(spec))
    (found,) = load(tmp_path, exact=True).run(None, {"ids": ids.numpy()})
    np.testing.assert_allclose(found, (torch.tanh(table[ids]) @ table.T).numpy(), **CLOSE)


@pytest.mark.parametrize("columns", [96, 95, 40])
def test_blocks_of_nf4_end_with_the_row(columns: int, tmp_path: Path) -> None:
    model, x = one_linear(columns), _x(columns)
    spec = "nf4:g64" if columns > 64 else "nf4:g32"
    export_onnx(model, tmp_path, recipe=qpass.Recipe(linear=spec), inputs=x)
    expected = x.double() @ stored(model.layer.weight, parse_spec(spec)).T + model.layer.bias.double()
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), **CLOSE)


class Halves(torch.nn.Module):
    """Two linears that are rows of one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(64, 96))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return torch.tanh(linear(x, self.weight[:32])) + 2 * linear(x, self.weight[32:])


@pytest.mark.parametrize("spec", ["int8:channel", "int4:g32:asym", "nf4:g32", "fp8_e4m3"])
def test_rows_of_one_weight_are_weights_of_their_own(spec: str, tmp_path: Path) -> None:
    model, x = Halves().eval(), _x()
    export_onnx(model, tmp_path, recipe=qpass.Recipe.uniform(spec, embedding=None), inputs=x)
    with qpass.set_compute("float"):
        expected = qpass.quantize(model, spec, inputs=x, inner="eager")(x)
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec", ["int8@int8", "int8@int8:asym", "int8@int4:asym", "int8@int4:g32", "int8:g32@int8:g32", "int8@fp8_e4m3:g32"]
)
@pytest.mark.parametrize("columns", [96, 95], ids=lambda k: f"K{k}")
def test_activations_that_are_rounded_as_they_come(spec: str, columns: int, tmp_path: Path) -> None:
    model, x = one_linear(columns), _x(columns)
    export_onnx(model, tmp_path, recipe=qpass.Recipe(linear=spec), inputs=x)
    parsed = parse_spec(spec)
    assert parsed.activations is not None
    rounded = qpass.numerics.fake_quantize(x, parsed.activations).double()
    expected = rounded @ stored(model.layer.weight, parsed).T + model.layer.bias.double()
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), **CLOSE)


def test_products_of_int8_inputs_stay_within_half_a_step_of_each_input(tmp_path: Path) -> None:
    model, x = one_linear(bias=False), _x()
    export_onnx(model, tmp_path, recipe="int8:g32", inputs=x)
    weight = stored(model.layer.weight, parse_spec("int8:g32"))
    steps = x.abs().unflatten(-1, (3, 32)).amax(-1, keepdim=True).expand(2, 3, 3, 32).flatten(-2).double() / 127
    bound = steps / 2 @ weight.abs().T
    (found,) = load(tmp_path).run(None, {"x": x.numpy()})
    error = np.abs(found - (x.double() @ weight.T).numpy())
    assert (error <= bound.numpy() * 1.01 + 1e-6).all()


def test_weights_of_a_quantized_model_are_written_without_floats(tmp_path: Path) -> None:
    model, x = one_linear(), _x()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantized = qpass.quantize(model, "int4:g32:asym", inputs=x, inner="eager")
    exported = export_onnx(quantized, tmp_path, inputs=x)
    expected = (
        x.double() @ stored(before["layer.weight"], parse_spec("int4:g32:asym")).T + before["layer.bias"].double()
    )
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), **CLOSE)
    assert type(quantized.layer.weight.data).__name__ == "QTensor" or isinstance(quantized.layer.weight, qpass.QTensor)
    assert exported.path.stat().st_size < 96 * 40 * 4

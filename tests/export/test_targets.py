"""What a target refuses, with what it says, and that its advice can be followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qpass_export import TARGETS, export_onnx
from qpass_export.targets import get_target

import qpass
from qpass.spec import every_format, parse_spec
from tests.export.micro import one_linear

WEIGHTS = [str(s) for s in every_format()] + [
    "int8:g32", "int8:g48", "int8:asym", "int8:g32:zero=float", "int4:g128", "int4:g32:asym", "int4:g8", "int4:g512",
    "int4:g32:zero=float", "nf4:g48", "fp8_e4m3:channel", "fp8_e4m3:g32", "int8@int8", "int8@int8:static", "int8@int8:asym",
    "int4:g128@int8:static", "fp8_e4m3:channel@fp8_e4m3:static",
]  # fmt: skip
CACHES = [
    "int8",
    "int8:static",
    "fp8_e4m3",
    "fp8_e4m3:static",
    "int4:g32:asym:rotated",
    "int2:t32:zero=float",
    "mxfp8",
    "int8:g32",
]
PLACES = (
    [("linear", s) for s in WEIGHTS] + [("embedding", s) for s in WEIGHTS if "@" not in s] + [("kv", s) for s in CACHES]
)


@pytest.mark.parametrize(("place", "spec"), PLACES, ids=lambda x: x)
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_refusal_proposes_is_taken(target: str, place: str, spec: str) -> None:
    rule = getattr(TARGETS[target], place)
    refusal = rule(parse_spec(spec))
    if refusal is not None:
        assert rule(parse_spec(refusal.instead)) is None, refusal
        assert refusal.reason


@pytest.mark.parametrize(
    ("target", "recipe", "told"),
    [
        ("ort-cpu", "nvfp4", "no four-bit floats"),
        ("ort-cpu", "int4:g48", "powers of two"),
        ("ort-cpu", qpass.Recipe.uniform("int8", kv="fp8_e4m3"), "joins no fp8"),
        ("ort-cpu", qpass.Recipe.uniform("int8", kv="int2"), "a scale of their own"),
        ("ort-cuda", "w8a8", "no kernels for quantized activations"),
        ("ort-cpu", "mxfp8@mxfp8", "blocks whose scales have 8 bits"),
        ("ort-cuda", qpass.Recipe.uniform("int8", kv="int8"), "from calibration"),
        ("tensorrt", "int8", "rows of floats"),
        ("tensorrt", qpass.Recipe.uniform("nf4", embedding=None), "no table of values"),
        ("tensorrt", qpass.Recipe.uniform("int8:asym", embedding=None), "zero points"),
        ("tensorrt", qpass.Recipe.uniform("int4:g32", embedding=None), "blocks of 128"),
    ],
)  # fmt: skip
def test_a_recipe_is_refused_before_anything_is_done(target: str, recipe: object, told: str, tmp_path: Path) -> None:
    class NeverCalled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("captured before the recipe was checked")

    with pytest.raises(qpass.QpassError, match=f"{target}.*{told}.*nearest that works"):
        export_onnx(NeverCalled().eval(), tmp_path / "out", target, recipe, inputs=torch.zeros(2, 2))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused_by_its_own_formats(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 96)
    model = qpass.quantize(one_linear(), "mxfp4", inputs=x, inner="eager")
    with pytest.raises(qpass.QpassError, match=r"layer\.weight"):
        export_onnx(model, tmp_path / "out", inputs=x)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_told_the_nearest() -> None:
    with pytest.raises(qpass.QpassError, match="'ort-cuda'"):
        get_target("ort-cude")


@pytest.mark.parametrize("recipe", ["int8", None], ids=["int8", "float"])
def test_a_recipe_is_for_float_models(recipe: str | None, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 96)
    model = qpass.quantize(one_linear(), "int8", inputs=x, inner="eager")
    if recipe is None:
        assert export_onnx(model, tmp_path, recipe=recipe, inputs=x).sites
    else:
        with pytest.raises(qpass.QpassError, match="quantized already"):
            export_onnx(model, tmp_path, recipe=recipe, inputs=x)

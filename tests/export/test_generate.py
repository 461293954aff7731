"""An exported folder generates: onnxruntime-genai, the example without torch, the perplexity of the shipped model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from qpass_export import export_onnx, load
from qpass_export.genai import GENAI
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import qpass
from qpass.cli import app
from tests.export.micro import empty_cache, float_products

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tinypy"
PROMPT = "def load(path):\n    "


def _model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tinypy")
    export_onnx(_model(), where, recipe="int8")
    return where


def _greedy(model: torch.nn.Module, new: int = 24) -> list[int]:
    ids = AutoTokenizer.from_pretrained(TINY)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad(), float_products():
        return model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()  # type: ignore[operator]


def _by_genai(folder: Path, new: int = 24) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    ids = genai.Tokenizer(model).encode(PROMPT)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + new)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    found: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def test_onnxruntime_genai_gives_the_tokens_of_qpass(folder: Path) -> None:
    assert _by_genai(folder) == _greedy(qpass.quantize(_model(), "int8", inner="eager"))


def test_onnxruntime_genai_keeps_a_cache_of_int8_with_static_scales(tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(TINY)(
        (TINY / "calibration.txt").read_text()[:4000], return_tensors="pt"
    ).input_ids
    cache = qpass.KVCache(_model().config, 128, "int8:static").calibrate(_model(), [ids])
    exported = export_onnx(_model(), tmp_path, recipe="int8", cache=cache)
    assert exported.genai is None
    expected = _greedy(qpass.quantize(_model(), "int8", inner="eager"))
    same = sum(a == b for a, b in zip(_by_genai(tmp_path), expected, strict=False))
    assert same >= 20, "a cache of 8 bits changes few tokens"


def test_scales_that_change_are_nothing_for_onnxruntime_genai(tmp_path: Path) -> None:
    exported = export_onnx(_model(), tmp_path, recipe=qpass.Recipe.uniform("int8", kv="int8"))
    assert exported.genai is not None
    assert "int8:static" in exported.genai
    assert not (tmp_path / GENAI).exists()


def test_the_config_names_what_the_graph_has(folder: Path) -> None:
    content = json.loads((folder / GENAI).read_text())["model"]
    assert content["decoder"]["num_hidden_layers"] == 6
    assert content["decoder"]["num_key_value_heads"] == 2
    names = {i.name for i in load(folder).get_inputs()}
    assert content["decoder"]["inputs"]["past_key_names"] % 5 in names


def test_the_example_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, runpy\n"
        "class No:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'qpass', 'qpass_export', 'transformers'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        f"sys.argv = ['onnx_generate.py', {str(folder)!r}, {PROMPT!r}, '--new', '24']\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'onnx_generate.py')!r}, run_name='__main__')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    expected = tokenizer.decode(_greedy(qpass.quantize(_model(), "int8", inner="eager")))
    assert expected[:40] in out


@pytest.mark.parametrize("kv", [pytest.param(None, marks=pytest.mark.long), "int8"])
def test_the_perplexity_in_onnxruntime_is_that_of_qpass(kv: str | None, tmp_path: Path) -> None:
    recipe = qpass.Recipe.uniform("int4:g32:asym", embedding="int8", vocab="int8", kv=kv)
    export_onnx(_model(), tmp_path, recipe=recipe)
    session = load(tmp_path, exact=True)
    ids = np.load(TINY / "validation.npy").reshape(-1)[: 4 * 256].astype(np.int64).reshape(4, 256)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(256), (4, 1))}
    ours = torch.from_numpy(session.run(["logits"], feeds | empty_cache(session, 4))[0])
    quantized = qpass.quantize(_model(), recipe, inner="eager")
    tokens = torch.from_numpy(ids)
    with torch.no_grad(), float_products():
        theirs = quantized(tokens, use_cache=False).logits

    def perplexity(logits: torch.Tensor) -> float:
        return math.exp(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
        )

    # With a cache in int8 the graph reads what it stores; qpass's own cache lets the tokens of a call see floats.
    assert perplexity(ours) == pytest.approx(perplexity(theirs), rel=1e-5 if kv is None else 5e-3)


class TestCommand:
    @pytest.mark.long
    def test_a_folder_is_exported_and_verified(self, tmp_path: Path) -> None:
        told = CliRunner().invoke(
            app, ["export", str(TINY), str(tmp_path / "out"), "--format", "onnx", "--recipe", "int8", "--verify", "--json"],
            catch_exceptions=False,
        )  # fmt: skip
        content = json.loads(told.stdout)
        assert content["target"] == "ort-cpu"
        assert all(check["passed"] for check in content["checks"])
        assert load(tmp_path / "out").get_inputs()[0].name == "input_ids"

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--format", "onx"], "did you mean 'onnx'"),
            (["--format", "onnx", "--target", "ort"], "unknown target"),
            (["--format", "onnx", "--recipe", "nvfp4"], "nearest that works"),
            (["--verify"], "of --format onnx"),
        ],
    )
    def test_bad_options_are_named(self, options: list[str], told: str, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["export", str(TINY), str(tmp_path / "out"), *options])
        assert isinstance(result.exception, qpass.QpassError)
        assert told in str(result.exception)

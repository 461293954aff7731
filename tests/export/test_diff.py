"""A float export against a quantized one, site by site."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from qpass_export import diff_onnx, export_onnx
from typer.testing import CliRunner

import qpass
from qpass.cli import app
from tests.zoo.configs import build


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("diff")
    before = export_onnx(build("LlamaForCausalLM"), folder / "float").path
    after = export_onnx(
        build("LlamaForCausalLM"), folder / "int8", recipe=qpass.Recipe.uniform("int8:g16", kv="int8")
    ).path
    return before, after


def test_every_site_shows_what_went_and_what_came(files: tuple[Path, Path]) -> None:
    (graph,) = diff_onnx(*files).graphs
    for module, kind in {
        "model.embed_tokens": "embedding", "model.layers.1.self_attn.o_proj": "attn_out", "model.layers.0.mlp.down_proj": "ffn",
        "model.layers.0.self_attn.q_proj": "qkv", "lm_head": "vocab",
    }.items():  # fmt: skip
        mine = [n for n in graph.nodes if n.module == module]
        assert any(n.status == "removed" and "float[" in n.text for n in mine), module
        assert any(n.status == "added" and n.text.endswith(f"# {kind}") for n in mine), module
    attention = [n for n in graph.nodes if n.module == "model.layers.0.self_attn" and n.text.endswith("# kv")]
    assert {n.text.split("(")[0] for n in attention if n.status == "added"} >= {"QuantizeLinear", "DequantizeLinear"}


def test_what_is_in_both_is_kept(files: tuple[Path, Path]) -> None:
    before, after = files
    (same,) = diff_onnx(before, before).graphs
    assert same.count("removed") == same.count("added") == 0
    assert same.count("kept") == len(onnx.load(before).graph.node)
    (graph,) = diff_onnx(before, after).graphs
    norms = [n for n in graph.nodes if "RMSNormalization" in n.text]
    assert len(norms) == 5
    assert {n.status for n in norms} == {"kept"}
    assert graph.count("removed") + graph.count("kept") == len(onnx.load(before).graph.node)
    assert graph.count("added") + graph.count("kept") == len(onnx.load(after).graph.node)


def test_linears_that_were_fused_are_one_group(files: tuple[Path, Path]) -> None:
    diff = diff_onnx(*files)
    (graph,) = diff.graphs
    for group in graph.groups():
        assert group.before, group.after
        assert group.after, group.before
    group = next(g for g in graph.groups() if "model.layers.1.self_attn.q_proj" in g.modules)
    assert {n.module for n in group.before} == {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert any(n.op == "Split" for n in group.after)
    (site,) = (s for s in diff.sites if s.name == "model.layers.1.self_attn.q_proj.weight")
    assert site.before is not None
    assert site.after is not None
    assert site.before.nbytes == 4 * (64 * 64 + 2 * 64 * 64)
    assert site.after.format == "int8"


def test_the_command(files: tuple[Path, Path]) -> None:
    before, after = map(str, files)
    shown = CliRunner().invoke(app, ["diff", before, after], catch_exceptions=False).stdout
    assert "model.layers.*.mlp.down_proj  x2" in shown
    plain = json.loads(CliRunner().invoke(app, ["diff", before, after, "--json"], catch_exceptions=False).stdout)
    assert plain["graphs"][0]["added"] > 0
    wrong = CliRunner().invoke(app, ["diff", before, __file__])
    assert isinstance(wrong.exception, qpass.QpassError)
    assert "is compared with another one" in str(wrong.exception)


def test_a_file_tells_nothing_of_the_machine_that_wrote_it(files: tuple[Path, Path]) -> None:
    for file in files:
        content = file.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(__file__).parents[2]).encode() not in content

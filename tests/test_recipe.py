"""Recipes: presets, keyword sites, YAML, overrides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import qpass
from qpass.cli import app
from qpass.errors import QpassError
from qpass.recipe import PRESETS, WEIGHT_KINDS, resolve_recipe
from qpass.spec import parse_spec


@pytest.mark.parametrize("name", PRESETS)
def test_presets_cover_every_weight(name: str) -> None:
    assert all(resolve_recipe(name).spec_for(kind, "any") for kind in WEIGHT_KINDS)


def test_a_preset_wins_over_a_format_of_its_name() -> None:
    assert resolve_recipe("int4") == PRESETS["int4"] != resolve_recipe("int4:g128")
    assert resolve_recipe("int4:g128").spec_for("ffn", "x") == parse_spec("int4:g128")


def test_the_first_matching_name_wins() -> None:
    recipe = qpass.Recipe(ffn="int4", overrides={"*.0.*": "int8", "*.0.up": None, "*.1.*": None})
    assert recipe.spec_for("ffn", "a.0.up") == parse_spec("int8")
    assert recipe.spec_for("ffn", "a.1.up") is None
    assert recipe.spec_for("ffn", "a.2.up") == parse_spec("int4")


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(PRESETS[name].to_dict()))
    assert resolve_recipe(path) == PRESETS[name]


def test_kv_sets_both_halves_and_k_or_v_one() -> None:
    assert qpass.Recipe(kv="int8").kv_specs == (parse_spec("int8"),) * 2
    assert qpass.Recipe(kv="int8", v="int4:g32").kv_specs == (parse_spec("int8"), parse_spec("int4:g32"))
    assert qpass.Recipe(qkv="int8").kv_specs is None


def test_the_command_prints_them() -> None:
    out = CliRunner().invoke(app, ["recipes", "--json"])
    assert json.loads(out.stdout)["int8"]["ffn"] == "int8:g32:scale=fp16"
    rows = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "250"}).stdout.splitlines()
    (without,) = (row for row in rows if row.split()[:2] == ["int4", "int2"])
    assert without.count("int2 .. int8:g32") == len(WEIGHT_KINDS)
    assert "5.35 on average" in without
    assert any(row.split()[0] == "w4a8" and "int4:g32:asym@int8:g32" in row for row in rows)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("int4+kv=int8", {"ffn": "int4:g32:asym", "vocab": "int4:g32:asym", "bits": 5.35, "k": "int8:channel"}),
        ("int8+vocab=int4:g32+ffn=float", {"vocab": "int4:g32", "ffn": None, "qkv": "int8:g32:scale=fp16", "k": None}),
        (
            "w8a8+k=int8+v=int4:g32:asym",
            {"k": "int8:channel", "v": "int4:g32:asym", "qkv": "int8:channel@int8:channel"},
        ),
        ("int4:g64+qkv=int8", {"qkv": "int8:channel", "ffn": "int4:g64"}),
    ],
)
def test_a_name_with_changes(text: str, wanted: dict[str, str | None]) -> None:
    found = resolve_recipe(text).to_dict()
    assert {site: found.get(site) for site in wanted} == wanted


@pytest.mark.parametrize("text", ["int4+kvv=int8", "int4+kv", "int4+=int8", "int4+kv=int99", "int4+"])
def test_a_change_that_is_none(text: str) -> None:
    with pytest.raises(QpassError):
        resolve_recipe(text)

"""plan, report, diff, recipes, doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import TINYPY, Command


@pytest.mark.long
def test_the_ladder_of_70_billion_parameters_and_its_cache(command: Command) -> None:
    """280, 140, 70, 70 and 35 GB; a cache of 262 GB at 100,000 tokens becomes 131."""
    ended = command("plan", "70b", "--recipe", "int8", "--kv", "int8", "--context", 100_000, "--json")
    found = json.loads(ended.out)
    rungs = {(r["what"], r["format"]): round(r["nominal_bytes"] / 1e9) for r in found["ladder"]}
    weights = {format: size for (what, format), size in rungs.items() if what == "weights"}
    assert weights == {"fp32": 280, "bf16": 140, "fp8_e4m3": 70, "int8": 70, "int4:g128": 35}
    assert rungs["cache", "bfloat16"] == 262
    assert rungs["cache", "int8"] == 131
    assert found["parameters"] == pytest.approx(70e9, rel=1e-3)


@pytest.mark.parametrize(
    ("memory", "says"), [("24MB", "it fits"), ("5MB", "does not fit"), ("5MiB", "2 such devices")], ids=str
)
def test_whether_it_fits(memory: str, says: str, command: Command) -> None:
    assert says in command("plan", TINYPY, "--context", 100, "--kv", "int8", "--gpu-memory", memory).out


def test_a_floor_is_bytes_over_bandwidth_of_the_devices_that_hold_them(command: Command) -> None:
    found = json.loads(command("plan", TINYPY, "--device", "h200", "--device", "B200", "--batch", 2, "--json").out)
    h200, b200 = found["floors"]
    looked_up = next(row["bytes"] for row in found["rows"] if row["kind"] == "embedding")
    assert h200["step_seconds"] == pytest.approx((found["total"]["bytes"] - looked_up) / 4.8e12)
    assert h200["tokens_per_second"] == pytest.approx(2 / h200["step_seconds"])
    assert (b200["device"], b200["fits"]) == ("B200", True)
    (saving,) = found["savings"]
    assert saving["format"] == "int4"
    assert saving["total_bytes"] == found["total"]["bytes"] - saving["saved_bytes"]


def test_a_plan_of_a_model_or_its_artifact_is_of_the_float_model(command: Command, tmp_path: Path) -> None:
    """Its floats are those of the file, where the config does not say."""
    assert command("quantize", TINYPY, tmp_path / "a").status == 0
    one, other = (json.loads(command("plan", folder, "--json").out) for folder in (TINYPY, tmp_path / "a"))
    assert one == other
    assert one["weights"]["float_bytes"] == pytest.approx((TINYPY / "model.safetensors").stat().st_size, rel=0.01)


def test_report_of_a_recipe_and_of_an_artifact(command: Command, artifact: Path) -> None:
    by_recipe = json.loads(command("report", TINYPY, "--recipe", "int4+kv=int8", "--json").out)
    by_artifact = json.loads(command("report", artifact, "--json").out)
    told = []
    for found in (by_recipe, by_artifact):
        rows = [s for s in found["sites"] if s["kind"] != "kv"]
        told.append([(s["kind"], s["name"], s["format"], s["bytes_after"]) for s in rows])
    assert told[0] == told[1]
    assert "int4:g32:asym" in command("report", artifact).out


def test_pages_are_written(command: Command, tmp_path: Path) -> None:
    for name in ("report", "diff"):
        page = tmp_path / f"{name}.html"
        ended = command(name, TINYPY, "-o", page)
        assert (ended.status, ended.out) == (0, "")
        assert page.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diff.html", "report.html"]


@pytest.mark.parametrize(
    ("sides", "status"),
    [((), 1), (("artifact",), 1), (("artifact", "artifact"), 0)],
    ids=["recipe", "artifact", "same"],
)
def test_diff_ends_with_1_if_graphs_differ_as_git_does(
    sides: tuple[str, ...], status: int, command: Command, artifact: Path
) -> None:
    given = [artifact if side == "artifact" else side for side in sides] or [TINYPY]
    given = [TINYPY, *given] if len(given) == 1 and sides else given
    assert command("diff", *given, "--exit-code").status == status
    assert command("diff", *given).status == 0


def test_recipes_and_doctor_print_and_give_plain_data(command: Command) -> None:
    assert "int4:g32:asym" in command("recipes").out
    assert "int4, with data" in json.loads(command("recipes", "--json").out)
    assert json.loads(command("doctor", "--json").out)["threads"] > 0

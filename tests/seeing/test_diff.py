"""diff: nodes matched by where they come from, sites beside them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.graph.provenance import place_of
from qpass.graph.torch_private import copy_graph
from qpass.registry import captured
from qpass.seeing.diff import Diff, Group, diff_graphs
from qpass.seeing.sides import COUNTED, histogram
from tests.models import BLOCKS, FAMILIES, NORM, build, hf, tokens


def compiled(family: str, recipe: Any = "int8") -> Any:
    fast = torch.compile(build(family), backend=qpass.QPass(recipe, inner="eager"))
    with torch.no_grad():
        fast(tokens())
    return fast


def generated(recipe: Any) -> nn.Module:
    """Quantized, with a cache of its own, so that there are a prefill and a decode."""
    model = qpass.quantize(build("llama"), recipe, inner="eager")
    ids = tokens(1, 5)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    return model


def of(group: Group, side: str) -> list[str]:
    return [node.op for node in getattr(group, side)]


# --- what is kept, removed and added --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_agrees_with_what_the_passes_say_they_did(family: str) -> None:
    for capture in captured(compiled(family), "test").captures:
        check_against_edits(capture)


def test_it_agrees_where_the_cache_is_quantized_too() -> None:
    captures = captured(generated(qpass.Recipe.uniform("int4:g16", kv="int8")), "test").captures
    assert len(captures) == 2
    for capture in captures:
        check_against_edits(capture)


def check_against_edits(capture: Any) -> None:
    nodes = diff_graphs(capture.before, capture.after).nodes
    for status in ("removed", "added"):
        said = {name for edit in capture.edits for name in getattr(edit, status)}
        assert said == {n.name for n in nodes if n.status == status}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_put_in_has_something_that_it_stands_for(family: str) -> None:
    for graph in qpass.diff(compiled(family)).graphs:
        assert graph.groups()
        for group in graph.groups():
            assert group.before, group.after


def test_three_linears_and_the_operator_that_computes_them_are_one_group() -> None:
    (graph,) = qpass.diff(compiled("llama")).graphs
    group = next(g for g in graph.groups() if "model.layers.0.self_attn.q_proj" in g.modules)
    assert group.modules == tuple(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    assert of(group, "before") == ["input"] * 3 + NORM + ["linear"] * 3
    assert of(group, "after") == ["input", "input", "qpass::linear", "split_with_sizes"] + ["getitem"] * 3
    assert {n.site for n in group.before} == {f"qkv {m}.weight" for m in group.modules}


def test_one_linear_and_the_nodes_that_quantize_it_are_one_group() -> None:
    (graph,) = qpass.diff(compiled("llama", qpass.Recipe.uniform("int8@int8"))).graphs
    group = next(g for g in graph.groups() if g.modules == ("model.layers.1.self_attn.o_proj",))
    assert of(group, "before") == ["input", "linear"]
    assert of(group, "after")[-1] in ("qpass::integer_linear", "qpass::linear")
    assert len(group.after) > len(group.before)
    assert all(n.source.startswith("modeling_llama.py:") for n in (*group.before, *group.after))


def test_an_attention_over_a_quantized_cache_is_one_group() -> None:
    _, decode = qpass.diff(generated(qpass.Recipe.uniform("int8", kv="int8"))).graphs
    groups = [g for g in decode.groups() if g.modules == ("model.layers.0.self_attn",)]
    rotary, group = sorted(groups, key=lambda g: "qpass::attention" in of(g, "after"))
    assert of(rotary, "after") == ["qpass::append_rotated", "getitem", "getitem", "getitem"]
    assert {"neg", "cat", "qpass::append"} < set(of(rotary, "before"))
    assert of(group, "after") == ["qpass::attention"]
    assert {"qpass::read_cache", "scaled_dot_product_attention"} < set(of(group, "before"))
    assert {n.site for n in (*group.before, *group.after)} == {"kv model.layers.0.self_attn.k_proj.weight"}


def test_names_play_no_part() -> None:
    (capture,) = captured(compiled("llama"), "test").captures
    other = copy_graph(capture.before)
    for i, node in enumerate(other.nodes):
        node.name = f"node_{i}"
    assert {n.status for n in diff_graphs(capture.before, other).nodes} == {"kept"}


def test_lines_that_moved_play_no_part() -> None:
    (capture,) = captured(compiled("llama"), "test").captures
    moved = copy_graph(capture.before)
    for node in moved.nodes:
        node.meta["stack_trace"] = re.sub(
            r"line (\d+)", lambda m: f"line {int(m[1]) + 10_000}", node.meta.get("stack_trace", "")
        )
    assert {place_of(n)[1] for n in moved.nodes}.isdisjoint({place_of(n)[1] for n in capture.before.nodes} - {""})
    assert {n.status for n in diff_graphs(capture.before, moved).nodes} == {"kept"}


@pytest.mark.parametrize("change", ["operation", "shape"], ids=lambda c: f"another {c}")
def test_what_differs_is_not_kept(change: str) -> None:
    (capture,) = captured(compiled("llama"), "test").captures
    other = copy_graph(capture.before)
    node = next(n for n in other.nodes if n.target is torch.nn.functional.silu)
    if change == "operation":
        node.target = torch.nn.functional.gelu
    else:
        node.meta = node.meta | {"example_value": node.meta["example_value"][..., :3]}
    changed = [n for n in diff_graphs(capture.before, other).nodes if n.status != "kept"]
    assert [(n.status, n.group, n.name) for n in changed] == [("removed", 0, node.name), ("added", 0, node.name)]


# --- what is told ---------------------------------------------------------------------------------------------------------


def test_no_folder_of_this_machine_is_told() -> None:
    text = json.dumps(qpass.diff(compiled("llama")).to_json())
    assert "modeling_llama.py:" in text
    for hint in ("site-packages", str(Path(__file__).parents[2]), str(Path.home()) + "/"):
        assert hint not in text


def test_repeated_blocks_are_folded() -> None:
    diff = qpass.diff(compiled("llama"))
    (graph,) = diff.graphs
    blocks = {pattern: count for pattern, count, _ in graph.blocks()}
    assert blocks["model.layers.*.self_attn.q_proj, k_proj, v_proj"] == BLOCKS
    assert blocks["model.layers.*.mlp.down_proj"] == BLOCKS
    assert f"x{BLOCKS}" in str(diff)
    assert blocks["lm_head"] == 1


def test_many_layers_are_as_long_as_few() -> None:
    lengths = []
    for layers in (3, 12):
        model = hf("LlamaForCausalLM", num_key_value_heads=2, num_hidden_layers=layers).eval()
        fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
        with torch.no_grad():
            fast(tokens())
        lengths.append(len(str(qpass.diff(fast)).splitlines()))
    assert lengths[0] == lengths[1] < 100


def test_json_has_every_node_and_site() -> None:
    diff = qpass.diff(compiled("llama"))
    (graph,) = diff.graphs
    data = json.loads(json.dumps(diff.to_json()))
    (told,) = data["graphs"]
    assert told["removed"] == graph.count("removed") > 0
    assert told["changed"] == graph.count("changed") > 0
    assert len(told["nodes"]) == told["removed"] + told["added"] + told["kept"]
    assert {s["name"] for s in data["sites"] if s["kind"] != "kv"} == {
        n for n, p in build("llama").named_parameters() if p.dim() > 1
    }
    assert data["same"] is False


def test_nodes_stand_in_the_order_of_both_graphs() -> None:
    capture = captured(compiled("llama"), "test").captures[0]
    nodes = diff_graphs(capture.before, capture.after).nodes
    for graph, absent in ((capture.after, "removed"), (capture.before, "added")):
        names = [n.name for n in nodes if n.status != absent]
        assert names == [n.name for n in graph.nodes]


# --- sites ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [True, False], ids=["replaced", "beside the float weights"])
def test_sites_are_those_of_the_report_with_their_scales(quantize: bool) -> None:
    recipe = qpass.Recipe.uniform("int4:g16")
    model: Any = qpass.quantize(build("llama"), recipe, inner="eager") if quantize else compiled("llama", recipe)
    model(tokens())
    alone = qpass.quantize(build("llama"), recipe, inner="eager")
    rows = {(r.kind, r.name): r for r in qpass.report(model).sites}
    sites = {(s.kind, s.name): s for s in qpass.diff(model).sites}
    assert rows.keys() == sites.keys()
    for key, site in sites.items():
        assert site.before is not None
        assert site.after is not None
        row = rows[key]
        assert (site.before.nbytes, site.after.nbytes) == (row.bytes_before, row.bytes_after)
        assert (site.after.format, site.after.sqnr_db, site.after.skipped) == (row.format, row.sqnr_db, row.skipped)
        if row.kind == "kv":
            continue
        scales = alone.get_parameter(row.name).quantized.scale  # type: ignore[attr-defined]
        shown = site.after.scales
        assert shown is not None
        assert (shown.low, shown.high) == (float(scales.min()), float(scales.max()))
        assert sum(shown.counts) == shown.counted == shown.total == scales.numel()


@pytest.mark.parametrize(
    "scales",
    [
        torch.tensor([1.0]),
        torch.tensor([2.0**-30, 2.0**30]),
        torch.linspace(0.001, 0.5, 3 * COUNTED + 1),
        torch.ones(7),
    ],
    ids=["one", "far apart", "many", "equal"],
)
def test_a_histogram_counts_what_lies_in_its_bins(scales: Tensor) -> None:
    found = histogram(scales)
    assert found is not None
    assert (found.low, found.high, found.total) == (float(scales.min()), float(scales.max()), scales.numel())
    assert sum(found.counts) == found.counted <= COUNTED
    assert len(found.counts) <= 64
    edges = [2 ** (found.start + i * found.step) for i in range(len(found.counts) + 1)]
    taken = scales[:: math.ceil(scales.numel() / COUNTED)].double()
    for i, n in enumerate(found.counts):
        assert n == int(((taken >= edges[i]) & (taken < edges[i + 1])).sum())


def test_a_histogram_of_nothing() -> None:
    assert histogram(torch.empty(0)) is None
    assert histogram(torch.zeros(3)) is None


# --- two models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_the_same_as_another_that_was_quantized_alike() -> None:
    diff = qpass.diff(compiled("nanogpt"), compiled("nanogpt"))
    assert diff.same
    assert diff.graphs[0].count("kept") > 0
    assert {s.after.format for s in diff.sites if s.after} == {"int8:g32:scale=fp16"}


def test_two_formats_differ_at_every_site() -> None:
    diff = qpass.diff(compiled("nanogpt"), compiled("nanogpt", qpass.Recipe.uniform("int4:g16")))
    assert not diff.same
    (graph,) = diff.graphs
    assert all(group.before and group.after for group in graph.groups())
    for site in diff.sites:
        assert site.before is not None
        assert site.after is not None
        assert (site.before.format, site.after.format) == ("int8:g32:scale=fp16", "int4:g16")
        assert site.before.nbytes > site.after.nbytes


def test_a_float_model_against_what_became_of_it() -> None:
    """The same operations go and come as in the diff of the quantized model alone; another number of tokens is no change."""
    quantized = compiled("llama")
    diff = qpass.diff(build("llama"), quantized)
    alone = qpass.diff(quantized)

    def changes(d: Diff) -> list[tuple[str, str, str]]:
        return sorted((n.status, n.module, n.op) for g in d.graphs for n in g.nodes if n.status != "kept")

    assert changes(diff) == changes(alone)
    weights = [s for s in diff.sites if s.kind != "kv"]
    assert all(s.before and s.before.format is None and s.before.dtype == "float32" for s in weights)
    assert sum(s.before.nbytes for s in weights if s.before) == sum(
        p.nbytes for p in build("llama").parameters() if p.dim() > 1
    )


def test_a_float_model_against_itself() -> None:
    assert qpass.diff(build("nanogpt"), build("nanogpt")).same


def test_exported_programs() -> None:
    program = torch.export.export(build("nanogpt"), (tokens(),))
    quantized = qpass.quantize(program, "int8")
    for diff in (qpass.diff(quantized), qpass.diff(program, quantized)):
        (graph,) = diff.graphs
        group = next(g for g in graph.groups() if g.modules == ("first.c_attn",))
        assert of(group, "before") == ["input", "linear"]
        assert of(group, "after") == ["input", "input", "qpass::linear"]
        (site,) = (s for s in diff.sites if s.name == "first.c_attn.weight")
        assert site.after is not None
        assert site.after.scales is not None
        assert {n.site for n in (*group.before, *group.after)} == {site.key}
    assert qpass.diff(quantized, quantized).same


def test_report_and_diff_belong_to_the_model_asked_about() -> None:
    backend = qpass.QPass(inner="eager")
    models = [build("llama"), build("nanogpt")]
    for model in models:
        torch.compile(model, backend=backend)(tokens())
    for model in models:
        assert len(qpass.diff(model).graphs) == 1
        names = {r.name for r in qpass.report(model).sites if r.kind != "kv"}
        assert names == {n for n, p in model.named_parameters() if p.dim() == 2}
        assert any(r.kind == "kv" for r in qpass.report(model).sites) == (model is models[0])

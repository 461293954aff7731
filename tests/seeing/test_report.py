"""report and evaluate: what they say is what is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.errors import QpassError
from qpass.seeing.html.page import as_script_data
from tests.models import FAMILIES, build, dequantized_copy, hf, logits_of, tokens


def compiled(family: str, recipe: Any = "int8") -> Any:
    fast = torch.compile(build(family), backend=qpass.QPass(recipe, inner="eager"))
    with torch.no_grad():
        fast(tokens())
    return fast


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_with_its_bytes_and_sqnr(family: str) -> None:
    fast = compiled(family, "int4:g16")
    expected = FAMILIES[family].expected(fast._orig_mod)
    rows = {r.name: r for r in qpass.report(fast).sites if r.kind != "kv"}
    assert rows.keys() == expected.keys()
    rounded = dequantized_copy(fast._orig_mod, lambda n: "int4:g16", FAMILIES[family].transposed)
    for name, row in rows.items():
        weight = fast._orig_mod.get_parameter(name)
        kind, roles = expected[name]
        assert row.kind == ("embedding+vocab" if roles == ("embedding", "vocab") else kind)
        assert row.bytes_before == weight.nbytes
        assert row.bytes_after == weight.numel() // 2 + weight.numel() // 16 * 4
        noise = (weight.double() - rounded.get_parameter(name).double()).square().sum()
        assert row.sqnr_db == pytest.approx(float(10 * torch.log10(weight.double().square().sum() / noise)), abs=0.01)


def test_json_and_table() -> None:
    report = qpass.report(compiled("llama"))
    data = json.loads(json.dumps(report.to_json()))
    fields = "kind name format bytes_before bytes_after sqnr_db skipped compute bytes_per_token input seconds"
    assert set(fields.split()) == data["sites"][0].keys()
    assert data["bytes_before"] == sum(s["bytes_before"] for s in data["sites"])
    assert data["bytes_after"] == sum(s["bytes_after"] for s in data["sites"])
    text = str(report)
    for site in report.sites:
        assert site.name in text


def test_resident_bytes_and_the_line_that_frees_the_float_ones() -> None:
    fast, model = compiled("nanogpt"), qpass.quantize(build("nanogpt"), "int8", inner="eager")
    beside, alone = qpass.report(fast), qpass.report(model)
    assert beside.resident_float == sum(p.nbytes for p in fast._orig_mod.parameters())
    assert alone.resident_float == sum(p.nbytes for p in model.parameters() if p.dim() < 2)
    assert beside.resident_quantized == alone.resident_quantized > 0
    assert any("qpass.quantize" in note for note in beside.notes)
    assert not alone.notes


def test_a_recipe_that_leaves_a_kind_out() -> None:
    rows = qpass.report(compiled("llama", qpass.Recipe(qkv="int8"))).sites
    left = {r.kind: r.skipped for r in rows if r.skipped and r.kind != "kv"}
    assert left == {k: f"the recipe leaves {k} in float" for k in ("embedding", "attn_out", "ffn", "vocab")}


def test_a_tied_table_takes_the_more_accurate_format_and_says_so() -> None:
    report = qpass.report(compiled("gpt2", qpass.Recipe(embedding="int4:g16", vocab="int8")))
    (table,) = (r for r in report.sites if "wte" in r.name)
    assert table.format == "int8:channel"
    assert any("tied" in note for note in report.notes)


def test_many_layers_stay_readable() -> None:
    """The report on 40 layers is as long as that on 8, and still names every kind; nothing is left out of the sums."""
    lengths = []
    for layers in (8, 40):
        model = hf("LlamaForCausalLM", num_key_value_heads=2, num_hidden_layers=layers).eval()
        fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
        with torch.no_grad():
            fast(tokens())
        found = qpass.report(fast)
        text = str(found)
        assert f"model.layers.*.mlp.up_proj.weight x {layers}" in text
        assert sum(len(sites) for _, sites in found.folded()) == len(found.sites) == 8 * layers + 2  # with its cache
        lengths.append(len(text.splitlines()))
    assert lengths[0] == lengths[1]


def test_few_layers_are_shown_one_by_one() -> None:
    fast = compiled("llama", "int8")
    assert "model.layers.1.mlp.up_proj.weight" in str(qpass.report(fast))


def test_the_page_holds_what_the_json_says(tmp_path: Path) -> None:
    report = qpass.report(compiled("llama"))
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    assert "<title>LlamaForCausalLM</title>" in text
    assert as_script_data(report.to_json()["sites"]) in text
    assert "srcdoc" in report._repr_html_()


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_against_its_definition_in_float64() -> None:
    reference, model = build("nanogpt"), qpass.quantize(build("nanogpt"), "int3:g16", inner="eager")
    batches = [tokens(3, 11, seed=1), tokens(2, 7, seed=2)]
    found = qpass.evaluate(model, reference, batches)
    kl, nll, agree = [], [], []
    with torch.no_grad():
        for ids in batches:
            p, q = (logits_of(m(ids)).double().log_softmax(-1)[:, :-1] for m in (reference, model))
            kl.append((p.exp() * (p - q)).sum(-1).flatten())
            nll.append(-q.gather(-1, ids[:, 1:, None]).flatten())
            agree.append((p.argmax(-1) == q.argmax(-1)).flatten())
    assert found.tokens == 3 * 10 + 2 * 6
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(float(torch.cat(nll).mean())), rel=1e-5)
    assert found.top1 == pytest.approx(float(torch.cat(agree).double().mean()))


def test_evaluate_leaves_padding_out() -> None:
    model, reference = build("nanogpt", seed=1), build("nanogpt", seed=2)
    ids = tokens(2, 8)
    short = qpass.evaluate(model, reference, [ids[:, :5]])

    class Batch(dict):  # type: ignore[type-arg]
        pass

    def of(m: Any) -> Any:
        return lambda input_ids, attention_mask: m(input_ids)

    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    padded = qpass.evaluate(of(model), of(reference), [Batch(input_ids=ids, attention_mask=mask)])
    assert padded.tokens == short.tokens
    assert padded.kl == pytest.approx(short.kl, rel=1e-5)


def test_evaluate_without_data() -> None:
    with pytest.raises(QpassError, match="no batch"):
        qpass.evaluate(build("nanogpt"), build("nanogpt"), [])

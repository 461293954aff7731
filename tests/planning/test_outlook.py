"""What `qpass plan` adds to the bytes: sizes in words, devices, what comes next, how fast a step can be."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from qpass.errors import QpassError
from qpass.planning.memory import Planner
from qpass.planning.outlook import DEVICES, Device, named_devices, outlook, parse_bytes
from tests.planning.test_plan import SMALL


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80e9), ("80", 80e9), ("24GiB", 24 * 2**30), ("512 mb", 512e6), ("1.5TB", 1.5e12), ("640K", 640e3)],
)
def test_sizes_in_words(text: str, count: float) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "80 apples", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(QpassError, match="80GB"):
        parse_bytes(text)


def test_devices_by_name() -> None:
    assert [d.name for d in named_devices(["h200", "B200"])] == ["H200", "B200"]
    assert {d.name for d in named_devices([])} > {"H100", "H200", "B200"}
    with pytest.raises(QpassError, match="did you mean 'H200'"):
        named_devices(["H20"])


@pytest.mark.parametrize("batch", [1, 16])
def test_a_step_of_experts_reads_at_least_those_of_one_token(batch: int) -> None:
    """Two of four, whatever the batch: all of its tokens may choose the same."""
    config = t.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    plan = Planner(config, batch=batch, dtype=torch.float32).plan("int8")
    experts = next(row for row in plan.rows if row.kind == "ffn")
    assert experts.step_bytes == pytest.approx(experts.bytes / 2, rel=0.01)
    looked_up = next(row for row in plan.rows if row.kind == "embedding")
    assert looked_up.step_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_experts_is_in_the_plan_whatever_the_type(dtype: torch.dtype) -> None:
    config = t.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    plan = Planner(config, context=64, dtype=dtype).plan("int8", "int8")
    assert plan.is_whole
    assert plan.cache.nominal_bytes == 2 * 2 * 2 * 32 * 64, "layers, halves, key heads, width, tokens"


def test_whether_it_fits_is_not_said_without_the_cache() -> None:
    """An encoder keeps none, however much memory there is."""
    planner = Planner(
        t.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96), context=64
    )
    found = outlook(planner, "int8", "int8", memory=1e12, devices=DEVICES[:1])
    assert found.plan.cache.bytes == 0
    assert found.fits is None
    assert "not known" in str(found)
    assert outlook(Planner(t.LlamaConfig(**SMALL), context=64), "int8", memory=1e12, devices=DEVICES[:1]).fits is True


def test_the_next_format_down_saves_what_it_says() -> None:
    # tokens beside which those of the float window are few
    planner = Planner(t.LlamaConfig(**SMALL), context=4096, dtype=torch.float32)
    found = outlook(planner, "int8", "int8", devices=[Device("d", 1e9, 1e12)])
    by_what = {saving.what: saving for saving in found.savings}
    for what, then in (("weights", planner.plan("int4", "int8")), ("cache", planner.plan("int8", "int4"))):
        assert by_what[what].format == "int4"
        assert by_what[what].total_bytes == then.total.bytes
    assert found.fits is None
    assert found.floors[0].step_seconds == pytest.approx(found.plan.total.step_bytes / 1e12)


def test_several_devices_hold_what_one_cannot() -> None:
    planner = Planner(t.LlamaConfig(**SMALL), dtype=torch.float32)
    total = planner.plan("int8").total
    found = outlook(planner, "int8", memory=total.bytes / 2.5, devices=[Device("small", total.bytes / 2.5, 1e9)])
    assert found.fits is False
    assert (found.floors[0].fits, found.floors[0].devices) == (False, 3)
    assert found.floors[0].step_seconds == pytest.approx(total.step_bytes / 3e9)
    assert "3 such devices" in str(found)

"""KVCache: stored at its width, read by one operator, compiled without breaks, refused before it overflows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, StaticCache

import qpass
from qpass.registry import captured
from tests.models import BLOCKS, HEADS, WIDTH, build, tokens

IDS = tokens(batch=2, length=7)


@contextmanager
def counted_operators() -> Iterator[Counter[str]]:
    """How often each qpass operator ran, from torch's profiler: a dispatch mode would keep Dynamo from compiling."""
    counts: Counter[str] = Counter()
    with torch.profiler.profile() as profile:
        yield counts
    counts.update(e.name.removeprefix("qpass::") for e in profile.events() if e.name.startswith("qpass::"))


def generate(model: Any, new: int = 6, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


def decode_logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position: a prefill of all but three tokens, then one by one."""
    with torch.no_grad():
        parts = [model(ids[:, :-3], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(-3, 0) if i < -1]
        parts += [model(ids[:, -1:], past_key_values=cache).logits]
    return torch.cat(parts, 1)


#: spec -> largest difference of logits from a float cache, as a share of their range
FORMATS = {"int8": 0.02, "fp8_e4m3": 0.1, "int4:g16:asym": 0.3, "mxfp8": 0.1, None: 0.0}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize(("spec", "tolerance"), FORMATS.items(), ids=map(str, FORMATS))
def test_logits_are_close_to_a_float_cache(family: str, spec: str | None, tolerance: float) -> None:
    model = build(family)
    ours = decode_logits(model, qpass.KVCache(model.config, 32, spec), IDS)
    theirs = decode_logits(model, StaticCache(model.config, max_cache_len=32), IDS)
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max()) + 1e-6


def test_dequantize_repeat_attention_become_one_operator() -> None:
    eager, model = build("llama"), build("llama")
    backend = qpass.QPass(qpass.Recipe.uniform("bf16", kv="int8"), inner="eager", strict=True)
    model.compile(backend=backend, fullgraph=True)
    ours = decode_logits(model, qpass.KVCache(model.config, 32), IDS)
    with torch.no_grad():
        for p in eager.parameters():
            if p.dim() == 2:
                p.copy_(p.bfloat16())
    torch.testing.assert_close(ours, decode_logits(eager, qpass.KVCache(eager.config, 32), IDS), rtol=1e-4, atol=1e-4)
    for capture in backend.captures:
        names = [str(n.target) for n in capture.after.nodes]
        assert sum("qpass.attention" in n for n in names) == BLOCKS
        assert not any("qpass.dequantize" in n or "scaled_dot_product" in n for n in names)
    assert [m.site.name for m in backend.captures[0].plan.matches if m.site.kind == "kv"] == [
        f"model.layers.{i}.self_attn.k_proj.weight" for i in range(BLOCKS)
    ]


def test_no_graph_more_as_it_grows() -> None:
    model = build("llama")
    backend = qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), inner="eager")
    model.compile(backend=backend, fullgraph=True)
    outs = [generate(model, new=12, past_key_values=qpass.KVCache(model.config, 32)) for _ in range(2)]
    assert torch.equal(*outs)
    assert len(backend.captures) == 2  # prefill and decode


def test_memory_is_that_of_the_format() -> None:
    model = build("llama")
    for spec, bytes_per_head in (("int8", 16 + 4), ("int4:g16:asym", 8 + 4 + 1), ("fp8_e4m3", 16)):
        cache = qpass.KVCache(model.config, 32, spec)
        assert cache.nbytes == 0
        decode_logits(model, cache, IDS)
        assert cache.nbytes == BLOCKS * 2 * 2 * (HEADS // 2) * 32 * bytes_per_head
        assert f"{IDS.shape[1]}/32 tokens" in repr(cache)
        assert WIDTH // HEADS == 16


@pytest.mark.parametrize("inner", [None, "eager", "aot_eager"])
def test_overflow_is_refused_before_the_write(inner: str | None) -> None:
    model = build("llama")
    if inner is not None:
        model.compile(backend=qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), inner=inner))
    cache = qpass.KVCache(model.config, 8)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        before = [t.clone() for layer in cache.layers for t in (*layer.k.parts, layer.cumulative_length)]
        with pytest.raises(qpass.QpassError, match=r"too short: it holds 7 and 2 more arrive.*max_cache_len=9"):
            model(IDS[:, :2], past_key_values=cache)
    after = [t for layer in cache.layers for t in (*layer.k.parts, layer.cumulative_length)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_through_inductor() -> None:
    """The same tokens as without it, in two graphs; and an overflow is refused before the write there too."""
    recipe = qpass.Recipe.uniform("int8", kv="int8")
    plain, model = (qpass.quantize(build("llama"), recipe, inner=inner) for inner in ("eager", "inductor"))
    cache = qpass.KVCache(model.config, 16)
    assert torch.equal(generate(plain, new=6), generate(model, new=6, past_key_values=cache))
    assert len(captured(model, "test").captures) == 2
    before = [t.clone() for layer in cache.layers for t in layer.k.parts]
    with torch.no_grad():
        for _ in range(16 - 12):
            model(IDS[:, :1], past_key_values=cache)
        full = [t.clone() for layer in cache.layers for t in layer.k.parts]
        with pytest.raises(qpass.QpassError, match="it holds 16 and 1 more arrive"):
            model(IDS[:, :1], past_key_values=cache)
    assert not torch.equal(full[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(full, (t for la in cache.layers for t in la.k.parts), strict=True))


def test_a_step_reads_the_storage_and_makes_no_float_of_the_size_of_the_cache(one_by_one: None) -> None:
    """Seen by the profiler in a compiled step: one qpass::attention a layer, nothing dequantized, no large allocation."""
    room = 2048
    model = qpass.quantize(build("llama"), qpass.Recipe.uniform("int8", kv="int8"))
    cache = qpass.KVCache(model.config, room)
    with torch.no_grad():
        for step in (IDS, IDS[:, :1], IDS[:, :1]):
            model(step, past_key_values=cache)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(IDS[:, :1], past_key_values=cache)
    calls = {e.key: e.count for e in profile.key_averages()}
    assert calls["qpass::attention"] == model.config.num_hidden_layers
    assert not any(
        name in calls for name in ("qpass::read_cache", "qpass::dequantize", "aten::scaled_dot_product_attention")
    )
    keys_of_a_layer = len(IDS) * model.config.num_key_value_heads * room * model.config.head_dim * 4
    assert keys_of_a_layer > 10 * max(e.self_cpu_memory_usage for e in profile.events())


def test_a_cache_shorter_than_the_prompt() -> None:
    model = build("llama")
    with pytest.raises(qpass.QpassError, match="too short: it holds 0 and 7 more arrive"):
        generate(model, past_key_values=qpass.KVCache(model.config, 4))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_recipe_with_kv_makes_its_own_cache(num_beams: int, one_by_one: None) -> None:
    model = qpass.quantize(build("llama"), qpass.Recipe.uniform("int8", kv="int8"), inner="eager")
    with counted_operators() as counts:
        ours = generate(model, num_beams=num_beams)
    assert counts["attention"] == BLOCKS * 6  # a prefill and five decode steps
    assert torch.equal(ours, generate(model, num_beams=num_beams, past_key_values=qpass.KVCache(model.config, 64)))
    assert {r.format for r in qpass.report(model).sites if r.kind == "kv"} == {"int8:channel"}


@pytest.mark.parametrize("how", ["compile", "quantize"])
def test_transformers_own_compilation_does_not_bypass_qpass(how: str, one_by_one: None) -> None:
    """On a GPU generate compiles the decode step by itself; `_compile_all_devices` makes it do so here."""
    model = build("llama")
    recipe = qpass.Recipe.uniform("int8", kv="int8")
    if how == "compile":
        model.compile(backend=qpass.QPass(recipe, inner="eager"))
    else:
        qpass.quantize(model, recipe, inner="eager")
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    options = GenerationConfig(compile_config=config, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with counted_operators() as counts:
        model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            generation_config=options,
            past_key_values=qpass.KVCache(model.config, 32),
        )
    assert counts["linear"] == (4 * BLOCKS + 1) * 6
    assert counts["attention"] == BLOCKS * 6


def test_a_float_cache_of_the_callers_is_reported() -> None:
    model = build("llama")
    model.compile(backend=qpass.QPass(qpass.Recipe.uniform("int8", kv="int8"), inner="eager"))
    generate(model, past_key_values=StaticCache(model.config, max_cache_len=32))
    rows = [r for r in qpass.report(model).sites if r.kind == "kv"]
    assert len(rows) == BLOCKS
    assert all("past_key_values=qpass.KVCache" in str(r.skipped) for r in rows)
    assert captured(model, "test").captures


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda c: qpass.KVCache(c, 0), "at least one token"),
        (lambda c: qpass.KVCache(c, 8, "int9"), "unknown format"),
        (lambda c: qpass.KVCache(c, 8, "nvfp4"), "whole tensor"),
        (lambda c: qpass.KVCache(c, 8, "int8:tensor"), "whole tensor"),
    ],
)
def test_bad_caches_are_refused(make: Any, says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        make(build("llama").config)


@pytest.mark.parametrize(
    "version", ["deepseek v3 (latent attention, shared experts)", "deepseek v2 (latent attention, full queries)"]
)
def test_the_compressed_cache_of_latent_attention(version: str) -> None:
    """What is stored is the latent and the rotary part of the key: both as integers, a fraction of K and V in bytes."""
    from tests import shapes
    from tests.zoo.check import FakeQuantizedCache

    model = shapes.build(version)
    recipe = qpass.Recipe(kv="int8", linear="fp32", qkv="fp32")
    fast = torch.compile(model, backend=qpass.QPass(recipe, inner="eager"))
    ours, theirs = qpass.KVCache(model.config, 32), FakeQuantizedCache(config=model.config)
    with torch.no_grad():
        for step in (tokens(length=9), tokens(length=1, seed=1), tokens(length=1, seed=2)):
            found = fast(step, past_key_values=ours, use_cache=True).logits
            expected = model(step, past_key_values=theirs, use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rows = [row for row in qpass.report(fast).sites if row.kind == "kv"]
    assert [row.format for row in rows] == ["int8:channel"] * 2
    latent, rotary, batch, length = 16, 8, 2, 32
    assert {row.bytes_before for row in rows} == {batch * length * (latent + rotary) * 4}
    assert {row.bytes_after for row in rows} == {batch * length * (latent + rotary + 2 * 4)}

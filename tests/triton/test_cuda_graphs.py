"""CUDA graphs: a decode step is captured, copies no weights, and gives what it gives without. Needs a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass
from qpass.numerics import quantize
from qpass.ops.triton import operators
from qpass.qtensor import QTensor
from qpass.spec import parse_spec
from tests.triton.test_linear import random, weight

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16().eval().cuda()


@torch.no_grad()
def decode(model: Any, cache: Any, steps: int, first: int = 0) -> list[Tensor]:
    """Logits of so many steps, each behind the ones before."""
    found = []
    for i in range(first, first + steps):
        torch.compiler.cudagraph_mark_step_begin()
        ids = torch.full((1, 1), 7 + i, device="cuda")
        found.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits.clone())
    return found


@pytest.mark.parametrize(
    ("recipe", "kv"),
    [
        ("int8", "int8"),
        ("int4:g128", "int4:channel:asym"),
        ("nf4", None),
        ("fp8_e4m3", "fp8_e4m3:channel"),
        ("int4", "nf4:g32"),
        ("int5", "mxfp4"),
        ("int3", "mxfp8"),
    ],
)
def test_a_decode_step_is_a_graph(recipe: str, kv: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    plain = qpass.quantize(copy.deepcopy(model), qpass.Recipe.uniform(recipe), inner="eager")
    captured = qpass.quantize(model, qpass.Recipe.uniform(recipe), mode="reduce-overhead")

    def cache() -> Any:
        return transformers.StaticCache(model.config, 64) if kv is None else qpass.KVCache(model.config, 64, kv)

    held = cache()
    found = decode(captured, held, 2)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]  # the first allocates the cache
    found += decode(captured, held, 6, first=2)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    for ours, theirs in zip(found, decode(plain, cache(), 8), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
    copied = []
    copy_into = torch._foreach_copy_

    def counted(to: Any, sources: Any, *rest: Any) -> Any:
        """How Inductor's graphs copy inputs into their memory."""
        copied.append(sum(source.nbytes for source in sources))
        return copy_into(to, sources, *rest)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        decode(captured, held, 1)
        torch.cuda.synchronize()
    assert any(e.name == "cudaGraphLaunch" for e in profile.events())
    smallest = min(part.nbytes for layer in model.model.layers for p in layer.parameters() for part in parts_of(p))
    assert 8 <= sum(copied) < smallest


def parts_of(p: Tensor) -> list[Tensor]:
    return [part for part in p.quantized.parts if part is not None] if isinstance(p, QTensor) else [p]


def linear() -> Callable[[], Tensor]:
    stored, _ = weight(64, 4096, "int8", "cuda")
    x = random(2, 4096, seed=1).bfloat16().cuda()
    return lambda: operators.linear(x, *stored.parts, None, "int8")


def attention() -> Callable[[], Tensor]:
    stored = quantize(random(2, 2, 2000, 64).cuda(), parse_spec("int8"))
    q = random(2, 8, 1, 64, seed=2).bfloat16().cuda()
    return lambda: operators.attention(q, *stored.parts, "int8", *stored.parts, 64, "int8", None, False, None)


@pytest.mark.parametrize("made", [linear, attention])
def test_graphs_captured_apart_may_run_at_the_same_time(made: Callable[[], Callable[[], Tensor]]) -> None:
    """Programs of two graphs that share sums do not meet in one counter."""
    call = made()
    expected = call()
    graphs, results, streams = [], [], [torch.cuda.Stream() for _ in range(2)]
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(call())
        graphs.append(graph)
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_a_captured_append_counts_on() -> None:
    """Each replay writes behind the one before."""
    parts = [[torch.zeros(1, 2, 8, 64, dtype=torch.int8).cuda(), torch.zeros(1, 2, 8, 1).cuda()] for _ in range(2)]
    length, x = torch.tensor(0).cuda(), random(1, 2, 1, 64).bfloat16().cuda()

    def call() -> Tensor:
        return operators.append(*parts, length, x, x, "int8", "int8")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = call()
    for start in range(1, 8):
        graph.replay()
        assert (int(before), int(length)) == (start, start + 1)
    assert all(bool((p == p[:, :, :1]).all()) for half in parts for p in half)

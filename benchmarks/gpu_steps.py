"""Steps of a random Llama of the shape of an 8B model, as benchmarks/gpu.py times them."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from gpu_shape import CACHES, MORE_WEIGHTS, OTHER_WEIGHTS, PAIRS, TINY, WEIGHTS, Shape, one
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

import qpass
from qpass.cache import CACHE_ARGUMENT


@dataclass(frozen=True)
class Engine:
    """A way to run the model: its name, what is done to the float model, the format of its cache (None: in float)."""

    name: str
    prepare: Callable[[Any], Any] = field(repr=False)
    cache: str | None = None


def engines(compiles: bool) -> list[Engine]:
    """In the order of their weight for the comparison."""
    inner = "inductor" if compiles else "eager"
    mode = "reduce-overhead" if compiles else None

    def of_qpass(text: str) -> Callable[[Any], Any]:
        return lambda model: qpass.quantize(model, qpass.Recipe.uniform(text), inner=inner, mode=mode)

    def of_torch(model: Any) -> Any:
        if compiles:
            model.compile(mode=mode)
        return model

    def with_cache(weight: str, cache: str) -> Engine:
        return Engine(f"qpass {weight}, {cache} cache", of_qpass(weight), cache)

    found = [Engine("torch.compile bf16", of_torch)]
    found += [Engine(f"qpass {text}", of_qpass(text)) for text in WEIGHTS]
    if importlib.util.find_spec("torchao"):
        found += [
            Engine(f"torchao {name}", lambda m, name=name: of_torch(_torchao(m, name)))
            for name in ("int8", "int4", "fp8")
        ]
    alike = list(zip(("int8", "fp8_e4m3:channel", "int4:g128"), CACHES, strict=True))
    found += [with_cache(weight, cache) for weight, cache in alike]
    found += [Engine(f"qpass {text}", of_qpass(text)) for text in (*PAIRS, *MORE_WEIGHTS, *OTHER_WEIGHTS)]
    every = (*WEIGHTS, *MORE_WEIGHTS, *OTHER_WEIGHTS)
    others = [(weight, cache) for cache in CACHES for weight in every if (weight, cache) not in alike]
    return found + [with_cache(weight, cache) for weight, cache in others]


def _torchao(model: Any, name: str) -> Any:
    from torchao import quantization as ao

    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.Int4WeightOnlyConfig(group_size=128),
        "fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }
    ao.quantize_(model, configs[name]())
    return model


def random_llama(shape: Shape, layers: int, device: str) -> Any:
    """In bfloat16, with weights of the size that training gives them."""
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads, vocab_size=shape.vocab, max_position_embeddings=1 << 17, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for name, p in model.named_parameters():
        torch.nn.init.ones_(p) if "norm" in name else torch.nn.init.normal_(p, std=0.02)
    return model


def weight_bytes(model: Any) -> int:
    """That a step reads: all but the embedding."""
    return sum(_stored_bytes(p) for n, p in model.named_parameters() if "embed_tokens" not in n)


def _stored_bytes(p: Any) -> int:
    """Of a Parameter of qpass, of torchao (whose subclasses hold others), or of torch."""
    if hasattr(p, "stored_nbytes"):
        return int(p.stored_nbytes)
    if hasattr(p, "__tensor_flatten__"):
        return sum(_stored_bytes(getattr(p, name)) for name in p.__tensor_flatten__()[0])
    return int(p.nbytes)


def time_head(engine: Engine, rows: int, shape: Shape, device: str) -> float:
    """Seconds of the vocabulary projection alone, as the engine has it."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(shape.hidden, shape.vocab, bias=False, device=device))
    head = engine.prepare(head.to(torch.bfloat16).eval())
    x = torch.randn(rows, shape.hidden, dtype=torch.bfloat16, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return head(x)

    return time_steps(call, device, shape.repeats)


def float_cache_bytes(shape: Shape, layers: int, batch: int, context: int) -> int:
    """Of keys and values in bfloat16."""
    return batch * context * layers * shape.key_heads * shape.head * 4


@torch.no_grad()
def decode_step(
    model: Any, engine: Engine, batch: int, context: int, room: int, device: str
) -> tuple[Callable[[], Tensor], int]:
    """A function that decodes a token for each of `batch` sequences behind `context` random ones; bytes of these in the cache."""
    length = context + room
    cache: Any = (
        StaticCache(model.config, length) if engine.cache is None else qpass.KVCache(model.config, length, engine.cache)
    )
    ids = torch.randint(0, 90, (batch, 1), device=device)
    torch.compiler.cudagraph_mark_step_begin()
    model(input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    size = 0
    for layer in cache.layers:
        stored = engine.cache is not None
        for part in [*layer.k.parts, *layer.v.parts] if stored else [layer.keys, layer.values]:
            size += part.nbytes * context // length
            if part.dtype.is_floating_point:
                part.copy_(torch.rand_like(part) * 0.02 if stored else torch.randn_like(part))
            else:
                part.random_(0, 100)
        layer.cumulative_length.fill_(context)

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return model(input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits

    return step, size


def time_steps(step: Callable[[], Tensor], device: str, repeats: int) -> float:
    """Median seconds of a step, of which the host makes the next while the device is at one."""
    for _ in range(4):  # compiled, then captured
        step()
    if device == "cpu":
        return statistics.median(one(step) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    for mark in marks:
        mark.record()
        step()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))


@dataclass(frozen=True)
class Profile:
    """Of one step: kernels, graphs launched, bytes copied into the memory of graphs."""

    kernels: int
    graphs: int
    copied: int


def profile_of(step: Callable[[], Tensor]) -> Profile:
    """What the device does in a step. Inductor's graphs copy what is no weight with torch._foreach_copy_."""
    copy, copied = torch._foreach_copy_, [0]

    def counted(to: Any, sources: Any, *rest: Any) -> Any:
        copied[0] += sum(source.nbytes for source in sources)
        return copy(to, sources, *rest)

    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch._foreach_copy_ = counted  # type: ignore[assignment]
    try:
        with torch.profiler.profile(activities=kinds) as recorded:
            step()
            torch.cuda.synchronize()
    finally:
        torch._foreach_copy_ = copy
    events = recorded.events()
    on_device = [e.name for e in events if str(e.device_type).endswith("CUDA") and not e.is_user_annotation]
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
    return Profile(kernels, sum(e.name == "cudaGraphLaunch" for e in events), copied[0])


def check_captured(found: Profile, batch: int) -> None:
    """Raises if a step is not in CUDA graphs, or if they copy more than what is new in a step: ids, masks, positions."""
    if not found.graphs:
        raise RuntimeError("the step is in no CUDA graph")
    if found.copied > 256 + 64 * batch:
        raise RuntimeError(f"CUDA graphs copy {found.copied:,} bytes a step")


def kernels_of_step(engine: Engine, layers: int, batch: int, device: str) -> int:
    """Kernels of a decode step of a small model."""
    model = engine.prepare(random_llama(TINY, layers, device))
    step, _ = decode_step(model, engine, batch, 8, 16, device)
    for _ in range(4):  # compiled, then captured
        step()
    found = profile_of(step)
    check_captured(found, batch)
    return found.kernels

"""What benchmarks/gpu.py times: kernels by themselves, and steps of a random Llama of the shape of an 8B model."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

import qpass
from qpass.cache import CACHE_ARGUMENT
from qpass.numerics import Quantized, dequantize, quantize
from qpass.ops import reference
from qpass.ops.around import Around
from qpass.ops.triton import operators
from qpass.packing import as_bytes
from qpass.spec import parse_spec
from qpass.weights import quantize_weight

#: Formats of weights and of caches.
WEIGHTS = ("int8", "int4:g128", "int4:g32:asym", "nf4", "fp8_e4m3:channel")
MORE_WEIGHTS = ("mxfp8", "mxfp4", "nvfp4", "int3:g128", "int5:g32:asym:scale=fp16")
WRITTEN_OUT = "int8 written out"
CACHES = ("int8", "fp8_e4m3:channel", "int4:channel:asym")
#: Of a sum of some thousand products in bfloat16, by the largest result; of float32.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of what is measured alone."""

    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocab: int = 128256
    full_layers: int = 32
    rows: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (128, 8192, 100_000)
    prompts: tuple[int, ...] = (2048, 8192)
    repeats: int = 20
    copies: int = 8

    @property
    def head(self) -> int:
        return self.hidden // self.heads


TINY = Shape(128, 128, 4, 2, 96, 2, (1, 3), (8, 40), (20,), 2, 2)


def seconds_of(calls: Sequence[Callable[[], Any]], device: str, repeats: int) -> float:
    """Median time of one of `calls`, which are made in turn so that none finds its weights in a cache; on a GPU in one graph."""
    for call in calls:
        call()
    if device == "cpu":
        return statistics.median(_one(call) for _ in range(repeats) for call in calls)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[3:])


def _one(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- kernels by themselves --------------------------------------------------------------------------------------------


def ceilings(shape: Shape, device: str) -> dict[str, float]:
    """Bytes a second of a copy, read and written; operations a second of a bfloat16 product."""
    size = shape.hidden * shape.ffn * 8
    a = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    n = min(8192, shape.hidden * 2)
    x, w = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy = seconds_of([lambda: b.copy_(a)], device, shape.repeats)
    product = seconds_of([lambda: torch.mm(x, w)], device, shape.repeats)
    return {"copy_bytes_per_second": 2 * size / copy, "bf16_operations_per_second": 2 * n**3 / product}


def stored_on(device: str, rows: int, columns: int, text: str, seed: int) -> Quantized:
    """A random weight of training's size."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device=device) * 0.02
    return quantize_weight(values, parse_spec(text))


def check_linear(
    text: str, rows: int, dtype: torch.dtype, device: str, outputs: int, columns: int, seed: int, around: bool = False
) -> float:
    """Error of the operator by the largest result, against float64; its output held NaN before. `around`: with a norm before, a
    gate and a residual behind, of twice as many rows of the weight."""
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    stored = stored_on(device, 2 * outputs if around else outputs, columns, text, seed)
    x, norm, residual = random(rows, columns), random(columns), random(rows, outputs)
    rest = Around(norm, 1e-5, None, "silu", residual) if around else Around()
    found = operators.linear(x, *stored.parts, None, text, *vars(rest).values()).double()
    y = x.double()
    if around:
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
    expected = F.linear(y, dequantize(stored, parse_spec(text), columns).double())
    if around:
        first, second = expected.chunk(2, -1)
        expected = F.silu(first) * second + residual.double()
    return float((found - expected).abs().max() / expected.abs().max())


def check_append(text: str, batch: int, new: int, shape: Shape, device: str, seed: int) -> str:
    """What is wrong with new tokens of a cache: their codes, anything beside them, or the length; "" if nothing is."""
    generator, start = torch.Generator().manual_seed(seed), 7
    spec, size = parse_spec(text), (batch, shape.key_heads, new, shape.head)
    q, k, v = (
        torch.randn(batch, heads, new, shape.head, generator=generator).bfloat16().to(device)
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    phase = torch.rand(1, 1, new, shape.head, generator=generator) * 6
    cos, sin = (x.bfloat16().to(device) for x in (phase.cos(), phase.sin()))
    like = [as_bytes(p) for p in reference.quantized_like(q.new_empty(size), text)]
    caches = [[p.new_full((*p.shape[:2], 32, p.shape[3]), 77) for p in like] for _ in range(2)]
    length = torch.tensor(start, device=device)
    before, _, keys = operators.append_rotated(*caches, length, q, k, v, cos, sin, text, text)
    exact = reference.rotated(k.double(), cos.double(), sin.double())
    if (int(before), int(length)) != (start, start + new):
        return f"the length was {int(before)} and is {int(length)}"
    if float((keys - exact).abs().max() / exact.abs().max()) > TOLERANCE[torch.bfloat16]:
        return "the rotated keys"
    for cache, states in zip(caches, (keys, v), strict=True):
        for part, codes in zip(cache, [p for p in quantize(states, spec).parts if p is not None], strict=True):
            expected = torch.full_like(part, 77)
            expected[:, :, start : start + new] = as_bytes(codes)
            if not torch.equal(part, expected):
                return "the codes"
    return ""


def check_attention(text: str, queries: int, tokens: int, shape: Shape, device: str, seed: int) -> float:
    """The same of attention, behind a mask that hides the end of the cache."""
    generator = torch.Generator().manual_seed(seed)
    spec = parse_spec(text)
    k, v = (
        quantize(torch.randn(2, shape.key_heads, tokens, shape.head, generator=generator), spec).map(
            lambda p: p.to(device)
        )
        for _ in range(2)
    )
    q = torch.randn(2, shape.heads, queries, shape.head, generator=generator).bfloat16().to(device)
    seen = (torch.arange(tokens, device=device) < max(1, tokens * 2 // 3)).expand(1, 1, queries, tokens)
    found = operators.attention(q, *k.parts, text, *v.parts, shape.head, text, seen, False, None).double()
    keys, values = (dequantize(x, spec, shape.head).double() for x in (k, v))
    expected = F.scaled_dot_product_attention(q.double(), keys, values, attn_mask=seen, enable_gqa=True)
    return float((found - expected).abs().max() / expected.abs().max())


def time_linear(text: str, rows: int, shape: Shape, device: str) -> tuple[float, int]:
    """Seconds of one product with [ffn, hidden], and the bytes of its weight; "bf16": torch's own; WRITTEN_OUT:
    int8 as the sum that Inductor makes a kernel of."""
    xs = torch.randn(rows, shape.hidden, dtype=torch.bfloat16, device=device)
    if text == "bf16":
        floats = [
            torch.randn(shape.ffn, shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(shape.copies)
        ]
        return seconds_of([lambda w=w: F.linear(xs, w) for w in floats], device, shape.repeats), floats[0].nbytes
    spec = "int8" if text == WRITTEN_OUT else text
    weights = [stored_on(device, shape.ffn, shape.hidden, spec, seed) for seed in range(min(2, shape.copies))]
    while len(weights) < shape.copies:
        weights.append(weights[len(weights) % 2].map(torch.clone))
    product = _written_out if text == WRITTEN_OUT else lambda *parts: operators.linear(*parts, None, spec)
    calls = [lambda w=w: product(xs, *w.parts) for w in weights]
    return seconds_of(calls, device, shape.repeats), weights[0].nbytes


@torch.compile
def _written_out(x: Tensor, data: Tensor, scale: Tensor, *_: None) -> Tensor:
    """As sites/written.py has it: [1, K] and codes [N, K] -> [1, N]."""
    return ((x.float().unsqueeze(-2) * data.float()).sum(-1) * scale.view(-1)).to(x.dtype)


def time_attention(text: str, tokens: int, shape: Shape, device: str) -> tuple[float, int]:
    """Seconds of one query over so many tokens, and the bytes of the cache; "bf16": the best of torch's kernels."""
    q = torch.randn(1, shape.heads, 1, shape.head, dtype=torch.bfloat16, device=device)
    size = (1, shape.key_heads, tokens, shape.head)
    if text == "bf16":
        k, v = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
        return min(_float_attentions(q, k, v, shape, device)), k.nbytes + v.nbytes
    spec = parse_spec(text)
    k, v = (quantize(torch.randn(size, device=device), spec) for _ in range(2))
    call = lambda: operators.attention(q, *k.parts, text, *v.parts, shape.head, text, None, False, None)  # noqa: E731
    return seconds_of([call], device, shape.repeats), k.nbytes + v.nbytes


def _float_attentions(q: Tensor, k: Tensor, v: Tensor, shape: Shape, device: str) -> list[float]:
    """Of each of torch's ways that takes these, heads grouped or joined to rows of one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, queries, width = q.shape
    joined = q.view(batch, k.shape[1], heads // k.shape[1] * queries, width)
    found = []
    for way in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        for query, grouped in ((q, True), (joined, False)):
            call = lambda query=query, grouped=grouped: F.scaled_dot_product_attention(query, k, v, enable_gqa=grouped)  # noqa: E731
            try:
                with sdpa_kernel(way):
                    found.append(seconds_of([call], device, shape.repeats))
            except RuntimeError:  # not for these shapes, or not here
                continue
    return found


def time_quantization(text: str, shape: Shape, device: str) -> tuple[float, int]:
    """Seconds of rounding a bfloat16 weight that lies there, and its bytes."""
    weight = torch.randn(shape.ffn, shape.hidden, dtype=torch.bfloat16, device=device)
    spec = parse_spec(text)

    def wait() -> None:
        quantize_weight(weight, spec)
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    return statistics.median(_one(wait) for _ in range(3)), weight.nbytes


# --- steps of a model -------------------------------------------------------------------------------------------------


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

    found = [Engine("torch.compile bf16", of_torch)]
    found += [Engine(f"qpass {text}", of_qpass(text)) for text in WEIGHTS]
    if importlib.util.find_spec("torchao"):
        found += [
            Engine(f"torchao {name}", lambda m, name=name: of_torch(_torchao(m, name)))
            for name in ("int8", "int4", "fp8")
        ]
    found += [
        Engine(f"qpass {w}, {c} cache", of_qpass(w), c)
        for w, c in zip(("int8", "fp8_e4m3:channel", "int4:g128"), CACHES, strict=True)
    ]
    found += [
        Engine(f"qpass {text}", of_qpass(text))
        for text in ("int8@int8", "fp8_e4m3:channel@fp8_e4m3:channel", *MORE_WEIGHTS)
    ]
    return found


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
    return sum(getattr(p, "stored_nbytes", p.nbytes) for n, p in model.named_parameters() if "embed_tokens" not in n)


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
        return statistics.median(_one(step) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    for mark in marks:
        mark.record()
        step()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))


@dataclass(frozen=True)
class Profile:
    """Of one step: kernels, graphs launched, bytes copied from device to device outside of kernels."""

    kernels: int
    graphs: int
    copies: int


def profile_of(step: Callable[[], Tensor]) -> Profile:
    """What the device does in a step."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as recorded:
        step()
        torch.cuda.synchronize()
    events = recorded.events()
    on_device = [e.name for e in events if str(e.device_type).endswith("CUDA")]
    copies = sum("Memcpy DtoD" in name for name in on_device)
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
    return Profile(kernels, sum(e.name == "cudaGraphLaunch" for e in events), copies)


def kernels_of_step(engine: Engine, layers: int, device: str) -> int:
    """Kernels of a decode step of a small model."""
    model = engine.prepare(random_llama(TINY, layers, device))
    step, _ = decode_step(model, engine, 1, 8, 16, device)
    for _ in range(4):  # compiled, then captured
        step()
    return profile_of(step).kernels

"""What a KVCache stores: each format against K and V that went through it, one operator a layer, and every kind of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache

import qpass
from qpass.numerics import dequantize, fake_quantize, quantize
from qpass.ops.cpu.build import REFERENCE, use_isa
from qpass.quantized import Quantized
from qpass.rotation import rotate, rotation
from qpass.spec import parse_spec
from tests.isas import isas
from tests.models import BLOCKS, build, hf, tokens
from tests.zoo.check import FakeQuantizedCache

FORMATS = [
    ("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2"), ("mxfp8", "mxfp8"), ("int8", "int4:g8:asym"),
    ("int4:g8:asym:rotated", "int4:g8:asym:rotated"), ("int8:rotated", "int2:g8:zero=float:scale=fp16"),
    ("int4:channel", "nf4:g16"),
]  # fmt: skip
KIVI = ("int2:t32:zero=float:scale=fp16", "int2:g8:zero=float:scale=fp16")
IDS = tokens(batch=2, length=150)
WEIGHTS_AS_THEY_ARE = qpass.Recipe.uniform("fp32", kv="int8")


def in_steps(model: Any, cache: Any, steps: tuple[int, ...] = (9, 1, 1, 4, 1)) -> Tensor:
    """Logits of all tokens, as many at a time as `steps` says."""
    out, start = [], 0
    with torch.no_grad():
        for n in steps:
            out.append(model(IDS[:, start : start + n], past_key_values=cache).logits)
            start += n
    return torch.cat(out, 1)


def attention_calls(backend: qpass.QPass) -> list[int]:
    return [sum("qpass.attention" in str(n.target) for n in c.after.nodes) for c in backend.captures]


@pytest.mark.parametrize(("k", "v"), FORMATS, ids=lambda s: s)
def test_stored_tokens_are_read_as_they_were_rounded(k: str, v: str) -> None:
    model = build("llama")
    with use_isa(REFERENCE):
        found = in_steps(model, qpass.KVCache(model.config, 32, k=k, v=v))
    torch.testing.assert_close(found, in_steps(model, FakeQuantizedCache(model.config, k, v)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "v"), [*FORMATS, KIVI], ids=lambda s: s)
def test_compiled_is_one_operator_a_layer(k: str, v: str) -> None:
    model = build("llama")
    backend = qpass.QPass(WEIGHTS_AS_THEY_ARE, inner="eager", strict=True)
    steps = (9, 1, 1) if (k, v) != KIVI else (120, 1, 9)
    options = {} if (k, v) != KIVI else {"window": 32}
    expected = in_steps(model, qpass.KVCache(model.config, 160, k=k, v=v, **options), steps)
    found = in_steps(
        torch.compile(model, backend=backend), qpass.KVCache(model.config, 160, k=k, v=v, **options), steps
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert set(attention_calls(backend)) == {BLOCKS}


class Residual(DynamicCache):
    """The reference for KIVI: of as many tokens as the first new one sees, those before (length - window) rounded down to 32 are
    rounded, but the first."""

    def __init__(self, config: Any, window: int) -> None:
        super().__init__(config=config)
        self.window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = super().update(key_states, value_states, *args, **kwargs)
        seen = stored[0].shape[2] - key_states.shape[2] + 1
        end = max(seen - self.window, 0) // 32 * 32
        out = []
        for x, text in zip(stored, KIVI, strict=True):
            x = x.clone()
            if end:
                x[:, :, 1:end] = fake_quantize(x[:, :, :end], parse_spec(text))[:, :, 1:]
            out.append(x)
        return out[0], out[1]


@pytest.mark.parametrize("steps", [(150,), (40, 1, 60, 1, 40), (1,) * 20 + (100, 30), (100, *(1,) * 50)], ids=len)
@pytest.mark.parametrize("window", [32, 64])
def test_the_residual_window(window: int, steps: tuple[int, ...]) -> None:
    model = build("llama")
    cache = qpass.KVCache(model.config, 150, k=KIVI[0], v=KIVI[1], window=window)
    found, expected = in_steps(model, cache, steps), in_steps(model, Residual(model.config, window), steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = in_steps(model, DynamicCache(config=model.config), steps)
    assert torch.equal(plain, expected) == (len(steps) == 1)  # a prefill sees all of its tokens as floats


@pytest.mark.parametrize("other", [None, "int8"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_window_beside_layers_of_another_form(other: str | None, layer: int) -> None:
    """All have room for as many tokens, since they share a mask; 50 are no whole blocks."""
    model = build("llama")
    made = [
        qpass.KVCache(model.config, 50, k=KIVI[0], v=KIVI[1], layers=layers)
        for layers in ({layer: other}, dict.fromkeys(range(BLOCKS), other))
    ]
    assert {la.max_cache_len for la in made[0].layers} == {64}
    assert {la.max_cache_len for la in made[1].layers} == {64}
    mixed, plain = (in_steps(model, cache, (40, 1, 9)) for cache in made)
    torch.testing.assert_close(mixed, plain, rtol=0.1, atol=0.02)


def test_a_number_that_is_none_leaves_codes_as_they_are() -> None:
    """A block that leaves the window is quantized, both halves, before anything is written."""
    layer = qpass.KVCache(build("llama").config, 128, k=KIVI[0], v=KIVI[1], window=32).layers[0]
    states = torch.randn(1, 2, 63, 16)
    values = states.clone()
    values[0, 0, 3, 0] = torch.inf
    for t in range(63):
        layer.update(states[:, :, t : t + 1], values[:, :, t : t + 1])
    before = [t.clone() for t in layer.tensors().values()]
    with pytest.raises(qpass.QpassError, match="overflows"):
        layer.update(states[:, :, :1], states[:, :, :1])
    assert all(torch.equal(a, b) for a, b in zip(before, layer.tensors().values(), strict=True))
    assert layer.get_seq_length() == 63


def test_static_scales_come_from_calibration() -> None:
    """One scale for each head and channel, its largest magnitude / 127."""
    model = build("llama")
    with pytest.raises(qpass.QpassError, match=r"int8:static has no scales yet; run cache.calibrate"):
        in_steps(model, qpass.KVCache(model.config, 32, "int8:static"))
    with pytest.raises(qpass.QpassError, match="no batches"):
        qpass.KVCache(model.config, 32, "int8:static").calibrate(model, [])
    cache = qpass.KVCache(model.config, 32, "int8:static").calibrate(model, [IDS[:, :9], {"input_ids": IDS[:, 9:40]}])
    floats = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for c, ids in zip(floats, (IDS[:, :9], IDS[:, 9:40]), strict=True):
            model(ids, past_key_values=c)
    tops = [c.layers[1].keys.abs().amax((0, 2)) for c in floats]
    torch.testing.assert_close(cache.scales[1][0][0, :, 0] * 127, torch.maximum(*tops))  # type: ignore[index]
    again = qpass.KVCache(model.config, 32, "int8:static", scales=cache.scales)
    backend = qpass.QPass(WEIGHTS_AS_THEY_ARE, inner="eager")
    found = in_steps(torch.compile(model, backend=backend), again)
    torch.testing.assert_close(found, in_steps(model, cache), rtol=1e-4, atol=1e-5)
    assert set(attention_calls(backend)) == {BLOCKS}
    torch.testing.assert_close(found, in_steps(model, DynamicCache(config=model.config)), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("columns", [64, 80, 96, 128, 256, 7])
def test_the_rotation_is_its_own_inverse_and_spreads(columns: int) -> None:
    matrix = rotation(columns).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(matrix.abs().max()) <= math.sqrt(2 / columns) + 1e-6
    x = torch.randn(3, columns)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=0, atol=1e-5)


def test_formats_of_four_bits_and_fewer_have_a_layout_of_their_own() -> None:
    for name in ("int4", "int3", "int2"):
        recipe = qpass.Recipe(kv=name)
        assert str(recipe.k) == f"{name}:t32:zero=float:scale=fp16"
        assert str(recipe.v) == str(qpass.Recipe(k="int8", v=name).v) == f"{name}:g32:zero=float:scale=fp16"


T5 = transformers.T5Config(vocab_size=97, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=4)
#: A model -> its cache's layers in "int4", where tokens come or leave one by one.
SINGLY: dict[str, Callable[[], Any]] = {
    "sliding window": lambda: qpass.KVCache(hf("MistralForCausalLM", sliding_window=8).config, 64, "int4").layers,
    "encoder's output": lambda: qpass.KVCache.for_encoder_decoder(T5, 64, "int4").cross_attention_cache.layers,
}


@pytest.mark.parametrize("where", SINGLY)
def test_where_there_are_no_groups_of_tokens_int4_means_rotated_groups(where: str) -> None:
    assert {half.text for la in SINGLY[where]() for half in (la.k, la.v)} == {"int4:g32:asym:rotated"}


@pytest.mark.parametrize("spec", ["int2", "int3"])
def test_fewer_bits_need_groups_of_tokens(spec: str) -> None:
    config = hf("MistralForCausalLM", sliding_window=8).config
    with pytest.raises(qpass.QpassError, match=r"layer 0 keeps the last 8 tokens.* quantizes them in groups"):
        qpass.KVCache(config, 64, spec)
    qpass.KVCache(config, 8, spec)
    with pytest.raises(qpass.QpassError, match=r"layer 0 keeps the encoder's output.* quantizes them in groups"):
        qpass.KVCache.for_encoder_decoder(T5, 64, spec)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"k": "int8", "format": None}, "k and v are one cache"),
        ({"format": "int8:t32"}, "for values: scales per channel and group of tokens are for keys"),
        ({"k": "int2:t64", "v": "int2:g8"}, "use t32"),
        (
            {"k": "int2:t32", "v": "int2:g8", "window": 0},
            "wait in float for the others of their group; make it 32 or more",
        ),
        ({"window": 20}, "use a multiple of 32"),
        ({"window": 0, "firsts": 4}, r"window=0, but so are they with firsts=4"),
        ({"layers": {7: "int8"}}, "the model has layers 0 to 1"),
        ({"format": "int4:static"}, "static scales are for int8 and fp8"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_has_no_meaning_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        qpass.KVCache(build("llama").config, 64, **arguments)


@pytest.mark.parametrize("token", ["t32", "static", "rotated"])
def test_what_is_for_caches_is_no_format_of_weights(token: str) -> None:
    with pytest.raises(qpass.QpassError, match="is for the KV cache, not for weights"):
        qpass.Recipe(ffn=f"int8:{token}")


# --- the operator ---------------------------------------------------------------------------------------------------------


def in_float64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float, sinks: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)
    return (weights[..., :-1] if sinks is not None else weights) @ v


@pytest.mark.parametrize("isa", [REFERENCE, *isas()])
@pytest.mark.parametrize(
    ("k_spec", "v_spec"),
    [
        ("int8", "int8"), ("fp8_e4m3", "int4:g16:asym"), ("int4:g32:asym:rotated", "int4:g32:asym:rotated"),
        ("int2:t32:zero=float:scale=fp16", "int2:g32:zero=float:scale=fp16"),
        ("int4:t32:zero=float", "int4:g8:zero=float:scale=bf16"),
    ],
    ids=lambda s: s,
)  # fmt: skip
@pytest.mark.parametrize(("width", "v_width"), [(64, 64), (80, 80), (96, 96), (128, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("what", ["mask", "bias of each head", "cap", "sinks", "all"])
def test_attention_equals_float64(isa: str, k_spec: str, v_spec: str, width: int, v_width: int, what: str) -> None:
    """Grouped heads, tokens that are there as floats, several splits; 11 queries and one."""
    torch.manual_seed(0)
    batch, heads, key_heads, tokens_, start = 2, 4, 2, 224, 200
    k, v = torch.randn(batch, key_heads, tokens_, width), torch.randn(batch, key_heads, tokens_, v_width)
    parts = [quantize(x, parse_spec(s)) for x, s in ((k, k_spec), (v, v_spec))]
    first, last = (
        (torch.randn(batch, key_heads, 1, n) for n in (width, v_width)),
        (torch.randn(batch, key_heads, 15, n) for n in (width, v_width)),
    )
    (k_first, v_first), (k_last, v_last) = first, last
    full = []
    for stored, spec, n, f, la in zip(
        parts, (k_spec, v_spec), (width, v_width), (k_first, v_first), (k_last, v_last), strict=True
    ):
        x = dequantize(stored, parse_spec(spec), n)
        x[:, :, :1], x[:, :, start : start + 15] = f, la
        full.append(x)
    for queries in (1, 11):
        q = torch.randn(batch, heads, queries, width)
        seen = torch.arange(tokens_)[None, None, None] <= (start + torch.arange(queries))[:, None]
        mask = (
            torch.where(seen, torch.randn(1, heads, 1, tokens_), -torch.inf)
            if what in ("bias of each head", "all")
            else seen
        )
        cap, sinks = 2.0 if what in ("cap", "all") else 0.0, torch.randn(heads) if what in ("sinks", "all") else None
        with use_isa(isa):
            found = torch.ops.qpass.attention(
                q, *_four(parts[0]), k_spec, *_four(parts[1]), v_width, v_spec, mask, False, None,
                k_first, v_first, k_last, v_last, torch.tensor(start), cap, sinks,
            )  # fmt: skip
        torch.testing.assert_close(found.double(), in_float64(q, *full, mask, cap, sinks), rtol=2e-4, atol=2e-4)


def _four(stored: Quantized) -> tuple[Tensor | None, ...]:
    return stored.parts


# --- attention that is written out ------------------------------------------------------------------------------------------


WRITTEN_OUT = {
    "softmax(q k^T)": ("LlamaForCausalLM", {"attn_implementation": "eager", "num_key_value_heads": 2}),
    "soft-capping": ("Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16, "attn_logit_softcapping": 3.0}),
    "sinks": ("GptOssForCausalLM", {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "ALiBi, baddbmm": ("BloomForCausalLM", {"n_layer": BLOCKS, "n_head": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_attention_that_is_written_out_becomes_the_operator(name: str) -> None:
    torch.manual_seed(0)
    architecture, config = WRITTEN_OUT[name]
    model = hf(architecture, **config).eval()
    backend = qpass.QPass(qpass.Recipe(qkv="fp32", attn_out="fp32", kv="int8"), inner="eager")
    with use_isa(REFERENCE):
        expected = in_steps(model, FakeQuantizedCache(model.config), (9, 1, 1))
        found = in_steps(torch.compile(model, backend=backend), qpass.KVCache(model.config, 32), (9, 1, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert set(attention_calls(backend)) == {BLOCKS}, [r.skipped for r in qpass.report(backend).sites if r.kind == "kv"]


# --- rounding ---------------------------------------------------------------------------------------------------------------

NEW_SPECS = [
    "int2:t32:zero=float:scale=fp16", "int4:t32:zero=float", "int8:t32", "int2:g32:zero=float:scale=fp16",
    "int4:g8:zero=float:scale=bf16", "int2:g16:asym", "int2:g16", "int8:scale=fp16",
]  # fmt: skip


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("spec", NEW_SPECS)
@pytest.mark.parametrize("shape", [(2, 3, 64, 48), (1, 1, 7, 5), (2, 1, 33, 80)], ids=str)
def test_the_kernel_rounds_as_the_reference_to_the_bit(spec: str, shape: tuple[int, ...], isa: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x[0, 0, :, 0], x[0, 0, 0] = 0.0, 2.5
    if spec.split(":")[1].startswith("g") and parse_spec(spec).group_size > shape[-1]:
        spec = spec.replace(spec.split(":")[1], "g4")
    with use_isa(isa):
        found = torch.ops.qpass.quantize(x, spec)
    with use_isa(REFERENCE):
        expected = torch.ops.qpass.quantize(x, spec)
    assert [p.dtype for p in found] == [p.dtype for p in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("isa", [REFERENCE, *isas()])
@pytest.mark.parametrize(
    "spec", ["int4:t32:zero=float:scale=fp16", "int4:g32:zero=float:scale=fp16", "int2:t32:zero=float"]
)
def test_numbers_that_are_nearly_one_have_a_zero_point(isa: str, spec: str) -> None:
    """As keys of one token many times over: a range far smaller than the numbers."""
    x = 5 + torch.randn(1, 2, 64, 32) * 1e-6
    expected = [p for p in quantize(x, parse_spec(spec)).parts if p is not None]
    with use_isa(isa):
        found = torch.ops.qpass.quantize(x, spec)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert bool(ours.float().isfinite().all())
    back = dequantize(quantize(x, parse_spec(spec)), parse_spec(spec), 32)
    torch.testing.assert_close(back, x, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "spec", ["int2:t32:zero=float", "int4:t8:zero=float", "int4:g8:zero=float", "int8:t16", "int3:t4:asym"]
)
@pytest.mark.parametrize("tokens_", [1, 7, 32, 45])
def test_rounding_is_off_by_half_a_step_at_most(spec: str, tokens_: int) -> None:
    """Scales computed here, from the range of a channel's group of tokens or of a row's group."""
    x = torch.randn(2, tokens_, 16, generator=torch.Generator().manual_seed(1)) + 2
    parsed = parse_spec(spec)
    size = int(spec.split(":")[1][1:])
    rows = x.mT if ":t" in spec else x
    step = torch.empty_like(rows)
    for start in range(0, rows.shape[-1], size):
        block = rows[..., start : start + size]
        low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        if not parsed.float_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        levels = 254 if parsed.symmetric else 2**parsed.format.bits - 1
        width = 2 * torch.maximum(-low, high) if parsed.symmetric else high - low
        step[..., start : start + size] = width / levels
    back = dequantize(quantize(x, parsed), parsed, 16)
    off = (back - x).abs()
    # An integer zero point is rounded itself: half a step more at the ends.
    bound = (step.mT if ":t" in spec else step) * (0.5 if parsed.float_zero or parsed.symmetric else 1.0)
    assert bool((off <= bound + 1e-5).all())


def test_a_fill_that_is_no_mask_is_left_alone() -> None:
    """Scores set to 0 keep their weight: an attention with that in it stays as it is written."""
    from torch.export import export

    from qpass.graph.attention import read_whole

    class Filled(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2)).masked_fill(mask, self.value).softmax(-1) @ v

    q = torch.randn(1, 2, 3, 8)
    for value, known in ((0.0, False), (-torch.inf, True), (-65504.0, True)):
        nodes = export(Filled(value), (q, q, q, torch.ones(3, 3) > 0)).graph.find_nodes(
            op="call_function", target=torch.ops.aten.matmul.default
        )
        assert (read_whole(list(nodes)[-1]) is not None) == known

"""What transformers does with a cache: padding, beams, crop, chunks, copies, windows, two sequences, states beside it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import qpass
from qpass.registry import captured
from tests.models import BLOCKS, build, hf, tokens
from tests.zoo.check import FakeQuantizedCache

IDS = tokens(batch=2, length=40)
TINYPY = Path(__file__).parent.parent / "examples" / "tinypy"


def logits(model: Any, ids: Tensor, cache: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, past_key_values=cache, **more).logits
    return found


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


FORMATS = ["int8", "int4:g8:asym:rotated", "kivi"]


def make(model: Any, spec: str, length: int = 96, **options: Any) -> Any:
    if spec == "kivi":
        return qpass.KVCache(model.config, length, k="int2:t32", v="int2:g8", **{"window": 32, **options})
    return qpass.KVCache(model.config, length, spec, **options)


@pytest.mark.parametrize("spec", FORMATS)
def test_crop(spec: str) -> None:
    """After a crop the cache goes on as one that never saw the tokens."""
    model = build("llama")
    cropped, plain = make(model, spec), make(model, spec)
    logits(model, IDS[:, :20], cropped)
    logits(model, IDS[:, 20:30], cropped)
    cropped.crop(-10)
    logits(model, IDS[:, :20], plain)
    assert int(cropped.get_seq_length()) == 20
    close(logits(model, IDS[:, 30:], cropped), logits(model, IDS[:, 30:], plain))


def test_crop_back_into_what_was_quantized() -> None:
    """Tokens that return to the window were quantized before: they come back as they were read."""
    model, ids = build("llama"), tokens(batch=1, length=90)
    cache = make(model, "kivi")
    logits(model, ids, cache)
    before = cache.layers[0].keys[:, :, :40].clone()
    cache.crop(-50)
    close(cache.layers[0].keys[:, :, :40], before)


@pytest.mark.parametrize("spec", FORMATS)
def test_reset_and_reuse(spec: str) -> None:
    model = build("llama")
    cache = make(model, spec)
    first = [logits(model, ids, cache) for ids in (IDS[:, :35], IDS[:, 35:])]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    for a, b in zip(first, [logits(model, ids, cache) for ids in (IDS[:, :35], IDS[:, 35:])], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", FORMATS)
def test_one_prefix_for_several_continuations(spec: str) -> None:
    """A copy of a cache is one of its own; repeated and selected rows are those of single calls."""
    model, prefix = build("llama"), IDS[:1, :33]
    cache = make(model, spec)
    logits(model, prefix, cache)
    for row in range(2):
        mine = copy.deepcopy(cache)
        close(logits(model, IDS[row : row + 1, 33:], mine), _alone(model, spec, prefix, IDS[row : row + 1, 33:]))
    cache.batch_repeat_interleave(2)
    both = logits(model, IDS[:, 33:], cache)
    for row in range(2):
        close(both[row : row + 1], _alone(model, spec, prefix, IDS[row : row + 1, 33:]))
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].batch_size == 1
    more = logits(model, IDS[:1, :1], cache)
    alone = make(model, spec)
    for ids in (prefix, IDS[1:, 33:]):
        logits(model, ids, alone)
    close(more, logits(model, IDS[:1, :1], alone))


def _alone(model: Any, spec: str, prefix: Tensor, ids: Tensor) -> Tensor:
    cache = make(model, spec)
    logits(model, prefix, cache)
    return logits(model, ids, cache)


@pytest.mark.parametrize("spec", FORMATS)
def test_save_and_restore(spec: str, tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "cache.safetensors"
    cache = make(model, spec)
    with pytest.raises(qpass.QpassError, match="the cache is empty"):
        cache.save(path)
    logits(model, IDS[:, :35], cache)
    cache.save(path)
    restored = make(model, spec).load_tokens(path)
    assert torch.equal(logits(model, IDS[:, 35:], restored), logits(model, IDS[:, 35:], cache))
    with pytest.raises(qpass.QpassError, match="holds a cache of another form"):
        make(model, spec, length=64).load_tokens(path)
    with pytest.raises(qpass.QpassError, match="holds a cache of another form"):
        make(model, spec, window=64 if spec == "kivi" else 32).load_tokens(path)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"do_sample": False}], ids=str)
def test_generate(how: dict[str, Any], spec: str) -> None:
    """The compiled model and its operators give the tokens of eager mode."""
    model = build("llama")
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "min_new_tokens": 12, **how}
    torch.manual_seed(0)
    expected = model.generate(IDS, past_key_values=make(model, spec), **options)
    model.compile(backend=qpass.QPass(qpass.Recipe.uniform("fp32", kv="int8"), inner="eager"))
    torch.manual_seed(0)
    assert torch.equal(model.generate(IDS, past_key_values=make(model, spec), **options), expected)


@pytest.fixture(scope="module")
def tinypy() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval()


@pytest.mark.parametrize(("spec", "tolerance"), [(None, 1e-4), ("int8", 1e-3)], ids=["float", "int8"])
def test_left_padded_prompts_equal_single_ones(tinypy: Any, spec: str | None, tolerance: float) -> None:
    """Eight prompts of 1 to 200 tokens at once, 64 greedy tokens each in fp32: the tokens of single runs.

    Products of eight rows are summed in another order than those of one; of a quantized cache such a last bit turns some code
    into the next one, which changes logits by a few 1e-4. Those of the prompt, which sees itself in float, are equal to 1e-4.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 7, 30, 64, 100, 150, 200]
    prompts = [torch.randint(3, 1000, (1, n), generator=generator) for n in lengths]
    pad = tinypy.config.pad_token_id or 0
    ids = torch.cat([torch.cat([torch.full((1, 200 - p.shape[1]), pad), p], 1) for p in prompts])
    mask = torch.cat([torch.cat([torch.zeros(1, 200 - n), torch.ones(1, n)], 1) for n in lengths]).long()
    options = {
        "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    together = tinypy.generate(
        ids, attention_mask=mask, past_key_values=qpass.KVCache(tinypy.config, 264, spec), pad_token_id=pad, **options
    )
    for row, prompt in enumerate(prompts):
        alone = tinypy.generate(
            prompt, attention_mask=torch.ones_like(prompt), pad_token_id=pad,
            past_key_values=qpass.KVCache(tinypy.config, prompt.shape[1] + 64, spec), **options,
        )  # fmt: skip
        assert torch.equal(alone.sequences[0, prompt.shape[1] :], together.sequences[row, 200:])
        for i, (a, b) in enumerate(zip(alone.logits, together.logits, strict=True)):
            torch.testing.assert_close(a[0], b[row], rtol=0, atol=tolerance if i else 1e-4)


@pytest.mark.parametrize("spec", ["int8", "int4:g8:asym:rotated"])
@pytest.mark.parametrize("steps", [(6, *(1,) * 14), (12, 1, 1, 5, 1), (3, 4, 9, 1)], ids=str)
def test_a_sliding_window_holds_its_tokens_only(spec: str, steps: tuple[int, ...]) -> None:
    """Against transformers' sliding cache with rounded K and V: while it fills, as it fills up, and full."""
    model = hf("MistralForCausalLM", num_key_value_heads=2, sliding_window=8).eval()
    ours, theirs = qpass.KVCache(model.config, 64, spec), FakeQuantizedCache(model.config, spec)
    start = 0
    for n in steps:
        ids = IDS[:, start : start + n]
        close(logits(model, ids, ours), logits(model, ids, theirs))
        start += n
    assert ours.layers[0].k.parts[0].shape[2] == 8
    ours.reset()
    close(logits(model, IDS[:, :5], ours), logits(model, IDS[:, :5], FakeQuantizedCache(model.config, spec)))


def test_layers_may_differ() -> None:
    """Full and sliding layers, and a format of its own for one of them."""
    kinds = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
    model = hf("Gemma3ForCausalLM", head_dim=16, num_key_value_heads=2, sliding_window=8, layer_types=kinds).eval()
    cache = qpass.KVCache(model.config, 64, "int8", layers={1: "int4:g16:asym"})
    backend = qpass.QPass(qpass.Recipe.uniform("fp32", kv="int8"), inner="eager")
    fast = torch.compile(model, backend=backend)
    eager = qpass.KVCache(model.config, 64, "int8", layers={1: "int4:g16:asym"})
    start = 0
    for n in (6, *(1,) * 8):
        ids = IDS[:, start : start + n]
        torch.testing.assert_close(logits(fast, ids, cache), logits(model, ids, eager), rtol=1e-4, atol=1e-4)
        start += n
    assert [la.k.parts[0].shape[2] for la in cache.layers] == [8, 64]
    assert [la.k.text for la in cache.layers] == ["int8:channel", "int4:g16:asym"]
    assert (
        len(backend.captures) <= 6
    )  # filling and full, each once more as lengths become symbols; none for more tokens
    assert all(sum("qpass.attention" in str(n.target) for n in c.after.nodes) == BLOCKS for c in backend.captures[1:])


@pytest.mark.parametrize("recipe_makes_it", [False, True])
def test_an_encoder_decoder_has_two(recipe_makes_it: bool) -> None:
    """The decoder's own tokens, and the encoder's output: each rounded once."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if recipe_makes_it:
        qpass.quantize(
            model,
            qpass.Recipe.uniform("fp32", kv="int8"),
            inner="eager",
            inputs={"input_ids": IDS, "decoder_input_ids": IDS[:, :2]},
        )
        found = model.generate(IDS, **options)
        assert any(r.kind == "kv" and not r.skipped for r in qpass.report(model).sites)
    else:
        cache = qpass.KVCache.for_encoder_decoder(config, 16)
        found = model.generate(IDS, past_key_values=cache, **options)
        assert cache.cross_attention_cache.layers[0].k.parts[0].dtype == torch.int8
        assert cache.cross_attention_cache.layers[0].k.parts[0].shape[2] == IDS.shape[1]
    fresh = transformers.T5ForConditionalGeneration(config).eval()
    fresh.load_state_dict(
        {k: v.dequantize() if isinstance(v, qpass.QTensor) else v for k, v in model.state_dict().items()}
    )
    theirs = EncoderDecoderCache(FakeQuantizedCache(fresh.config.get_text_config(decoder=True)), _Rounded())
    assert torch.equal(found, fresh.generate(IDS, past_key_values=theirs, **options))


class _Rounded(DynamicCache):
    """Cross attention sees floats in the call that makes them, and what was stored from then on."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        from qpass.numerics import fake_quantize
        from qpass.spec import parse_spec

        super().update(*(fake_quantize(x, parse_spec("int8")) for x in (key_states, value_states)), layer_idx)
        return key_states, value_states


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "JambaForCausalLM"])
def test_layers_with_a_state_keep_it_in_float(architecture: str) -> None:
    from tests.zoo.configs import build as build_of_zoo

    model = build_of_zoo(architecture).eval()
    cache, theirs = qpass.KVCache(model.config, 64), FakeQuantizedCache(model.config)
    for ids in (IDS[:, :9] % 90 + 3, IDS[:, 9:10] % 90 + 3, IDS[:, 10:11] % 90 + 3):
        torch.testing.assert_close(logits(model, ids, cache), logits(model, ids, theirs), rtol=1e-3, atol=1e-4)
    assert cache.nbytes > 0


def test_bytes_in_the_report_and_of_the_cache_agree() -> None:
    model = build("llama")
    model.compile(backend=qpass.QPass(qpass.Recipe.uniform("fp32", kv="int8"), inner="eager"))
    cache = qpass.KVCache(model.config, 32)
    logits(model, IDS[:, :5], cache)
    rows = [r for r in qpass.report(model).sites if r.kind == "kv"]
    assert sum(r.bytes_after for r in rows) == cache.nbytes
    assert sum(r.bytes_per_token or 0 for r in rows) == cache.nbytes / (2 * 32)
    assert "bytes a token" in str(qpass.report(model))
    assert captured(model, "test").captures

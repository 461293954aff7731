"""Whole models: onnxruntime, with float products, against transformers running the same quantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from qpass_export import export_onnx, load
from qpass_export.rules import unfused, violations
from qpass_export.verify import openvino_runner
from transformers.cache_utils import DynamicCache

import qpass
from qpass.cache import CACHE_ARGUMENT
from tests.export.micro import decode, empty_cache, float_products
from tests.zoo.configs import build, example_inputs, logits_of

DECODERS = [
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "OPTForCausalLM", "BloomForCausalLM", "PhiForCausalLM", "MistralForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM",
]  # fmt: skip
ENCODERS = ["BertForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM"]
LONG = {
    "GPTNeoXForCausalLM", "PhiForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM", "Qwen3ForCausalLM", "BloomForCausalLM",
    "DistilBertForMaskedLM", "Gemma2ForCausalLM", "OPTForCausalLM", "GptOssForCausalLM",
}  # fmt: skip
#: float32 sums in another order, over the largest logit.
CLOSE = 1e-5


def _marked(names: list[str]) -> list[object]:
    return [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in names]


@pytest.mark.parametrize("name", _marked(DECODERS))
def test_a_decoder_from_prompt_to_32_steps(name: str, tmp_path: Path) -> None:
    model = build(name)
    exported = export_onnx(model, tmp_path, recipe="int8:g16")
    reference = qpass.quantize(model, "int8:g16", inner="eager")
    session = load(tmp_path, exact=True)
    ids = torch.randint(3, 90, (2, 44), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the second prompt is shorter
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache()
    import inspect

    takes = inspect.signature(type(model).forward).parameters
    with torch.no_grad(), float_products():
        for tokens, found in decode(session, ids, 12, mask):
            given = {"attention_mask": mask[:, : tokens.stop], "position_ids": positions[:, tokens]}
            arguments = {n: t for n, t in given.items() if n in takes}
            expected = reference(ids[:, tokens], **arguments, **{CACHE_ARGUMENT: cache}, use_cache=True).logits.numpy()
            counted = mask[:, tokens].numpy().astype(bool)
            assert np.abs(found - expected)[counted].max() <= CLOSE * np.abs(expected).max()
    second = openvino_runner(exported.path)
    prompt = {"input_ids": ids[:, :12], "attention_mask": mask[:, :12], "position_ids": positions[:, :12]}
    feeds = {n: t.numpy() for n, t in prompt.items() if n in exported.inputs} | empty_cache(session, 2)
    ours, theirs = session.run(["logits"], feeds)[0], second(feeds)["logits"]
    counted = mask[:, :12].numpy().astype(bool)
    assert np.abs(ours - theirs)[counted].max() <= CLOSE * np.abs(ours).max()
    onnx.checker.check_model(str(exported.path), full_check=True)
    assert violations(exported.path, "ort-cpu") == []
    assert unfused(exported.path) == []
    kinds = {kind for s in exported.sites if s.format is not None for kind in s.kind.split("+")}
    assert {"embedding", "qkv", "attn_out", "ffn", "vocab"} <= kinds


@pytest.mark.parametrize("name", _marked(ENCODERS))
def test_an_encoder(name: str, tmp_path: Path) -> None:
    model = build(name)
    inputs = example_inputs(model)
    export_onnx(model, tmp_path, recipe="int8:g16", inputs=inputs)
    reference = qpass.quantize(model, "int8:g16", inputs=inputs, inner="eager")
    session = load(tmp_path, exact=True)
    for batch, length in ((2, 9), (1, 9), (3, 14)):
        given = {n: t[:1].repeat(batch, 1)[:, :length] for n, t in inputs.items()}
        given = {
            n: torch.nn.functional.pad(t, (0, length - t.shape[1]), value=5 if n == "input_ids" else 1)
            for n, t in given.items()
        }
        with torch.no_grad(), float_products():
            expected = logits_of(reference(**given)).numpy()
        found = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})[0]
        assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_model_in_half_precision_is_computed_in_the_floats_of_the_target(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM").to(dtype)
    export_onnx(model, tmp_path, recipe="int8:g16")
    assert {p.dtype for p in model.parameters()} == {dtype}, "the model itself is left as it is"
    reference = qpass.quantize(build("LlamaForCausalLM").to(dtype).float(), "int8:g16", inner="eager")
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(3))
    (_, found), *_ = decode(load(tmp_path, exact=True), ids, 12)
    with torch.no_grad(), float_products():
        expected = reference(ids).logits.numpy()
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def test_norms_rotary_and_attention_are_operators_of_the_opset(tmp_path: Path) -> None:
    exported = export_onnx(build("LlamaForCausalLM"), tmp_path, recipe="int8:g16")
    found = [n.op_type for n in onnx.load(exported.path).graph.node]
    assert (found.count("RMSNormalization"), found.count("RotaryEmbedding"), found.count("Attention")) == (5, 4, 2)
    assert "Softmax" not in found
    assert "ReduceMean" not in found


def test_soft_capped_attention_is_written_out(tmp_path: Path) -> None:
    """Opset 23 caps scores after the mask is added; these models cap them before."""
    exported = export_onnx(build("Gemma2ForCausalLM"), tmp_path, recipe="int8:g16")
    assert "Attention" not in {n.op_type for n in onnx.load(exported.path).graph.node}

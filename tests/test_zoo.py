"""A sample of the zoo: real classes of transformers, quantized whole at every site. `make zoo` runs all of them."""

from __future__ import annotations

import pytest

from tests.zoo.check import check
from tests.zoo.oracle import expected_kind

#: One of each shape: dense, fused, parallel, alibi, mixture of experts, latent attention, state space, hybrid, encoder,
#: encoder-decoder, vision.
SAMPLE = [
    "BloomForCausalLM", "CohereForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM", "Gemma3nForCausalLM",
    "GPTNeoXForCausalLM", "GPTNeoXJapaneseForCausalLM", "GptOssForCausalLM", "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM", "MambaForCausalLM",
    "OlmoeForCausalLM", "Phi3ForCausalLM", "Qwen3NextForCausalLM", "ZayaForCausalLM", "AlbertForMaskedLM",
    "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "CLIPModel", "ViTForImageClassification",
    "ModernBertForMaskedLM",
]  # fmt: skip
THROUGH_INDUCTOR = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "DeepseekV2ForCausalLM",
    "BertForMaskedLM",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_passes(name: str) -> None:
    outcome = check(name, "aot_eager")
    assert outcome.passed, (outcome.cause, outcome.disagreements)


@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_an_architecture_passes_through_inductor(name: str) -> None:
    outcome = check(name, "inductor")
    assert outcome.passed, (outcome.cause, outcome.disagreements)


@pytest.mark.parametrize(
    ("change", "cause"),
    [("kinds", "kinds: "), ("weights", "logits: relative error")],
    ids=["a site under another kind", "weights that differ"],
)
def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch, change: str, cause: str) -> None:
    if change == "kinds":
        monkeypatch.setattr("tests.zoo.check.expected_kind", lambda name, _: "vocab")
    else:
        monkeypatch.setattr("tests.zoo.check.fake_quantize", lambda x, spec: x * 1.01)
    outcome = check("LlamaForCausalLM", "eager")
    assert outcome.cause.startswith(cause)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("h.0.attn.c_attn.weight", "qkv"),
        ("model.layers.0.self_attn.o_proj.weight", "attn_out"),
        ("model.layers.0.mlp.experts.gate_up_proj", "ffn"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.conv.conv.weight", "float"),
        ("backbone.layers.0.mixer.in_proj.weight", "linear"),
        ("lm_head.weight", "vocab"),
    ],
)
def test_the_oracle_reads_names(name: str, kind: str) -> None:
    assert expected_kind(name) == kind

"""Quantizing frees the float weights as it goes: measured as resident memory, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 M random parameters in fp32, saved as safetensors."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=18, num_attention_heads=16,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("recipe", "after"), [("int8", 0.30), pytest.param("int4:g128", 0.20, marks=pytest.mark.long)])
def test_resident_memory(saved_model: Path, recipe: str, after: float) -> None:
    command = [sys.executable, "-m", "tests.memory_probe", str(saved_model), recipe]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    measured = json.loads(out.stdout.splitlines()[-1])
    assert measured["weights"] > 1.1e9
    assert measured["after"] <= after
    assert measured["peak"] < 1.15

"""transformers' own doors to artifacts: from_pretrained, quantization_config, save_pretrained, pipelines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import qpass
from tests.models import build, tokens

TINYPY = Path(__file__).parent.parent / "examples" / "tinypy"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(a quantized model, the folder that it wrote of itself)"""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    model = qpass.quantize(build("llama"), qpass.Recipe.uniform("int8", kv="int8"), inner="eager")
    model.save_pretrained(folder)
    return model, folder


def equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(n == m and type(p) is type(q) and torch.equal(p, q) for (n, p), (m, q) in pairs)


def test_from_pretrained_gives_the_quantized_model(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)):
        assert equal_weights(model, loaded)
        assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, qpass.QTensor)
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    again = folder.with_name("again")
    loaded.save_pretrained(again)
    assert qpass.verify(again) == qpass.verify(folder)


def test_generate_with_its_quantized_cache(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch._dynamo.reset()
    loaded.compile(backend="eager")
    out = loaded.generate(tokens(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(tokens(), max_new_tokens=3, do_sample=False))
    assert isinstance(out.past_key_values, qpass.KVCache)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_tied_tables_and_encoders(family: str, tmp_path: Path) -> None:
    model = qpass.quantize(build(family), "int4:g16:asym", inner="eager")
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert equal_weights(model, loaded)


def test_a_float_model_is_quantized_while_loading() -> None:
    config = qpass.QpassConfig("int4:g32")
    loaded = AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32, quantization_config=config)
    plain = qpass.quantize(
        AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval(), "int4:g32", inner="eager"
    )
    assert equal_weights(loaded, plain)


@pytest.mark.long
def test_a_pipeline(tmp_path: Path) -> None:
    model = qpass.quantize(
        AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32).eval(), "int8", inner="eager"
    )
    model.save_pretrained(tmp_path / "a")
    AutoTokenizer.from_pretrained(TINYPY).save_pretrained(tmp_path / "a")
    made = pipeline("text-generation", model=str(tmp_path / "a"))
    text = made("def read(", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("def read(")
    assert len(text) > len("def read(")


PROGRAMS = {
    "qpass first": "import qpass, sys\nassert 'transformers' not in sys.modules\n"
    "from transformers import AutoModelForCausalLM as A",
    "transformers first": "from transformers import AutoModelForCausalLM as A\nimport qpass",
    "no qpass": "from transformers import AutoModelForCausalLM as A",
}  # fmt: skip


@pytest.mark.parametrize("order", PROGRAMS)
def test_in_a_fresh_process(order: str, saved: tuple[Any, Path]) -> None:
    """Without qpass it must raise, never give random weights."""
    used = f"model = A.from_pretrained({str(saved[1])!r})\nprint('loaded', type(model.lm_head.weight).__name__)"
    program = f"{PROGRAMS[order]}\n{used}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if order == "no qpass":
        assert done.returncode != 0
        assert "OSError" in done.stderr
        assert "loaded" not in done.stdout
    else:
        assert "loaded QTensor" in done.stdout, done.stderr


def test_options_that_mean_nothing_here_are_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    with pytest.raises(qpass.QpassError, match="'push_to_hub' is not for quantized models"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    with pytest.raises(qpass.QpassError, match="leave out device_map"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


def test_damage_is_found_here_too(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = saved
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "qpass-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(qpass.QpassError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")

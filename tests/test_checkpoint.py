"""qpass.quantize_checkpoint: what qpass.quantize gives, in little memory; a killed run goes on."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qpass
from qpass.artifact.manifest import read_manifest
from tests.models import build, hf, logits_of, tokens

ROOT = Path(__file__).parent.parent
RECIPES = {
    "int8": "int8", "gptq": "int4:g16:asym:awq:gptq", "w8a8": "int8:smooth@int8:static",
    "bits": {**dict.fromkeys(("embedding", "qkv", "attn_out", "ffn", "vocab"), "int4:g32:asym:gptq"), "bits": 5.2},
}  # fmt: skip


def batches(seed: int = 0) -> list[torch.Tensor]:
    return [tokens(2, 24, seed + i) for i in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    build("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_quantize_gives(name: str, source: Path, tmp_path: Path) -> None:
    data = None if name == "int8" else batches()
    found = qpass.quantize_checkpoint(source, tmp_path / "a", RECIPES[name], calibration=data)
    model = qpass.quantize(build("llama"), RECIPES[name], calibration=data, inner="eager")
    loaded = qpass.load(tmp_path / "a", inner="eager")
    with torch.no_grad():
        assert torch.equal(logits_of(loaded(tokens())), logits_of(model(tokens())))
    assert found == qpass.verify(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


PROGRAM = """
import json, os, signal, sys
import qpass
from qpass.artifact.checkpoint import Unfinished
from tests.test_checkpoint import RECIPES, batches
source, target, name, after = sys.argv[1:]
put, made = Unfinished.put, 0
def counted(self, group, weights):
    global made
    put(self, group, weights)
    made += 1
    if made == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
Unfinished.put = counted
print(qpass.quantize_checkpoint(source, target, RECIPES[name], calibration=None if name == "int8" else batches()))
print(made)
"""


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["int8", pytest.param("bits", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_to_the_same_hash(name: str, source: Path, tmp_path: Path) -> None:
    whole, count = run(source, tmp_path / "whole", name, 0).stdout.split()[-2:]
    for _ in range(2):
        killed = run(source, tmp_path / "cut", name, 3)
        assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.unfinished").is_dir()
    found, made = run(source, tmp_path / "cut", name, 0).stdout.split()[-2:]
    assert found == whole
    assert int(made) == int(count) - 6  # nothing was made twice
    assert not (tmp_path / "cut.unfinished").exists()


def test_other_data_another_recipe_or_another_source_do_not_go_on(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "cut"
    assert run(source, target, "gptq", 2).returncode == -signal.SIGKILL
    with pytest.raises(qpass.QpassError, match="begun with another calibration"):
        qpass.quantize_checkpoint(source, target, RECIPES["gptq"], calibration=batches(seed=7))
    with pytest.raises(qpass.QpassError, match="begun with another recipe"):
        qpass.quantize_checkpoint(source, target, RECIPES["w8a8"], calibration=batches())
    other = tmp_path / "other"
    build("llama").save_pretrained(other)
    with pytest.raises(qpass.QpassError, match="begun with another source"):
        qpass.quantize_checkpoint(other, target, RECIPES["gptq"], calibration=batches())
    assert qpass.quantize_checkpoint(source, target, RECIPES["gptq"], calibration=batches())


def test_what_is_kept_is_checked(source: Path, tmp_path: Path) -> None:
    """A damaged group is made again; a folder that is not ours, or in use, is left alone."""
    whole = qpass.quantize_checkpoint(source, tmp_path / "whole")
    assert run(source, tmp_path / "cut", "int8", 3).returncode == -signal.SIGKILL
    kept = sorted((tmp_path / "cut.unfinished").glob("*.safetensors"))
    content = bytearray(kept[0].read_bytes())
    content[-1] ^= 1
    kept[0].write_bytes(content)
    kept[1].write_bytes(kept[1].read_bytes()[:50])
    with (tmp_path / "cut.unfinished" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(qpass.QpassError, match="another process is at work"):
            qpass.quantize_checkpoint(source, tmp_path / "cut")
    assert qpass.quantize_checkpoint(source, tmp_path / "cut") == whole
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "mine.txt").write_text("mine")
    with pytest.raises(qpass.QpassError, match="holds something else than an unfinished artifact"):
        qpass.quantize_checkpoint(source, tmp_path / "new")
    assert (tmp_path / "new.unfinished" / "mine.txt").exists()


def test_a_call_that_failed_blocks_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(qpass.QpassError, match="awq needs data"):
        qpass.quantize_checkpoint(source, tmp_path / "a", RECIPES["gptq"])
    assert qpass.quantize_checkpoint(source, tmp_path / "a", RECIPES["gptq"], calibration=batches())


def test_weights_that_are_missing_are_not_made_up(source: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    shutil.copytree(source, tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "s" / "model.safetensors", {"format": "pt"})
    with pytest.raises(qpass.QpassError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        qpass.quantize_checkpoint(tmp_path / "s", tmp_path / "a")
    config = json.loads((tmp_path / "s" / "config.json").read_text()) | {"architectures": ["MyOwn"]}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    with pytest.raises(qpass.QpassError, match="no class 'MyOwn'"):
        qpass.quantize_checkpoint(tmp_path / "s", tmp_path / "a")


def test_formats_are_taken_from_another_artifact(source: Path, tmp_path: Path) -> None:
    """Bits are given out once; a checkpoint of the same architecture is quantized alike, without giving them out again."""
    qpass.quantize_checkpoint(source, tmp_path / "a", RECIPES["bits"], calibration=batches())
    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    qpass.quantize_checkpoint(tmp_path / "other", tmp_path / "b", like=tmp_path / "a", calibration=batches(seed=3))
    first, second = (qpass.load(tmp_path / name, inner="eager") for name in "ab")
    specs = [{n: str(p.spec) for n, p in m.named_parameters() if isinstance(p, qpass.QTensor)} for m in (first, second)]
    assert specs[0] == specs[1]
    assert len(set(specs[0].values())) > 1
    with pytest.raises(qpass.QpassError, match="gptq needs data"):
        qpass.quantize_checkpoint(tmp_path / "other", tmp_path / "c", like=tmp_path / "a")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(qpass.QpassError, match=r"config\.json is missing"):
        qpass.quantize_checkpoint(tmp_path, tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(qpass.QpassError, match="holds something else"):
        qpass.quantize_checkpoint(source, tmp_path / "mine")


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["int8", "int8:smooth@int8", "int4:g128:gptq"])
def test_memory_is_the_quantized_model_one_block_and_what_was_recorded(recipe: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint_probe", str(tmp_path), recipe]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    measured = json.loads(out.stdout.splitlines()[-1])
    assert measured["float"] > 8 * measured["block"]
    assert measured["peak"] <= measured["final"] + 1.25 * measured["block"] + measured["recorded"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_like_repeats_what_stayed_in_float_and_tables_under_any_of_their_names(tied: bool, tmp_path: Path) -> None:
    hf("LlamaForCausalLM", num_key_value_heads=2, tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    recipe = qpass.Recipe.uniform("int8", overrides={"*down_proj*": None, "*0*o_proj*": "int4:g16"})
    first = qpass.quantize_checkpoint(tmp_path / "float", tmp_path / "a", recipe)
    qpass.quantize_checkpoint(tmp_path / "float", tmp_path / "b", like=tmp_path / "a")
    a, b = (read_manifest(tmp_path / name) for name in "ab")
    assert {n: w.spec for n, w in a.weights.items()} == {n: w.spec for n, w in b.weights.items()}
    assert not any("down_proj" in name for name in b.weights)
    assert first == a.hash

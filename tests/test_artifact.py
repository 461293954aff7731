"""qpass.save, load, verify: the same model back, every damage found, the old folder or the new one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import qpass
from qpass.artifact.manifest import NAME, QpassFormatError, head_of
from tests.checkpoint_probe import write
from tests.models import build, logits_of, tokens

FAMILIES = ["llama", "gpt2", "bert", "nanogpt"]
RECIPES = ["int8", "int4:g16:asym", "nf4:g16", "fp8", "nvfp4", "mxfp4", "int3:g16:zero=float", "bf16"]


def quantized(family: str = "llama", recipe: Any = "int8", **options: Any) -> nn.Module:
    return qpass.quantize(build(family), recipe, inner="eager", **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model(tokens()))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "llama"
    qpass.save(quantized(recipe="int4:g16:asym"), folder)
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


# --- the same model back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_computes_the_same(family: str, tmp_path: Path) -> None:
    model = quantized(family)
    qpass.save(model, tmp_path / "a")
    skeleton = None
    if family == "nanogpt":  # a class of one's own
        with torch.device("meta"):
            skeleton = build(family)
    loaded = qpass.load(tmp_path / "a", skeleton, inner="eager")
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.is_meta for p in loaded.parameters())
    rows = [
        {(r.kind, r.name, r.format, r.sqnr_db) for r in qpass.report(m).sites if r.kind != "kv"}
        for m in (model, loaded)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_format(recipe: str, tmp_path: Path) -> None:
    model = quantized(recipe=recipe)
    first = qpass.save(model, tmp_path / "a", shard_bytes=20_000)
    loaded = qpass.load(tmp_path / "a", inner="eager")
    assert torch.equal(logits(loaded), logits(model))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert qpass.save(loaded, tmp_path / "b", shard_bytes=20_000) == first == qpass.verify(tmp_path / "a")


def test_what_calibration_saw_is_kept(tmp_path: Path) -> None:
    model = quantized(recipe="int8:smooth@int8:static", calibration=[tokens(4, 16)])
    qpass.save(model, tmp_path / "a", calibration="data")
    loaded = qpass.load(tmp_path / "a", inner="eager")
    assert torch.equal(logits(loaded), logits(model))
    seen = [{r.name: r.input for r in qpass.report(m).sites} for m in (model, loaded)]
    assert seen[0] == seen[1]
    assert any(s is not None and s.scale is not None for s in seen[0].values())


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    model = quantized("gpt2")
    qpass.save(model, tmp_path / "a")
    stored = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors"))
    assert stored < 1.1 * sum(r.bytes_after for r in qpass.report(model).sites if r.kind != "kv") + 40_000
    loaded = qpass.load(tmp_path / "a", inner="eager")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_generate_and_its_cache(tmp_path: Path) -> None:
    model = quantized(recipe=qpass.Recipe.uniform("int8", kv="int8"))
    qpass.save(model, tmp_path / "a")
    loaded = qpass.load(tmp_path / "a", inner="eager")
    both = [m.generate(tokens(), max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*both)


def test_equal_models_have_equal_hashes(tmp_path: Path) -> None:
    a, b, c = (
        qpass.save(quantized(recipe=r), tmp_path / n) for n, r in (("a", "int8"), ("b", "int8"), ("c", "int8:asym"))
    )
    assert a == b != c


@pytest.mark.long
def test_loading_takes_the_memory_of_the_artifact(tmp_path: Path) -> None:
    """Of 300 M parameters, with a first call behind it; beside what torch takes for any model."""
    write(tmp_path / "float")
    write(tmp_path / "small", hidden=128)
    for name in ("float", "small"):
        qpass.quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-int8", "int8")
    command = [sys.executable, "-m", "tests.load_probe", str(tmp_path / "float-int8"), str(tmp_path / "small-int8")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    measured = json.loads(out.stdout.splitlines()[-1])
    assert measured["artifact"] > 2.4e8
    assert measured["peak"] <= 1.3 * measured["artifact"]


# --- damage -----------------------------------------------------------------------------------------------------------


def checked(folder: Path) -> list[Path]:
    """All but the tokenizer and generation_config.json, which are written again by their own `save_pretrained`."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" or p.name in (NAME, "config.json")]
    assert len(found) >= 3
    return found


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << random.Random(at).randrange(8))]))


def test_every_flipped_bit_is_found(copy: Path) -> None:
    generator = random.Random(0)
    before = qpass.verify(copy)
    for path in checked(copy):
        for at in {0, 7, path.stat().st_size - 1, *(generator.randrange(path.stat().st_size) for _ in range(60))}:
            flip(path, at)
            with pytest.raises(QpassFormatError):
                qpass.verify(copy)
            flip(path, at)
    assert qpass.verify(copy) == before


def test_every_truncation_is_found(copy: Path) -> None:
    for path in checked(copy):
        whole = path.read_bytes()
        for length in {0, 1, 8, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            with pytest.raises(QpassFormatError):
                qpass.load(copy, inner="eager")
        path.write_bytes(whole + b" ")
        with pytest.raises(QpassFormatError):
            qpass.verify(copy)
        path.unlink()
        with pytest.raises(QpassFormatError, match="missing"):
            qpass.verify(copy)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["../out", "/etc/hostname", "a/../../b", "..", ".", "", "a\x00b", "C:\\x", "~root", "a/b"]
)
def test_paths_out_of_the_folder_are_refused(name: str, copy: Path) -> None:
    content = json.loads((copy / NAME).read_text())
    file, entry = next((k, v) for k, v in content["files"].items() if k.endswith(".safetensors"))
    content["files"][name] = entry
    for tensor in content["tensors"].values():
        tensor["file"] = name if tensor["file"] == file else tensor["file"]
    forge(copy, content)
    with pytest.raises(QpassFormatError, match="refused"):
        qpass.load(copy, inner="eager")


def forge(folder: Path, content: dict[str, Any], config: bool = False) -> None:
    """A manifest with the right hash: what an attacker writes. `config`: of another config.json too."""
    from qpass.artifact import manifest

    if config:
        content["files"]["config.json"] = vars(manifest.head_of(folder / "config.json", tensors=False))

    made = {
        f: content[f] for f in ("recipe", "weights", "tensors", "files", "aliases", "groups", "calibration", "versions")
    }
    kinds = {"weights": manifest.WeightEntry, "tensors": manifest.TensorEntry, "files": manifest.FileEntry}
    for key, kind in kinds.items():
        made[key] = {name: kind(**value) for name, value in made[key].items()}
    (folder / NAME).write_text(manifest.Manifest(**made).text())


FORGED: dict[str, Any] = {
    "header of 10^15": lambda c, config: c["files"]["qpass-00001.safetensors"].update(head=10**15),
    "header of 10^20": lambda c, config: c["files"]["qpass-00001.safetensors"].update(head=10**20),
    "type of a weight": lambda c, config: first(c).update(dtype="load"),
    "type that is none": lambda c, config: first(c).update(dtype="nope"),
    "integers": lambda c, config: first(c).update(dtype="int8"),
    "fields of an input": lambda c, config: first(c).update(input={"a": 1}),
    "negative shape": lambda c, config: first(c).update(shape=[-1, 64]),
    "enormous shape": lambda c, config: first(c).update(shape=[10**18, 10**18]),
    "another format": lambda c, config: first(c).update(spec="nf4:g16"),
    "no format": lambda c, config: first(c).update(spec="int4:nonsense"),
    "codes on a terminal": lambda c, config: first(c).update(kind="\x1b[2J"),
    "group of nothing": lambda c, config: c["groups"].append(["a", "b"]),
    "group of strangers": lambda c, config: c["groups"].append(
        ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"]
    ),
    "alias of nothing": lambda c, config: c["aliases"].update(a="b"),
    "recipe": lambda c, config: c["recipe"].update(qkv="nonsense"),
    "class": lambda c, config: config.update(architectures=5),
    "no class": lambda c, config: config.update(architectures=["os.system"]),
    "heads": lambda c, config: config.update(num_attention_heads=0),
    "layers": lambda c, config: config.update(num_hidden_layers="x"),
    "activation": lambda c, config: config.update(hidden_act="nonsense"),
    "width": lambda c, config: config.update(hidden_size=10**12),
    "depth": lambda c, config: config.update(num_hidden_layers=10**7),
    "model type": lambda c, config: config.update(model_type="nonsense"),
}


def first(content: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = content["weights"]["model.layers.0.mlp.up_proj.weight"]
    return entry


@pytest.mark.parametrize("how", FORGED)
def test_forged_content_with_the_right_hash_is_refused(how: str, copy: Path) -> None:
    content, config = json.loads((copy / NAME).read_text()), json.loads((copy / "config.json").read_text())
    FORGED[how](content, config)
    (copy / "config.json").write_text(json.dumps(config))
    forge(copy, content, config=True)
    with pytest.raises(qpass.QpassError):
        qpass.load(copy, inner="eager")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


HEADERS: dict[str, Any] = {
    "a list": lambda header: [1, 2],
    "entries that are lists": lambda header: {key: [1] for key in header},
    "no offsets": lambda header: {k: {"dtype": v["dtype"], "shape": v["shape"]} for k, v in header.items()},
    "offsets of nothing": lambda header: {k: v | {"data_offsets": None} for k, v in header.items()},
    "overlapping": lambda header: {k: v | {"data_offsets": [0, v["data_offsets"][1]]} for k, v in header.items()},
    "another type": lambda header: {k: v | {"dtype": "BF16"} for k, v in header.items()},
    "another shape": lambda header: {k: v | {"shape": [1, *v["shape"]]} for k, v in header.items()},
    "a tensor too few": lambda header: dict(list(header.items())[1:]),
    "a tensor too many": lambda header: header | {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
}


@pytest.mark.parametrize("how", HEADERS)
def test_a_forged_header_with_the_right_hash_is_refused(how: str, copy: Path) -> None:
    path = copy / "qpass-00001.safetensors"
    header, data = header_of(path)
    text = json.dumps(HEADERS[how](header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    content = json.loads((copy / NAME).read_text())
    content["files"][path.name] = vars(head_of(path, tensors=True))
    forge(copy, content)
    for read in (qpass.verify, qpass.load):
        with pytest.raises(QpassFormatError):
            read(copy)


def test_loading_does_not_depend_on_torchs_default_device(copy: Path) -> None:
    with torch.device("meta"):
        assert qpass.verify(copy)
    skeleton = build("llama")
    with torch.device("meta"):
        assert qpass.load(copy, skeleton, inner="eager") is skeleton


class Rotating(torch.nn.Module):
    """With a table of complex numbers, which the class computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)
        self.register_buffer("freqs", torch.polar(torch.ones(16), torch.arange(16.0)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (16, 2))) * self.freqs).flatten(-2))


def test_complex_tables_are_computed_again(tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    model = qpass.quantize(Rotating().eval(), "int8", inputs=x, inner="eager")
    qpass.save(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(qpass.load(tmp_path / "a", Rotating(), inner="eager")(x), model(x))


def test_a_weight_in_sixteen_bits_is_no_part_of_its_checkpoint(tmp_path: Path) -> None:
    """Which may be written over."""
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = qpass.quantize(model, qpass.Recipe.uniform("int8", ffn="bf16"), inner="eager")
    parts = [p for w in model.parameters() if isinstance(w, qpass.QTensor) for p in w.quantized.parts if p is not None]
    assert all(p.untyped_storage().resizable() for p in parts)


def test_a_config_chooses_no_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetches kernels from its hub by the name of an attention."""
    content, config = json.loads((copy / NAME).read_text()), json.loads((copy / "config.json").read_text())
    config |= {"attn_implementation": "kernels-community/flash-attn3", "_attn_implementation": "kernels-community/x"}
    config |= {"auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    forge(copy, content, config=True)
    assert qpass.load(copy, inner="eager").config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_links_are_refused(link: Any, copy: Path, tmp_path: Path) -> None:
    for name in (NAME, "qpass-00001.safetensors", "config.json"):
        (copy / name).rename(tmp_path / name)
        link(tmp_path / name, copy / name)
        with pytest.raises(QpassFormatError, match="refused"):
            qpass.verify(copy)
        (copy / name).unlink()
        (tmp_path / name).rename(copy / name)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "[" * 100_000, '{"qpass_artifact": 1}', '{"a":' * 3000], ids=range(7)
)
def test_a_manifest_that_is_none(text: str, copy: Path) -> None:
    (copy / NAME).write_text(text)
    with pytest.raises(QpassFormatError, match="damaged"):
        qpass.verify(copy)


def test_a_newer_format_is_named(copy: Path) -> None:
    content = json.loads((copy / NAME).read_text())
    (copy / NAME).write_text(json.dumps(content | {"qpass_artifact": 99}))
    with pytest.raises(QpassFormatError, match="format 99, written by a newer qpass"):
        qpass.load(copy)


def test_a_skeleton_that_does_not_fit(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(qpass.QpassError, match=r"has no place in|needs: another class"):
        qpass.load(artifact, build("gpt2"), inner="eager")
    other = build("llama")
    other.lm_head = nn.Linear(other.config.hidden_size, 7, bias=False)
    with pytest.raises(qpass.QpassError, match=r"lm_head.weight is \["):
        qpass.load(artifact, other, inner="eager")
    with pytest.raises(qpass.QpassError, match="no qpass artifact there"):
        qpass.load(tmp_path)


def test_a_link_beside_the_artifact_is_not_followed(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (copy / "tokenizer.json").symlink_to(tmp_path / "secret")
    qpass.save(qpass.load(copy, inner="eager"), tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.json").exists()
    (copy / "generation_config.json").unlink()
    (copy / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(QpassFormatError, match="refused"):
        qpass.load(copy, inner="eager")


def test_an_artifact_of_the_first_format_is_read_for_good() -> None:
    """Written by the first version that wrote any: five formats, static inputs, scales of columns, float zero points."""
    folder = Path(__file__).parent / "data" / "artifact-v1"
    model = qpass.load(folder, inner="eager")
    with torch.no_grad(), qpass.set_compute("float"):
        found = logits_of(model(tokens())).numpy()
    expected = np.load(folder.with_name("artifact-v1-logits.npy"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_was_moved_to_another_type(when: str, tmp_path: Path) -> None:
    """What the module computes itself (the frequencies of rotary embeddings) was moved too."""
    float_model = build("llama").to(torch.bfloat16) if when == "before" else build("llama")
    model = qpass.quantize(float_model, "int8", inner="eager")
    model = model.to(torch.bfloat16) if when == "after" else model
    qpass.save(model, tmp_path / "a")
    loaded = qpass.load(tmp_path / "a", inner="eager")
    assert torch.equal(logits(loaded), logits(model))


def test_without_qpass_transformers_raises(artifact: Path) -> None:
    program = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(artifact)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Error" in done.stderr


# --- saving -----------------------------------------------------------------------------------------------------------


def test_what_lies_in_the_folder_stays_there(copy: Path) -> None:
    (copy / "letter.txt").write_text("dear")
    (copy / "results").mkdir()
    (copy / "results" / "x").write_text("1")
    qpass.save(quantized(), copy)
    assert (copy / "letter.txt").read_text() == "dear"
    assert (copy / "results" / "x").read_text() == "1"
    assert qpass.verify(copy)


def test_all_of_a_tokenizer_is_carried_over(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "source")
    for name in ("vocab.txt", "spiece.model", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_text("{}")
    for name in ("modeling.py", "README.md", "calibration.txt"):
        (tmp_path / "source" / name).write_text("")
    model = type(build("bert")).from_pretrained(tmp_path / "source")
    qpass.save(qpass.quantize(model, "int8", inner="eager"), tmp_path / "a")
    found = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"vocab.txt", "spiece.model", "tokenizer_config.json"} < found
    assert not {"modeling.py", "model.safetensors", "README.md", "calibration.txt"} & found


def test_the_working_folder_and_compiled_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = quantized()
    assert qpass.save(model, ".") == qpass.save(torch.compile(model, backend="eager"), tmp_path / "b")


def test_a_copy_is_saved_under_the_recipe_that_its_weights_have(tmp_path: Path) -> None:
    """Whatever else compiles the copy."""
    copied = copy_of(quantized(recipe="int8:channel"))
    copied.compile(backend=qpass.QPass("int4:g16", inner="eager"))
    logits(copied)
    qpass.save(copied, tmp_path / "a")
    assert json.loads((tmp_path / "a" / NAME).read_text())["recipe"]["ffn"] == "int8:channel"
    qpass.load(tmp_path / "a", inner="eager")


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(qpass.QpassError, match="holds something else"):
        qpass.save(quantized(), tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(qpass.QpassError, match="no weight is quantized"):
        qpass.save(build("llama"), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


KILLED = """
import os, signal, sys, qpass
from qpass.artifact import save
from tests.models import build
after, folder = int(sys.argv[1]), sys.argv[2]
model = qpass.quantize(build("llama"), "int8:asym", inner="eager")
count = 0
def watch(event, args):
    global count
    if event in ("open", "os.rename", "os.mkdir", "shutil.copyfile", "os.remove", "os.rmdir", "tempfile.mkdtemp") and armed:
        count += 1
        if count == after:
            os.kill(os.getpid(), signal.SIGKILL)
armed = False
sys.addaudithook(watch)
armed = True
qpass.save(model, folder, shard_bytes=40_000)
print("done", flush=True)
"""


@pytest.mark.parametrize("after", [3, 12, 26, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 5, 8, 20))])
def test_a_killed_save_leaves_the_old_or_the_new(after: int, copy: Path) -> None:
    old = qpass.verify(copy)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(after), str(copy)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == -signal.SIGKILL or run.stdout == "done\n"
    new = qpass.verify(copy)
    assert (new == old) or run.stdout == "done\n" or len(list(copy.glob("*.safetensors"))) > 1
    again = qpass.save(qpass.load(copy, inner="eager"), copy)
    assert qpass.verify(copy) == again
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]  # no litter


def test_a_full_disk_leaves_the_old(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, model = qpass.verify(copy), quantized()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qpass.artifact.save.sync", full)
    with pytest.raises(OSError, match="No space left"):
        qpass.save(model, copy)
    assert qpass.verify(copy) == old
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]

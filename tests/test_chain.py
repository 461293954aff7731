"""A real model from end to end, behind `make test-long`: SmolLM2-135M-Instruct, made by examples/smollm2.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import qpass

ROOT = Path(__file__).parent.parent
TEXTS = ROOT / "examples" / "smollm2"
RECIPE = "int4+kv=int8"
QUESTION = "What is the capital of France?"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Its folder, in the user's cache."""
    made = subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(made.stderr.strip()[-200:])
    return Path(made.stdout.strip().splitlines()[-1])


def in_float(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def prompt(smollm2: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    return torch.as_tensor(ids)


def greedy(model: Any, ids: torch.Tensor, new: int = 24, **options: Any) -> list[int]:
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
    return [int(token) for token in found[0, ids.shape[1] :]]


IN_A_FRESH_PROCESS = """
import json, sys, torch, qpass
model = qpass.load(sys.argv[1], inner="eager")
assert all(isinstance(p, qpass.QTensor) for p in model.parameters() if p.dim() > 1)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
print(json.dumps(found[0, ids.shape[1]:].tolist()))
"""


@pytest.mark.parametrize("by", ["save", "quantize_checkpoint"])
def test_saved_and_loaded_elsewhere_it_writes_the_same(by: str, smollm2: Path, tmp_path: Path) -> None:
    """In a process that has no matrix in float."""
    ids = prompt(smollm2)
    model = qpass.quantize(AutoModelForCausalLM.from_pretrained(smollm2).eval(), RECIPE, inner="eager")
    expected = greedy(model, ids)
    if by == "save":
        qpass.save(model, tmp_path)
    else:
        qpass.quantize_checkpoint(smollm2, tmp_path, RECIPE)
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path), json.dumps(ids.tolist())]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert json.loads(out.splitlines()[-1]) == expected
    assert "Paris" in AutoTokenizer.from_pretrained(smollm2).decode(expected)


@pytest.mark.parametrize("kv", [None, "int8:static"], ids=["float cache", "int8 cache"])
def test_onnxruntime_genai_chats_as_qpass_does(kv: str | None, smollm2: Path, tmp_path: Path) -> None:
    """Five and six bits lie in eight there, with the same values, and it says in how many bytes. Of caches in int8 it takes those
    with static scales."""
    genai = pytest.importorskip("onnxruntime_genai")
    export = pytest.importorskip("qpass_export")
    ids = prompt(smollm2)
    model, cache = in_float(smollm2), None
    if kv is not None:
        text = (TEXTS / "calibration.txt").read_text()[:20_000]
        batches = list(
            AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids[:, :2048].split(512, 1)
        )
        cache = qpass.KVCache(model.config, ids.shape[1] + 24, kv).calibrate(model, batches)
    exported = export.export_onnx(model, tmp_path, recipe="int4", cache=cache)
    assert sum(site.wider for site in exported.sites) > 10e6
    assert "int5 in 8 bits, int6 in 8 bits" in str(exported)
    runtime = genai.Model(str(tmp_path))
    params = genai.GeneratorParams(runtime)
    params.set_search_options(max_length=ids.shape[1] + 24)
    generator = genai.Generator(runtime, params)
    generator.append_tokens(ids[0].numpy().astype("int32"))
    found: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    with qpass.set_compute("float"):
        expected = greedy(qpass.quantize(in_float(smollm2), "int4", inner="eager"), ids, past_key_values=cache)
    assert len(found) >= 8
    assert found[: len(expected)] == expected[: len(found)]


@pytest.mark.parametrize("recipe", ["int8", "int4:g32:asym"])
def test_transformers_reads_the_export_for_vllm(recipe: str, smollm2: Path, tmp_path: Path) -> None:
    """The reader (compressed-tensors 0.20) has no place for packed zero points unless it dequantizes. Then it takes all layers to
    have the bits of one, so it does not read bits that were given out."""
    pytest.importorskip("compressed_tensors")
    model = qpass.quantize(in_float(smollm2), recipe, inner="eager")
    qpass.export_compressed_tensors(model, tmp_path / "served")
    options = {} if recipe == "int8" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype=torch.float32, **options).eval()
    ids = prompt(smollm2)
    with torch.no_grad(), qpass.set_compute("float"):
        ours, theirs = model(ids).logits, served(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("recipe", ["int8", RECIPE, "nf4", "int4:g128"])
def test_the_plan_is_within_a_percent_of_the_bytes(recipe: str, smollm2: Path) -> None:
    planned = qpass.plan_memory(smollm2, recipe, dtype=torch.float32).weights.bytes
    report = qpass.report(qpass.quantize(in_float(smollm2), recipe, inner="eager"))
    assert planned == pytest.approx(report.resident_quantized + report.resident_float, rel=0.01)


def test_compare_goes_on_after_a_kill(smollm2: Path, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("qpass")), "compare", str(smollm2), "--recipes", "int8,int4:g128", "--data",
        str(TEXTS / "validation.txt"), "--windows", "1", "--window", "128", "--steps", "0", "--inner", "eager", "--folder",
        str(tmp_path), "--json",
    ]  # fmt: skip
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("*.json")):  # the first row is there
        time.sleep(0.05)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [row["recipe"] for row in json.loads(out)["rows"]] == ["float", "int8", "int4:g128"]
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}.items()


SHARDED = """
import sys, torch, qpass
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(sys.argv[1])(open(sys.argv[2]).read()[:80000], return_tensors="pt").input_ids
windows = ids[0, : 8 * 512].view(8, 1, 512)
qpass.quantize(model, "int4", calibration=list(windows[rank::world]), inner="eager")
if rank == 0:
    qpass.save(model, sys.argv[3])
"""


def test_two_processes_calibrate_it_as_well_as_one_does(smollm2: Path, tmp_path: Path) -> None:
    """Sums are rounded differently, as with another number of threads, and GPTQ passes each rounding on: codes differ, the loss
    does not. That statistics are equal is tested on a small model (tests/test_ranks.py)."""
    text = (TEXTS / "validation.txt").read_text()[:4000]
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids[:, :512]
    losses = []
    with torch.no_grad():
        exact = in_float(smollm2)(ids).logits.log_softmax(-1)
    (tmp_path / "sharded.py").write_text(SHARDED)
    for count in (1, 2):
        folder = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [str(tmp_path / "sharded.py"), str(smollm2), str(TEXTS / "calibration.txt"), str(folder)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        with torch.no_grad(), qpass.set_compute("float"):
            found = qpass.load(folder, inner="eager")(ids).logits.log_softmax(-1)
        losses.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert 0 < losses[1] == pytest.approx(losses[0], rel=0.15), losses


def test_the_worst_sites_are_those_that_leaving_each_out_finds(smollm2: Path) -> None:
    """qpass.blame restores sites in the graph; here each weight is put back into a plain model, which reads all anew."""
    text = (TEXTS / "validation.txt").read_text()[:4000]
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(text).input_ids[:256]])
    reference, plain = in_float(smollm2), in_float(smollm2)
    model = qpass.quantize(in_float(smollm2), "int4", inner="eager")
    worst = [row.name for row in qpass.blame(model, reference, [ids]).rows[:10]]
    floats = dict(reference.named_parameters())
    stored = {name: p.dequantize() for name, p in model.named_parameters() if isinstance(p, qpass.QTensor)}
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        exact = reference(ids).logits.log_softmax(-1)
        for name, value in stored.items():
            weights[name].copy_(value)
        left: dict[str, float] = {}
        for name, value in stored.items():
            weights[name].copy_(floats[name])
            left[name] = float((exact.exp() * (exact - plain(ids).logits.log_softmax(-1))).sum(-1).mean())
            weights[name].copy_(value)
    assert set(sorted(left, key=left.__getitem__)[:5]) <= set(worst)

"""What is given to export_onnx, what it writes, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from qpass_export import export_onnx, load, verify
from qpass_export.session import SESSION

import qpass
from tests.export.micro import decode, float_products, one_linear
from tests.export.test_cache import Keeper
from tests.zoo.configs import build

TINY = Path(__file__).parents[2] / "examples" / "tinypy"


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    export_onnx(build("LlamaForCausalLM"), folder, recipe=qpass.Recipe.uniform("int8:g16", kv="int8"))
    return folder / "model.onnx"


def test_names_and_sizes_are_those_of_the_ecosystem(llama: Path) -> None:
    graph = onnx.load(llama).graph
    inputs, outputs = ({v.name: _dims(v) for v in side} for side in (graph.input, graph.output))
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total_sequence"]
    assert inputs["past_key_values.1.value"] == ["batch", 4, "past_sequence", 16]
    assert inputs["past_key_values.1.value_scale"] == ["batch", 4, "past_sequence", 1]
    assert list(outputs)[:2] == ["logits", "present.0.key"]
    assert outputs["logits"] == ["batch", "sequence", 97]
    assert outputs["present.1.key_scale"] == ["batch", 4, "total_sequence", 1]


def test_each_node_of_a_site_says_which(llama: Path) -> None:
    model = onnx.load(llama)
    sites = {p.value for n in model.graph.node for p in n.metadata_props if p.key == "qpass.site"}
    assert "ffn model.layers.1.mlp.down_proj.weight" in sites
    assert json.loads(next(p.value for p in model.metadata_props if p.key == "qpass.sites"))
    assert next(p.value for p in model.metadata_props if p.key == "qpass.target") == "ort-cpu"


@pytest.mark.parametrize(("spec", "bits"), [("int5:g32", 8), ("int6:g32:asym", 8), ("int3:g32", 4), ("int2:g32", 4)])
def test_a_format_that_onnx_lacks_is_held_in_a_wider_type_and_says_so(spec: str, bits: int, tmp_path: Path) -> None:
    exported = export_onnx(one_linear(), tmp_path, recipe=spec, inputs=torch.randn(2, 3, 96))
    (site,) = exported.sites
    own = int(spec[3])
    assert site.wider == one_linear(96, 40).state_dict()[site.name].numel() * (bits - own) // 8
    assert f"wider than its format: int{own} in {bits} bits, {site.wider:,} bytes more" in str(exported)


@pytest.mark.parametrize("spec", ["int8", "int4:g32", "nf4", "fp8_e4m3"])
def test_a_format_that_onnx_has_is_held_in_its_own_type(spec: str, tmp_path: Path) -> None:
    exported = export_onnx(one_linear(), tmp_path, recipe=spec, inputs=torch.randn(2, 3, 96))
    assert [site.wider for site in exported.sites] == [0]
    assert "wider" not in str(exported)


def test_a_file_name_or_a_folder(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 96)
    assert export_onnx(one_linear(), tmp_path / "a", recipe="int8", inputs=x).path == tmp_path / "a" / "model.onnx"
    assert export_onnx(one_linear(), tmp_path / "b" / "net.onnx", recipe="int8", inputs=x).path.name == "net.onnx"
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == ["net.onnx", "net.session.json"]
    export_onnx(one_linear(), tmp_path / "b" / "other.onnx", "ort-cuda", "int8", inputs=x)
    assert load(tmp_path / "b" / "net.onnx").get_inputs()[0].name == "x", "each file has its own session"


def test_an_export_replaces_another_and_a_failed_one_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 96)
    export_onnx(one_linear(), tmp_path, recipe="int8", inputs=x)
    before = (tmp_path / "model.onnx").read_bytes()
    monkeypatch.setattr("qpass_export.export.write_session", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        export_onnx(one_linear(), tmp_path, recipe="int4:g32", inputs=x)
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", SESSION]


def test_many_bytes_lie_beside_the_graph_and_are_written_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpass_export.export._INLINE", 1000)
    x = torch.randn(2, 3, 96)
    exported = export_onnx(one_linear(), tmp_path, recipe="int8", inputs=x)
    beside = tmp_path / "model.onnx.data"
    assert exported.nbytes == exported.path.stat().st_size + beside.stat().st_size
    assert beside.stat().st_size >= 96 * 40
    with qpass.set_compute("float"):
        expected = qpass.quantize(one_linear(), "int8", inputs=x, inner="eager")(x)
    (found,) = load(tmp_path, exact=True).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_an_artifact_and_a_transformers_folder(tmp_path: Path) -> None:
    model = qpass.quantize(build("LlamaForCausalLM"), "int4:g16:asym", inner="eager")
    ids = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), float_products():
        expected = model(ids).logits.numpy()
    qpass.save(model, tmp_path / "artifact")
    for i, source in enumerate((tmp_path / "artifact", str(tmp_path / "artifact"))):
        exported = export_onnx(source, tmp_path / f"{i}")
        (_, found), *_ = decode(load(exported.path, exact=True), ids, 8)
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
    with pytest.raises(qpass.QpassError, match="neither an artifact"):
        export_onnx(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("when", ["before", "at the export"])
def test_an_exported_program(when: str, tmp_path: Path) -> None:
    model, x = one_linear(), torch.randn(2, 3, 96)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    names = list(program.graph.nodes)
    with qpass.set_compute("float"):
        expected = qpass.quantize(one_linear(), "int8", inputs=x, inner="eager")(x)
    if when == "before":
        export_onnx(qpass.quantize(program, "int8"), tmp_path)
    else:
        export_onnx(program, tmp_path, recipe="int8")
    assert list(program.graph.nodes) == names, "the given program is unchanged"
    session = load(tmp_path, exact=True)
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:1, :2].numpy()})
    np.testing.assert_allclose(found, expected[:1, :2].detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "inputs", "told"),
    [
        (3, None, "takes a module"),
        (one_linear().train(), torch.zeros(2, 96), "training mode"),
        (one_linear(), None, "pass inputs="),
        (one_linear(), {"x": 3}, "is no tensor"),
        (Path(__file__).parent, None, "neither an artifact"),
        (one_linear(), torch.zeros(2, 3), "torch.export does not take it"),
    ],
    ids=["no module", "training", "no inputs", "no tensor", "no model there", "wrong width"],
)
def test_bad_input_is_named(model: object, inputs: object, told: str, tmp_path: Path) -> None:
    with pytest.raises(qpass.QpassError, match=told):
        export_onnx(model, tmp_path / "out", recipe="int8", inputs=inputs)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x.onnx"):
        with pytest.raises(qpass.QpassError, match="nothing can be written there"):
            export_onnx(one_linear(), place, recipe="int8", inputs=torch.zeros(2, 96))


def test_an_export_leaves_nothing_of_another_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(build("LlamaForCausalLM"), tmp_path, recipe="int8:g16")
    assert (tmp_path / "genai_config.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("qpass_export.export._INLINE", 1000)
        export_onnx(one_linear(), tmp_path, recipe="int8", inputs=torch.zeros(2, 96))
    assert not (tmp_path / "genai_config.json").exists()
    assert (tmp_path / "model.onnx.data").exists()
    export_onnx(one_linear(), tmp_path, recipe="int8", inputs=torch.zeros(2, 96))
    assert not (tmp_path / "model.onnx.data").exists()


def test_sizes_of_two_sequences_have_two_names(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.left(a) @ self.right(b).mT

    model, a, b = Two().eval(), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    export_onnx(model, tmp_path, recipe="int8", inputs=(a, b))
    session = load(tmp_path, exact=True)
    assert len({s for i in session.get_inputs() for s in i.shape[1:2]}) == 2
    for lengths in ((7, 4), (1, 9)):
        x, y = (torch.randn(2, n, 16) for n in lengths)
        with float_products():
            expected = qpass.quantize(Two().eval(), "int8", inputs=(a, b), inner="eager")
        expected.load_state_dict(qpass.quantize(model, "int8", inputs=(a, b), inner="eager").state_dict())
        (found,) = session.run(None, {"a": x.numpy(), "b": y.numpy()})
        np.testing.assert_allclose(found, expected(x, y).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["int8", "mxfp4", "int4:g24"])
def test_a_program_from_a_file_is_checked_and_told(spec: str, tmp_path: Path) -> None:
    program = torch.export.export(one_linear(), (torch.randn(2, 96),))
    torch.export.save(qpass.quantize(program, spec), tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2")
    if spec == "int8":
        assert [(s.kind, s.name, s.format) for s in export_onnx(loaded, tmp_path).sites] == [
            ("linear", "layer.weight", "int8:g32:scale=fp16")
        ]
    else:
        with pytest.raises(qpass.QpassError, match="nearest that works"):
            export_onnx(loaded, tmp_path)
    with pytest.raises(qpass.QpassError, match="computes in"):
        export_onnx(program, tmp_path, "ort-cuda", "int8")


@pytest.mark.parametrize("wrong", [False, True], ids=["exported", "refused"])
def test_the_model_is_as_it_was(wrong: bool, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    own = model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    before = {n: (id(m), dict(m._parameters), dict(m._buffers), set(m.__dict__)) for n, m in model.named_modules()}
    values = {n: t.clone() for n, t in model.state_dict().items()}
    if wrong:
        with pytest.raises(qpass.QpassError):
            export_onnx(model, tmp_path, recipe="int8:g16", inputs={"nothing": torch.zeros(2, 2)})
    else:
        export_onnx(model, tmp_path, "ort-cuda", "int8:g16")
    after = {n: (id(m), dict(m._parameters), dict(m._buffers), set(m.__dict__)) for n, m in model.named_modules()}
    assert after == before
    assert model.forward is own
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())


def test_calibrated_activations_become_constant_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 96)
    model = qpass.quantize(one_linear(), "int8:smooth@int8:static", inputs=x, calibration=[x, x * 0.5], inner="eager")
    exported = export_onnx(model, tmp_path, inputs=x)
    graph = onnx.load(exported.path).graph
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    constants = {i.name for i in graph.initializer}
    assert len(quantizers) == 1
    assert all(n.input[1] in constants for n in quantizers), "found when the graph is made"
    with torch.no_grad():
        expected = model(x).numpy()
    (found,) = load(tmp_path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    static = export_onnx(model, tmp_path / "trt", "tensorrt", inputs=x)
    assert [str(c) for c in verify(static) if c.passed is False] == []


class TestLoad:
    def test_the_provider_that_is_asked_for_is_the_one_that_runs(self, llama: Path) -> None:
        assert load(llama.parent).get_providers()[0] == "CPUExecutionProvider"

    def test_a_missing_provider_is_an_error(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(qpass.QpassError, match="has no CUDAExecutionProvider"):
            load(llama, provider="CUDAExecutionProvider")
        export_onnx(one_linear(), tmp_path, "ort-cuda", "int8", inputs=torch.randn(2, 3, 96))
        with pytest.raises(qpass.QpassError, match="made for ort-cuda"):
            load(tmp_path)

    def test_options_are_applied(self, llama: Path, tmp_path: Path) -> None:
        for f in llama.parent.iterdir():
            (tmp_path / f.name).write_bytes(f.read_bytes())
        content = json.loads((tmp_path / SESSION).read_text())
        content["options"]["session.qdq_matmulnbits_accuracy_level"] = "1"
        (tmp_path / SESSION).write_text(json.dumps(content))
        ids = torch.randint(3, 90, (1, 8))
        (_, exact), *_ = decode(load(llama, exact=True), ids, 8)
        (_, told), *_ = decode(load(tmp_path), ids, 8)
        (_, plain), *_ = decode(load(llama), ids, 8)
        np.testing.assert_array_equal(told, exact)
        assert np.abs(plain - exact).max() > 0

    def test_a_folder_of_another_origin(self, tmp_path: Path) -> None:
        with pytest.raises(qpass.QpassError, match="export_onnx has written"):
            load(tmp_path)


class TestVerify:
    def test_all_checks_of_a_sound_file_pass(self, tmp_path: Path) -> None:
        checks = verify(export_onnx(build("LlamaForCausalLM"), tmp_path, recipe="int8:g16"))
        assert [c.name for c in checks] == [
            "onnx.checker", "rules of ort-cpu", "fused products", "onnxruntime, float products", "onnxruntime, int8 products",
            "OpenVINO", "ReferenceEvaluator",
        ]  # fmt: skip
        assert [str(c) for c in checks if c.passed is not True] == [], "two runtimes and the specification"

    def test_one_wrong_scale_is_found(self, tmp_path: Path) -> None:
        exported = export_onnx(build("LlamaForCausalLM"), tmp_path, recipe="int8:g16")
        model = onnx.load(exported.path)
        scale = next(i for i in model.graph.initializer if i.name == "model.layers.1.self_attn.o_proj.weight.scale")
        array = np.frombuffer(scale.raw_data, np.float32).copy()
        array[: len(array) // 2] *= 1.5
        scale.raw_data = array.tobytes()
        onnx.save(model, exported.path)
        failed = {c.name for c in verify(exported) if c.passed is False}
        assert {"onnxruntime, float products", "OpenVINO", "ReferenceEvaluator"} <= failed

    def test_numbers_that_are_none_do_not_pass(self, tmp_path: Path) -> None:
        exported = export_onnx(build("LlamaForCausalLM"), tmp_path, recipe="int8:g16")
        model = onnx.load(exported.path)
        scale = next(i for i in model.graph.initializer if i.name == "model.layers.1.self_attn.o_proj.weight.scale")
        scale.raw_data = np.full(len(scale.raw_data) // 4, np.nan, np.float32).tobytes()
        onnx.save(model, exported.path)
        assert "onnxruntime, float products" in {c.name for c in verify(exported) if c.passed is False}

    def test_a_module_that_keeps_its_cache(self, tmp_path: Path) -> None:
        inputs = (torch.zeros(1, 3, dtype=torch.long), torch.arange(3))
        recipe = qpass.Recipe.uniform("int8", kv="int8")
        checks = verify(export_onnx(Keeper(True).eval(), tmp_path, recipe=recipe, inputs=inputs))
        assert [str(c) for c in checks if c.passed is False] == []
        assert {c.name for c in checks if c.passed} >= {"onnxruntime, float products", "ReferenceEvaluator"}

    def test_without_the_provider_the_rules_are_what_is_checked(self, tmp_path: Path) -> None:
        exported = export_onnx(one_linear(), tmp_path, "ort-cuda", "int8", inputs=torch.randn(2, 3, 96))
        checks = verify(exported)
        assert [c.passed for c in checks] == [True, True, None]
        assert "rule-checked only" in str(exported)


@pytest.mark.long
def test_peak_memory_of_a_large_export_is_below_1_3_times_the_file(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, resource, torch, qpass\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from qpass_export import export_onnx\n"
        "sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=6, num_attention_heads=16, vocab_size=32000)\n"
        "config = LlamaConfig(**sizes)\n"
        "small = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)\n"
        f"export_onnx(LlamaForCausalLM(small).eval(), {str(tmp_path / 'small')!r}, recipe='int8')  # what torch.onnx imports\n"
        "model = qpass.quantize(LlamaForCausalLM(config).eval(), 'int8', inner='eager')\n"
        "from qpass.memory import return_freed_heap; return_freed_heap()\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = resident()\n"
        f"done = export_onnx(model, {str(tmp_path)!r})\n"
        "peak = [int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0]\n"
        "print(done.nbytes, before, peak)\n"
    )  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    written, before, peak = map(int, out.split()[-3:])
    assert written > 450e6
    assert peak - before < 0.3 * written, "the model itself is in memory once; the file adds less than .3 of it"

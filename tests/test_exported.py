"""qpass.quantize of an ExportedProgram: a program that runs, with the sites and logits of the compiled model."""

from __future__ import annotations

import io

import pytest
import torch

import qpass
from tests.models import INT8, dequantized_copy, logits_of, tokens
from tests.shapes import EVERY, build

TEN = ["llama", "gpt2", "bert", "flat", "bloom", "nanogpt", "parallel in one linear", "mixtral (3-D experts)",
       "deepseek v2 (latent attention, full queries)", "mamba (state space)"]  # fmt: skip


def export(family: str, dynamic: bool = False) -> tuple[torch.nn.Module, torch.export.ExportedProgram, dict[str, bool]]:
    model = build(family)
    kwargs = {"use_cache": False} if hasattr(model, "config") else {}
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=100)
    shapes = ({0: batch, 1: length}, *([None] * len(kwargs))) if dynamic else None
    return model, torch.export.export(model, (tokens(),), kwargs, dynamic_shapes=shapes, strict=False), kwargs


@pytest.mark.parametrize("family", TEN)
def test_sites_and_logits_are_those_of_the_compiled_model(family: str) -> None:
    model, program, kwargs = export(family)
    quantized = qpass.quantize(program, "int8")
    rows = {r.name: (r.kind, r.format) for r in qpass.report(quantized).sites}
    floats = {name for name, (_, spec) in rows.items() if spec is None}
    fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
    reference = dequantized_copy(model, lambda name: None if name in floats else INT8, EVERY[family].transposed)
    with torch.no_grad():
        ours, compiled = logits_of(quantized.module()(tokens(), **kwargs)), logits_of(fast(tokens(), **kwargs))
        theirs = logits_of(reference(tokens(), **kwargs))
    assert rows == {r.name: (r.kind, r.format) for r in qpass.report(fast).sites if r.kind != "kv"}
    torch.testing.assert_close(ours, compiled, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize("spec", ["int8", "int4:g16", "nf4:g16", "fp8", "nvfp4"])
def test_it_is_small_saved_and_loaded(spec: str) -> None:
    _, program, kwargs = export("qwen3")
    quantized = qpass.quantize(program, spec)
    report = qpass.report(quantized)
    stored = sum(t.nbytes for t in quantized.state_dict.values())
    assert (
        stored
        == report.resident_float + report.resident_quantized
        < 0.4 * sum(t.nbytes for t in program.state_dict.values())
    )
    file = io.BytesIO()
    torch.export.save(quantized, file)
    file.seek(0)
    loaded = torch.export.load(file)
    with torch.no_grad():
        expected, found = (logits_of(p.module()(tokens(), **kwargs)) for p in (quantized, loaded))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("family", ["nanogpt", "experts as modules", "llama", "mixtral (3-D experts)"])
def test_dynamic_shapes_stay_dynamic(family: str) -> None:
    if family in ("llama", "mixtral (3-D experts)") and torch.__version__ < "2.12":
        pytest.skip("this torch.export makes the length of transformers' models a constant")
    _, program, kwargs = export(family, dynamic=True)
    plain, quantized = program.module(), qpass.quantize(program, "fp32").module()
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 17), (5, 4)):
            ids = tokens(batch, length)
            ours, theirs = logits_of(quantized(ids, **kwargs)), logits_of(plain(ids, **kwargs))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_given_program_is_unchanged() -> None:
    _, program, _ = export("llama")
    before, state = str(program.graph), {k: v.clone() for k, v in program.state_dict.items()}
    quantized = qpass.quantize(program, "int4:g16")
    assert str(program.graph) == before
    assert all(torch.equal(v, program.state_dict[k]) for k, v in state.items())
    removed = qpass.diff(quantized).graphs[0]
    assert removed.count("removed") > 0
    assert removed.count("added") > 0


def test_bad_input_is_named() -> None:
    _, program, _ = export("llama")
    with pytest.raises(qpass.QpassError, match=r"override 'nowhere\*'"):
        qpass.quantize(program, qpass.Recipe(ffn="int8", overrides=(("nowhere*", "int4"),)))
    program.state_dict["model.norm.weight"].data.fill_(1)
    program.state_dict["lm_head.weight"].data[0, 0] = float("nan")
    with pytest.raises(qpass.QpassError, match=r"lm_head\.weight: the weight holds NaN"):
        qpass.quantize(program, "int8")

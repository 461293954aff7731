"""qpass.quantize(..., calibration=batches): each weight is quantized on what reaches it through the quantized ones before it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass import programs, replay
from qpass.calibration import batches_of
from qpass.numerics import dequantize
from qpass.observers import InputStats
from qpass.spec import parse_spec
from qpass.weights import quantize_weight
from tests.models import VOCAB, build, hf, tokens

SPEC = "int4:g16:gptq"


class Two(nn.Module):
    """A table and a feed-forward pair around a residual add."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        return x + self.down(F.gelu(self.up(x)))


def calibrated(model: nn.Module, recipe: Any = SPEC, batches: Any = None, **options: Any) -> nn.Module:
    batches = [tokens(batch=4, length=12)] if batches is None else batches
    return qpass.quantize(model.eval(), recipe, calibration=batches, inner="eager", **options)


def stored(weight: Any) -> list[Tensor]:
    return [p for p in weight.quantized.all_parts if p is not None]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(stored(a), stored(b), strict=True))


def test_weights_of_several_formats_share_what_their_input_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v read one input: its products are summed once, and serve as if each had its own."""
    mixed = qpass.Recipe.uniform(SPEC, overrides={"*v_proj*": "int5:g16:asym:gptq", "*k_proj*": "int6:g16:search"})
    collect, calls = replay._collect, []
    monkeypatch.setattr(replay, "_collect", lambda *a: calls.append(a) or collect(*a))
    model = calibrated(build("llama"), mixed)
    layers = model.config.num_hidden_layers
    assert len(calls) == 4 * layers + 1
    monkeypatch.setattr(replay.Place, "inputs", property(lambda place: frozenset([(id(place), None)])))
    apart = calibrated(build("llama"), mixed)
    assert len(calls) == (4 * layers + 1) + (6 * layers + 1)
    for (name, a), (_, b) in zip(model.named_parameters(), apart.named_parameters(), strict=True):
        assert not isinstance(a, qpass.QTensor) or same(a, b), name


@torch.no_grad()
def test_each_weight_sees_what_comes_through_those_before_it() -> None:
    model = Two()
    ids = tokens(batch=6, length=20)
    table, up, down = model.table.weight.clone(), model.up.weight.clone(), model.down.weight.clone()
    quantized = calibrated(model, batches=list(ids.split(2)))
    spec = parse_spec(SPEC)

    def gptq(weight: Tensor, x: Tensor) -> Any:
        stats = InputStats.empty(x.shape[-1])
        for part in x.split(2):
            stats.add(part)
        return quantize_weight(weight, spec, stats=stats)

    x = F.embedding(ids, table)
    first = gptq(up, x)
    second = gptq(down, F.gelu(F.linear(x, dequantize(first, spec, 32), model.up.bias)))
    of_floats = gptq(down, F.gelu(F.linear(x, up, model.up.bias)))
    assert all(torch.equal(a, b) for a, b in zip(stored(quantized.up.weight), first.parts, strict=False))
    assert torch.equal(quantized.down.weight.quantized.data, second.data)
    assert not torch.equal(second.data, of_floats.data)


@torch.no_grad()
def test_it_loses_less_than_rounding_to_nearest() -> None:
    """On other tokens than those of the calibration; q, k, v and gate, up share an input."""
    reference, ids = build("llama"), tokens(batch=8, length=32)
    other = ids.flip(0, 1)
    losses = {}
    for recipe in ("int3:g32", "int3:g32:gptq", "int3:g32:search:gptq"):
        model = build("llama")
        qpass.quantize(model, recipe, calibration=list(ids.split(2)) if "gptq" in recipe else None, inner="eager")
        with qpass.set_compute("float"):
            losses[recipe] = float((model(other).logits - reference(other).logits).square().mean())
    assert losses["int3:g32:gptq"] < 0.8 * losses["int3:g32"]
    assert losses["int3:g32:search:gptq"] < 0.8 * losses["int3:g32"]


def test_padding_does_not_count() -> None:
    ids = tokens(batch=3, length=10)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 10, dtype=torch.long)], 1)
    plain = calibrated(Two(), batches=[ids])
    masked = calibrated(
        Two(), batches=[{"ids": padded, "attention_mask": mask}], inputs={"ids": padded, "attention_mask": mask}
    )
    counted = calibrated(Two(), batches=[padded])
    assert same(plain.up.weight, masked.up.weight)
    assert same(plain.down.weight, masked.down.weight)
    assert not same(plain.up.weight, counted.up.weight)


def test_batches_of_any_length_are_one_set() -> None:
    ids = tokens(batch=1, length=60)
    whole = calibrated(Two(), batches=[ids])
    pieces = calibrated(Two(), batches=[ids[:, :7], ids[:, 7:30], ids[:, 30:]])
    share = (whole.down.weight.quantized.data == pieces.down.weight.quantized.data).float().mean()
    assert float(share) > 0.99, "only the order of a sum differs"


@pytest.mark.parametrize("name", ["tied", "conv1d", "experts", "biased"])
def test_every_kind_of_linear(name: str) -> None:
    make = {
        "tied": lambda: hf("LlamaForCausalLM", tie_word_embeddings=True, num_key_value_heads=2),
        "conv1d": lambda: hf("GPT2LMHeadModel", n_embd=64, n_layer=1, n_head=4),
        "experts": lambda: hf("MixtralForCausalLM", num_local_experts=4, num_key_value_heads=2),
        "biased": lambda: hf("Qwen2ForCausalLM", num_key_value_heads=2),
    }[name]
    ids = tokens(batch=4, length=24)
    reference, model, plain = make().eval(), make().eval(), make().eval()
    plain.load_state_dict(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    calibrated(model, "int3:g16:gptq", [ids])
    qpass.quantize(plain, "int3:g16", inner="eager")
    with torch.no_grad(), qpass.set_compute("float"):
        wanted = reference(ids).logits
        losses = [float((m(ids).logits - wanted).square().mean()) for m in (model, plain)]
    if name != "tied":  # the rows of that table are looked up too, which the inputs of the projection say nothing of
        assert losses[0] < losses[1]
    sites = [s for s in qpass.report(model).sites if s.format]
    assert {s.format for s in sites if s.kind != "embedding"} == {"int3:g16:gptq"}, "the table of a tied projection too"
    assert {s.format for s in sites if s.kind == "embedding"} <= {"int3:g16"}, (
        "a table multiplies nothing: no input, no data"
    )


@pytest.mark.parametrize(
    "recipe", [SPEC, "int8:smooth@int8:static", qpass.Recipe.uniform("int4:g32:asym:gptq", bits=5.5)], ids=str
)
def test_an_exported_program_is_calibrated_as_the_module_is(recipe: Any) -> None:
    program = torch.export.export(
        Two().eval(), (tokens(),), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    )
    batches = [tokens(2, 12, seed) for seed in range(4)]
    before = {name: value.clone() for name, value in program.state_dict.items()}
    found = qpass.quantize(program, recipe, calibration=batches)
    model = qpass.quantize(copied(program), recipe, calibration=batches, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(found.module()(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    rows, expected = ({(r.name, r.format) for r in qpass.report(x).sites} for x in (found, model))
    assert rows == expected
    assert all(torch.equal(before[name], value) for name, value in program.state_dict.items())


def copied(program: torch.export.ExportedProgram) -> torch.nn.Module:
    model = Two().eval()
    model.load_state_dict(program.state_dict)
    return model


class Nested(Two):
    def forward(self, d: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(d["x"]) + 100 * self.table(d["y"])


def test_the_arguments_of_an_exported_program_go_by_name() -> None:
    x, y = tokens(), tokens(seed=1)
    program = torch.export.export(Nested().eval(), ({"x": x, "y": y},))
    found = [
        qpass.quantize(program, "int8@int8:static", calibration=[{"d": d}]).state_dict
        for d in ({"x": x, "y": y}, {"y": y, "x": x})
    ]
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    with pytest.raises(qpass.QpassError, match="d is to be a mapping of x, y"):
        qpass.quantize(program, SPEC, calibration=[{"d": {"x": x}}])


@pytest.mark.parametrize(("batches", "says"), [
    ([], "no batches"), ([("a", "b")], "a batch is a tuple"), ([tokens().float()], "exported for torch.int64"),
    ([tokens(3, 5)], "was exported for"), ([{"wrong": tokens()}], "takes no 'wrong'"),
], ids=["none", "tuple", "type", "shape", "name"])  # fmt: skip
def test_what_does_not_fit_an_exported_program_is_refused(batches: Any, says: str) -> None:
    program = torch.export.export(Two().eval(), (tokens(),))
    with pytest.raises(qpass.QpassError, match=says):
        qpass.quantize(program, SPEC, calibration=batches)
    with pytest.raises(qpass.QpassError, match="gptq needs data"):
        qpass.quantize(program, SPEC)


class Breaks(Two):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(x)))
        torch._dynamo.graph_break()
        return x + self.down(F.gelu(self.up(x)))


def test_a_model_with_graph_breaks() -> None:
    model = calibrated(Breaks())
    assert str(model.up.weight.spec) == SPEC
    assert any(note.startswith("calibrated in pieces") for note in qpass.report(model).notes)
    assert not any(note.startswith("calibrated in pieces") for note in qpass.report(calibrated(Two())).notes)
    with torch.no_grad():
        model(tokens())


def test_float_weights_are_freed() -> None:
    model = build("llama")
    weights = [weakref.ref(p) for n, p in model.named_parameters() if "proj" in n]
    calibrated(model)
    gc.collect()
    assert not any(w() is not None for w in weights)


def test_calibrating_leaves_the_config_as_it_was() -> None:
    model = build("llama")
    before = model.config.use_cache
    calibrated(model)
    assert model.config.use_cache is before


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no batches"),
        (["a text"], "a batch is a str"),
        (None, "gptq needs data: .*calibration=batches"),
    ],
)
def test_bad_data_is_refused(batches: Any, says: str) -> None:
    model = Two().eval()
    with pytest.raises(qpass.QpassError, match=says):
        qpass.quantize(model, SPEC, calibration=batches, inner="eager")
    assert not any(isinstance(p, qpass.QTensor) for p in model.parameters())


def test_an_input_with_nan_is_named() -> None:
    class Bad(Two):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.table(ids) / (ids.shape[1] != 9)
            return x + self.down(F.gelu(self.up(x)))

    with pytest.raises(qpass.QpassError, match=r"up\.weight: its input in calibration holds NaN"):
        calibrated(Bad(), batches=[tokens(length=9)])


def test_torch_compile_says_that_data_are_needed() -> None:
    fast = torch.compile(Two().eval(), backend=qpass.QPass(SPEC, inner="eager"))
    with pytest.raises(qpass.QpassError, match="gptq needs data"), torch.no_grad():
        fast(tokens())


class Variants(Two):
    """What a forward may do around its linears."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.extra = how, nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor, more: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        if self.how == "turned early":
            up, down = self.up.weight.t(), self.down.weight.t()
            return x + F.gelu(x @ up) @ down
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return x + self.down(F.gelu(self.up(x)))
        if self.how == "counts":
            self.calls.add_(1)
        if self.how == "more" and more is not None:
            x = x + more * self.extra(x)
        h = F.gelu(self.up(x))
        if self.how == "zeroed":
            h[..., :16] = 0
        if self.how == "breaks":
            torch._dynamo.graph_break()
            x += self.extra(x)
        if self.how == "twice":
            h = h + F.gelu(self.up(self.down(h)))
        return x + self.down(h)


@pytest.mark.parametrize("how", ["turned early", "autocast", "counts", "zeroed", "breaks", "twice"])
def test_whatever_stands_around_the_linears(how: str) -> None:
    model = Variants(how)
    calibrated(model, batches=[tokens(batch=2, length=9), tokens(batch=2, length=9).flip(1)])
    assert {str(m.weight.spec) for m in (model.up, model.down)} == {SPEC}
    assert not torch.is_autocast_enabled("cpu")
    assert float(model.calls) == 0


@torch.no_grad()
def test_the_input_is_taken_as_the_linear_reads_it() -> None:
    """Not as it was before something was written into it; nor, behind a graph break, as it is after."""
    model, ids = Variants("zeroed"), tokens(batch=4, length=12)
    table, up = model.table.weight.clone(), model.up.weight.clone()
    down = model.down.weight.clone()
    calibrated(model, batches=[ids])
    spec = parse_spec(SPEC)

    def gptq(weight: Tensor, x: Tensor) -> Any:
        stats = InputStats.empty(x.shape[-1])
        stats.add(x)
        return quantize_weight(weight, spec, stats=stats)

    x = F.embedding(ids, table)
    h = F.gelu(F.linear(x, dequantize(gptq(up, x), spec, 32), model.up.bias))
    h[..., :16] = 0
    assert torch.equal(model.down.weight.quantized.data, gptq(down, h).data)
    broken = Variants("breaks")
    table, extra = broken.table.weight.clone(), broken.extra.weight.clone()
    calibrated(broken, batches=[ids])
    assert torch.equal(broken.extra.weight.quantized.data, gptq(extra, F.embedding(ids, table)).data)


@pytest.mark.parametrize("how", ["", "zeroed", "autocast", "twice"])
def test_a_small_budget_computes_again_and_gives_the_same(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(tokens(batch=6, length=12).split(2))
    models = []
    for budget in (replay.BUDGET, 0):
        monkeypatch.setattr(replay, "BUDGET", budget)
        models.append(calibrated(Variants(how), batches=batches))
    assert same(models[0].up.weight, models[1].up.weight)
    assert same(models[0].down.weight, models[1].down.weight)


def test_a_small_budget_holds_the_residual_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of several blocks no run holds the inside of a feed-forward network, nor begins again at its start."""
    goes: list[tuple[int, int]] = []  # (where a run goes back to, from where)
    back = programs.Run.back

    def watched(run: Any) -> None:
        before = run.at
        back(run)
        goes.append((run.at, before))

    monkeypatch.setattr(programs.Run, "back", watched)
    monkeypatch.setattr(replay, "BUDGET", 0)
    model = hf("LlamaForCausalLM", intermediate_size=256, num_hidden_layers=3, num_key_value_heads=2)
    calibrated(model, "int4:g16:gptq", [tokens(batch=4, length=12)])
    assert len(goes) == model.config.num_hidden_layers, "only before the second half of each feed-forward network"
    assert all(0 < to < at for to, at in goes)
    assert [to for to, _ in goes] == sorted({to for to, _ in goes})


def test_batches_of_two_kinds_of_calls() -> None:
    ids, more = tokens(batch=2, length=9), torch.ones(())
    model = calibrated(
        Variants("more"), batches=[{"ids": ids}, {"ids": ids, "more": more}], inputs={"ids": ids, "more": more}
    )
    assert str(model.extra.weight.spec) == SPEC


def test_a_weight_that_no_batch_uses_is_named_before_anything_is_quantized() -> None:
    ids, more = tokens(batch=2, length=9), torch.ones(())
    model = Variants("more").eval()
    with pytest.raises(qpass.QpassError, match=r"extra\.weight: no batch of the calibration uses it"):
        calibrated(model, batches=[{"ids": ids}], inputs={"ids": ids, "more": more})
    assert not any(isinstance(p, qpass.QTensor) for p in model.parameters())


def test_a_model_that_was_compiled_in_place_before() -> None:
    model = Two().eval()
    model.compile(backend="eager")
    calibrated(model)
    assert str(model.up.weight.spec) == SPEC


def test_batches_that_torch_does_not_capture_are_refused() -> None:
    class Named(Two):
        def forward(self, ids: Tensor, name: str = "") -> Tensor:
            return super().forward(ids) + len(name + "x")

    batches = [{"ids": tokens(), "name": str(i)} for i in range(12)]
    with pytest.raises(qpass.QpassError, match="was not captured: past its limit of recompilations"):
        qpass.quantize(Named().eval(), SPEC, calibration=batches, inner="eager")


# --- what data may be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ids", "array", "loader", "dicts"])
def test_data_in_every_form_are_the_same(how: str) -> None:
    ids = tokens(batch=8, length=12)
    forms: dict[str, Any] = {
        "ids": ids,
        "array": ids.numpy().astype("uint16"),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4),
        "dicts": [{"ids": part} for part in ids.split(4)],
    }
    assert same(
        calibrated(Two(), batches=forms[how]).down.weight, calibrated(Two(), batches=list(ids.split(4))).down.weight
    )


def test_text_files_are_read_with_the_tokenizer_of_the_model(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parent.parent / "examples" / "tinypy"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = list(batches_of(folder / "calibration.txt", model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = tokenizer((folder / "calibration.txt").read_text(), return_tensors="pt").input_ids[0]
    length = min(1024, model.config.max_position_embeddings)
    assert len(found) == 32
    assert torch.equal(found[0], whole[None, :length])
    assert {tuple(f.shape) for f in found} == {(1, length)}
    (tmp_path / "short.txt").write_text("x = 1\n")
    with pytest.raises(qpass.QpassError, match=r"short\.txt: no document of \d+ tokens"):
        batches_of(tmp_path / "short.txt", model)
    with pytest.raises(qpass.QpassError, match="is no file"):
        batches_of("nothing.txt", model)
    with pytest.raises(qpass.QpassError, match="no tokenizer beside the model"):
        batches_of(folder / "calibration.txt", Two())


def test_ids_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(qpass.QpassError, match=r"ids of shape \[96\].*give token ids \[windows, tokens\]"):
        calibrated(Two(), batches=tokens(batch=8, length=12).flatten())


def test_a_preset_makes_use_of_data() -> None:
    """Its formats are others where there is something to choose them by; the same through torch.compile."""
    ids = tokens(batch=8, length=24)
    model = calibrated(build("llama"), "int4", [ids])
    fast = torch.compile(build("llama"), backend=(backend := qpass.QPass("int4", inner="eager")))
    calibrate(backend, fast, [ids])
    with torch.no_grad():
        fast(ids)
    for compiled in (model, fast):
        formats = {s.format for s in qpass.report(compiled).sites if s.format and s.kind != "embedding"}
        assert all(f.endswith(":gptq") for f in formats)
        assert len(formats) > 1
    plain = qpass.quantize(build("llama"), "int4", inner="eager")
    assert not any("gptq" in str(s.format) for s in qpass.report(plain).sites)


# --- with backend.calibrate(): -----------------------------------------------------------------------------------------


class Masked(Two):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = super().forward(ids)
        return out if attention_mask is None else out * attention_mask[..., None]


def calibrate(backend: qpass.QPass, fast: Any, batches: list[Any]) -> None:
    with torch.no_grad(), backend.calibrate():
        for batch in batches:
            fast(**batch) if isinstance(batch, dict) else fast(batch)


def test_calls_inside_run_in_float_and_those_behind_it_quantized() -> None:
    """The weights are those of qpass.quantize on the same batches; the float ones stay in the model."""
    ids = tokens(batch=6, length=20)
    backend, model, plain = qpass.QPass(SPEC, inner="eager"), Two().eval(), Two().eval()
    fast = torch.compile(model, backend=backend)
    with torch.no_grad(), backend.calibrate():
        for batch in ids.split(2):
            assert torch.equal(fast(batch), plain(batch))
    stored_model = calibrated(Two(), batches=list(ids.split(2)))
    with torch.no_grad(), qpass.set_compute("float"):
        torch.testing.assert_close(fast(ids), stored_model(ids), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(fast(ids), plain(ids))
    assert not isinstance(model.up.weight, qpass.QTensor)
    assert {s.format for s in qpass.report(fast).sites} == {SPEC, "int4:g16"}


def test_observers_stand_in_the_graph_at_the_sites_of_the_plan() -> None:
    """One before each group of weights; what they saw belongs to the site, whichever graph it came through."""
    backend, model, ids = qpass.QPass("int8@int8:static", inner="eager"), build("llama"), tokens(batch=3, length=10)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad(), backend.calibrate():
        prefill = fast(ids, use_cache=True)
        fast(ids[:, :1], past_key_values=prefill.past_key_values, use_cache=True)
        recording = backend._recording
        assert recording is not None
        graphs, seen = list(recording.graphs), dict(recording.seen)
    assert len(graphs) > 1
    for graph in graphs:
        observers = [n for n in graph.graph.nodes if n.op == "call_module"]
        assert {n.meta["label"] for n in observers} == {s.site for s in seen.values()}
    assert {s.tokens for s in seen.values()} == {33}
    with torch.no_grad():
        fast(ids)
    by_name = {r.name: r.input for r in qpass.report(fast).sites}
    assert all(by_name[s.site].tokens == s.tokens for s in seen.values())  # type: ignore[union-attr]


def test_nan_in_a_call_is_named_before_any_weight_is_touched() -> None:
    backend, model, ids = qpass.QPass(SPEC, inner="eager"), Two().eval(), tokens(batch=2, length=12) % 5
    with torch.no_grad():
        model.table.weight[5] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    fast = torch.compile(model, backend=backend)
    with pytest.raises(qpass.QpassError, match=r"up\.weight: its input in calibration call 1 holds NaN"):
        calibrate(backend, fast, [ids, torch.full_like(ids, 5)])
    assert all(torch.equal(before[name].nan_to_num(), p.nan_to_num()) for name, p in model.named_parameters())
    model.table.weight.data[5] = 0
    calibrate(backend, fast, [ids])


def test_more_than_the_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpass.calibration.BUDGET", 5000)
    with pytest.raises(qpass.QpassError, match=r"the inputs of 5 calls take .* give fewer or shorter batches"):
        calibrated(Two(), batches=[tokens(batch=4, length=32)] * 8)


def test_what_was_captured_before_is_captured_anew() -> None:
    backend = qpass.QPass("int3:g16:search", inner="eager")
    fast, ids = torch.compile(Two().eval(), backend=backend), tokens(batch=2, length=12)
    with torch.no_grad():
        before = fast(ids)
    calibrate(backend, fast, [ids])
    with torch.no_grad():
        assert not torch.equal(fast(ids), before), "with data, search weighs by them"


def test_the_mask_of_a_call_counts() -> None:
    ids = tokens(batch=3, length=10)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 10, dtype=torch.long)], 1)
    outs = []
    for batch in ({"ids": ids}, {"ids": padded, "attention_mask": mask}, {"ids": padded}):
        backend = qpass.QPass(SPEC, inner="eager")
        fast = torch.compile(Masked().eval(), backend=backend)
        calibrate(backend, fast, [batch])
        with torch.no_grad():
            outs.append(fast(ids))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_the_mask_may_have_another_name() -> None:
    ids, keep = tokens(batch=3, length=14), torch.ones(3, 14, dtype=torch.long)
    keep[:, :4] = 0

    class Kept(Masked):
        def forward(self, ids: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids, keep)

    for name, counted in (("keep", 30), ("attention_mask", 42)):
        backend = qpass.QPass(SPEC, inner="eager")
        fast = torch.compile(Kept().eval(), backend=backend)
        with torch.no_grad(), backend.calibrate(mask=name):
            fast(ids, keep)
        assert {seen.tokens for seen in backend.observed} == {counted}


def test_a_changed_weight_is_quantized_again() -> None:
    """What calibration chose is of the weight that it saw."""
    backend, model, ids = qpass.QPass("int8:g16:search", inner="eager"), Two().eval(), tokens(batch=2, length=12)
    fast = torch.compile(model, backend=backend)
    calibrate(backend, fast, [ids])
    with torch.no_grad():
        fast(ids)
        model.up.weight.mul_(0)
        model.up.bias.mul_(0)
        torch.testing.assert_close(fast(ids), model.table.weight[ids] + model.down.bias, rtol=0.02, atol=0.02)


def test_a_calibration_without_calls_or_inside_of_another_is_refused() -> None:
    backend = qpass.QPass(SPEC, inner="eager")
    with pytest.raises(qpass.QpassError, match="no call of the compiled model"), backend.calibrate():
        pass
    with pytest.raises(qpass.QpassError, match="inside of calibrate"), backend.calibrate(), backend.calibrate():
        pass
    fast = torch.compile(calibrated(Two()).forward, backend=backend)
    with pytest.raises(qpass.QpassError, match="quantized already"):
        calibrate(backend, fast, [tokens()])

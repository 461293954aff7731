"""One architecture through qpass: captured, every site, and the logits against the dequantized float model."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import qpass
from qpass.numerics import fake_quantize
from qpass.ops.cpu.build import REFERENCE, use_isa
from qpass.spec import parse_spec
from tests.zoo.configs import build, example_inputs, logits_of
from tests.zoo.oracle import expected_kind

#: int8 at every site.
RECIPE = qpass.Recipe(embedding="int8", qkv="int8", attn_out="int8", ffn="int8", vocab="int8", linear="int8", kv="int8")
CACHE_TOKENS = 64
#: A matrix with no more rows than this, and no kind by its name, may be left in float.
FEW = 32
#: Largest difference of the logits, relative to the largest logit.
TOLERANCE = 1e-3


@dataclass
class Outcome:
    """What became of one architecture. `graphs_alone`: graphs that torch.compile makes of the float model."""

    name: str
    stage: str = "build"
    graphs: int = 0
    graphs_alone: int = 0
    unused: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    cache: str = ""
    error: float = float("nan")
    kl: float = float("nan")
    disagreements: list[str] = field(default_factory=list)
    cause: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether kinds, logits and number of graphs are as they should be."""
        return not self.cause

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class FakeQuantizedCache(DynamicCache):
    """The reference for the cache: transformers' own, given K and V that went through a format and back.

    The tokens of a call see each other as they are.
    """

    def __init__(self, config: Any, k: str = "int8", v: str | None = None) -> None:
        super().__init__(config=config)
        self.specs = [parse_spec(k), parse_spec(v or k)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        stored = super().update(*(fake_quantize(x, s) for x, s in zip(new, self.specs, strict=True)), *args, **kwargs)
        keys, values = (torch.cat([s[:, :, : -x.shape[2]], x], 2) for s, x in zip(stored, new, strict=True))
        return keys, values


def check(name: str, inner: str = "aot_eager") -> Outcome:
    """Build, compile and compare one architecture; never raises for what the architecture does."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        # A last bit that kernels sum otherwise can round a key to the next code of the cache, and a router to another expert.
        with use_isa(REFERENCE):
            _run(outcome, inner)
        outcome.cause = _cause(outcome)
    except Exception as error:
        text = " ".join(str(error).split())
        outcome.cause = f"{outcome.stage}: {type(error).__name__}: {text[:300]}"
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def check_quietly(name: str, inner: str) -> Outcome:
    """`check` in a worker process: one thread, no warnings, nothing left from the architecture before."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    return check(name, inner)


def _run(outcome: Outcome, inner: str) -> None:
    model = build(outcome.name)
    inputs = example_inputs(model)
    outcome.stage = "float run"
    with torch.no_grad():
        model(**inputs, **_cache(model, outcome, qpass_cache=False))
    outcome.stage = "float capture"
    outcome.graphs_alone = _graphs_alone(model, inputs, outcome)
    outcome.stage = "capture"
    torch._dynamo.reset()
    backend = qpass.QPass(RECIPE, inner=inner)
    out = _twice(torch.compile(model, backend=backend), inputs, _cache(model, outcome))
    outcome.graphs = len(backend.captures)
    outcome.stage = "report"
    _read_report(outcome, model)
    outcome.stage = "reference"
    expected = _twice(_reference(model, backend), inputs, _cache(model, outcome, qpass_cache=False))
    ours, theirs = logits_of(out).double(), logits_of(expected).double()
    outcome.error = _relative_error(ours, theirs)
    if outcome.error > TOLERANCE and outcome.cache == "int8":
        # A length in a tensor breaks the graph of some (positions cut by it), and torch runs the piece around it eagerly, in
        # float. qpass.quantize leaves no float weights that it could use.
        outcome.stage = "quantize"
        torch._dynamo.reset()
        stored = qpass.quantize(copy.deepcopy(model), RECIPE, inputs=inputs, inner=inner)
        ours = logits_of(_twice(stored, inputs, _cache(model, outcome))).double()
        outcome.error = _relative_error(ours, theirs)
    unquantized = logits_of(_twice(model, inputs, _cache(model, outcome, qpass_cache=False))).double()
    log_p, log_q = unquantized.log_softmax(-1), ours.log_softmax(-1)
    outcome.kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _cache(model: Any, outcome: Outcome, qpass_cache: bool = True) -> dict[str, Any]:
    """A quantized cache where one fits, else none; the reference gets transformers' cache with rounded K and V."""
    if not type(model).__name__.endswith("ForCausalLM") or not getattr(model.config, "use_cache", True):
        return {}
    if outcome.cache == "":
        try:
            qpass.KVCache(model.config, CACHE_TOKENS)
            _try_cache(model, DynamicCache(config=model.config))
            _try_cache(model, qpass.KVCache(model.config, CACHE_TOKENS))
            outcome.cache = "int8"
        except Exception as error:
            outcome.cache = " ".join(str(error).split())[:200]
    if outcome.cache != "int8":
        return {"use_cache": False}
    cache = (
        qpass.KVCache(model.config, CACHE_TOKENS, "int8") if qpass_cache else FakeQuantizedCache(config=model.config)
    )
    return {"past_key_values": cache, "use_cache": True}


def _try_cache(model: Any, cache: Any) -> None:
    """Raises if the class does not take a cache object, or none of static shape."""
    with torch.no_grad():
        model(**example_inputs(model), past_key_values=cache, use_cache=True)
    if not cache.get_seq_length():
        raise ValueError("the model uses no cache")


def _graphs_alone(model: nn.Module, inputs: dict[str, Any], outcome: Outcome) -> int:
    count = 0

    def counting(gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        nonlocal count
        count += 1
        return gm.forward

    torch._dynamo.reset()
    _twice(torch.compile(model, backend=counting), inputs, _cache(model, outcome))
    return count


def _twice(model: Any, inputs: dict[str, Any], cache: dict[str, Any]) -> Any:
    """One call; with a cache another behind it, which reads what the first one stored."""
    with torch.no_grad():
        out = model(**inputs, **cache)
        return model(**inputs, **cache) if "past_key_values" in cache else out


def _read_report(outcome: Outcome, model: nn.Module) -> None:
    report = qpass.report(model)
    rows = [row for row in report.sites if row.kind != "kv"]
    outcome.sites = dict(Counter(row.kind for row in report.sites if not row.skipped))
    outcome.skipped = [(row.kind, row.name, row.skipped) for row in report.sites if row.skipped]
    unused = [r.name for r in rows if r.skipped and "did not use it" in r.skipped and "eagerly" not in r.skipped]
    outcome.unused = len(unused)
    if unused and not _is_unused(model, unused, outcome):
        outcome.disagreements.append(f"{unused[0]} and others are used, the report says they are not")
    for row in rows:
        if row.name in unused or (row.skipped and any(reason in row.skipped for reason in _RIGHT_REASONS)):
            continue
        if outcome.graphs_alone > 1 and row.skipped and "runs it eagerly" in row.skipped:
            continue  # the model breaks by itself; the report names what no graph holds
        found = "float" if row.skipped else row.kind.split("+")[0]
        wanted = expected_kind(row.name, outcome.name)
        allowed = {"float" if kind == "router" else kind for kind in wanted.split("|")}
        if "linear" in allowed and min(model.get_parameter(row.name).shape) <= FEW:
            allowed.add("float")  # a few gates or coefficients
        if found not in allowed and wanted not in row.kind.split("+"):
            outcome.disagreements.append(f"{row.name}: {row.kind}, by its name {wanted}; {row.skipped or 'quantized'}")


#: Reasons that are right whatever the Parameter is called.
_RIGHT_REASONS = ("a table read by slices or constants",)


def _is_unused(model: nn.Module, names: list[str], outcome: Outcome) -> bool:
    """Whether the float model gives finite logits with these Parameters full of NaN."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            broken.get_parameter(name).fill_(float("nan"))
        out = broken(**example_inputs(model), **_cache(model, outcome, qpass_cache=False))
    return bool(logits_of(out).isfinite().all())


def _reference(model: nn.Module, backend: qpass.QPass) -> nn.Module:
    """The float model with each quantized weight rounded in place, along the dimension that its module sums over."""
    reference = copy.deepcopy(model)
    conv1d = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    turned = {
        f"{n}.{leaf}"
        for n, m in model.named_modules()
        for leaf in ("gate_up_proj", "down_proj", "up_proj")
        if getattr(m, "is_transposed", False) or type(m).__name__ == "Llama4TextExperts"
    } | {n for n, _ in model.named_parameters() if n.endswith("rel_logits_proj.proj")}
    with torch.no_grad():
        for (name, target), source in zip(reference.named_parameters(), model.parameters(), strict=True):
            decision = backend.decisions.of(source)
            if decision is None or decision.spec is None:
                continue
            rows = source.transpose(-1, -2) if name in conv1d | turned else source
            rounded = fake_quantize(rows.contiguous(), decision.spec)
            target.copy_(rounded.transpose(-1, -2) if rows is not source else rounded)
    return reference


def _cause(outcome: Outcome) -> str:
    """Why the architecture does not pass; "" if it does."""
    if outcome.disagreements:
        return f"kinds: {outcome.disagreements[0]} ({len(outcome.disagreements)})"
    if not outcome.error <= TOLERANCE:
        return f"logits: relative error {outcome.error:.2e}"
    if outcome.graphs > outcome.graphs_alone:
        return f"{outcome.graphs} graphs, {outcome.graphs_alone} without qpass"
    return ""

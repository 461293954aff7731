"""Whether an exported file is what it should be: by the specification, by onnxruntime, by OpenVINO, against the torch graph."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import qpass
from qpass_export.export import Exported
from qpass_export.lowering.attention import written_out
from qpass_export.lowering.build import Build
from qpass_export.rules import unfused, violations
from qpass_export.session import load
from qpass_export.targets import get_target

#: Largest difference of logits, over the largest logit, with float products: sums in another order.
TOLERANCE = 1e-3
#: The same where products round their inputs to int8: half a step of 127 for each of a model's linears, one after the other.
INT8_TOLERANCE = 0.15
#: OpenVINO computes in float32 and leaves activations as they are.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_PROMPT, _STEPS = 12, 32
_TYPES = {
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip
#: ReferenceEvaluator computes in numpy, operator by operator: above so many bytes of weights it is left out.
_SMALL = 16 << 20


@dataclass(frozen=True)
class Check:
    """One check: `passed` is None where it could not be made, and `detail` says why."""

    name: str
    passed: bool | None
    detail: str = ""

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "left out"}[self.passed]
        return f"{word:9}{self.name}{': ' + self.detail if self.detail else ''}"


def verify(exported: Exported) -> list[Check]:
    """All checks of a file that export_onnx has just written."""
    found = [_check("onnx.checker", lambda: _onnx_checker(exported.path))]
    wrong = violations(exported.path, exported.target)
    found.append(Check(f"rules of {exported.target}", not wrong, "; ".join(wrong[:3])))
    if exported.hardware != "runs on this machine":
        found.append(
            Check("onnxruntime", None, f"{exported.hardware}: this machine has no provider for {exported.target}")
        )
        return found
    if exported.target == "ort-cpu":
        left = unfused(exported.path)
        found.append(Check("fused products", not left, "; ".join(left[:3])))
    calls = Calls(exported)
    for name, make, bound in (
        ("onnxruntime, float products", lambda: runner(exported.path, exact=True), _bound(exported)),
        ("onnxruntime, int8 products", lambda: runner(exported.path), INT8_TOLERANCE),
        ("OpenVINO", lambda: openvino_runner(exported.path), _bound(exported)),
        ("ReferenceEvaluator", lambda: reference_runner(exported.path), _bound(exported)),
    ):
        found.append(_compare(name, make, calls, bound))
    return found


def _bound(exported: Exported) -> float:
    """Activations that the graph itself rounds may fall to the other side of a step."""
    rounded = any(s.format is not None and ("@" in s.format or s.kind == "kv") for s in exported.sites)
    return INT8_TOLERANCE if rounded else TOLERANCE


def _check(name: str, run: Callable[[], Any]) -> Check:
    try:
        run()
    except Exception as error:
        return Check(name, False, str(error).splitlines()[0])
    return Check(name, True)


def _onnx_checker(path: Path) -> None:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


# --- runtimes -----------------------------------------------------------------------------------------------------------

#: Inputs by name -> outputs by name.
Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class LeftOut(Exception):
    """A runtime that cannot be asked, and why."""


def runner(path: Path, exact: bool = False) -> Runner:
    """onnxruntime."""
    session = load(path, exact=exact)
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def openvino_runner(path: Path) -> Runner:
    """OpenVINO's CPU plugin. It is given attentions of grouped heads written out, for its Attention has none."""
    try:
        import openvino
    except ImportError:
        raise LeftOut("openvino is not installed") from None
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.onnx"
        ir.save(_written_out(ir.load(path)), plain, external_data="weights")
        try:
            compiled = openvino.compile_model(str(plain), "CPU", _EXACT)
        except RuntimeError as error:
            raise LeftOut(f"it does not take the file: {_told(error)}") from error

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return {o.any_name: value for o, value in compiled(feeds).items()}
        except (
            RuntimeError
        ) as error:  # it takes some files that it does not run: scales of a length that it does not know
            raise LeftOut(f"it does not run the file: {_told(error)}") from error

    return run


def _told(error: RuntimeError) -> str:
    """The line of OpenVINO's message that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "annot" in line or "Check" in line), lines[0])[:200]


def _written_out(model: ir.Model) -> ir.Model:
    """Every Attention of grouped heads as products and a softmax."""
    ShapeInferencePass()(model)
    for node in [n for n in model.graph if n.op_type == "Attention"]:
        q, key, value, mask = (*node.inputs, None)[:4]
        assert q is not None
        assert key is not None
        assert value is not None
        assert q.shape is not None
        assert key.shape is not None
        heads = int(q.shape[1]), int(key.shape[1])  # type: ignore[arg-type]
        if heads[0] != heads[1]:
            build = Build(model.graph, get_target("ort-cpu"))
            scale, causal = node.attributes["scale"].as_float(), bool(node.attributes["is_causal"].as_int())
            made = written_out(build, q, key, value, mask, heads, scale, 0.0, causal, None)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], build.nodes, node.outputs, [made])
    return model


def reference_runner(path: Path) -> Runner:
    """onnx's own evaluator, which knows the specification's operators only."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    own = sorted({n.op_type for n in model.graph.node if n.domain not in ("", "ai.onnx")})
    if own:
        raise LeftOut(f"{', '.join(own)}: onnxruntime's own operators")
    if sum(len(i.raw_data) for i in model.graph.initializer) > _SMALL:
        raise LeftOut("slow for so many weights")
    names = [o.name for o in model.graph.output]
    evaluator = ReferenceEvaluator(model)
    return lambda feeds: dict(zip(names, evaluator.run(None, feeds), strict=True))


# --- against the torch graph --------------------------------------------------------------------------------------------


class Calls:
    """A prompt and decode steps: inputs for the runtimes, each with the logits that the program gives in torch."""

    def __init__(self, exported: Exported) -> None:
        assert exported.program is not None
        self.program, self.names, self.example = exported.program, exported.inputs, exported.example
        self.has_cache = any(name.startswith("past_key_values.") for name in self.names)

    def compare(self, run: Runner) -> float:
        """The largest difference of the first output, over its largest value, over all calls. Each side keeps its own cache."""
        ours: dict[str, np.ndarray] = {}
        theirs: dict[str, np.ndarray] = {}
        worst = 0.0
        for feeds in self._feeds():
            if not ours:
                ours = theirs = {n: v for n, v in feeds.items() if n.startswith("past_key_values.")}
            expected = self._torch(feeds | theirs)
            found = run(feeds | ours)
            name = next(iter(expected))
            error = float(np.abs(found[name].astype(np.float64) - expected[name]).max() / np.abs(expected[name]).max())
            if not np.isfinite(error):
                return error
            worst = max(worst, error)
            ours, theirs = _kept(found), _kept(expected)
        return worst

    def _feeds(self) -> Iterator[dict[str, np.ndarray]]:
        values = [n.meta["val"] for n in _user_placeholders(self.program)]
        generator = np.random.default_rng(0)
        if not self.has_cache:
            yield {n: t.numpy() for n, t in zip(self.names, self.example, strict=True)}
            return
        logits = self.program.graph.output_node().all_input_nodes[0].meta["val"]
        for step in range(_STEPS + 1):
            before, new = (0, _PROMPT) if step == 0 else (_PROMPT + step - 1, 1)
            given = {
                "input_ids": generator.integers(0, int(logits.shape[-1]), (2, new)),
                "attention_mask": np.ones((2, before + new), np.int64),
                "position_ids": np.tile(np.arange(before, before + new), (2, 1)),
            }
            feeds = {n: given[n] for n in self.names if n in given}
            if step == 0:
                for name, value in zip(self.names, values, strict=True):
                    if name.startswith("past_key_values."):
                        shape = (2, int(value.shape[1]), 0, int(value.shape[3]))
                        feeds[name] = torch.empty(shape, dtype=value.dtype).numpy()
            yield feeds

    def _torch(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        leaves = [torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in self.names]
        args, kwargs = pytree.tree_unflatten(leaves, self.program.call_spec.in_spec)
        with torch.no_grad(), qpass.set_compute("float"):
            out = self.program.module(check_guards=False)(*args, **kwargs)
        flat = [t.numpy() for t in pytree.tree_leaves(out)]
        kept = [n.replace("past_key_values.", "present.") for n in self.names if n.startswith("past_key_values.")]
        names = [f"first_{i}" for i in range(len(flat) - len(kept))]
        return dict(zip([*names, *kept], flat, strict=True))


def _user_placeholders(program: ExportedProgram) -> list[torch.fx.Node]:
    users = set(program.graph_signature.user_inputs)
    return [n for n in program.graph.find_nodes(op="placeholder") if n.name in users]


def _kept(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n.replace("present.", "past_key_values."): v for n, v in outputs.items() if n.startswith("present.")}


def _compare(name: str, make: Callable[[], Runner], calls: Calls, bound: float) -> Check:
    try:
        run = make()

        def renamed(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            """The outputs that are no cache, in order, under the names that the torch side has."""
            out = run(feeds)
            plain = [v for n, v in out.items() if not n.startswith("present.")]
            return {f"first_{i}": v for i, v in enumerate(plain)} | {
                n: v for n, v in out.items() if n.startswith("present.")
            }

        worst = calls.compare(renamed)
    except LeftOut as reason:
        return Check(name, None, str(reason))
    except Exception as error:
        return Check(name, False, str(error).splitlines()[0][:300])
    return Check(name, worst <= bound, f"largest difference {worst:.1e} of the largest logit (allowed {bound:.0e})")

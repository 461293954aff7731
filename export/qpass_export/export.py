"""export_onnx: a model, an artifact or a program as an ONNX file that a runtime takes as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import qpass
from qpass.artifact.save import carry
from qpass.errors import QpassError
from qpass.exported import quantize_program
from qpass.graph.torch_private import original_module
from qpass.graph.vocabulary import op_name
from qpass.pretrained import load_pretrained
from qpass.qtensor import QTensor
from qpass.recipe import WEIGHT_KINDS, Recipe, of_single_tokens, resolve_recipe
from qpass.registry import FINISHED, captured
from qpass.spec import QuantSpec, parse_spec
from qpass_export.capture import Captured, capture
from qpass_export.genai import GENAI, why_not, write_genai
from qpass_export.lowering.graph import lower
from qpass_export.provenance import keep_provenance
from qpass_export.session import MODEL, write_session
from qpass_export.simplify import simplify
from qpass_export.state import lift_state
from qpass_export.targets import Target, get_target
from qpass_export.translate import translate, with_whole_attention

#: Weights of more bytes lie in a file of their own beside the graph; protobuf ends at 2 GB.
_INLINE = 64 << 20
#: Of tensors that were made and are not written yet.
_IN_FLIGHT = 1 << 20


@dataclass(frozen=True)
class ExportedSite:
    """One place of the model in the file. `wider`: bytes that its codes take beyond what the format needs, where ONNX has no type
    of so few bits; the values are the same."""

    kind: str
    name: str
    format: str | None
    reason: str | None = None
    wider: int = 0


@dataclass(frozen=True)
class Exported:
    """What was written. `hardware`: whether the target's provider is on this machine, so that the file can be run here.
    `genai`: why onnxruntime-genai cannot generate from the folder, None if it can. `program`: the torch graph that the file was
    made of, with the `inputs` of the file in its order; `example`: what it was traced on.
    """

    path: Path
    target: str
    sites: tuple[ExportedSite, ...]
    nbytes: int
    hardware: str
    genai: str | None = None
    inputs: tuple[str, ...] = ()
    program: ExportedProgram | None = field(default=None, repr=False, compare=False)
    example: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        sites = [asdict(s) for s in self.sites]
        return {
            "path": str(self.path),
            "target": self.target,
            "bytes": self.nbytes,
            "hardware": self.hardware,
            "genai": self.genai,
            "sites": sites,
        }

    def __str__(self) -> str:
        done = [s for s in self.sites if s.format is not None]
        counts = {k: sum(s.kind == k for s in done) for k in dict.fromkeys(s.kind for s in done)}
        lines = [
            f"{self.path}: {self.nbytes:,} bytes for {self.target} ({self.hardware})",
            "quantized: " + (", ".join(f"{n} {kind}" for kind, n in counts.items()) or "nothing"),
        ]
        if extra := sum(s.wider for s in done):
            formats = {
                s.format.partition(":")[0]: parse_spec(s.format).container_bits for s in done if s.wider and s.format
            }
            held = ", ".join(f"{name} in {bits} bits" for name, bits in sorted(formats.items()))
            lines.append(
                f"wider than its format: {held}, {extra:,} bytes more; the values are the same, and so is the KL"
            )
        lines.append(f"onnxruntime-genai: {'generates from the folder' if self.genai is None else 'no: ' + self.genai}")
        left: dict[tuple[str, str | None], list[str]] = {}
        for site in self.sites:
            if site.format is None:
                left.setdefault((site.kind, site.reason), []).append(site.name)
        for (kind, reason), names in left.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"float: {names[0]}{more} ({kind}): {reason}")
        return "\n".join(lines)


def export_onnx(
    model: nn.Module | ExportedProgram | str | Path,
    path: str | Path,
    target: str = "ort-cpu",
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None,
    inputs: Any = None,
    cache: Any = None,
) -> Exported:
    """Write `model` as ONNX for `target` ("ort-cpu", "ort-cuda" or "tensorrt"), with its session options beside it.

    `model`: one that qpass.quantize or qpass.load made, whose integers and scales are what is written; an artifact's folder; a
    quantized ExportedProgram; or a float model (or program) with the `recipe` that it is quantized by, round to nearest; without
    one it is written in float. `path`: of the file, or of its folder. `inputs`: what the model is called with, if it is no
    decoder of transformers: a tensor, tuple or dict; sizes of 2 and more are dynamic. `cache`: a qpass.KVCache whose formats the
    graph's cache gets, with the scales that its `calibrate` found if they are static; without it the recipe says.

    A decoder's graph has input_ids, attention_mask, position_ids and past_key_values.N.key / .value (of a quantized cache also
    .key_scale and so on) as inputs, logits and present.N... as outputs, for any batch, length and past.
    Raises `QpassError`, with nothing written, for a format that the target does not run.
    """
    goal, chosen = get_target(target), None if recipe is None else resolve_recipe(recipe)
    if chosen is not None:
        goal.check(_specs_of(chosen))
    file = _file(Path(path))
    if isinstance(model, str | Path):
        model = _open(Path(model))
    if isinstance(model, nn.Module):
        found, quantized = _of_module(original_module(model), chosen, goal, inputs, cache)
    elif isinstance(model, ExportedProgram):
        found, quantized = _of_program(model, chosen, goal)
    else:
        raise QpassError(f"export_onnx: takes a module, an ExportedProgram or a folder, got {type(model).__name__}")
    stored = _stored_in(quantized)
    goal.check(stored)
    sites = _sites(quantized, stored)
    goal.check((s.kind, s.name, parse_spec(s.format)) for s in sites if s.format is not None)
    traced = tuple(pytree.tree_leaves(quantized.example_inputs))
    found, prepared = lift_state(found, with_whole_attention(quantized))
    graph = translate(found, prepared, goal.opset_for(spec for _, _, spec in stored))
    lower(graph, goal, {s.name: s.kind for s in sites})
    simplify(graph, goal)
    name_sizes(graph, found)
    keep_provenance(graph)
    _describe(graph, goal, sites)
    described = model if isinstance(model, nn.Module) else None
    genai = why_not(graph.graph.inputs, found.config, goal)
    nbytes = _write(graph, file, goal, original_module(described) if genai is None else None)
    reference = prepared if found.state else quantized  # as it was before attention was read, if nothing was lifted
    example = (*traced, *found.state)
    names = tuple(str(value.name) for value in graph.graph.inputs)
    return Exported(file, goal.name, sites, nbytes, hardware_of(goal), genai, names, reference, example)


def hardware_of(target: Target) -> str:
    """Whether this machine has what the target is for."""
    try:
        import onnxruntime as ort

        here = target.provider in ort.get_available_providers()
    except ImportError:
        here = False
    return "runs on this machine" if here else "rule-checked only"


def _specs_of(recipe: Recipe) -> Iterable[tuple[str, str, QuantSpec]]:
    """(kind, name, spec) of what a recipe says of kinds."""
    for kind in WEIGHT_KINDS:
        if getattr(recipe, kind) is not None:
            yield kind, "the recipe", getattr(recipe, kind)
    for spec in recipe.kv_specs or ():
        yield "kv", "the recipe", of_single_tokens(spec)


def _open(folder: Path) -> nn.Module:
    """An artifact, or a float model of transformers."""
    if (folder / "qpass.json").is_file():
        return qpass.load(folder, inner="eager")
    if (folder / "config.json").is_file():
        model: nn.Module = load_pretrained(folder)
        return model
    raise QpassError(f"{folder}: neither an artifact of qpass nor a transformers model")


def _of_module(
    module: nn.Module, recipe: Recipe | None, target: Target, inputs: Any, cache: Any
) -> tuple[Captured, ExportedProgram]:
    if module.training:
        raise QpassError(f"export_onnx: {type(module).__name__} is in training mode; call model.eval() first")
    stored = any(isinstance(p, QTensor) for p in module.parameters())
    if stored and recipe is not None:
        raise QpassError("export_onnx: the model is quantized already; recipe= is for float models")
    if stored:
        backend = captured(module, "export_onnx")
        decided = ((p, backend.decisions.of(p)) for p in module.parameters() if isinstance(p, QTensor))
        target.check((d.site.kind, d.site.name, p.spec) for p, d in decided if d is not None)
        recipe = replace(backend.recipe, bits=None)  # given out already: each weight has its spec
    if cache is not None:
        recipe = replace(recipe or Recipe(), k=cache.k_spec, v=cache.v_spec)
    if recipe is None:
        found = capture(module, inputs, target.dtype)
        return found, found.program
    target.check(("kv", "the cache", of_single_tokens(spec)) for spec in recipe.kv_specs or ())
    if any(spec.static for spec in recipe.kv_specs or ()) and (cache is None or None in cache.scales):
        raise QpassError(
            "export_onnx: static scales of the cache come from data: cache = qpass.KVCache(model.config, n, 'int8:static'), "
            "cache.calibrate(model, batches), export_onnx(..., cache=cache)"
        )
    found = capture(module, inputs, target.dtype)
    inner = found.program.graph_signature.user_inputs[len(found.inputs) - found.caches :]
    flat = [scale for pair in (cache.scales if cache is not None else ()) if pair is not None for scale in pair]
    if flat and len(flat) != len(inner):
        raise QpassError(
            f"export_onnx: cache has {len(flat) // 2} layers, the model {len(inner) // 2}; is it of its config?"
        )
    scales = {str(n): scale.float() for n, scale in zip(inner, flat, strict=False)}
    found.program.state_dict.update(found.weights)
    done = quantize_program(found.program, recipe, strict=False, scales=scales)
    for name in done.state_dict.keys() & found.weights.keys():  # what stays in float, as the graph has it
        plain = done.state_dict[name].detach().to(target.dtype)
        done.state_dict[name] = nn.Parameter(plain, requires_grad=False)
    return found, done


def _of_program(program: ExportedProgram, recipe: Recipe | None, target: Target) -> tuple[Captured, ExportedProgram]:
    done = any(op_name(node).startswith("qpass::") for node in program.graph.nodes)
    if done and recipe is not None:
        raise QpassError("export_onnx: the program is quantized already; recipe= is for float programs")
    values = [node.meta.get("val") for node in program.graph.output_node().all_input_nodes]
    others = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.itemsize > 1}
    if others - {target.dtype}:
        raise QpassError(
            f"export_onnx: the program computes in {', '.join(map(str, others))}, {target.name} in {target.dtype}; export the "
            f"module itself, or model.to({target.dtype}) before torch.export"
        )
    signature = program.graph_signature
    names = tuple(str(name) for name in signature.user_inputs)
    outputs = tuple(f"output_{i}" if i else "output" for i in range(len(signature.user_outputs)))
    found = Captured(program, names, outputs)
    return found, program if recipe is None else quantize_program(program, recipe, strict=False)


def _stored_in(program: ExportedProgram) -> list[tuple[str, str, QuantSpec]]:
    """(kind, name, spec) of what the operators of a program read."""
    named = {s.arg.name: str(s.target) for s in program.graph_signature.input_specs if s.target is not None}
    found: dict[tuple[str, str, QuantSpec], None] = {}
    for node in program.graph.nodes:
        operation = op_name(node).removeprefix("qpass::")
        if not op_name(node).startswith("qpass::") or operation in ("quantize_input", "round_input", "cache_positions"):
            continue
        sources = [n.args[0] if op_name(n) == "slice" else n for n in node.all_input_nodes]  # rows of a weight, too
        read = [named.get(getattr(n, "name", ""), "") for n in sources]
        name = next((r.removesuffix("_data") for r in read if r.endswith("_data")), "the cache")
        weights = {"embedding": "embedding", "linear": "linear", "integer_linear": "linear", "experts": "linear"}
        kind = weights.get(operation, "kv")
        for spec in (parse_spec(a) for a in node.args if isinstance(a, str)):
            found[kind, name, spec] = None
    return list(found)


def _sites(program: ExportedProgram, stored: list[tuple[str, str, QuantSpec]]) -> tuple[ExportedSite, ...]:
    """What became of each place, as qpass.report has it; of a program from a file, what its operators say."""
    if program not in FINISHED:
        return tuple(ExportedSite(kind, name, str(spec)) for kind, name, spec in stored)

    def wider(name: str, format: str | None) -> int:
        data = program.state_dict.get(f"{name}_data")
        if data is None or format is None:
            return 0
        spec = parse_spec(format)
        return data.nbytes * (spec.container_bits - spec.format.bits) // spec.format.bits

    return tuple(
        ExportedSite(s.kind, s.name, s.format, s.skipped, wider(s.name, s.format)) for s in FINISHED[program][0].sites
    )


def name_sizes(model: ir.Model, found: Captured) -> None:
    """Give the dynamic sizes the names that a person knows: batch, sequence, past_sequence, total_sequence."""
    names: dict[str, str] = {}
    decoder = found.caches > 0

    def give(symbol: str, name: str, owner: str) -> None:
        """A second size of the same name bears that of its input too; of a decoder all that are called so are equal."""
        if symbol not in names:
            taken = name in names.values() and not decoder
            names[symbol] = f"{owner}_{name}" if taken else name

    total = {"attention_mask": {1: "total_sequence"}} if decoder else {}
    for value in model.graph.inputs:
        cache = str(value.name).startswith("past_key_values.")
        known = (
            {0: "batch", 2: "past_sequence"} if cache else {0: "batch", 1: "sequence"} | total.get(str(value.name), {})
        )
        for i, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and i in known:
                give(str(size), known[i], str(value.name))
    for value in model.graph.outputs:
        if str(value.name).startswith("present.") and value.shape is not None and not isinstance(value.shape[2], int):
            give(str(value.shape[2]), "total_sequence", str(value.name))
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None and any(str(d) in names for d in value.shape if not isinstance(d, int)):
            value.shape = ir.Shape([d if isinstance(d, int) else names.get(str(d), str(d)) for d in value.shape])


def _describe(model: ir.Model, target: Target, sites: tuple[ExportedSite, ...]) -> None:
    model.producer_name, model.producer_version = "qpass", version("qpass-torch")
    model.metadata_props["qpass.target"] = target.name
    model.metadata_props["qpass.sites"] = json.dumps([asdict(s) for s in sites])


def _file(path: Path) -> Path:
    """`path`, or model.onnx in the folder that it is. Raises `QpassError` for a place that nothing can be written to."""
    file = path if path.suffix == ".onnx" else path / MODEL
    there = next(p for p in (file.parent, *file.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK) or file.is_dir():
        raise QpassError(f"{path}: nothing can be written there; give a folder, or a file that ends in .onnx")
    return file


def _write(model: ir.Model, file: Path, target: Target, described: Any) -> int:
    """Into a folder beside the file, then into its place: an interrupted export leaves what was there. `described`: a model of
    transformers whose tokenizer and configs onnxruntime-genai will look for."""
    unfinished = file.parent / f".{file.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise QpassError(f"{file.parent}: nothing can be written there: {error}") from error
    try:
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        data = f"{file.name}.data" if weights > _INLINE else None
        ir.save(model, unfinished / file.name, external_data=data, max_workers=1, max_in_flight_bytes=_IN_FLIGHT)
        write_session(unfinished, file.name, target)
        if described is not None:
            carry(described, unfinished, {})
            generation = getattr(described, "generation_config", None)
            write_genai(unfinished, file.name, model.graph, described.config, generation, target)
        onnx.checker.check_model(str(unfinished / file.name), full_check=True)
        written = sum(f.stat().st_size for f in unfinished.iterdir() if f.name.startswith(file.name))
        for stale in (GENAI, f"{file.name}.data"):  # of another export to the same place
            (file.parent / stale).unlink(missing_ok=True)
        for made in unfinished.iterdir():
            made.replace(file.parent / made.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return written

"""Every private name of torch that qpass relies on. The next release of torch is read against this one file.

Checked with torch 2.11 and 2.13.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary as WeakIdKeyDictionary

from qpass.errors import Breach, QpassError

#: Leaves a region of torch.autocast that a graph entered.
exit_autocast = torch.amp.autocast_mode._exit_autocast


class CaptureError(QpassError, ShortenTraceback):
    """A QpassError raised while Dynamo compiles: this base reaches the caller as it is, not as BackendCompilerFailed."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


class CaptureBreach(CaptureError, Breach):
    """A Breach inside of a capture."""


@contextmanager
def errors_through_dynamo() -> Iterator[None]:
    """QpassErrors raised inside reach the caller of the compiled model as they are."""
    try:
        yield
    except CaptureError:
        raise
    except QpassError as error:
        raise (CaptureBreach if isinstance(error, Breach) else CaptureError)(str(error)) from None


def _source_text(node: Node) -> str:
    """How Dynamo writes where an input of a captured graph comes from; "" for one that it did not make."""
    return _text_of(getattr(node, "_dynamo_source", None))


def _text_of(source: Any) -> str:
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name or "")


def source_name(node: Node) -> str | None:
    """`L['self']._modules['model']._parameters['weight']` -> "model.weight"; None for an input without such a source."""
    keys = re.findall(r"(?:\.|\.__dict__\[')_(?:modules|parameters|buffers)(?:'\])?\['([^']+)'\]", _source_text(node))
    return ".".join(keys) or None


@contextmanager
def as_plain_module(model: torch.nn.Module) -> Iterator[None]:
    """`model` without what `model.compile` set on it."""
    compiled = model.__dict__.pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if compiled is not None:
            model._compiled_call_impl = compiled


def is_of_module(node: Node) -> bool:
    """Whether an input of a captured graph is kept by a module, as a Parameter, a buffer or an attribute."""
    guards = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
    return guards is not None and (guards.is_unspecialized_nn_module() or guards.is_specialized_nn_module())


def is_graph_fragment(gm: GraphModule) -> bool:
    """Whether the graph is a part of what was compiled: it ends at a graph break, or its frame was called by one that did."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return True
    frame = _compiling_frame()
    # Out of Dynamo's compiler, past the calling conventions of modules: the compiled function itself, or a caller in it.
    while frame is not None and frame.f_code.co_filename.endswith(_CALLING_FILES):
        if frame.f_code.co_name == "compile_wrapper":
            return False
        frame = frame.f_back
    return frame is not None


def _is_dynamos_compile(code: CodeType) -> bool:
    return code.co_name == "_compile" and code.co_filename.endswith("torch/_dynamo/convert_frame.py")


_CALLING_FILES = tuple(
    f"torch/{name}.py"
    for name in (
        "_dynamo/convert_frame", "_dynamo/eval_frame", "_dynamo/external_utils", "_utils_internal", "nn/modules/module",
        "_compile", "_dynamo/utils",
    )
)  # fmt: skip


def compiled_call() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The module, and the arguments of the call, that is being compiled right now; None for a plain function."""
    frame, outermost = inspect.currentframe(), None
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and "fn" in frame.f_locals:
            outermost = frame.f_locals
        frame = frame.f_back
    owner = getattr(outermost["fn"], "__self__", None) if outermost else None
    if outermost is None or not isinstance(owner, torch.nn.Module):
        return None
    return owner, outermost["args"], outermost["kwargs"]


def outside_of_capture() -> Any:
    """A context in which something else may be traced while Dynamo compiles."""
    return torch._guards.tracing(None)


def captured_code() -> CodeType | None:
    """The code object that Dynamo is compiling right now."""
    frame = _compiling_frame()
    code = None if frame is None else frame.f_locals.get("code")
    return code if isinstance(code, CodeType) else None


def _compiling_frame() -> FrameType | None:
    """The frame of Dynamo's compiler that is nearest."""
    frame = inspect.currentframe()
    while frame is not None and not _is_dynamos_compile(frame.f_code):
        frame = frame.f_back
    return frame


def forget_code(code: CodeType) -> None:
    """The next call of `code` is captured anew."""
    reset_code(code)


def is_argument(node: Node, name: str) -> bool:
    """Whether an input of a captured graph is what the caller passed as argument `name`."""
    return _source_text(node).endswith(f"['{name}']")


def place_of(node: Node) -> tuple[Any, str] | None:
    """Of an input of the graph that is being captured: what a local of the frame, or an item of it, is, and the way from there.

    `L['args'][0]._modules['model']._parameters['weight']` -> (the first of args, "._modules['model']._parameters['weight']")"""
    found = re.fullmatch(r"L\['(\w+)'\](?:\[(\d+)\])?(\..*)", _source_text(node))
    frame = _compiling_frame()
    if found is None or frame is None:
        return None
    local = frame.f_locals["locals"].get(found[1])
    return (local if found[2] is None else local[int(found[2])]), found[3]


def guard_owner(node: Node, attribute: str) -> bool:
    """Have Dynamo check at each call a constant attribute of the local, or item of one, from which an input is reached.

    Gives whether it will."""
    source = getattr(node, "_dynamo_source", None)
    while source is not None and not re.fullmatch(r"L\['\w+'\](?:\[\d+\])?", _text_of(source)):
        source = getattr(source, "base", None)
    if source is None:
        return False
    install_guard(AttrSource(source, attribute).make_guard(GuardBuilder.EQUALS_MATCH))
    return True


def pass_no_more(gm: GraphModule, positions: Collection[int]) -> None:
    """Have Dynamo call what was compiled of its graph without these arguments. All but the inputs of the graph is lost."""
    inputs = gm.graph.find_nodes(op="placeholder")
    gm.graph.output_node().args = ((),)
    for node in reversed(list(gm.graph.nodes)):
        if node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    for i in positions:
        gm.graph.erase_node(inputs[i])


def frame_key(gm: GraphModule) -> str | None:
    """Which frame a graph was captured from; graphs of one frame are recompilations of each other."""
    compile_id = gm.meta.get("dynamo_compile_id")
    return None if compile_id is None else str(compile_id).split("/")[0].strip("[]")


def recompile_limit() -> int:
    """After this many graphs of one frame Dynamo runs it eagerly, in float."""
    return int(torch._dynamo.config.recompile_limit)


def copy_graph(graph: Graph) -> Graph:
    """A copy with the same names; its nodes share nothing with those of `graph` but their values."""
    mapping: dict[Node, Node] = {}
    copy = Graph()
    copy.output(copy.graph_copy(graph, mapping))
    copy.output_node().meta = dict(graph.output_node().meta)
    for old, new in mapping.items():
        new.name = old.name
        if old.op == "placeholder":
            new._dynamo_source = getattr(old, "_dynamo_source", None)
    return copy


def copy_captured(gm: GraphModule) -> GraphModule:
    """A copy that may be edited: Dynamo still needs its own graph, and AOTAutograd what hangs on it."""
    copy = GraphModule(gm, copy_graph(gm.graph))
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def mark_static_input(placeholder: Node) -> None:
    """A new placeholder whose tensor keeps its address: CUDA graphs must not copy it at every call."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def fake_like(reference: Tensor, real: Tensor) -> Tensor:
    """`real` as a fake tensor in the fake mode of `reference` (a fake tensor, or a subclass that wraps some)."""
    if hasattr(reference, "__tensor_flatten__"):
        reference = getattr(reference, reference.__tensor_flatten__()[0][0])
    mode = getattr(reference, "fake_mode", None)
    return real if mode is None else mode.from_tensor(real, static_shapes=True)


def trace_aten(
    function: Callable[..., Any], values: Sequence[Any], mode: Literal["symbolic", "real"] = "symbolic"
) -> GraphModule:
    """The graph of `function` in ATen's spelling, with linear and attention as one operation each.

    `mode`: "symbolic" for traced values, whose sizes stay symbols; "real" to follow one call with these tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with outside_of_capture():
        return make_fx(function, tracing_mode=mode, pre_dispatch=True)(*values)


def fake_mode_of(value: Tensor) -> AbstractContextManager[Any]:
    """The fake mode that a traced value belongs to."""
    mode: AbstractContextManager[Any] = value.fake_mode  # type: ignore[attr-defined]
    return mode


def fake_static(tensor: Tensor) -> Tensor:
    """A stand-in for an input that Dynamo has not seen, in AOTAutograd's own fake mode.

    Its sizes are constants; given the real tensor, AOTAutograd would make them symbols that no guard has a source for.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def fake_parts_of(subclass: Any, parts: Sequence[Tensor]) -> list[Tensor]:
    """Stand-ins for the `parts` inside of an input that Dynamo has seen, in AOTAutograd's own fake mode, with the symbols that
    Dynamo gave to their sizes."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(parts)
    seen = context.tensor_to_context.get(subclass)
    if seen is None:
        return [context.fake_mode.from_tensor(p, static_shapes=True) for p in parts]
    fake: Any = context.fake_mode.from_tensor(
        subclass, static_shapes=False, symbolic_context=seen, source=seen.tensor_source, trace=False
    )
    return [getattr(fake, name) for name in fake.__tensor_flatten__()[0]]


def compile_inner(gm: GraphModule, inputs: Sequence[Any], inner: str, mode: str | None) -> Callable[..., Any]:
    """Compile the rewritten graph with Inductor (and its mode), or with another backend by name."""
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode else {}
        # Of every input, at every call: a twentieth of a small model's step.
        if "TORCHINDUCTOR_SIZE_ASSERTS" not in os.environ:
            patches = {"size_asserts": False} | patches
        return compile_fx(gm, list(inputs), config_patches=patches)  # type: ignore[return-value]
    if inner == "eager":
        return gm.forward
    return lookup_backend(inner)(gm, list(inputs))


def uses_cuda_graphs(inner: str, mode: str | None) -> bool:
    """Whether GPUs run CUDA graphs of what a backend makes, in a mode of torch.compile."""
    from torch._inductor import config, list_mode_options

    options = list_mode_options(mode) if mode else {}
    return inner == "cudagraphs" or (
        inner == "inductor" and bool(options.get("triton.cudagraphs", config.triton.cudagraphs))
    )


def check_inner(inner: str) -> None:
    """Raises what torch raises for a backend that does not exist."""
    if inner != "eager":
        lookup_backend(inner)


def compile_in_place(
    module: torch.nn.Module, backend: Callable[..., Any], keep_guards: Callable[..., Any]
) -> Callable[..., Any]:
    """`module.compile(backend=...)`, apart from what else is compiled of the same code, where torch can keep it apart.

    Gives the compiled call.

    `keep_guards`: Dynamo's guards (with `name`, `value`, `guard_type`) -> for each, whether it is checked at every call.
    """

    def kept(guards: Sequence[Any]) -> Any:
        # They are built again behind this. torch 2.11 then wants the same object, which one that is made on access is not.
        for guard in guards:
            guard.orig_guard.obj_weakref = None
        return keep_guards(guards)

    options: dict[str, Any] = {"backend": backend, "options": {"guard_filter_fn": kept}, **isolated()}
    # Dynamo skips the frames of torch's own containers, unless inlined.
    if type(module).__module__.startswith("torch.nn"):
        module._compiled_call_impl = torch.compile(wrap_inline(module._call_impl), **options)
    else:
        module.compile(**options)
    call: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]
    return call


def isolated() -> dict[str, Any]:
    """torch.compile's option that counts the recompilations of this call alone (torch 2.13), if there is one."""
    supported = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if supported else {}


def backend_of(compiled: Any) -> Any:
    """The backend given to torch.compile for an OptimizedModule or a module compiled in place; None for anything else."""
    context = getattr(compiled, "dynamo_ctx", None)
    callback = getattr(context, "callback", None)
    if callback is None:
        call = getattr(compiled, "_compiled_call_impl", None)
        callback = getattr(call, "_torchdynamo_orig_backend", None) or _closure_callback(call)
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_fn", callback)  # out of torch.compile's wrapper


def _closure_callback(function: Any) -> Any:
    while function is not None:
        for cell in getattr(function, "__closure__", None) or ():
            found = getattr(cell.cell_contents, "callback", None)
            if found is not None:
                return found
        function = getattr(function, "__wrapped__", None)
    return None


def original_module(compiled: Any) -> Any:
    """The module inside torch.compile's wrapper, or the argument itself."""
    return getattr(compiled, "_orig_mod", compiled)


def drop_input_guards(program: ExportedProgram) -> None:
    """Forget what torch.export found about sizes of arguments: the checks name arguments that are lists of parts now."""
    program._guards_code = []


def shapes_only() -> AbstractContextManager[Any]:
    """Within it operations give tensors without values, whatever they are given."""
    return FakeTensorMode(allow_non_fake_inputs=True)

"""A product of one row with a large int8 weight is written out for Inductor on GPUs; everything else stays an operator."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from qpass.numerics import dequantize, quantize
from qpass.ops.triton import table
from qpass.sites import fuse, written
from qpass.spec import parse_spec

COLUMNS, OUTPUTS = 2048, 32768  # 64 MB


def module_of(
    text: str, rows: int, dtype: torch.dtype, columns: int, outputs: int, device: str, bias: bool = False
) -> GraphModule:
    """A norm and a quantized linear behind it, as fake tensors of the device."""
    stored = quantize(torch.zeros(1, columns), parse_spec(text))
    graph = Graph()

    def given(name: str, shape: tuple[int, ...], kind: torch.dtype) -> Node:
        return with_value(graph.placeholder(name), shape, kind)

    def with_value(node: Node, shape: tuple[int, ...], kind: torch.dtype) -> Node:
        with FakeTensorMode():
            node.meta["example_value"] = torch.empty(shape, dtype=kind, device=device)
        return node

    x, norm = given("x", (1, rows, columns), dtype), given("norm", (columns,), dtype)
    names = ("data", "scale", "zero", "outer")
    parts = [
        None if part is None else given(name, (outputs, *part.shape[1:]), part.dtype)
        for name, part in zip(names, stored.parts, strict=True)
    ]
    added = given("bias", (outputs,), torch.float32) if bias else None
    normed = with_value(graph.call_function(F.rms_norm, (x, (columns,), norm, 1e-6)), (1, rows, columns), dtype)
    y = graph.call_function(torch.ops.qpass.linear.default, (normed, *parts, added, text))
    graph.output(with_value(y, (1, rows, outputs), dtype))
    return GraphModule(torch.nn.Module(), graph)


def is_written(module: GraphModule) -> bool:
    fuse.rewrite(module.graph)
    written.write_out_products(module)
    return all(n.target is not torch.ops.qpass.linear.default for n in module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("text", ["int8:channel", "int8:tensor", "int8:channel:scale=fp16"])
def test_it_fires(text: str, dtype: torch.dtype) -> None:
    assert is_written(module_of(text, 1, dtype, COLUMNS, OUTPUTS, "cuda"))


@pytest.mark.parametrize(
    "case",
    [
        "two rows",
        "cpu",
        "small",
        "square",
        "pieces",
        "int8:g32",
        "int8:channel:asym",
        "int4:channel",
        "fp8_e4m3:channel",
    ],
)
def test_it_does_not(case: str) -> None:
    text, outputs = case if ":" in case else "int8:channel", OUTPUTS - 1 if case == "small" else OUTPUTS
    columns = OUTPUTS // 4 if case == "square" else COLUMNS
    rows, device = 2 if case == "two rows" else 1, "cpu" if case == "cpu" else "cuda"
    module = module_of(text, rows, torch.bfloat16, columns, outputs, device)
    if case == "pieces":  # of q, k and v
        y = module.graph.find_nodes(op="output")[0].args[0]
        with module.graph.inserting_after(y):
            y.replace_all_uses_with(
                module.graph.call_function(torch.split, (y, OUTPUTS // 2, -1)), lambda n: n.op == "output"
            )
    assert not is_written(module)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_is_computed(dtype: torch.dtype, bias: bool, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which the table leaves to the operator. The compiler makes it one loop: no float weight is left."""
    text, columns, outputs = "int8:channel", 96, 40
    monkeypatch.setattr(table, "WRITTEN_OUT", 1)
    monkeypatch.setattr(table, "_VOCABULARY", 0)
    module = module_of(text, 1, dtype, columns, outputs, "cuda", bias)
    assert is_written(module)
    torch.manual_seed(0)
    x, norm, weight = torch.randn(1, 1, columns).to(dtype), torch.rand(columns).to(dtype), torch.randn(outputs, columns)
    stored, added = quantize(weight, parse_spec(text)), torch.randn(outputs) if bias else None
    given: list[Tensor] = [p for p in (x, norm, *stored.parts, added) if p is not None]
    if inner == "eager":
        found = module(*given)
    else:
        found, (code,) = run_and_get_code(torch.compile(module), *given)
        made = re.findall(r"empty_strided_cpu\(\((.*?)\), ", code)
        assert made
        assert not any(f"{outputs}, {columns}" in shape for shape in made)
    normed = F.rms_norm(x, (columns,), norm, 1e-6)
    expected = F.linear(normed.double(), dequantize(stored, parse_spec(text), columns).double())
    expected = expected if added is None else expected + added.double()
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 8e-3) * expected.abs().max()

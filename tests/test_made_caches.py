"""The memory of a cache that a compiled call allocates stays: marked so for CUDA graphs, and no memory of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import qpass
from qpass.made_caches import keep, made_and_changed
from tests.models import build, tokens

KIVI = ("int4:t32:zero=float", "int4:g16:zero=float")


@pytest.mark.parametrize("kv", [None, "int8", "int4:channel:asym", "mxfp8", KIVI], ids=str)
def test_after_the_first_call(kv: str | tuple[str, str] | None) -> None:
    model = qpass.quantize(build("llama").eval(), inner="eager")
    k, v = kv if isinstance(kv, tuple) else (kv, kv)
    cache: Any = StaticCache(model.config, 32) if kv is None else qpass.KVCache(model.config, 32, k=k, v=v)
    with torch.no_grad():
        model(tokens(), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        tensors = [layer.keys, layer.values] if kv is None else list(layer.tensors().values())
        for tensor in tensors:
            assert tensor._dynamo_static_input_type == "unguarded"


class Makes(nn.Module):
    """Gives back a cache that it makes, one that it is given, sums, and what it computes."""

    def forward(self, x: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        made, untouched, sums, index = torch.zeros(4), torch.zeros(4), torch.zeros_like(x), torch.arange(4)
        made.index_copy_(0, index, x)
        given.index_copy_(0, index, x)
        sums.index_add_(0, index, x)
        computed = x * 2
        computed.add_(1)
        return made, untouched, given, sums, computed, x.to(torch.float32).mul_(1)


def test_which_outputs() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(Makes(), backend=backend)(torch.ones(4), torch.ones(4))
    (found,) = (graphs[0].graph.output_node().args[0][i].name for i in made_and_changed(graphs[0].graph))  # type: ignore
    assert found == "made"


@pytest.mark.parametrize("lent", [True, False], ids=["of a CUDA graph", "its own"])
def test_what_is_lent_is_copied(lent: bool) -> None:
    outputs = (torch.ones(2), torch.ones(3))
    first, second, again = keep((*outputs, outputs[1]), [1, 2], lent)
    assert first is outputs[0]
    assert second is again
    assert torch.equal(second, outputs[1])
    assert (second is not outputs[1]) == lent
    assert second._dynamo_static_input_type == "unguarded"
    assert not hasattr(first, "_dynamo_static_input_type")

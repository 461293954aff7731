"""A layer of a decode step is six operators, each of which is one kernel on a GPU, and a norm at most; Inductor adds none."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch._inductor import metrics
from torch.fx import Graph

import qpass
from qpass.graph.vocabulary import op_name, value_of
from qpass.ops.triton.table import takes_in, takes_norm_in
from tests.models import tokens

transformers = pytest.importorskip("transformers")

#: The same memory, looked at in another way; of one token, the heads of an attention are in order already.
VIEWS = {"view", "reshape", "transpose", "unsqueeze", "getitem", "split_with_sizes", "contiguous"}
LAYER = Counter({"qpass::linear": 4, "qpass::append_rotated": 1, "qpass::attention": 1})
MOST = 7


def decode_graph(layers: int, batch: int, weights: str, kv: str, inner: str = "eager") -> Graph:
    """The rewritten graph of one token for each sequence."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    model = qpass.quantize(model, qpass.Recipe.uniform(weights, kv=kv), inner=inner)
    cache = qpass.KVCache(config, 16, kv)
    with torch.no_grad():
        for length in (4, 1):
            metrics.reset()  # of the last call, one token
            model(input_ids=tokens(batch, length), past_key_values=cache, use_cache=True)
    return qpass.registry.captured(model, "test").captures[-1].after


def operators_of(graph: Graph) -> Counter[str]:
    """Names of what computes something, and how often."""
    calls = [op_name(n) for n in graph.nodes if n.op in ("call_function", "call_method")]
    return Counter(name for name in calls if name not in VIEWS)


@pytest.mark.parametrize(
    ("weights", "kv"),
    [
        ("int8:channel", "int8"),
        ("int4:g32", "int4:channel:asym"),
        pytest.param("nf4:g32", "fp8_e4m3:channel", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.long)])
def test_operators_of_a_layer(weights: str, kv: str, batch: int) -> None:
    """Three layers, less one, are two of them."""
    one, three = (decode_graph(layers, batch, weights, kv) for layers in (1, 3))
    two = operators_of(three) - operators_of(one)
    assert two == Counter({name: 2 * count for name, count in LAYER.items()})


@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.long)])
def test_inductor_adds_no_kernel_to_a_layer(batch: int) -> None:
    """What one operator gives to the next goes there as it is, and the mask is made once."""
    made = []
    for layers in (1, 3):
        torch._dynamo.reset()
        decode_graph(layers, batch, "int8:channel", "int8", inner="inductor")
        made.append(metrics.generated_kernel_count)
    assert made[1] == made[0]


@pytest.mark.parametrize("batch", [1, 8, 16, 64])
@pytest.mark.parametrize(
    ("qkv", "gate_and_up"), [(6144, 28672), (12288, 22016), (10240, 57344)], ids=["8 B", "7 B", "70 B"]
)
def test_one_norm_of_a_layer_is_a_kernel_at_most(qkv: int, gate_and_up: int, batch: int) -> None:
    """Of Llama 3 8 B, Llama 2 7 B and Llama 3 70 B."""
    norms = sum(not takes_norm_in(batch, outputs) for outputs in (qkv, gate_and_up))
    assert LAYER.total() + norms <= (MOST if batch > 16 else LAYER.total())


@pytest.mark.parametrize("weights", ["int8:channel", "int4:g32", "nf4:g32"])
def test_the_linears_of_a_layer_are_taken_in_on_gpus(weights: str) -> None:
    """Nothing is around those that a kernel of a GPU would leave to torch."""
    linears = decode_graph(2, 1, weights, "int8").find_nodes(op="call_function", target=torch.ops.qpass.linear.default)
    assert len(linears) == 9
    for node in linears:
        x = value_of(node.args[0])
        assert takes_in(node.args[6], x.shape[-1], x.dtype, math.prod(x.shape[:-1]))

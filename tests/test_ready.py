"""Models that cannot be quantized as they are: refused by name, with what to do, on both ways in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import qpass
from tests.models import build, logits_of, tokens

ways = pytest.mark.parametrize("way", ["compile", "quantize"])


def quantized(model: nn.Module, way: str) -> Tensor:
    if way == "quantize":
        fast = qpass.quantize(model, "int8", inner="eager")
    else:
        fast = torch.compile(model, backend=qpass.QPass("int8", inner="eager"))
    with torch.no_grad():
        return logits_of(fast(tokens()))


def refused(model: nn.Module, way: str, message: str) -> None:
    params = dict(model.named_parameters())
    with pytest.raises(qpass.QpassError, match=message):
        quantized(model, way)
    if way == "quantize":  # a compiled call stops in the middle of the forward pass, after hooks have begun their work
        assert all(p is params[n] for n, p in model.named_parameters()), "the model was changed"


# --- device_map --------------------------------------------------------------------------------------------------------


@ways
def test_offloaded_by_a_device_map(way: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(build("llama"), execution_device=torch.device("cpu"))
    refused(model, way, r"weights are offloaded \(device_map\).*load the model without device_map")


@pytest.mark.long
def test_a_device_map_without_offload_works() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = quantized(build("llama"), "quantize")
    torch._dynamo.reset()
    model = accelerate.dispatch_model(build("llama"), {"": "cpu"}, force_hooks=True)
    torch.testing.assert_close(quantized(model, "quantize"), expected)


def test_what_hooks_cost_a_compiled_model_is_reported() -> None:
    """They break the graph at each module; past torch's limit of recompilations the rest runs in float."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(build("llama"), {"": "cpu"}, force_hooks=True)
    quantized(model, "compile")
    assert "remove_hook_from_submodules" in str(qpass.report(model))


# --- sharded -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[torch.distributed.device_mesh.DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    torch.distributed.destroy_process_group()


@ways
def test_tensor_parallel(mesh: torch.distributed.device_mesh.DeviceMesh, way: str) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = build("nanogpt")
    parallelize_module(model.first, mesh, {"fc": ColwiseParallel(), "out": RowwiseParallel()})
    refused(model, way, r"first\.fc\.weight: the weight is a DTensor \(tensor parallel, tp_plan\)")


@ways
def test_fsdp(mesh: torch.distributed.device_mesh.DeviceMesh, way: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = build("nanogpt")
    fully_shard(model, mesh=mesh)
    refused(model, way, r"sharded by FSDP; quantize the model before")


# --- quantized by someone else -----------------------------------------------------------------------------------------


def fp8_checkpoint() -> nn.Module:
    model = build("llama")
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj.weight = nn.Parameter(weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def mxfp4_checkpoint() -> nn.Module:
    """The blocks and scales that transformers keeps of a gpt-oss checkpoint."""
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.gate_up_proj_blocks = nn.Parameter(torch.zeros(4, 64, 2, 16, dtype=torch.uint8), requires_grad=False)
    mlp.gate_up_proj_scales = nn.Parameter(torch.zeros(4, 64, 2, dtype=torch.uint8), requires_grad=False)
    return model


def foreign(package: str) -> Callable[[], nn.Module]:
    """A weight of a tensor subclass that a package defines, as torchao's and bitsandbytes' are."""

    def make() -> nn.Module:
        kind = type("Weight4Bit", (torch.Tensor,), {"__module__": f"{package}.quantization"})
        model = build("llama")
        proj = model.model.layers[0].mlp.up_proj
        proj.weight = nn.Parameter(proj.weight.data.as_subclass(kind), requires_grad=False)
        return model

    return make


def by_a_quantizer() -> nn.Module:
    """What transformers leaves on a model that it loaded from a quantized checkpoint."""
    model = build("llama")
    model.is_quantized, model.quantization_method = True, "gptq"
    return model


@ways
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            fp8_checkpoint,
            r"layers\.0\.mlp\.up_proj\.weight: the weight is float8_e4m3fn: the checkpoint is already quantized",
        ),
        (mxfp4_checkpoint, r"gate_up_proj_blocks: the weight is uint8: the checkpoint is already quantized"),
        (foreign("torchao"), r"up_proj\.weight: the weight is quantized already \(torchao Weight4Bit\)"),
        (foreign("bitsandbytes"), r"up_proj\.weight: the weight is quantized already \(bitsandbytes Weight4Bit\)"),
        (by_a_quantizer, r"LlamaForCausalLM: the checkpoint is already quantized \(gptq\)"),
    ],
    ids=["fp8", "mxfp4", "torchao", "bitsandbytes", "a quantizer of transformers"],
)
def test_quantized_by_someone_else(make: Callable[[], nn.Module], message: str, way: str) -> None:
    refused(make(), way, message)


def test_quantized_by_qpass() -> None:
    model = qpass.quantize(build("llama"), "int8", inner="eager")
    with pytest.raises(
        qpass.QpassError, match=r"already quantized \(int8:g32:scale=fp16\); start from its float checkpoint"
    ):
        qpass.quantize(model, "int4:g16")
    with torch.no_grad():
        torch.compile(model, backend=qpass.QPass("int4:g16", inner="eager"))(tokens())

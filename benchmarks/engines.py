"""Decode engines for benchmarks/decode_cpu.py: each turns one random Llama into a function that takes one step."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

import qpass
from qpass.cache import CACHE_ARGUMENT

#: One step on ids [B, S]: its logits [B, V] of the last position as float32.
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Engine:
    """`start(batch, context, room)`: a step function whose cache holds `context` tokens and has room for as many more.

    `bytes_read`: of weights, in a step. `largest`: the longest context it can be put at. `compute`: of qpass's products.
    `cpp_wrapper`: whether Inductor's wrapper of the kernels is C++, which compiles for minutes.
    """

    name: str
    start: Callable[[int, int, int], Step]
    bytes_read: int
    cache_bytes_per_token: int
    largest: int = 1 << 30
    compute: Literal["float", "int8"] | None = None
    cpp_wrapper: bool = False


def is_read(model: Any, name: str) -> bool:
    """Whether a step reads all of a Parameter: of a table only if it is the vocabulary projection too."""
    return "embed_tokens" not in name or model.config.tie_word_embeddings


def random_llama(layers: int, hidden: int, ffn: int, heads: int, key_heads: int, vocab: int) -> Any:
    """The reference in float32; weights of the size that training gives them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocab, max_position_embeddings=1 << 16, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        torch.nn.init.ones_(p) if "norm" in name else torch.nn.init.normal_(p, std=0.02)
    fresh = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8}))
    model.model.rotary_emb = fresh.model.rotary_emb  # its buffers are computed, not loaded
    return model.eval()


def _key_bytes(config: Any, bits: float) -> int:
    head = config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * config.num_key_value_heads * head * 2 * bits / 8)


def _filled(cache: Any, model: Any, call: Any, batch: int, context: int) -> Any:
    """The cache as after `context` tokens: random keys and values, for a prefill of 32k tokens would take minutes."""
    call(input_ids=torch.ones(batch, 1, dtype=torch.long), **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        quantized = hasattr(layer, "k")
        for part in [*layer.k.parts, *layer.v.parts] if quantized else [layer.keys, layer.values]:
            if part.dtype.is_floating_point:
                part.copy_(torch.rand_like(part) * 0.02 if quantized else torch.randn_like(part))
            else:
                part.random_()
        layer.cumulative_length.fill_(context)
    return cache


def of_transformers(
    name: str, model: Any, dtype: torch.dtype, compiled: bool, bytes_read: int, kv: str | None = None
) -> Engine:
    """A transformers model, eager or compiled in whatever backend it was given; cache in its own type or `kv`."""
    call = torch.compile(model) if compiled else model

    def start(batch: int, context: int, room: int) -> Step:
        length = context + room
        cache = (
            StaticCache(model.config, max_cache_len=length) if kv is None else qpass.KVCache(model.config, length, kv)
        )
        _filled(cache, model, call, batch, context)

        def step(ids: torch.Tensor) -> torch.Tensor:
            out = call(input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float()

        return step

    bits = {"int8": 8.5, "int4": 5.0}.get(kv or "", 8 * dtype.itemsize)
    return Engine(name, start, bytes_read, _key_bytes(model.config, bits))


def of_qpass(
    name: str, reference: Any, recipe: str, kv: str | None = None, compute: Literal["float", "int8"] | None = None
) -> Engine:
    """qpass.quantize."""
    return of_quantized(name, qpass.quantize(copy.deepcopy(reference), recipe), kv, compute)


def of_quantized(
    name: str, model: Any, kv: str | None = None, compute: Literal["float", "int8"] | None = None
) -> Engine:
    """A model that is quantized already."""
    read = sum(getattr(p, "stored_nbytes", p.nbytes) for n, p in model.named_parameters() if is_read(model, n))
    found = of_transformers(name, model, torch.float32, compiled=False, bytes_read=read, kv=kv)
    return replace(found, compute=compute)


def of_torchao(name: str, reference: Any, bits: int) -> Engine | str:
    """torchao's weight-only quantization in bfloat16, its best type here, compiled. A sentence if it is not there."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    try:
        if bits == 8:
            config: Any = Int8WeightOnlyConfig()
        else:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group_size=128)
        model = copy.deepcopy(reference).bfloat16()
        quantize_(model, config)
    except Exception as error:
        return f"torchao cannot: {' '.join(str(error).split())[:100]}"
    weights = {n: p.numel() for n, p in reference.named_parameters() if is_read(reference, n) and p.dim() > 1}
    tied = sum(count for n, count in weights.items() if "embed_tokens" in n)  # stays in 16 bits
    read = (sum(weights.values()) - tied) * (bits + (0.25 if bits == 4 else 0)) / 8 + 2 * tied
    return of_transformers(name, model, torch.bfloat16, True, int(read))


def of_llama_cpp(name: str, reference: Any, kind: str, threads: int) -> Engine | str:
    """llama.cpp on the same weights, through llama-cpp-python and gguf. A sentence if it is not there."""
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        return "llama-cpp-python or gguf is not installed"
    import llama_cpp

    folder = tempfile.mkdtemp()
    path = Path(folder) / f"{kind}.gguf"
    size = write_gguf(path, reference, kind)

    def start(batch: int, context: int, room: int) -> Step:
        llama = llama_cpp.Llama(
            str(path), n_ctx=context + room + 8, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
        llama.eval([1] * max(context, 1))
        if not context:  # the first call allocates
            llama.reset()

        def step(ids: torch.Tensor) -> torch.Tensor:
            llama.eval(ids[0].tolist())
            pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            return torch.from_numpy(np.ctypeslib.as_array(pointer, (1, llama.n_vocab())).copy())

        return step

    return Engine(name, start, size, _key_bytes(reference.config, 16), largest=8192)


def write_gguf(path: Path, model: Any, kind: str) -> int:
    """The model as GGUF without a vocabulary; bytes of the weights that a step reads."""
    import gguf

    c = model.config
    head = c.hidden_size // c.num_attention_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    quantized = getattr(gguf.GGMLQuantizationType, kind)
    read = 0
    for name, p in model.named_parameters():
        value = p.detach().float().numpy()
        short = name.removeprefix("model.").removesuffix(".weight")
        if short in ("embed_tokens", "norm", "lm_head"):
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[short]
        else:
            _, layer, rest = short.split(".", 2)
            target = f"blk.{layer}.{names[rest]}"
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):  # rotary pairs are neighbours in llama.cpp
                value = value.reshape(-1, 2, head // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if p.dim() == 1:
            writer.add_tensor(target + ".weight", value)
            continue
        packed = gguf.quants.quantize(value, quantized)
        read += packed.nbytes if is_read(model, name) else 0
        writer.add_tensor(target + ".weight", packed, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def of_onnxruntime(name: str, reference: Any, threads: int) -> Engine | str:
    """The matrix products of a step alone, as MatMulNBits with int8 activations: no attention, no norms, no cache."""
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return "onnxruntime or onnx is not installed"
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, constants, inputs, outputs, size = np.random.default_rng(0), [], [], {}, [], 0
    for i, (n, p) in enumerate(
        (n, p) for n, p in reference.named_parameters() if p.dim() > 1 and "embed_tokens" not in n
    ):
        rows, columns = p.shape
        blocks = -(-columns // 128)
        data = rng.integers(0, 256, (rows, blocks, 64), dtype=np.uint8)
        scales = rng.random((rows, blocks), dtype=np.float32) * 0.01
        size += data.nbytes + scales.nbytes
        constants += [numpy_helper.from_array(data, f"w{i}"), numpy_helper.from_array(scales.reshape(-1), f"s{i}")]
        inputs[f"x{columns}"] = columns
        outputs.append(f"y{i}")
        sizes = {"K": columns, "N": rows, "bits": 4, "block_size": 128, "accuracy_level": 4}
        nodes.append(
            helper.make_node(
                "MatMulNBits", [f"x{columns}", f"w{i}", f"s{i}"], [f"y{i}"], n, domain="com.microsoft", **sizes
            )
        )
    graph = helper.make_graph(
        nodes, "products",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["rows", k]) for x, k in inputs.items()],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in outputs], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = Path(tempfile.mkdtemp()) / "products.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def start(batch: int, context: int, room: int) -> Step:
        def step(ids: torch.Tensor) -> torch.Tensor:
            feeds = {x: rng.standard_normal((ids.numel(), k), dtype=np.float32) for x, k in inputs.items()}
            session.run(None, feeds)
            return torch.zeros(ids.shape[0], 1)

        return step

    return Engine(name, start, size, 0)

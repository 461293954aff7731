"""genai_config.json: what onnxruntime-genai needs to generate from an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qpass_export.targets import Target

GENAI = "genai_config.json"
_PROVIDERS: dict[str, list[dict[str, Any]]] = {"CUDAExecutionProvider": [{"cuda": {}}]}
#: A decoder with the usual names; the class of the model is of no matter to the runtime.
_TYPE = "llama"


def why_not(inputs: Sequence[ir.Value], config: Any, target: Target) -> str | None:
    """The reason for which onnxruntime-genai cannot run a graph; None if it can."""
    names = [str(value.name) for value in inputs]
    if not any(name.startswith("past_key_values.") for name in names) or config is None:
        return "no decoder of transformers"
    if target.name == "tensorrt":
        return "it runs graphs for onnxruntime's CPU and CUDA providers"
    if any(name.endswith(("_scale", "_zero_point")) for name in names):
        return (
            "it passes a cache on without scales; calibrate it: qpass.KVCache(config, n, 'int8:static').calibrate(...)"
        )
    return None


def write_genai(folder: Path, model: str, graph: ir.Graph, config: Any, generation: Any, target: Target) -> None:
    """`genai_config.json` for a graph with the names of the ecosystem."""
    text = config.get_text_config(decoder=True)
    keys = [v for v in graph.inputs if str(v.name).startswith("past_key_values.") and str(v.name).endswith(".key")]
    shape = keys[0].shape
    assert shape is not None
    names = {str(value.name) for value in graph.inputs}
    cache = {f"past_{half}_names": f"past_key_values.%d.{half}" for half in ("key", "value")}
    present = {f"present_{half}_names": f"present.%d.{half}" for half in ("key", "value")}
    end = _first_known(generation, text, "eos_token_id")
    begin = _first_known(generation, text, "bos_token_id")
    padding = _first_known(generation, text, "pad_token_id")
    last = end[0] if isinstance(end, list) else end
    context = getattr(text, "max_position_embeddings", None) or 2048
    content = {
        "model": {
            "type": _TYPE,
            "vocab_size": text.vocab_size,
            "context_length": context,
            "bos_token_id": last if begin is None else begin,
            "eos_token_id": end,
            "pad_token_id": last if padding is None else padding,
            "decoder": {
                "filename": model,
                "session_options": {"provider_options": _PROVIDERS.get(target.provider, [])} | dict(target.options),
                "num_hidden_layers": len(keys),
                "num_key_value_heads": shape[1],
                "num_attention_heads": getattr(text, "num_attention_heads", shape[1]),
                "head_size": shape[3],
                "hidden_size": text.hidden_size,
                "inputs": {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in names} | cache,
                "outputs": {"logits": "logits"} | present,
            },
        },
        "search": {"max_length": context, "do_sample": False, "num_beams": 1, "past_present_share_buffer": False},
    }
    (folder / GENAI).write_text(json.dumps(content, indent=1) + "\n")


def _first_known(generation: Any, config: Any, name: str) -> Any:
    """A token id from the generation config, or from the model's."""
    found = getattr(generation, name, None)
    return getattr(config, name, None) if found is None else found

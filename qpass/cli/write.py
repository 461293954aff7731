"""`qpass generate`: a quantized model writes."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Annotated, Any

import typer

from qpass.cli.base import Calibration, Dtype, Inner, Json, RecipeOption, Source, app, check_dtype
from qpass.errors import QpassError


@app.command()
def generate(
    source: Source,
    prompt: Annotated[
        str | None, typer.Argument(help="What it goes on from; without one, standard input is read")
    ] = None,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token", min=0.0)] = 0.0,
    seed: int = 0,
    chat: Annotated[
        bool | None, typer.Option(help="Use the model's chat template; if it has one, that is the default")
    ] = None,
    dtype: Dtype = "auto",
    inner: Inner = "inductor",
    as_json: Json = False,
) -> None:
    """Write behind a prompt, token by token as they come; speed and memory on stderr. --recipe float: the model as it is."""
    from qpass.folders import is_artifact, load_float, load_quantized, recipe_for
    from qpass.generate import generate as tokens_of
    from qpass.generate import pieces
    from qpass.measuring.job import FLOAT, peak_rss
    from qpass.measuring.speed import weight_bytes
    from qpass.pretrained import load_tokenizer

    check_dtype(dtype)
    if prompt is None and sys.stdin.isatty():
        raise QpassError("no prompt; give one, or pipe it in")
    text = sys.stdin.read() if prompt is None else prompt
    tokenizer = load_tokenizer(source)
    ids = _ids(tokenizer, text, chat)
    if recipe == FLOAT and not is_artifact(source):
        model, chosen = load_float(source, dtype), None
        if inner == "inductor":
            model.compile()
    else:
        model = load_quantized(source, recipe, calibration=calibration, dtype=dtype, inner=inner)
        chosen = recipe_for(source, recipe, calibration is not None)
    times: list[float] = []
    made: list[int] = []

    def timed() -> Any:
        for token in tokens_of(model, ids, max_new_tokens, recipe=chosen, temperature=temperature, seed=seed):
            times.append(time.perf_counter())
            made.append(token)
            yield token

    whole = ""
    for piece in pieces(timed(), tokenizer):
        whole += piece
        if not as_json:
            print(piece, end="", flush=True)
    steps = sorted(b - a for a, b in pairwise(times))
    rate = 1 / steps[len(steps) // 2] if steps else None
    if as_json:
        print(
            json.dumps({"text": whole, "tokens": made, "tokens_per_second": rate, "weight_bytes": weight_bytes(model)})
        )
        return
    print()
    speed = "" if rate is None else f", {rate:,.1f} tokens/s (median step)"
    sizes = f"{weight_bytes(model) / 1e6:,.1f} MB of weights, at most {peak_rss() / 1e6:,.0f} MB resident"
    typer.echo(f"{len(made)} tokens{speed}, {sizes}", err=True)


def _ids(tokenizer: Any, text: str, chat: bool | None) -> Any:
    """[1, S]. Raises `QpassError` for a chat without a template, and for an empty prompt."""
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise QpassError("--chat: the tokenizer has no chat template; leave it out")
    if chat is not False and template:
        message = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    if not encoded.input_ids.shape[1]:
        raise QpassError("the prompt is empty")
    return encoded.input_ids

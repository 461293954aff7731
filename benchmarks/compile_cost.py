"""What finding and rewriting sites adds to the time that torch.compile takes, and what compiling one block only saves.

`python benchmarks/compile_cost.py [--layers 2 8 32 80] [--inductor-up-to 32]`. Writes build/compile_cost.json. For each number
of layers of a small llama: seconds in Dynamo's capture, in qpass (finding, deciding, rewriting; quantizing the weights is
counted apart, it is no compile time) and in Inductor; qpass's share of the whole; and microseconds per node of the graph,
which stay the same if the passes are linear. "regional": each layer compiled by itself, as one graph that all layers use.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass
import qpass.backend


class Clock:
    """Seconds spent inside functions, by name; of one inside another, by both names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside: list[str] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(name)
            key, start = "/".join(self.inside), time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside.pop()
                self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

        return call


def llama(layers: int) -> torch.nn.Module:
    """A llama of small matrices: the cost of compiling depends on nodes, not on sizes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(layers: int, inner: str, regional: bool = False) -> dict[str, Any]:
    """One compile from nothing, Inductor's caches off."""
    torch._dynamo.reset()
    model, clock, backend = llama(layers), Clock(), qpass.QPass("int8", inner=inner)
    module: Any = qpass.backend
    originals = module.compile_inner, backend.store._make, QPASS_CALL
    module.compile_inner = clock.timed("inner", module.compile_inner)
    backend.store._make = clock.timed("quantizing", backend.store._make)  # type: ignore[method-assign]
    qpass.QPass.__call__ = clock.timed("backend", QPASS_CALL)  # type: ignore[method-assign]
    try:
        if regional:
            for layer in model.model.layers:
                layer.compile(backend=backend)
        else:
            model.compile(backend=backend)
        ids = torch.randint(0, 256, (1, 32))
        start = time.perf_counter()
        with torch.no_grad():
            model(ids)
        total = time.perf_counter() - start
    finally:
        module.compile_inner, backend.store._make, qpass.QPass.__call__ = originals  # type: ignore[method-assign]
    spent = clock.seconds
    inner_s, quantizing = spent["backend/inner"], sum(s for key, s in spent.items() if key.endswith("quantizing"))
    passes = spent["backend"] - inner_s - spent["backend/quantizing"]
    compile_time = total - quantizing
    nodes = sum(len(c.before.nodes) for c in backend.captures)
    return {
        "layers": layers, "inner": inner, "regional": regional, "graphs": len(backend.captures), "nodes": nodes,
        "total_s": compile_time, "qpass_s": passes, "inner_s": inner_s, "quantizing_s": quantizing,
        "share": passes / compile_time, "us_per_node": passes / nodes * 1e6,
    }  # fmt: skip


def measure_float(layers: int) -> float:
    """Seconds that Inductor alone takes for the float model."""
    torch._dynamo.reset()
    model = llama(layers)
    model.compile()
    start = time.perf_counter()
    with torch.no_grad():
        model(torch.randint(0, 256, (1, 32)))
    return time.perf_counter() - start


QPASS_CALL = qpass.QPass.__call__


def main() -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 80])
    parser.add_argument("--inductor-up-to", type=int, default=80, help="layers; Inductor takes minutes for 80")
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    measure(2, "inductor")  # the first compile of a process loads half of torch
    rows = []
    for layers in args.layers:
        if layers <= args.inductor_up_to:
            rows.append({"layers": layers, "inner": "inductor alone", "total_s": measure_float(layers)})
            print(f"{layers:3} layers, Inductor alone, in float: {rows[-1]['total_s']:6.1f} s", flush=True)
        ways = [("aot_eager", False)]
        if layers <= args.inductor_up_to:
            ways += [("inductor", False), ("inductor", True)]
        for inner, regional in ways:
            rows.append(row := measure(layers, inner, regional))
            print(
                f"{layers:3} layers, {inner:9}{' by layer' if regional else '':9} {row['nodes']:6} nodes: "
                f"{row['total_s']:6.1f} s, of it qpass {row['qpass_s']:5.2f} s = {row['share']:5.1%}, "
                f"{row['us_per_node']:4.0f} us per node",
                flush=True,
            )
    Path("build").mkdir(exist_ok=True)
    Path("build/compile_cost.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

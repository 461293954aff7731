"""What benchmarks/gpu.py measured, as tables and a chart of a page: python benchmarks/gpu_page.py JSON PAGE"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from chart import bars

Row = dict[str, Any]
#: "decode qpass int8, int8 cache, batch 1, 128 tokens": what is measured, of whom, and how much of it.
_NAME = re.compile(r"(linear|attention|decode|prompt) (.+?)(, (?:batch )?\d+ ?.*)")
#: By kind, whom others are compared with.
_FLOAT = {"linear": "bf16", "attention": "bf16", "decode": "torch.compile bf16", "prompt": "torch.compile bf16"}


def milliseconds(row: Row) -> float:
    """Of a decode step: of all layers of the whole model."""
    return row.get("ms_of_32", row.get("ms", row.get("us", 0) / 1e3))


def times_bf16(row: Row, rows: dict[str, Row]) -> float | None:
    """How many times as fast as the same in bfloat16, if that was measured."""
    found = _NAME.fullmatch(row["name"])
    if found is None or found[2] == _FLOAT[found[1]]:
        return None
    plain = rows.get(f"{found[1]} {_FLOAT[found[1]]}{found[3]}")
    return milliseconds(plain) / milliseconds(row) if plain else None


def tables(results: Row) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    copy, product = (results["ceilings"][name] for name in ("copy_bytes_per_second", "bf16_operations_per_second"))
    lines = [
        f"{results['device']}, {versions}; a copy moves {copy / 1e12:.2f} TB/s, "
        f"a bfloat16 product reaches {product / 1e12:.0f} TFLOP/s.{_layers(results)}",
        "", "| | ms | times bf16 | fraction of the limit | kernels | GB |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = {row["name"]: row for row in results["rows"]}
    for row in rows.values():
        times, peak = times_bf16(row, rows), row.get("peak_bytes")
        cells = [f"{milliseconds(row):.3f}", "" if times is None else f"{times:.2f}", f"{row['fraction']:.2f}",
                 str(row.get("kernels", "")), "" if peak is None else f"{peak / 1e9:.1f}"]  # fmt: skip
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    if results["missing"]:
        lines += [
            "",
            "Not measured: " + "; ".join(sorted(entry.partition(": ")[0] for entry in results["missing"])) + ".",
        ]
    return "\n".join(lines)


def _layers(results: Row) -> str:
    """That a step was not measured whole."""
    layers = results.get("layers", 32)
    return f" Milliseconds of 32 layers are counted from {layers}, of which kernels and GB are." if layers < 32 else ""


def decode_rates(results: Row) -> tuple[str, list[tuple[str, float]]]:
    """Tokens a second of each engine at batch 1 behind the shortest context, and which that is; none if none was measured."""
    found = [(m, row) for row in results["rows"] if (m := _NAME.fullmatch(row["name"])) and m[1] == "decode"]
    alone = [(m, row) for m, row in found if m[3].startswith(", batch 1,")]
    if not alone:
        return "", []
    shortest = min((m[3] for m, _ in alone), key=lambda text: int(re.findall(r"\d+", text)[1]))
    return shortest.removeprefix(", "), [(m[2], 1e3 / milliseconds(row)) for m, row in alone if m[3] == shortest]


def write_page(results: Row, page: Path) -> None:
    """Put the tables between the marks of a page, above them a chart, which lies beside the page."""
    marked = re.compile(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", re.DOTALL)
    text = page.read_text()
    if not marked.search(text):
        sys.exit(f"{page} has no <!-- gpu --> and <!-- /gpu -->")
    made, (what, rates) = tables(results), decode_rates(results)
    if rates:
        chart = page.with_name("decode_gpu.svg")
        bars(rates, chart, f"tokens a second, {what}, {results['device']}")
        made = f"![tokens a second]({chart.name})\n\n{made}"
    page.write_text(marked.sub(lambda m: f"{m[1]}{made}\n{m[2]}", text))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_page(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

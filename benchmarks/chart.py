"""Charts as SVG: bars of rates, and points on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OURS, THEIRS = "#2563eb", "#9ca3af"


def bars(values: Sequence[tuple[str, float]], path: Path, title: str) -> None:
    """(name, value) as bars, the longest below; qpass's own in colour."""
    values = sorted(values, key=lambda pair: pair[1])
    top, height = max(value for _, value in values), 24
    lines = [f'<text x="10" y="22" font-weight="bold">{title}</text>']
    for i, (name, value) in enumerate(values):
        y, width = 36 + i * height, 400 * value / top
        color = OURS if name.startswith("qpass") else THEIRS
        lines.append(f'<text x="270" y="{y + 14}" text-anchor="end">{name}</text>')
        lines.append(f'<rect x="278" y="{y + 2}" width="{width:.0f}" height="{height - 8}" fill="{color}"/>')
        lines.append(f'<text x="{284 + width:.0f}" y="{y + 14}">{value:.0f}</text>')
    _write(lines, path, 760, height * len(values) + 40)


@dataclass(frozen=True)
class Point:
    """`line`: points of one line are joined from left to right; those of "" stand alone."""

    name: str
    x: float
    y: float
    ours: bool
    line: str = ""


def scatter(points: Sequence[Point], path: Path, title: str, x_axis: str, y_axis: str) -> None:
    """Points with a logarithmic scale upwards."""
    width, height, left, top = 760, 440, 70, 40
    right, bottom = width - 30, height - 50
    low, high = (math.log10(pick(p.y for p in points)) for pick in (min, max))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    first, last = min(p.x for p in points) - 4, max(p.x for p in points) + 14

    def place(p: Point) -> tuple[float, float]:
        across = (p.x - first) / (last - first)
        return left + across * (right - left), bottom - (math.log10(p.y) - low) / (high - low) * (bottom - top)

    lines = [f'<text x="10" y="22" font-weight="bold">{title}</text>']
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        y = bottom - (exponent - low) / (high - low) * (bottom - top)
        lines.append(f'<line x1="{left}" y1="{y:.0f}" x2="{right}" y2="{y:.0f}" stroke="#e5e7eb"/>')
        lines.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{10.0**exponent:g}</text>')
    for mark in range(math.ceil(first / 20) * 20, int(last), 20):
        x = left + (mark - first) / (last - first) * (right - left)
        lines.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{mark}</text>')
    lines.append(f'<text x="{(left + right) / 2:.0f}" y="{height - 12}" text-anchor="middle">{x_axis}</text>')
    lines.append(f'<text x="18" y="{top - 6}">{y_axis}</text>')
    for line in dict.fromkeys(p.line for p in points if p.line):
        joined = sorted((p for p in points if p.line == line), key=lambda p: p.x)
        track = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, joined))
        color = OURS if joined[0].ours else THEIRS
        lines.append(f'<polyline points="{track}" fill="none" stroke="{color}"/>')
    for p in points:
        x, y = place(p)
        color = OURS if p.ours else THEIRS
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        lines.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" font-size="11">{p.name}</text>')
    _write(lines, path, width, height)


def _write(lines: Sequence[str], path: Path, width: int, height: int) -> None:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""]))

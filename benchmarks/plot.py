"""Draws what `python -m benchmarks` wrote, as one SVG that needs nothing else: a plot a suite, a panel a case.

A panel has a bar for each rival, in a group for each number of rows: TFLOP/s, or GB/s, or milliseconds, whichever
its rows have first. The GEMM's rate is the line that no bar should pass.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lift_fast.errors import ConfigError

VALUES = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s", "median_ms": "ms"}
CASE = "dim", "dtype", "text", "context", "device"  # what tells one panel from another
CEILING = "torch.mm"
COLORS = "#2a9d8f", "#8ad1c4", "#264653", "#6d7f8b", "#e76f51", "#f4a261", "#e9c46a", "#9b5de5", "#577590", "#b5838d"
COLUMNS, WIDTH, HEIGHT = 4, 270, 190

Row = Mapping[str, Any]


def add_parser(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = names.add_parser("plot", help="draw results")
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="PLOT.svg")


def draw(results: Sequence[Path], out: Path) -> None:
    """Raises ConfigError for a name that does not end in .svg, and when no file has a row to draw."""
    if out.suffix != ".svg":
        raise ConfigError(f"the plot is an SVG: {out} must end in .svg")
    plots = [plot for file in results if (plot := _plot(json.loads(file.read_text())))]
    if not plots:
        raise ConfigError(f"nothing to draw in {', '.join(map(str, results))}: no row has {', '.join(VALUES)}")
    width, height = max(plot[0] for plot in plots), sum(plot[1] for plot in plots)
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="10" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    y = 0
    for _, tall, parts in plots:
        svg += [f'<g transform="translate(0 {y})">', *parts, "</g>"]
        y += tall
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*svg, "</svg>"]) + "\n")


def _plot(result: Mapping[str, Any]) -> tuple[int, int, list[str]] | None:
    """Width, height and elements of a suite's plot; None when none of its rows can be drawn."""
    rows = [row for row in result["rows"] if "what" in row and any(row.get(value) is not None for value in VALUES)]
    if not rows:
        return None
    value = next(value for value in VALUES if rows[0].get(value) is not None)
    rows = [row for row in rows if row.get(value) is not None]
    panels = list(_panels(rows))
    whats = list(dict.fromkeys(_label(row) for row in rows if row["what"] != CEILING))
    color = {what: COLORS[i % len(COLORS)] for i, what in enumerate(whats)}
    width = 20 + WIDTH * min(COLUMNS, max(2, len(panels)))
    where = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    torch = result["versions"].get("torch", "?")
    title = f"{result['suite']}: {VALUES[value]}"
    parts = [
        f'<text x="16" y="24" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="16" y="40" fill="#777">{escape(where)}, torch {escape(torch)}</text>',
    ]
    x, y = 16, 54
    legend = [*whats, *([CEILING] if any(row["what"] == CEILING for row in rows) else [])]
    for what in legend:
        long = 24 + 6 * len(what)
        if x + long > width:
            x, y = 16, y + 16
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{color.get(what, "#d00")}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 9}">{escape(what)}</text>')
        x += long
    top = y + 24
    for i, (name, panel) in enumerate(panels):
        across, down = i % COLUMNS, i // COLUMNS
        parts.append(f'<g transform="translate({10 + across * WIDTH} {top + down * HEIGHT})">')
        parts += [*_panel(name, panel, value, color), "</g>"]
    return width, top + -(-len(panels) // COLUMNS) * HEIGHT + 10, parts


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Int8 text is drawn beside the frozen text it comes from."""
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        text = "frozen" if row.get("text") == "int8" else row.get("text")
        panels.setdefault(tuple(text if name == "text" else row.get(name) for name in CASE), []).append(row)
    for key, panel in panels.items():
        yield (
            ", ".join(
                {"dim": f"D = {word}", "text": f"{word} text", "context": f"n = {word}"}.get(what, str(word))
                for what, word in zip(CASE, key, strict=True)
                if word is not None
            ),
            panel,
        )


def _label(row: Row) -> str:
    return f"{row['what']}, int8 text" if row.get("text") == "int8" else str(row["what"])


def _panel(name: str, rows: Sequence[Row], value: str, color: Mapping[str, str]) -> list[str]:
    left, right, top, bottom = 34, WIDTH - 12, 18, HEIGHT - 30
    step = _round_step(max(row[value] for row in rows))
    most = step * math.ceil(max(row[value] for row in rows) / step)
    sizes = sorted({row.get("rows") or row.get("batch_size") or 0 for row in rows})
    slot = (right - left) / len(sizes)

    def py(height: float) -> float:
        return bottom - (bottom - top) * height / most

    parts = [f'<text x="{left}" y="10" font-weight="bold">{escape(name)}</text>']
    for i in range(round(most / step) + 1):
        y = py(i * step)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end" fill="#777">{i * step:g}</text>')
    for i, size in enumerate(sizes):
        group = [row for row in rows if (row.get("rows") or row.get("batch_size") or 0) == size]
        bars = [row for row in group if row["what"] != CEILING]
        start, wide = left + (i + 0.1) * slot, 0.8 * slot / max(1, len(bars))
        for k, row in enumerate(bars):
            y = py(row[value])
            parts.append(
                f'<rect x="{start + k * wide:.1f}" y="{y:.1f}" width="{max(0.5, wide - 1):.1f}"'
                f' height="{bottom - y:.1f}" fill="{color[_label(row)]}">'
                f"<title>{escape(_label(row))}: {row[value]:.3g} {VALUES[value]}</title></rect>"
            )
        for row in group:
            if row["what"] == CEILING:
                ends = f'x1="{left + i * slot + 2:.1f}" x2="{left + (i + 1) * slot - 2:.1f}"'
                y = py(row[value])
                parts.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="#d00" stroke-dasharray="4 2"/>')
        if size:
            middle = left + (i + 0.5) * slot
            parts.append(f'<text x="{middle:.1f}" y="{bottom + 13}" text-anchor="middle">B = {size:,}</text>')
    return parts


def _round_step(most: float) -> float:
    """A round distance of grid lines, of which at most five reach to `most`."""
    power = 10 ** math.floor(math.log10(most / 5)) if most > 0 else 1
    return next(power * k for k in (1, 2, 5, 10) if power * k >= most / 5)

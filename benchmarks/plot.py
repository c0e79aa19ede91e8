"""Draws results of `python -m benchmarks` as one self-contained SVG: a plot per suite, a panel per case.

A panel has a group of bars for each number of rows, with a bar for each implementation. Bars show TFLOP/s, GB/s or
milliseconds: the first of these that the suite's rows have. A dashed line shows the rate of torch.mm for comparison.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lift_fast.errors import ConfigError
from lift_fast.measure.charts import Frame, Svg, element, ticks
from lift_fast.measure.formatting import integer

VALUES = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s", "median_ms": "ms"}
CASE = "dim", "dtype", "text", "context", "device"  # the fields that panels differ in
CEILING = "torch.mm"
COLORS = "#2a9d8f", "#8ad1c4", "#264653", "#6d7f8b", "#e76f51", "#f4a261", "#e9c46a", "#9b5de5", "#577590", "#b5838d"
CEILING_COLOR = "#d00"
COLUMNS, WIDTH, HEIGHT = 4, 270, 190
STYLE = f"""
svg {{ font: 10px sans-serif; fill: #333 }}
.grid {{ stroke: #e4e4e4 }}
.tick, .machine {{ fill: #777 }}
.title {{ font-size: 16px; font-weight: bold }}
.case {{ font-weight: bold }}
.ceiling {{ stroke: {CEILING_COLOR}; stroke-dasharray: 4 2 }}
"""

Row = Mapping[str, Any]


def add_parser(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = names.add_parser("plot", help="draw results")
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="PLOT.svg")


def draw(results: Sequence[Path], out: Path) -> None:
    """Writes the plots of these files to `out`, one above the other.

    Raises ConfigError if `out` does not end in .svg, and if no file has a row to draw.
    """
    if out.suffix != ".svg":
        raise ConfigError(f"the plot is an SVG: {out} must end in .svg")
    plots = [plot for file in results if (plot := _plot(json.loads(file.read_text())))]
    if not plots:
        raise ConfigError(f"nothing to draw in {', '.join(map(str, results))}: no row has {', '.join(VALUES)}")
    width, height = max(plot[0] for plot in plots), sum(plot[1] for plot in plots)
    parts = [element("style", STYLE), element("rect", width=width, height=height, fill="#fff")]
    y = 0
    for _, plot_height, plot_parts in plots:
        parts.append(_moved(0, y, plot_parts))
        y += plot_height
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    svg = element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(svg.replace("><", ">\n<") + "\n")


def _moved(x: float, y: float, parts: Sequence[Svg]) -> Svg:
    return element("g", *parts, transform=f"translate({x} {y})")


def _plot(result: Mapping[str, Any]) -> tuple[int, int, list[Svg]] | None:
    """Width, height and elements of a suite's plot; None if none of its rows can be drawn."""
    rows = [row for row in result["rows"] if "what" in row and any(row.get(value) is not None for value in VALUES)]
    if not rows:
        return None
    value = next(value for value in VALUES if rows[0].get(value) is not None)
    rows = [row for row in rows if row.get(value) is not None]
    panels = list(_panels(rows))
    labels = list(dict.fromkeys(_label(row) for row in rows if row["what"] != CEILING))
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    width = 20 + WIDTH * min(COLUMNS, max(2, len(panels)))
    machine = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    torch = result["versions"].get("torch", "?")
    legend = colors | ({CEILING: CEILING_COLOR} if any(row["what"] == CEILING for row in rows) else {})
    parts = [
        element("text", f"{result['suite']}: {VALUES[value]}", class_="title", x=16, y=24),
        element("text", f"{machine}, torch {torch}", class_="machine", x=16, y=40),
    ]
    x, y = 16, 54
    for label, color in legend.items():
        length = 24 + 6 * len(label)
        if x + length > width:
            x, y = 16, y + 16
        parts.append(element("rect", x=x, y=y, width=10, height=10, fill=color))
        parts.append(element("text", label, x=x + 14, y=y + 9))
        x += length
    top = y + 24
    for i, (name, panel) in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        parts.append(_moved(10 + column * WIDTH, top + row * HEIGHT, _panel(name, panel, value, colors)))
    return width, top + -(-len(panels) // COLUMNS) * HEIGHT + 10, parts


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yields name and rows of each case. Int8 text shares the panel of frozen text, as it is that text quantized."""
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        text = "frozen" if row.get("text") == "int8" else row.get("text")
        panels.setdefault(tuple(text if name == "text" else row.get(name) for name in CASE), []).append(row)
    for key, panel in panels.items():
        words = {"dim": "D = {}", "text": "{} text", "context": "n = {}"}
        named = zip(CASE, key, strict=True)
        yield ", ".join(words.get(field, "{}").format(value) for field, value in named if value is not None), panel


def _label(row: Row) -> str:
    return f"{row['what']}, int8 text" if row.get("text") == "int8" else str(row["what"])


def _size(row: Row) -> int:
    return row.get("rows") or row.get("batch_size") or 0


def _panel(name: str, rows: Sequence[Row], value: str, colors: Mapping[str, str]) -> list[Svg]:
    y_ticks = ticks(0.0, max(row[value] for row in rows))
    sizes = sorted({_size(row) for row in rows})
    frame = Frame(34, WIDTH - 12, 18, HEIGHT - 30, (0.0, len(sizes)), (0.0, y_ticks[-1]))
    slot = (frame.right - frame.left) / len(sizes)
    parts = [element("text", name, class_="case", x=frame.left, y=10), *frame.grid(y_ticks)]
    for i, size in enumerate(sizes):
        group = [row for row in rows if _size(row) == size]
        bars = [row for row in group if row["what"] != CEILING]
        bar_width = 0.8 * slot / max(1, len(bars))
        for k, row in enumerate(bars):
            label, y = _label(row), frame.y(row[value])
            parts.append(
                element(
                    "rect",
                    element("title", f"{label}: {row[value]:.3g} {VALUES[value]}"),
                    x=frame.x(i + 0.1) + k * bar_width,
                    y=y,
                    width=max(0.5, bar_width - 1),
                    height=frame.bottom - y,
                    fill=colors[label],
                )
            )
        for row in group:
            if row["what"] == CEILING:
                y = frame.y(row[value])
                parts.append(element("line", class_="ceiling", x1=frame.x(i) + 2, x2=frame.x(i + 1) - 2, y1=y, y2=y))
        if size:
            words = f"B = {integer(size)}"
            parts.append(element("text", words, x=frame.x(i + 0.5), y=frame.bottom + 13, text_anchor="middle"))
    return parts

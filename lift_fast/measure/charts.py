"""Charts as SVG text, for the report's page and for `python -m benchmarks plot`.

Kept by hand for a reason: matplotlib would add six packages to every install, its SVG changes with its version and
with the machine's fonts, and it styles each element by itself. Here the same numbers give the same bytes, elements
have classes that a style sheet gives colours to, and a chart refers to nothing outside itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .formatting import fixed


class Svg(str):
    """An element with all its content, as text that is escaped already."""

    def __html__(self) -> str:
        """Lets a template insert the element as it is, where it would escape another string."""
        return self


def element(tag: str, *content: str, **attributes: str | float) -> Svg:
    """An element. Content that is not an Svg is text and is escaped, as attributes are.

    Numbers are rounded to a tenth. In an attribute's name a trailing "_" is dropped, and any other "_" becomes "-":
    class_="grid", text_anchor="end".
    """
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value if isinstance(value, str) else _pixels(value))}"'
        for name, value in attributes.items()
    )
    inside = "".join(part if isinstance(part, Svg) else escape(part) for part in content)
    return Svg(f"<{tag}{words}>{inside}</{tag}>" if inside else f"<{tag}{words}/>")


def _pixels(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # + 0.0: never "-0"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high], at least two, in steps of 1, 2 or 5 times a power of ten."""
    raw, size = (high - low) / about, max(abs(low), abs(high))
    if raw < max(1e-9 * size, 1e-300):  # as good as one number
        raw = max(1.0, 1e-3 * size)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """One label for each tick, all with the decimals that their step needs."""
    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [fixed(value, digits) for value in values]


@dataclass(frozen=True)
class Frame:
    """The area of a chart that holds the data, in pixels, and the range of the data along both axes."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixel of a value; the middle where the range is empty."""
        low, high = self.x_range
        return self.left + (self.right - self.left) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def grid(self, values: Sequence[float]) -> list[Svg]:
        """Horizontal lines at the ticks of the y axis, with their labels."""
        parts = []
        for value, label in zip(values, tick_labels(values), strict=True):
            y = self.y(value)
            parts.append(element("line", class_="grid", x1=self.left, x2=self.right, y1=y, y2=y))
            parts.append(element("text", label, class_="tick", x=self.left - 6, y=y + 4, text_anchor="end"))
        return parts


@dataclass(frozen=True)
class Line:
    """A line of a chart. series: a class of the style sheet, as are the other names."""

    series: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False
    dashed: bool = False


def thinned(points: Sequence[tuple[float, float]], about: int = 500) -> list[tuple[float, float]]:
    """About so many of the points, evenly chosen, the last among them."""
    stride = max(1, math.ceil(len(points) / about))
    return [*points[::stride], *points[-1:]] if stride > 1 else list(points)


def line_chart(
    name: str,
    x_name: str,
    y_name: str,
    lines: Sequence[Line],
    *,
    from_zero: bool = False,
    x_ticks: Sequence[float] | None = None,
    width: int = 440,
    height: int = 250,
) -> Svg | None:
    """Lines over round axes; None where no line has a point. from_zero: the y axis contains zero."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    y_ticks = ticks(*((min(0.0, *ys), max(0.0, *ys)) if from_zero else (min(ys), max(ys))))
    x_range = min(0.0, *xs), max(xs)
    frame = Frame(56, width - 14, 12, height - 44, x_range, (y_ticks[0], y_ticks[-1]))
    middle, centre = (frame.top + frame.bottom) / 2, (frame.left + frame.right) / 2
    parts = [
        *frame.grid(y_ticks),
        *_x_axis(frame, [x for x in x_ticks or ticks(*x_range) if x_range[0] <= x <= x_range[1]]),
        element("text", x_name, class_="label", x=centre, y=height - 6, text_anchor="middle"),
        element("text", y_name, class_="label", transform=f"translate(13 {middle}) rotate(-90)", text_anchor="middle"),
    ]
    for line in lines:
        pixels = [(frame.x(x), frame.y(y)) for x, y in line.points]
        path = " ".join(f"{_pixels(x)},{_pixels(y)}" for x, y in pixels)
        style = " ".join(["line", line.series, *(way for way in ("faint", "dashed") if getattr(line, way))])
        parts.append(element("polyline", class_=style, points=path))
        if line.dots:
            parts += [element("circle", class_=f"dot {line.series}", cx=x, cy=y, r=3) for x, y in pixels]
    return chart(name, width, height, parts)


def _x_axis(frame: Frame, values: Sequence[float]) -> list[Svg]:
    parts = []
    last = -math.inf
    for value, label in zip(values, tick_labels(values), strict=True):
        x = frame.x(value)
        parts.append(element("line", class_="axis", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4))
        if x - last >= 24:  # a label that would touch the one before it is left out
            parts.append(element("text", label, class_="tick", x=x, y=frame.bottom + 18, text_anchor="middle"))
            last = x
    parts.append(element("line", class_="axis", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom))
    return parts


def chart(name: str, width: float, height: float, parts: Sequence[Svg]) -> Svg:
    """The svg element of a chart. name: what a screen reader reads out in its place."""
    return element("svg", *parts, class_="chart", viewBox=f"0 0 {width} {height}", role="img", aria_label=name)


# What all dumbbells share, so that they line up in a column.
_SHARES = Frame(8, 292, 0, 26, (0.0, 1.0), (0.0, 1.0))


def dumbbell(shares: Sequence[tuple[str, float | None]], chance: float | None) -> Svg:
    """One or two shares, each given with its series, as dots joined by a line; a mark shows chance.

    The first dot is smaller and lies on top, so that equal shares look like a dot in a ring.
    """
    frame = _SHARES
    y = (frame.top + frame.bottom) / 2
    parts = [element("line", class_="grid", x1=frame.left, x2=frame.right, y1=y, y2=y)]
    if chance is not None:
        x = frame.x(chance)
        parts.append(element("line", class_="chance", x1=x, x2=x, y1=frame.top, y2=frame.bottom))
    known = [(series, min(1.0, max(0.0, share))) for series, share in shares if share is not None]
    if len(known) == 2:
        larger = max(known, key=lambda pair: pair[1])[0]
        ends = [frame.x(share) for _, share in known]
        parts.append(element("line", class_=f"link {larger}", x1=ends[0], x2=ends[1], y1=y, y2=y))
    for series, share in reversed(known):
        radius = 5 if series == shares[0][0] else 6.5
        parts.append(element("circle", class_=f"dot {series}", cx=frame.x(share), cy=y, r=radius))
    return _on_shares(frame.bottom, parts)


def dumbbell_axis(chance: float | None) -> Svg:
    """The scale of a column of dumbbells, in per cent."""
    marks = [(0.0, "0", "start"), (1.0, "100", "end")]
    if chance is not None:
        marks.append((chance, f"chance, {fixed(100 * chance, 0)}", "middle"))
    labels = [
        element("text", label, class_="tick", x=_SHARES.x(share), y=12, text_anchor=anchor)
        for share, label, anchor in marks
    ]
    return _on_shares(16, labels)


def _on_shares(height: float, parts: Sequence[Svg]) -> Svg:
    width = _SHARES.left + _SHARES.right
    return element("svg", *parts, class_="dumbbell", viewBox=f"0 0 {width} {height}", width=width, aria_hidden="true")

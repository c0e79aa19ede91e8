"""The report of `lift-fast report`: one dict of numbers as JSON, as a page, and as a table in the terminal.

The page is one file without a script or an outside reference; its charts are SVG written here. It prints what
was measured or counted, says which of the two it was, and whoever wins: `verdict` sorts the measures, and the
page's first sentence is built from it. A number that is null, or a part that is missing, is left out or shown
as a dash.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TextIO

from ...files import write_whole

DASH = "–"
THIN = "\u202f"  # narrow space that does not break: 12 000
HARD = "\u00a0"  # space that does not break: 22.3 %
MODELS = (("lift", "LIFT"), ("clip", "CLIP"))
TASKS = {
    "add_obj": "add object",
    "add_att": "add attribute",
    "replace_obj": "replace object",
    "replace_att": "replace attribute",
    "replace_rel": "replace relation",
    "swap_obj": "swap objects",
    "swap_att": "swap attributes",
}
DIRECTIONS = {"i2t": "picture → text", "t2i": "text → picture"}
PAID_ONCE = "LIFT’s embedding is paid once per caption and encoder, whatever the number of epochs and runs."
UNITS = {
    "flops": [(10.0**e, u) for e, u in ((0, "FLOP"), (3, "kFLOP"), (6, "MFLOP"), (9, "GFLOP"), (12, "TFLOP"))],
    "bytes": [(1024.0**e, u) for e, u in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))],
    "ms": [(1e-3, "µs"), (1.0, "ms"), (1e3, "s")],
    "s": [(1.0, "s")],
}


# ---------------------------------------------------------------------------------- numbers and words


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities (a diverged run) as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _get(tree: Any, *keys: str) -> Any:
    """The value at a path of keys, None where the path ends early."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _e(value: Any) -> str:
    return DASH if value is None else escape(str(value))


def _count(n: int | None) -> str:
    return DASH if n is None else f"{n:,}".replace(",", THIN)


def _decimals(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, never an exponent."""
    size = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace(",", THIN)


def _unit(largest: float, kind: str) -> tuple[float, str]:
    """The largest unit of `kind` in which `largest` is at least one."""
    return next((u for u in reversed(UNITS[kind]) if abs(largest) >= u[0]), UNITS[kind][0])


def _amount(value: float | None, kind: str) -> str:
    if value is None:
        return DASH
    if kind == "share":
        return f"{100 * value:.1f}{HARD}%"
    scale, unit = _unit(value, kind)
    return f"{_decimals(value / scale)}{HARD}{unit}"


def _percent(share: float | None, digits: int = 1) -> str:
    """A share as a bare number of per cent, for a table whose head carries the sign."""
    return DASH if share is None else f"{100 * share:.{digits}f}".replace("-", "−")


def _saved(share: float | None) -> str:
    if share is None:
        return DASH
    digits = 3 if 0.9995 <= share < 1 else 1  # "100.0 % less" is left to a cost that is nothing
    return f"{abs(100 * share):.{digits}f}{HARD}% {'less' if share >= 0 else 'more'}"


def _points(lift: float | None, clip: float | None) -> str:
    if lift is None or clip is None:
        return DASH
    return f"{100 * (lift - clip):+.1f}".replace("-", "−")


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# -------------------------------------------------------------------------------------------- who won


@dataclass(frozen=True)
class Measure:
    """What both are compared by. kind: flops, bytes, ms, s (less is better) or share (more is better)."""

    name: str
    kind: str
    lift: float | None
    clip: float | None
    saved: float | None = None  # of a cost: the fraction of CLIP's that LIFT does without
    n: int | None = None  # of a share: how many answers it was counted over
    spread: float | None = None  # of a cost: the larger distance between the quartiles, in the cost's own unit

    @property
    def ahead(self) -> str | None:
        """ "lift", "clip", "close", or None where one was not measured.

        Close: shares within 1.96 standard errors of a difference of two independent counts, costs equal to
        0.05 % or within their spread. The same pictures answer for both models and there is one seed: a guide,
        not a test.
        """
        if self.lift is None or self.clip is None:
            return None
        if self.kind == "share":
            spread = sum(p * (1 - p) for p in (self.lift, self.clip))
            noise = 1.96 * math.sqrt(max(0.0, spread) / self.n) if self.n else 0.0
        else:
            noise = max(5e-4 * max(self.lift, self.clip), self.spread or 0.0)
        if self.lift == self.clip or abs(self.lift - self.clip) < noise:
            return "close"
        return "lift" if (self.lift > self.clip) == (self.kind == "share") else "clip"

    @property
    def difference(self) -> str:
        """LIFT's side of it: '22.3 % less' of a cost, '+4.1 points' of a share."""
        if self.kind != "share":
            return _saved(self.saved)
        points = _points(self.lift, self.clip)
        return points if points == DASH else f"{points}{HARD}points"


def costs(report: dict) -> list[Measure]:
    rows = (
        ("training FLOPs a sample", "flops", "flops_per_sample", "flops"),
        (_memory_name(report), "bytes", "peak_memory_bytes", "memory"),
        ("step time, whole step", "ms", "step_ms", "step_time"),
        ("text time a step", "ms", "text_ms_per_step", "text_time"),
    )
    found = []
    for name, kind, key, saving in rows:
        lift, clip = (_get(report, m, key) for m, _ in MODELS)
        spread = max((s for m, _ in MODELS if (s := _get(report, m, f"{key}_spread")) is not None), default=None)
        found.append(Measure(name, kind, lift, clip, _get(report, "savings", saving), spread=spread))
    if (once := _embedding_s(report)) is not None:
        steps, clip = (_text_steps_s(report, m) for m, _ in MODELS)
        lift = None if steps is None else once + steps
        saved = 1 - lift / clip if lift is not None and clip else None
        found.append(Measure("text over the whole run", "s", lift, clip, saved))
    return found


def _memory_name(report: dict) -> str:
    """Says which figures come from fake tensors: bytes a step would allocate, counted and not measured."""
    counted = [word for m, word in MODELS if _get(report, m, "peak_memory_from") == "fake tensors"]
    if not counted:
        return "peak memory"
    return "peak memory, counted" + ("" if len(counted) == len(MODELS) else f" for {counted[0]}")


def _embedding_s(report: dict) -> float | None:
    """Seconds LIFT spent on its captions before the first step; None where the report does not say."""
    captions, ms = (_get(report, "lift", key) for key in ("captions", "embed_ms_per_caption"))
    return None if captions is None or ms is None else captions * ms / 1e3


def _text_steps_s(report: dict, model: str) -> float | None:
    """Seconds the steps of a run spend on text."""
    loss, ms = (_get(report, model, key) for key in ("loss", "text_ms_per_step"))
    return None if not loss or ms is None else len(loss) * ms / 1e3


def qualities(report: dict) -> list[Measure]:
    def pair(name: str, n: int | None, *path: str) -> Measure:
        return Measure(name, "share", _get(report, "lift", *path), _get(report, "clip", *path), n=n)

    found = []
    for name in _sets(report):
        n = _get(report, "lift", "retrieval", name, "n")
        found += [pair(f"{name} {arrow} R@1", n, "retrieval", name, d, "r1") for d, arrow in DIRECTIONS.items()]
    found.append(pair("composition", _get(report, "lift", "composition", "n"), "composition", "mean"))
    found.append(pair("zero-shot", _get(report, "lift", "zero_shot", "n"), "zero_shot", "top1"))
    return found


def _sets(report: dict) -> list[str]:
    """Names of the retrieval sets either model was scored on, in the report's order."""
    return list(dict.fromkeys(s for m, _ in MODELS for s in _get(report, m, "retrieval") or {}))


def verdict(report: dict) -> dict[str, list[Measure]]:
    """{"lift": what LIFT is ahead on, "clip": ..., "close": ...}; a measure one of them lacks is in none."""
    sides: dict[str, list[Measure]] = {"lift": [], "clip": [], "close": []}
    for m in costs(report) + qualities(report):
        if m.ahead:
            sides[m.ahead].append(m)
    return sides


def summary(report: dict) -> str:
    """One sentence: what was trained, on which machine, who is ahead on what. Plain text."""
    report = _finite(report)
    data, machine = report.get("data") or {}, report.get("machine") or {}
    seen = [_get(report, m, "samples_seen") for m, _ in MODELS]
    if seen[0] == seen[1]:
        amount = f"{_count(seen[0])} samples each"
    else:
        amount = f"{_count(seen[0])} (LIFT) and {_count(seen[1])} (CLIP) samples"
    sources = [f"{_count(_get(d, 'train'))} {name}" for name, d in data.items()]
    origin = f" of {_joined(sources)} pictures" if sources else ""
    cores = f"{_count(machine.get('cores'))} cores of {machine.get('cpu') or 'an unnamed CPU'}"
    places = {word: cores if on == "cpu" else on for m, word in MODELS if (on := _get(report, m, "device"))}
    if len(set(places.values())) == 2:
        place = _joined([f"{where} ({word})" for word, where in places.items()])
    else:
        place = next(iter(places.values()), machine.get("gpu") or cores)

    sides = verdict(report)
    total = sum(map(len, sides.values()))
    named = {k: f" ({'; '.join(m.name for m in side)})" if side else "" for k, side in sides.items()}
    outcome = (
        f"LIFT is ahead on {len(sides['lift']) or 'none'} of {total} measures{named['lift']}, "
        f"CLIP on {len(sides['clip']) or 'none'}{named['clip']}"
    )
    if sides["close"]:
        outcome += f", and {len(sides['close'])} too close to call"
    return f"Trained on {amount}{origin}, on {place}: {outcome if total else 'no measure was taken of both'}."


# --------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Line:
    model: str  # css class: lift or clip
    points: list[tuple[float, float]]
    faint: bool = False
    dots: bool = False


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, a step of 1, 2 or 5 times a power of ten, that cover [low, high]."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _tick_words(ticks: Sequence[float]) -> list[str]:
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t:,.{digits}f}".replace(",", THIN).replace("-", "−") for t in ticks]


def line_chart(
    name: str,
    x_name: str,
    y_name: str,
    lines: Sequence[Line],
    from_zero: bool = False,
    x_at: Sequence[float] | None = None,
    width: int = 500,
    height: int = 270,
) -> str:
    """An SVG of lines over round axes, x ticks at `x_at` if given; a note where there is nothing to draw."""
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<p class="none">{_e(name)}: not measured</p>'
    xs, ys = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    y_ticks = _ticks(*((min(0.0, *ys), max(0.0, *ys)) if from_zero else (min(ys), max(ys))))
    if len(y_ticks) == 1:  # a flat line on a round number
        y_ticks.append(y_ticks[0] + 1)
    x0, x1 = min(0.0, *xs), max(xs)
    left, right, top, bottom = 56, width - 14, 12, height - 44

    def px(x: float) -> float:
        return left + (right - left) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def py(y: float) -> float:
        return bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    svg = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{_e(name)}">']
    for tick, word in zip(y_ticks, _tick_words(y_ticks), strict=True):
        y = py(tick)
        svg.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        svg.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{word}</text>')
    x_ticks = [t for t in (x_at or _ticks(x0, x1)) if x0 <= t <= x1]
    edge = -math.inf
    for tick, word in zip(x_ticks, _tick_words(x_ticks), strict=True):
        x = px(tick)
        svg.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        if x - edge >= 24:  # a label that would touch the one before it is left out
            svg.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{word}</text>')
            edge = x
    svg.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle, centre = (top + bottom) / 2, (left + right) / 2
    svg.append(f'<text class="label" x="{centre}" y="{height - 6}" text-anchor="middle">{_e(x_name)}</text>')
    svg.append(
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{_e(y_name)}</text>'
    )
    for line in lines:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        svg.append(f'<polyline class="line {line.model}{" faint" if line.faint else ""}" points="{path}"/>')
        if line.dots:
            svg += [
                f'<circle class="dot {line.model}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>' for x, y in line.points
            ]
    svg.append("</svg>")
    return "".join(svg)


def _bars(measures: Sequence[Measure]) -> str:
    """Paired bars, each pair to its own scale: the larger of the two is full length."""
    left = max(172, 8 + 7 * max((len(m.name) for m in measures), default=0))
    full, row, width = 712 - left, 66, 1000
    height = row * len(measures)
    svg = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="cost of LIFT and CLIP">']
    for i, m in enumerate(measures):
        y = i * row + 6
        if i:
            svg.append(f'<line class="grid" x1="0" x2="{width}" y1="{i * row}" y2="{i * row}"/>')
        svg.append(f'<text class="name" x="0" y="{y + 32}">{_e(m.name)}</text>')
        longest = max(m.lift or 0, m.clip or 0)
        for j, (model, word) in enumerate(MODELS):
            value = m.lift if model == "lift" else m.clip
            length = max(1.5, full * value / longest) if value and longest else 0
            top = y + 5 + j * 23
            svg.append(f'<rect class="bar {model}" x="{left}" y="{top}" width="{length:.1f}" height="19" rx="2"/>')
            svg.append(
                f'<text class="value" x="{left + length + 8:.1f}" y="{top + 14}">'
                f'<tspan class="{model}">{word}</tspan> {_amount(value, m.kind)}</text>'
            )
        svg.append(f'<text class="saving" x="{width}" y="{y + 33}" text-anchor="end">{m.difference}</text>')
    svg.append("</svg>")
    return "".join(svg)


def _dumbbell(lift: float | None, clip: float | None) -> str:
    """Both shares on a line from 0 to 100 %, with a mark at chance, 50 %."""
    width, height = 360, 26
    y = height / 2

    def px(share: float) -> float:
        return 8 + (width - 16) * min(1.0, max(0.0, share))

    svg = [f'<svg class="dumbbell" viewBox="0 0 {width} {height}" width="{width}" aria-hidden="true">']
    svg.append(f'<line class="grid" x1="8" x2="{width - 8}" y1="{y}" y2="{y}"/>')
    svg.append(f'<line class="chance" x1="{px(0.5)}" x2="{px(0.5)}" y1="0" y2="{height}"/>')
    if lift is not None and clip is not None:
        ends = f'x1="{px(lift):.1f}" x2="{px(clip):.1f}"'
        svg.append(f'<line class="link {"lift" if lift >= clip else "clip"}" {ends} y1="{y}" y2="{y}"/>')
    for model, share, radius in (("clip", clip, 6.5), ("lift", lift, 5)):  # equal shares: a dot in a ring
        if share is not None:
            svg.append(f'<circle class="dot {model}" cx="{px(share):.1f}" cy="{y}" r="{radius}"/>')
    svg.append("</svg>")
    return "".join(svg)


def _loss_lines(model: str, loss: Sequence[float | None]) -> list[Line]:
    """The raw losses, thinned to at most 500 points, under their running mean."""
    points = [(float(i + 1), v) for i, v in enumerate(loss) if v is not None]
    half = max(1, len(points) // 60)
    sums = [0.0]
    for _, v in points:
        sums.append(sums[-1] + v)
    mean = []
    for i, (x, _) in enumerate(points):
        first, end = max(0, i - half), min(len(points), i + half + 1)
        mean.append((x, (sums[end] - sums[first]) / (end - first)))
    stride = max(1, math.ceil(len(points) / 500))
    raw, bold = ([*line[::stride], *line[-1:]] for line in (points, mean))
    return [Line(model, raw, faint=True), Line(model, bold)]


# ------------------------------------------------------------------------------------------- the page


def _pair_cells(lift: float | None, clip: float | None, show: Callable[[float | None], str] = _percent) -> str:
    """Two table cells, the better (larger) in bold."""
    cells = []
    for model, mine, other in (("lift", lift, clip), ("clip", clip, lift)):
        best = mine is not None and other is not None and mine > other
        cells.append(f'<td class="n {model}{" best" if best else ""}">{show(mine)}</td>')
    return "".join(cells)


def _table(head: str, rows: Sequence[str], kind: str = "") -> str:
    return f'<table class="{kind}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _section(title: str, *parts: str, note: str = "") -> str:
    """A titled part of the page; nothing where it has no content."""
    body = "".join(parts)
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{lead}{body}</section>" if body else ""


def _figure(title: str, chart: str) -> str:
    legend = "".join(f'<span class="key {m}">{word}</span>' for m, word in MODELS)
    return f"<figure><figcaption><b>{title}</b>{legend}</figcaption>{chart}</figure>"


def _header(report: dict) -> str:
    sets = _sets(report)
    quality = qualities(report)
    r1 = [(m.lift, m.clip) for m in quality[: 2 * len(sets)] if m.lift is not None and m.clip is not None]
    tiles = costs(report)[:3] + quality[2 * len(sets) :]
    if r1:
        lift, clip = (sum(side) / len(r1) for side in zip(*r1, strict=True))
        tiles.insert(3, Measure("retrieval R@1, mean", "share", lift, clip))
    cards = []
    for m in tiles:
        values = "".join(
            f'<div class="{model}"><i>{word}</i>{_amount(v, m.kind)}</div>'
            for (model, word), v in zip(MODELS, (m.lift, m.clip), strict=True)
        )
        cards.append(f'<div class="tile"><h3>{_e(m.name)}</h3>{values}<p>LIFT: {m.difference}</p></div>')
    sides = verdict(report)
    columns = []
    for side, title in (("lift", "LIFT is ahead"), ("clip", "CLIP is ahead"), ("close", "Too close to call")):
        items = []
        for m in sides[side]:
            values = f'<b class="lift">{_amount(m.lift, m.kind)}</b><b class="clip">{_amount(m.clip, m.kind)}</b>'
            items.append(f"<li><span>{_e(m.name)}</span>{values}</li>")
        listed = f"<ul>{''.join(items)}</ul>" if items else '<p class="none">nothing</p>'
        columns.append(f'<div class="side {side}"><h3>{title}</h3>{listed}</div>')
    steps = ""
    if any(m.spread is not None for m in costs(report)):
        steps = "the step time where the medians differ by less than the larger distance between the quartiles; "
    return (
        f'<header><h1><span class="lift">LIFT</span> beside <span class="clip">CLIP</span></h1>'
        f'<p class="summary">{_e(summary(report))}</p></header>'
        f'<div class="tiles">{"".join(cards)}</div><div class="sides">{"".join(columns)}</div>'
        '<p class="small">Less is better for the costs, more for the rest. '
        f"A share is too close to call within 1.96 standard errors of the difference; {steps}"
        "one seed, so read small gaps with care.</p>"
    )


def _training(report: dict) -> str:
    lines = [line for m, _ in MODELS for line in _loss_lines(m, _get(report, m, "loss") or [])]
    lines.sort(key=lambda line: not line.faint)  # the means lie on top
    rows = (
        ("trained parameters", "params", _count),
        ("samples seen", "samples_seen", _count),
        ("pictures a second", "images_per_s", lambda v: DASH if v is None else _decimals(v)),
        ("seconds", "seconds", lambda v: DASH if v is None else _count(round(v))),
        ("pictures skipped", "skipped_pictures", _count),
    )
    body = [
        f"<tr><td>{name}</td>"
        + "".join(f'<td class="n {m}">{show(_get(report, m, key))}</td>' for m, _ in MODELS)
        + "</tr>"
        for name, key, show in rows
    ]
    for n in dict.fromkeys(n for m, _ in MODELS for n in _get(report, m, "text_ms_by_context") or {}):
        cells = "".join(
            f'<td class="n {m}">{_amount(_get(report, m, "text_ms_by_context", n), "ms")}</td>' for m, _ in MODELS
        )
        body.append(f"<tr><td>text a step, n = {_e(n)}</td>{cells}</tr>")
    if any(_get(report, m, "step_ms_spread") is not None for m, _ in MODELS):
        cells = "".join(f'<td class="n {m}">{_amount(_get(report, m, "step_ms_spread"), "ms")}</td>' for m, _ in MODELS)
        body.append(f"<tr><td>step time, between the quartiles</td>{cells}</tr>")
    head = '<tr><th>run</th><th class="n lift">LIFT</th><th class="n clip">CLIP</th></tr>'
    name = _get(report, "lift", "encoder", "name")
    encoder = f"LIFT’s frozen text encoder{'' if name is None else f', {_e(name)},'} is not counted"
    chart = line_chart("training loss", "step", "loss", lines, width=600, height=300)
    return _section(
        "Training",
        f'<div class="two wide">{_figure("Training loss", chart)}{_table(head, body)}</div>',
        note="Bold lines are running means over the raw losses. The two learn against different texts: "
        f"compare the shapes, not the heights. Trained parameters: {encoder}.",
    )


def _costs(report: dict) -> str:
    memory = ", memory on fake tensors" if "counted" in _memory_name(report) else ""
    return _section(
        "What training costs",
        _bars(costs(report)),
        '<p class="small">LIFT’s text time is gather and widen from the training caches. CLIP’s leaves out reading '
        "captions from disk, and the optimizer’s work on the text tower.</p>",
        _whole_run(report),
        note="Each pair is drawn to its own scale. Times are measured; FLOPs, forward and backward, are counted "
        f"by torch’s counter{memory}.",
    )


def _whole_run(report: dict) -> str:
    """What text costs each run from the first caption to the last step: LIFT's embedding stands beside its steps."""
    once = _embedding_s(report)
    if once is None:
        return ""
    total = costs(report)[-1]
    rows = []
    for (model, word), whole in zip(MODELS, (total.lift, total.clip), strict=True):
        steps, ms = len(_get(report, model, "loss") or []), _get(report, model, "text_ms_per_step")
        before = "nothing"
        if model == "lift":
            captions, each = (_get(report, model, key) for key in ("captions", "embed_ms_per_caption"))
            before = f"{_count(captions)} captions × {_amount(each, 'ms')} = {_amount(once, 's')}"
        rows.append(
            f'<tr><td class="{model}">{word}</td><td class="n">{before}</td>'
            f'<td class="n">{_count(steps)} × {_amount(ms, "ms")} = {_amount(_text_steps_s(report, model), "s")}</td>'
            f'<td class="n {model} best">{_amount(whole, "s")}</td></tr>'
        )
    head = '<tr><th>model</th><th class="n">once</th><th class="n">steps</th><th class="n">whole run</th></tr>'
    title = "<h3>Text over the whole run, from the times a caption and a step</h3>"
    return f'{title}{_table(head, rows)}<p class="note">{PAID_ONCE}</p>'


def _lengths(report: dict) -> str:
    rows = sorted(report.get("cost_against_length") or [], key=lambda r: r["context"])
    if not rows:
        return ""
    charts = []
    for title, y_name, key, kind in (
        ("Training FLOPs a sample, counted", "a sample", "flops", "flops"),
        ("Text time a step, measured", "a step", "text_ms", "ms"),
    ):
        known = {
            m: [(r["context"], r[f"{m}_{key}"]) for r in rows if _get(r, f"{m}_{key}") is not None] for m, _ in MODELS
        }
        scale, unit = _unit(max((y for line in known.values() for _, y in line), default=0), kind)
        lines = [Line(m, [(x, y / scale) for x, y in known[m]], dots=True) for m in ("clip", "lift")]
        at = [r["context"] for r in rows]
        chart = line_chart(title, "caption length n, tokens", f"{unit} {y_name}", lines, from_zero=True, x_at=at)
        charts.append(_figure(title, chart))
    return _section("Cost against caption length", f'<div class="two">{"".join(charts)}</div>')


def _retrieval(report: dict) -> str:
    rows = []
    for name in _sets(report):
        n = next((n for m, _ in MODELS if (n := _get(report, m, "retrieval", name, "n"))), None)
        for direction, arrow in DIRECTIONS.items():
            cells = "".join(
                _pair_cells(*(_get(report, m, "retrieval", name, direction, r) for m, _ in MODELS))
                for r in ("r1", "r5", "r10")
            )
            chance = _percent(1 / n, 2) if n else DASH
            rows.append(
                f"<tr><td>{_e(name)}</td><td>{arrow}</td>{cells}"
                f'<td class="n">{chance}</td><td class="n">{_count(n)}</td></tr>'
            )
    pair = '<th class="n lift">LIFT</th><th class="n clip">CLIP</th>'
    head = (
        '<tr><th rowspan="2">set</th><th rowspan="2">direction</th><th colspan="2" class="mid">R@1, %</th>'
        '<th colspan="2" class="mid">R@5, %</th><th colspan="2" class="mid">R@10, %</th>'
        f'<th rowspan="2" class="n">chance R@1, %</th><th rowspan="2" class="n">n</th></tr>'
        f"<tr>{pair * 3}</tr>"
    )
    return _section("Retrieval", _table(head, rows) if rows else "", note="The better of the two is in bold.")


def _composition(report: dict) -> str:
    if not any(_get(report, m, "composition") for m, _ in MODELS):
        return ""
    rows = []
    for key, name in {**TASKS, "mean": "mean of the seven"}.items():
        lift, clip = (_get(report, m, "composition", key) for m, _ in MODELS)
        rows.append(
            f'<tr class="{"total" if key == "mean" else ""}"><td>{name}</td>{_pair_cells(lift, clip)}'
            f'<td class="n">{_points(lift, clip)}</td><td class="plot">{_dumbbell(lift, clip)}</td></tr>'
        )
    axis = (
        '<svg class="dumbbell" viewBox="0 0 360 16" width="360" aria-hidden="true">'
        '<text class="tick" x="8" y="12">0</text>'
        '<text class="tick" x="180" y="12" text-anchor="middle">chance, 50</text>'
        '<text class="tick" x="352" y="12" text-anchor="end">100</text></svg>'
    )
    head = (
        '<tr><th>task</th><th class="n lift">LIFT, %</th><th class="n clip">CLIP, %</th>'
        f'<th class="n">points</th><th class="plot">{axis}</th></tr>'
    )
    n = next((n for m, _ in MODELS if (n := _get(report, m, "composition", "n"))), None)
    note = (
        "The true caption against a foil with something replaced, swapped or added. In the add tasks both sides "
        "add to a common base: the caption something that is in the picture, the foil something that is not. "
        f"{_count(n)} choices of two, chance 50{HARD}%."
    )
    return _section("Composition", _table(head, rows), note=note)


def _zero_shot(report: dict) -> str:
    known = {m: _get(report, m, "zero_shot") for m, _ in MODELS}
    shared = known["lift"] or known["clip"]
    lift, clip = (_get(known[m], "top1") for m, _ in MODELS)
    head = (
        '<tr><th class="n lift">LIFT, %</th><th class="n clip">CLIP, %</th><th class="n">chance, %</th>'
        '<th class="n">largest class, %</th><th class="n">classes</th><th class="n">n</th></tr>'
    )
    row = (
        f'<tr>{_pair_cells(lift, clip)}<td class="n">{_percent(_get(shared, "chance"))}</td>'
        f'<td class="n">{_percent(_get(shared, "majority"))}</td>'
        f'<td class="n">{_count(_get(shared, "classes"))}</td>'
        f'<td class="n">{_count(_get(shared, "n"))}</td></tr>'
    )
    return _section("Zero-shot classification", _table(head, [row], "narrow"))


def _paper_scale(report: dict) -> str:
    scale = report.get("paper_scale") or {}
    parts = []
    rows = []
    for n in (77, 128):
        if p := scale.get(f"n{n}"):
            rows.append(
                f'<tr><td>n = {n}</td><td class="n best">{_percent(_get(p, "flops_saved"))}</td>'
                f'<td class="n">{_percent(_get(p, "paper_flops_saved"))}</td>'
                f'<td class="n best">{_percent(_get(p, "memory_saved"))}</td>'
                f'<td class="n">{_percent(_get(p, "paper_memory_saved"))}</td></tr>'
            )
    if rows:
        ours_and_theirs = '<th class="n">ours</th><th class="n">the paper</th>'
        head = (
            '<tr><th rowspan="2">caption</th><th colspan="2" class="mid">FLOPs saved, %</th>'
            '<th colspan="2" class="mid">memory saved, %</th></tr>'
            f"<tr>{ours_and_theirs * 2}</tr>"
        )
        parts.append(_table(head, rows))
        regime = f"Our memory: {_e(scale.get('regime'))}, batch {_count(scale.get('batch_size'))}. "
        parts.append(f'<p class="note">{regime}{_e(scale.get("why") or "")}</p>')
    rows = [
        f'<tr><td class="n">{_count(_get(r, "context"))}</td>'
        f"<td>{_e(_get(r, 'checkpointing'))}</td>"
        f'<td class="n">{_count(_get(r, "batch_size"))}</td>'
        + "".join(
            f'<td class="n lift">{_amount(_get(r, f"lift_{key}"), kind)}</td>'
            f'<td class="n clip">{_amount(_get(r, f"clip_{key}"), kind)}</td>'
            f'<td class="n best">{_percent(_get(r, f"{saved}_saved"))}</td>'
            for key, kind, saved in (("flops", "flops", "flops"), ("memory_bytes", "bytes", "memory"))
        )
        + "</tr>"
        for r in scale.get("rows") or []
    ]
    if rows:
        triple = '<th class="n lift">LIFT</th><th class="n clip">CLIP</th><th class="n">saved, %</th>'
        head = (
            '<tr><th rowspan="2" class="n">n</th><th rowspan="2">checkpointing</th>'
            '<th rowspan="2" class="n">batch</th>'
            '<th colspan="3" class="mid">forward FLOPs a sample</th>'
            '<th colspan="3" class="mid">peak memory, counted</th></tr>'
            f"<tr>{triple * 2}</tr>"
        )
        parts.append(f"<h3>In each regime</h3>{_table(head, rows)}")
    return _section(
        "At the paper’s scale",
        *parts,
        note="ViT-B/16, 224 px, not trained here. Ours: forward FLOPs by torch’s counter, memory counted on fake "
        "tensors.",
    )


def _published(report: dict) -> str:
    """The paper's own results. Rows of one data set stand together; the best of them is in bold."""
    results = report.get("paper_results") or {}
    retrieval = {
        "imagenet": "ImageNet-1K zero-shot",
        "coco_i2t": "COCO i→t",
        "coco_t2i": "COCO t→i",
        "flickr_i2t": "Flickr30K i→t",
        "flickr_t2i": "Flickr30K t→i",
    }
    tables = []
    for key, title, columns in (
        ("sugarcrepe", "SugarCrepe, %", TASKS),
        ("retrieval", "ImageNet top-1 and retrieval R@1, %", retrieval),
    ):
        rows = results.get(key) or []
        body = []
        for row in rows:
            rivals = [r for r in rows if r.get("data") == row.get("data")]
            cells = []
            for c in columns:
                value = row.get(c)
                best = value is not None and all(value >= (r.get(c) or 0) for r in rivals)
                cells.append(f'<td class="n{" best" if best else ""}">{DASH if value is None else f"{value:.1f}"}</td>')
            model = str(row.get("model"))
            kind = f' class="{model.lower()}"' if model in ("LIFT", "CLIP") else ""
            seen = f", {_e(row['seen'])} seen" if row.get("seen") else ""
            body.append(f"<tr><td{kind}>{_e(model)}</td><td>{_e(row.get('data'))}{seen}</td>{''.join(cells)}</tr>")
        if body:
            names = "".join(f'<th class="n">{c}</th>' for c in columns.values())
            head = f"<tr><th>model</th><th>data</th>{names}</tr>"
            tables.append(f"<h3>{title}</h3>{_table(head, body, 'tight')}")
    return _section(
        "The paper’s published results",
        *tables,
        note="<strong>The paper’s numbers, not ours</strong> (arXiv 2506.04209, ViT-B/16), "
        "copied for comparison, not reproduced here. The better of a pair is in bold.",
    )


def _pictures(report: dict) -> str:
    cards = []
    for p in report.get("pictures") or []:
        guesses = "".join(
            f'<div class="guess {m}"><span class="{"tick-mark" if p.get(f"{m}_right") else "cross-mark"}">'
            f"{'✓' if p.get(f'{m}_right') else '✗'}</span><div><i>{word}</i> {_e(p.get(m))}</div></div>"
            for m, word in MODELS
        )
        cards.append(
            f'<div class="card"><img alt="{_e(p.get("caption"))}" '
            f'src="data:image/png;base64,{_e(p.get("png_base64") or "")}">'
            f'<div class="words"><b>{_e(p.get("caption"))}</b><small>{_e(p.get("set"))}</small>'
            f"{guesses}</div></div>"
        )
    grid = f'<div class="cards">{"".join(cards)}</div>' if cards else ""
    return _section("Pictures", grid, note="The true caption in bold, then the caption each model ranks first.")


def _footer(report: dict) -> str:
    machine = report.get("machine") or {}
    memory = machine.get("memory_gib")
    facts = [
        (
            "machine",
            f"{_e(machine.get('cpu'))}, {_count(machine.get('cores'))} cores, "
            f"{DASH if memory is None else _decimals(memory)}{HARD}GiB, "
            f"GPU: {_e(machine.get('gpu') or 'none')}, "
            f"{_e(machine.get('os'))}",
        ),
        (
            "versions",
            ", ".join(f"{_e(k)} {_e(v)}" for k, v in (report.get("versions") or {}).items()) or DASH,
        ),
        ("seed", _e(report.get("seed"))),
        ("command", f"<code>{_e(report.get('command'))}</code>"),
        (
            "data",
            "; ".join(
                f"{_e(name)}: {_count(_get(d, 'train'))} to train, {_count(_get(d, 'heldout'))} held out"
                for name, d in (report.get("data") or {}).items()
            )
            or DASH,
        ),
    ]
    if "openmoji" in (report.get("data") or {}) or any(
        p.get("set") == "openmoji" for p in report.get("pictures") or []
    ):
        facts.append(("pictures", "OpenMoji, CC BY-SA 4.0"))
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts)

    configs = [_get(report, m, "config") or {} for m, _ in MODELS]
    rows = []
    for key in dict.fromkeys(k for c in configs for k in c):
        words = [json.dumps(c[key], ensure_ascii=False).strip('"') if key in c else None for c in configs]
        kind = "" if words[0] == words[1] else ' class="differs"'
        rows.append(f"<tr{kind}><td>{_e(key)}</td>{''.join(f'<td>{_e(w)}</td>' for w in words)}</tr>")
    head = '<tr><th>setting</th><th class="lift">LIFT</th><th class="clip">CLIP</th></tr>'
    settings = (
        f"<details><summary>Settings of both runs</summary>{_table(head, rows, 'tight')}</details>" if rows else ""
    )
    return f"<footer><dl>{listed}</dl>{settings}</footer>"


STYLE = """
:root{--lift:#0b6e8c;--clip:#c2601c;--lift-wash:#e9f3f6;--clip-wash:#fbf0e7;--ink:#1c2329;--soft:#5d6873;--rule:#dfe4e8}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:15px/1.5 -apple-system,"Segoe UI",Roboto,"Noto Sans",
"Liberation Sans",Arial,system-ui,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:36px 40px 28px}
h1{font-size:34px;line-height:1.2;margin:0 0 10px;font-weight:650;letter-spacing:-.02em}
h2{font-size:20px;margin:0 0 12px;font-weight:650;letter-spacing:-.01em}
h3{font-size:14px;margin:18px 0 6px;font-weight:600}
section{margin-top:38px;padding-top:18px;border-top:2px solid var(--ink)}
.summary{font-size:16.5px;line-height:1.55;margin:0;max-width:900px}
.note{color:var(--soft);margin:0 0 14px;max-width:860px}
h2+.note{margin-top:-8px}
table+.note{margin-top:8px}
.small{color:var(--soft);font-size:12.5px;margin:8px 0 0}
.none{color:var(--soft);margin:0}
i{font-style:normal}
h1 .lift,td.lift,th.lift,tspan.lift,.guess.lift i,.side.lift h3,li .lift{color:var(--lift)}
h1 .clip,td.clip,th.clip,tspan.clip,.guess.clip i,.side.clip h3,li .clip{color:var(--clip)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:24px 0 14px}
.tile{border:1px solid var(--rule);border-radius:6px;padding:12px 12px 10px;display:flex;flex-direction:column}
.tile h3{flex:1;margin:0 0 6px;font-size:12.5px;color:var(--soft);font-weight:500}
.tile div{font-size:16.5px;line-height:1.4;font-weight:650;white-space:nowrap}
.tile div.lift{color:var(--lift)}
.tile div.clip{color:var(--clip)}
.tile i{display:inline-block;width:34px;font-size:11.5px;font-weight:500}
.tile p{margin:6px 0 0;font-size:12.5px;color:var(--soft);border-top:1px solid var(--rule);padding-top:6px}
.sides{display:grid;grid-template-columns:repeat(3,1fr);gap:10px}
.side{border-radius:6px;padding:11px 14px;background:#f4f6f7;font-size:13px}
.side.lift{background:var(--lift-wash)}
.side.clip{background:var(--clip-wash)}
.side h3{margin:0 0 4px}
.side ul{list-style:none;margin:0;padding:0}
.side li{display:flex;gap:8px;padding:2px 0}
.side li span{flex:1}
.side li b{white-space:nowrap;font-weight:600;text-align:right;min-width:46px}
.two{display:grid;grid-template-columns:1fr 1fr;gap:28px;align-items:start}
.two.wide{grid-template-columns:3fr 2fr}
figure{margin:0}
figcaption{font-size:14px;margin-bottom:6px;display:flex;gap:16px;align-items:baseline}
.key{font-size:12.5px;color:var(--soft)}
.key::before{content:"";display:inline-block;width:16px;height:3px;margin-right:5px;vertical-align:middle}
.key.lift::before{background:var(--lift)}
.key.clip::before{background:var(--clip)}
svg{display:block;font-family:inherit}
.chart{width:100%;height:auto}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:#97a1aa;stroke-width:1}
.tick{font-size:12px;font-weight:400;fill:var(--soft)}
.label{font-size:12.5px;fill:var(--soft)}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;opacity:.32}
.line.lift,.link.lift{stroke:var(--lift)}
.line.clip,.link.clip{stroke:var(--clip)}
.link{stroke-width:3;opacity:.35}
.dot{stroke:#fff;stroke-width:1.2}
.bar.lift,.dot.lift,tspan.lift{fill:var(--lift)}
.bar.clip,.dot.clip,tspan.clip{fill:var(--clip)}
.chance{stroke:#68737d;stroke-width:1.2;stroke-dasharray:3 3}
.name{font-size:14.5px;fill:var(--ink)}
.value{font-size:13.5px;fill:var(--ink)}
.value tspan{font-weight:600}
.saving{font-size:17px;font-weight:650;fill:var(--ink)}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:600;text-align:left;vertical-align:bottom;
color:var(--soft);font-size:12.5px;line-height:1.3;padding:4px 10px}
thead tr:last-child th,thead th[rowspan]{border-bottom:1px solid #97a1aa}
td{padding:5px 10px;border-bottom:1px solid var(--rule)}
.n{text-align:right;white-space:nowrap}
th.n{white-space:normal}
th.mid{text-align:center}
th.mid::after{content:"";display:block;border-bottom:1px solid #97a1aa;margin-top:4px}
td.lift,td.clip{font-weight:450}
.best,td.lift.best,td.clip.best{font-weight:700}
.total td{border-top:1px solid #97a1aa;font-weight:600}
.plot{width:380px;padding-top:0;padding-bottom:0}
.plot svg{margin-left:auto}
.narrow{width:auto}
.narrow td,.narrow th{padding-right:26px}
.tight td,.tight th{padding:4px 7px;font-size:13px}
.tight th{font-size:12px}
.differs td{font-weight:600}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:12px}
.card{display:flex;gap:12px;border:1px solid var(--rule);border-radius:6px;padding:10px;break-inside:avoid}
.card img{width:84px;height:84px;flex:none;background:#fff;border-radius:3px}
.words{min-width:0;overflow-wrap:anywhere;font-size:13px;line-height:1.38;flex:1}
.words b{font-weight:650}
.words small{color:var(--soft);margin-left:6px;font-size:11.5px}
.guess{display:flex;gap:6px;margin-top:4px}
.guess i{font-weight:600;font-size:11.5px}
.tick-mark,.cross-mark{font-weight:700;flex:none;width:13px}
.tick-mark{color:#1a7f4b}
.cross-mark{color:#b3261e}
footer{margin-top:38px;padding-top:16px;border-top:2px solid var(--ink);font-size:13px;color:var(--soft)}
dl{display:grid;grid-template-columns:90px 1fr;gap:3px 10px;margin:0}
dt{font-weight:600}
dd{margin:0;overflow-wrap:anywhere}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
details{margin-top:12px}
summary{cursor:pointer;font-weight:600}
details table{margin-top:6px;color:var(--ink)}
@media (max-width:800px){main{padding:20px 16px}.two,.two.wide,.sides,.cards{grid-template-columns:1fr}
section{overflow-x:auto}}
@media print{@page{margin:14mm}main{max-width:none;padding:0}body{font-size:12px}
section{break-inside:avoid-page}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def render_html(report: dict) -> str:
    """The page, whole in one string: style, charts and pictures inside, no script, nothing fetched."""
    report = _finite(report)
    parts = (
        _header,
        _training,
        _costs,
        _lengths,
        _retrieval,
        _composition,
        _zero_shot,
        _paper_scale,
        _published,
        _pictures,
        _footer,
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser holds the page to its promise: pictures from data, style from inside, nothing else.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>LIFT beside CLIP</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, (part(report) for part in parts)))
        + "\n</main></body></html>\n"
    )


def write(report: dict, folder: Path) -> None:
    """report.json and report.html into `folder`, each replaced whole; on an error the old files stay."""
    texts = {
        "report.json": json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render_html(report),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole({folder / name: text.encode() for name, text in texts.items()})


def print_table(report: dict, file: TextIO | None = None) -> None:
    """Costs, scores and the sentence to `file` or stdout, ASCII but for names, `*` at the one ahead."""
    report = _finite(report)
    rows = [("", "LIFT", "CLIP", "LIFT against CLIP")]
    for m in costs(report) + qualities(report):
        values = [
            f"{_amount(v, m.kind)} {'*' if m.ahead == side else ' '}"
            for side, v in (("lift", m.lift), ("clip", m.clip))
        ]
        rows.append((m.name, values[0], values[1], m.difference))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    if (once := _embedding_s(report)) is not None:
        captions, each = (_get(report, "lift", key) for key in ("captions", "embed_ms_per_caption"))
        paid = f"{_count(captions)} captions x {_amount(each, 'ms')} = {_amount(once, 's')} of embedding"
        lines += ["", f"Text over the whole run holds {paid}.", PAID_ONCE]
    text = "\n".join([*lines, "", summary(report)])
    plain = str.maketrans({THIN: " ", HARD: " ", "−": "-", DASH: "-", "→": "->", "µ": "u", "’": "'"})
    print(text.translate(plain), file=file or sys.stdout)

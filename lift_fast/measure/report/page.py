"""The report as one HTML page: the template page.html.j2, filled from the report's dict.

The page has no script and no outside reference: style, charts and images are inside. The template escapes every
string, raises for a name that it is not given, and shows None as a dash. Parts that the report lacks are left out.

Each function below prepares one part of the page: numbers and plain strings for the template, and charts.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...sugarcrepe import TASKS
from ..charts import Bar, Line, Svg, dumbbell, dumbbell_axis, line_chart, paired_bars
from ..formatting import DASH, amount, integer, percent, points, significant, unit_for
from ..paper import RETRIEVAL_TASKS
from .comparison import (
    DIRECTIONS,
    PAID_ONCE,
    Measure,
    averages,
    costs,
    embedding_s,
    memory_name,
    retrieval,
    retrieval_sets,
    summary,
    text_steps_s,
    verdict,
)
from .fields import MODELS, both, either, finite, get

# The paper's tables: key in the report, title, and each column's key and head.
PUBLISHED = (
    ("sugarcrepe", "SugarCrepe, %", TASKS),
    ("retrieval", "ImageNet top-1 and retrieval R@1, %", RETRIEVAL_TASKS),
)

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=lambda value: DASH if value is None else value,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"amount": amount, "integer": integer, "percent": percent, "significant": significant}


def render_html(report: dict) -> str:
    """The whole page as one string."""
    report = finite(report)
    return _ENVIRONMENT.get_template("page.html.j2").render(
        models=MODELS,
        summary=summary(report),
        tiles=_tiles(report),
        sides=_sides(report),
        step_spread=any(measure.spread is not None for measure in costs(report)),
        training=_training(report),
        costs=_costs(report),
        lengths=_lengths(report),
        retrieval=_retrieval(report),
        composition=_composition(report),
        zero_shot=_zero_shot(report),
        paper_scale=_paper_scale(report),
        published=_published(report),
        pictures=_pictures(report),
        footer=_footer(report),
    )


def _tiles(report: dict) -> list[Measure]:
    """The headline measures, with one mean for all retrieval."""
    recalls = [measure for measure in retrieval(report) if measure.ahead]
    mean = []
    if recalls:
        lift, clip = (sum(getattr(measure, model) for measure in recalls) / len(recalls) for model, _ in MODELS)
        mean = [Measure("retrieval R@1, mean", "share", lift, clip)]
    return [*costs(report)[:3], *mean, *averages(report)]


def _sides(report: dict) -> list[tuple[str, str, list[Measure]]]:
    """Key, title and measures of each side of the verdict."""
    titles = {"lift": "LIFT is ahead", "clip": "CLIP is ahead", "close": "Too close to call"}
    return [(side, titles[side], measures) for side, measures in verdict(report).items()]


def _training(report: dict) -> dict[str, Any]:
    lines = [line for model, _ in MODELS for line in _loss_lines(model, get(report, model, "loss") or [])]
    lines.sort(key=lambda line: not line.faint)  # the means are drawn last, on top
    rows = [
        (name, *map(show, both(report, key)))
        for name, key, show in (
            ("trained parameters", "params", integer),
            ("samples seen", "samples_seen", integer),
            ("pictures a second", "images_per_s", significant),
            ("seconds", "seconds", lambda s: integer(None if s is None else round(s))),
            ("pictures skipped", "skipped_pictures", integer),
        )
    ]
    for n in dict.fromkeys(n for times in both(report, "text_ms_by_context") for n in times or {}):
        rows.append((f"text time a step, n = {n}", *_ms(report, "text_ms_by_context", n)))
    if both(report, "step_ms_spread") != (None, None):
        rows.append(("step time, interquartile range", *_ms(report, "step_ms_spread")))
    encoder, power = get(report, "lift", "encoder", "name"), get(report, "lift", "conditioning", "power")
    if encoder is not None and power is not None:
        encoder = f"{encoder} (its vectors conditioned, power {power:g})"
    return {
        "encoder": encoder,
        "chart": line_chart("training loss", "step", "loss", lines, width=600, height=300),
        "rows": rows,
    }


def _ms(report: dict, *keys: str) -> list[str]:
    return [amount(ms, "ms") for ms in both(report, *keys)]


def _loss_lines(model: str, losses: Sequence[float | None]) -> list[Line]:
    """The losses and their running mean, each thinned to about 500 points."""
    known = [(float(step), loss) for step, loss in enumerate(losses, 1) if loss is not None]
    half = max(1, len(known) // 60)
    sums = [0.0]
    for _, loss in known:
        sums.append(sums[-1] + loss)
    mean = []
    for i, (step, _) in enumerate(known):
        first, end = max(0, i - half), min(len(known), i + half + 1)
        mean.append((step, (sums[end] - sums[first]) / (end - first)))
    stride = max(1, math.ceil(len(known) / 500))
    raw, smooth = ([*line[::stride], *line[-1:]] for line in (known, mean))
    return [Line(model, raw, faint=True), Line(model, smooth)]


def _costs(report: dict) -> dict[str, Any]:
    groups = [
        (
            measure.name,
            [
                Bar(model, name, value, amount(value, measure.kind))
                for (model, name), value in zip(MODELS, (measure.lift, measure.clip), strict=True)
            ],
            measure.difference,
        )
        for measure in costs(report)
    ]
    return {
        "chart": paired_bars("cost of LIFT and CLIP", groups),
        "memory_counted": "counted" in memory_name(report),
        "whole_run": _whole_run(report),
        "paid_once": PAID_ONCE,
    }


def _whole_run(report: dict) -> list[dict[str, Any]]:
    """For each model, the cost of text from the first caption to the last step; empty where the report lacks the
    time that LIFT's embedding took."""
    if embedding_s(report) is None:
        return []
    total = costs(report)[-1]
    rows = []
    for (model, name), whole in zip(MODELS, (total.lift, total.clip), strict=True):
        embedding = None
        if model == "lift":
            captions, ms = (get(report, model, key) for key in ("captions", "embed_ms_per_caption"))
            embedding = {"captions": captions, "ms": ms, "s": embedding_s(report)}
        rows.append(
            {
                "model": model,
                "name": name,
                "embedding": embedding,
                "steps": len(get(report, model, "loss") or []),
                "ms": get(report, model, "text_ms_per_step"),
                "s": text_steps_s(report, model),
                "whole": whole,
            }
        )
    return rows


def _lengths(report: dict) -> list[tuple[str, Svg | None]]:
    """Title and chart of each cost against the caption length."""
    rows = sorted(report.get("cost_against_length") or [], key=lambda row: row["context"])
    if not rows:
        return []
    charts = []
    for title, y_name, key, kind in (
        ("Training FLOPs a sample, counted", "a sample", "flops", "flops"),
        ("Text time a step, measured", "a step", "text_ms", "ms"),
    ):
        known = {
            model: [(row["context"], y) for row in rows if (y := get(row, f"{model}_{key}")) is not None]
            for model, _ in MODELS
        }
        size, unit = unit_for(max((y for line in known.values() for _, y in line), default=0), kind)
        lines = [Line(model, [(x, y / size) for x, y in known[model]], dots=True) for model in ("clip", "lift")]
        contexts = [row["context"] for row in rows]
        y_name = f"{unit} {y_name}"
        chart = line_chart(title, "caption length n, tokens", y_name, lines, from_zero=True, x_ticks=contexts)
        charts.append((title, chart))
    return charts


def _retrieval(report: dict) -> list[dict[str, Any]]:
    rows = []
    for name in retrieval_sets(report):
        n = either(report, "retrieval", name, "n")
        for direction, arrow in DIRECTIONS.items():
            recalls = [both(report, "retrieval", name, direction, recall) for recall in ("r1", "r5", "r10")]
            rows.append({"set": name, "direction": arrow, "recalls": recalls, "chance": 1 / n if n else None, "n": n})
    return rows


def _composition(report: dict) -> dict[str, Any] | None:
    if not either(report, "composition"):
        return None
    rows = []
    for key, name in {**TASKS, "mean": "mean of the seven"}.items():
        lift, clip = both(report, "composition", key)
        plot = dumbbell(("lift", lift), ("clip", clip))
        row = {"name": name, "total": key == "mean", "lift": lift, "clip": clip}
        rows.append({**row, "points": points(lift, clip), "plot": plot})
    return {"rows": rows, "axis": dumbbell_axis(), "n": either(report, "composition", "n")}


def _zero_shot(report: dict) -> dict[str, Any]:
    lift, clip = both(report, "zero_shot", "top1")
    shared = {key: get(either(report, "zero_shot"), key) for key in ("chance", "majority", "classes", "n")}
    return {"lift": lift, "clip": clip, **shared}


def _paper_scale(report: dict) -> dict[str, Any]:
    scale = report.get("paper_scale") or {}
    savings = ("flops_saved", "paper_flops_saved", "memory_saved", "paper_memory_saved")
    rows = [
        {
            **{key: get(row, key) for key in ("context", "checkpointing", "batch_size")},
            "costs": [
                (get(row, f"lift_{key}"), get(row, f"clip_{key}"), kind, get(row, saved))
                for key, kind, saved in (("flops", "flops", "flops_saved"), ("memory_bytes", "bytes", "memory_saved"))
            ],
        }
        for row in scale.get("rows") or []
    ]
    return {
        "savings": [(n, [get(entry, key) for key in savings]) for n in (77, 128) if (entry := scale.get(f"n{n}"))],
        **{key: scale.get(key) for key in ("regime", "batch_size", "why")},
        "rows": rows,
    }


def _published(report: dict) -> list[dict[str, Any]]:
    """Tables of the paper's own results; the best value among rows of the same training data is marked."""
    tables = []
    for key, title, columns in PUBLISHED:
        results = get(report, "paper_results", key) or []
        rows = []
        for result in results:
            peers = [peer for peer in results if peer.get("data") == result.get("data")]
            cells = []
            for column in columns:
                value = result.get(column)
                best = value is not None and all(value >= (peer.get(column) or 0) for peer in peers)
                cells.append((None if value is None else f"{value:.1f}", best))
            model = str(result.get("model"))
            rows.append(
                {
                    "model": model,
                    "series": model.lower() if model in ("LIFT", "CLIP") else None,
                    "data": result.get("data"),
                    "seen": result.get("seen"),
                    "cells": cells,
                }
            )
        if rows:
            tables.append({"title": title, "columns": list(columns.values()), "rows": rows})
    return tables


def _pictures(report: dict) -> list[dict[str, Any]]:
    return [
        {
            **{key: picture.get(key) for key in ("caption", "set")},
            "image": picture.get("image") or "",
            "guesses": [(model, name, picture.get(model), picture.get(f"{model}_right")) for model, name in MODELS],
        }
        for picture in report.get("pictures") or []
    ]


def _footer(report: dict) -> dict[str, Any]:
    data = report.get("data") or {}
    sets = {*data, *(picture.get("set") for picture in report.get("pictures") or [])}
    configs = [config or {} for config in both(report, "config")]
    settings = []
    for key in dict.fromkeys(key for config in configs for key in config):
        words = [
            json.dumps(config[key], ensure_ascii=False).strip('"') if key in config else None for config in configs
        ]
        settings.append((key, *words))
    return {
        "machine": {key: get(report, "machine", key) for key in ("cpu", "cores", "memory_gib", "gpu", "os")},
        "versions": list((report.get("versions") or {}).items()),
        "seed": report.get("seed"),
        "command": report.get("command"),
        "data": [(name, get(sizes, "train"), get(sizes, "heldout")) for name, sizes in data.items()],
        "openmoji": "openmoji" in sets,
        "settings": settings,
    }

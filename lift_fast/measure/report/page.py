"""The report as one HTML page: the template page.html.j2, filled from the report's dict.

The page has no script and no outside reference: style, charts and images are inside. The template escapes every
string, raises for a name that it is not given, and shows None as a dash. Parts and models that the report lacks are
left out.

Each function below prepares one part of the page: numbers and plain strings for the template, and charts. Those of the
scores are in scores.py.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..charts import Line, Svg, line_chart, thinned
from ..formatting import DASH, amount, integer, percent, significant, unit_for
from ..paper import PRESET, SIZE
from .comparison import (
    PAID_ONCE,
    Measure,
    averages,
    costs,
    embedding_s,
    lead,
    mean,
    memory_name,
    retrieval,
    summary,
    text_steps_s,
    verdict,
)
from .fields import MODELS, both, finite, get, models_of
from .scores import composition_tables, curves, examples, published, recall_rows, remarks, zero_shot_table

_SHOWN = 240  # characters of a caption


def shortened(caption: Any) -> str:
    """A caption for the page: on one line, without control characters, and cut where it is long."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in str(caption))
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 2].rstrip() + " …"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=lambda value: DASH if value is None else value,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "amount": amount,
    "integer": integer,
    "percent": percent,
    "significant": significant,
    "shortened": shortened,
}


def render_html(report: dict) -> str:
    """The whole page as one string."""
    report = finite(report)
    return _ENVIRONMENT.get_template("page.html.j2").render(
        models=models_of(report),
        lead=lead(report),
        summary=summary(report),
        tiles=_tiles(report),
        sides=_sides(report),
        training=_training(report),
        curves=curves(report),
        costs=_costs(report),
        lengths=_lengths(report),
        retrieval=recall_rows(report, "retrieval"),
        first_caption=recall_rows(report, "first_caption"),
        composition=composition_tables(report),
        zero_shot=zero_shot_table(report),
        remarks=remarks(report),
        scale=_paper_scale(report),
        published=published(report),
        examples=examples(report),
        footer=_footer(report),
    )


def _tiles(report: dict) -> list[Measure]:
    """The headline measures, with one mean for all retrieval."""
    models = [model for model, _ in models_of(report)]
    recalls = [measure for measure in retrieval(report) if all(getattr(measure, model) is not None for model in models)]
    total = mean("retrieval R@1, mean", recalls) if models else None
    return [*costs(report)[:3], *([total] if total else []), *averages(report)]


def _sides(report: dict) -> list[tuple[str, str, list[Measure]]]:
    """Key, title and measures of each side of the verdict; empty for a report of one run."""
    if len(models_of(report)) < 2:
        return []
    titles = {"lift": "LIFT is ahead", "clip": "CLIP is ahead", "close": "Too close to call"}
    return [(side, titles[side], measures) for side, measures in verdict(report).items()]


def _training(report: dict) -> dict[str, Any]:
    lines = [line for model, _ in models_of(report) for line in _loss_lines(model, get(report, model, "loss") or [])]
    lines.sort(key=lambda line: not line.faint)  # the means are drawn last, on top
    quantities: list[tuple[str, Callable[[Any], str], tuple[str, ...]]] = [
        ("trained parameters", integer, ("params",)),
        ("samples seen", integer, ("samples_seen",)),
        ("images a second", significant, ("images_per_s",)),
        ("seconds", lambda s: integer(None if s is None else round(s)), ("seconds",)),
        ("images skipped", integer, ("skipped_pictures",)),
        *(
            (f"text time a step, n = {n}", _ms, ("text_ms_by_context", n))
            for n in dict.fromkeys(n for times in both(report, "text_ms_by_context") for n in times or {})
        ),
        ("step time, interquartile range", _ms, ("step_ms_spread",)),
        ("best weights after step", integer, ("best", "step")),
    ]
    rows = [
        (name, [(model, show(get(report, model, *keys))) for model, _ in models_of(report)])
        for name, show, keys in quantities
        if both(report, *keys) != (None, None)
    ]
    encoder, power = get(report, "lift", "encoder", "name"), get(report, "lift", "conditioning", "power")
    if encoder is not None and power is not None:
        encoder = f"{encoder} (its vectors conditioned, power {power:g})"
    return {"encoder": encoder, "chart": line_chart("training loss", "step", "loss", lines), "rows": rows}


def _ms(value: float | None) -> str:
    return amount(value, "ms")


def _loss_lines(model: str, losses: Sequence[float | None]) -> list[Line]:
    """The losses and their running mean, thinned."""
    known = [(float(step), loss) for step, loss in enumerate(losses, 1) if loss is not None]
    half = max(1, len(known) // 60)
    sums = [0.0]
    for _, loss in known:
        sums.append(sums[-1] + loss)
    smoothed = []
    for i, (step, _) in enumerate(known):
        first, end = max(0, i - half), min(len(known), i + half + 1)
        smoothed.append((step, (sums[end] - sums[first]) / (end - first)))
    return [Line(model, thinned(known), faint=True), Line(model, thinned(smoothed))]


def _costs(report: dict) -> dict[str, Any]:
    rows = []
    for measure in costs(report):
        values = [(model, name, getattr(measure, model)) for model, name in models_of(report)]
        longest = max(value or 0 for _, _, value in values)
        lengths = [f"{value / longest:.4f}" if value and longest else "0" for _, _, value in values]
        bars = [(*value, length) for value, length in zip(values, lengths, strict=True)]
        rows.append({"name": measure.name, "kind": measure.kind, "bars": bars, "difference": measure.difference})
    return {
        "rows": rows,
        "counted": get(report, "lift", "flops_per_sample") is not None,
        "memory_counted": "counted" in memory_name(report),
        "text": [model for model, _ in models_of(report) if get(report, model, "text_ms_per_step") is not None],
        "whole_run": _whole_run(report),
        "paid_once": PAID_ONCE,
    }


def _whole_run(report: dict) -> list[dict[str, Any]]:
    """For each model, the cost of text from the first caption to the last step; empty where the report lacks the
    time that LIFT's embedding took."""
    if embedding_s(report) is None:
        return []
    total = next((measure for measure in costs(report) if measure.kind == "s"), None)
    rows = []
    for model, name in models_of(report):
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
                "whole": getattr(total, model, None),
            }
        )
    return rows


def _lengths(report: dict) -> list[tuple[str, Svg]]:
    """Title and chart of each cost against the caption length, of those that are known."""
    rows = sorted(report.get("cost_against_length") or [], key=lambda row: row["context"])
    charts = []
    for title, y_name, key, kind in (
        ("Training FLOPs a sample, counted", "a sample", "flops", "flops"),
        ("Text time a step, measured", "a step", "text_ms", "ms"),
    ):
        known = {
            model: [(row["context"], y) for row in rows if (y := get(row, f"{model}_{key}")) is not None]
            for model, _ in models_of(report)
        }
        size, unit = unit_for(max((y for line in known.values() for _, y in line), default=0), kind)
        lines = [Line(model, [(x, y / size) for x, y in line], dots=True) for model, line in reversed(known.items())]
        contexts = [row["context"] for row in rows]
        y_name = f"{unit} {y_name}"
        chart = line_chart(title, "caption length n, tokens", y_name, lines, from_zero=True, x_ticks=contexts)
        if chart is not None:
            charts.append((title, chart))
    return charts


def _paper_scale(report: dict) -> dict[str, Any] | None:
    """What LIFT saves at a preset's size, counted; with the paper's figures where it has any for that size."""
    scale = report.get("paper_scale") or {}
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
    if not rows:
        return None
    keys = ("flops_saved", "paper_flops_saved", "memory_saved", "paper_memory_saved")
    entries = [
        (name[1:], [get(entry, key) for key in keys])
        for name, entry in scale.items()
        if isinstance(entry, dict) and get(entry, "paper_flops_saved") is not None
    ]
    preset = scale.get("preset")
    return {
        "size": SIZE if preset == PRESET else preset,
        "paper_s": preset == PRESET,
        "trained": preset in both(report, "preset"),
        "savings": entries,
        **{key: scale.get(key) for key in ("regime", "batch_size", "why")},
        "rows": rows,
    }


def _footer(report: dict) -> dict[str, Any]:
    data, sources = report.get("data") or {}, get(report, "trained_on", "sets") or []
    sets = {*data, *(report.get("examples") or {}), *(part for source in sources for part in str(source).split("/"))}
    configs = [(get(report, model, "config") or {}) for model, _ in models_of(report)]
    settings = []
    for key in dict.fromkeys(key for config in configs for key in config):
        words = [
            json.dumps(config[key], ensure_ascii=False).strip('"') if key in config else None for config in configs
        ]
        settings.append((key, words, len(set(words)) > 1))
    return {
        "machine": {key: get(report, "machine", key) for key in ("cpu", "cores", "memory_gib", "gpu", "os")}
        if report.get("machine")
        else None,
        "versions": list((report.get("versions") or {}).items()),
        "seed": report.get("seed"),
        "command": report.get("command"),
        "data": [(name, get(sizes, "train"), get(sizes, "heldout")) for name, sizes in data.items()],
        "sources": sources,
        "samples": get(report, "trained_on", "samples"),
        "openmoji": "openmoji" in sets,
        "settings": settings,
        "names": [name for model, name in MODELS if report.get(model)],
    }

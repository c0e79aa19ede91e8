"""The parts of the page that show scores: retrieval, composition, zero-shot, curves, the paper's rows, examples."""

import math
from typing import Any

from ...sugarcrepe import TASKS
from ..charts import Line, Svg, dumbbell, dumbbell_axis, line_chart, thinned
from ..formatting import points
from .comparison import DIRECTIONS, Measure, recall, tasks, zero_shot
from .fields import both, either, get, models_of, sets_of

RECALLS = ("r1", "r5", "r10")
_DOTTED = 30  # a line of fewer points has dots at them


def recall_rows(report: dict, part: str) -> list[dict[str, Any]]:
    """The rows of the retrieval table. part: "retrieval" or "first_caption"."""
    rows = []
    for name in sets_of(report, part):
        for way, arrow in DIRECTIONS.items():
            measures = [recall(report, part, name, way, k) for k in RECALLS]
            queries = either(report, part, name, "captions" if way == "t2i" else "n")
            rows.append(
                {
                    "set": name,
                    "direction": arrow,
                    "recalls": measures,
                    "chance": measures[0].chance,
                    "n": queries or either(report, part, name, "n"),
                }
            )
    return rows


def composition_tables(report: dict) -> list[dict[str, Any]]:
    """A table for each set: the tasks and their mean, ties where there are any, and the blind baseline."""
    models = [model for model, _ in models_of(report)]
    tables = []
    for name in sets_of(report, "composition"):
        measures = tasks(report, name)
        if not measures:
            continue
        counts = either(report, "composition", name, "counts") or {}
        rows: list[dict[str, Any]] = []
        for task, measure in measures.items():
            total = task == "mean"
            ties = [get(report, model, "composition", name, "ties", task) for model in models]
            if total:
                each = [get(report, model, "composition", name, "ties") or {} for model in models]
                ties = [sum(n or 0 for n in counted.values()) for counted in each]
            rows.append(
                {
                    "name": f"mean of {len(measures) - 1}" if total else TASKS.get(task, task),
                    "total": total,
                    "n": either(report, "composition", name, "n") if total else counts.get(task),
                    "measure": measure,
                    "points": points(measure.lift, measure.clip),
                    "ties": list(zip(models, ties, strict=True)),
                    "blind": Measure(task, "share", *both(report, "composition", name, "blind", task)),
                    "plot": dumbbell([(model, getattr(measure, model)) for model in models], measure.chance),
                }
            )
        chance = rows[-1]["measure"].chance
        tables.append(
            {
                "set": name,
                "rows": rows,
                "axis": dumbbell_axis(chance),
                "blind": any(row["blind"].known for row in rows),
                "ties": any(n for row in rows for _, n in row["ties"]),
            }
        )
    return tables


def zero_shot_table(report: dict) -> dict[str, Any]:
    """The rows of the zero-shot table, a set each, and whether any has several templates."""
    rows = []
    for name in sets_of(report, "zero_shot"):
        shared = ("chance", "majority", "classes", "templates", "n", "alone")
        rows.append(
            {
                "set": name,
                "top1": zero_shot(report, name, "top1"),
                "top5": zero_shot(report, name, "top5"),
                "one": zero_shot(report, name, "one_template", "top1"),
                # How far it varies with the images is not known, so no model is called ahead.
                "per_class": Measure(name, "share", *both(report, "zero_shot", name, "mean_per_class"), noise=math.inf),
                **{key: either(report, "zero_shot", name, key) for key in shared},
            }
        )
    return {"rows": rows, "several": any(row["one"].known for row in rows)}


# What is drawn of a set while runs train: the y axis, and each score's name in words; the second line is dashed.
_CURVES = (
    ("R@1", {"t2i_r1": DIRECTIONS["t2i"], "i2t_r1": DIRECTIONS["i2t"]}),
    ("accuracy", {"composition": "composition", "zero_shot_top1": "zero-shot"}),
)


def curves(report: dict) -> list[tuple[str, str, Svg]]:
    """The scores on each set while the runs trained, in percent: title, which lines are which, chart."""
    charts = []
    for name in sets_of(report, "curves"):
        for axis, scores in _CURVES:
            lines, words = [], []
            for (key, title), way in zip(scores.items(), ("solid", "dashed"), strict=True):
                of_runs = {
                    model: [
                        (point["step"], 100 * y)
                        for point in get(report, model, "curves", name) or []
                        if (y := get(point, key)) is not None
                    ]
                    for model, _ in models_of(report)
                }
                lines += [
                    Line(model, thinned(known), dots=len(known) < _DOTTED, dashed=way == "dashed")
                    for model, known in of_runs.items()
                ]
                words += [f"{title} {way}"] if any(of_runs.values()) else []
            chart = line_chart(f"{axis} on {name} while training", "step", f"{axis}, %", lines, from_zero=True)
            if chart is not None:
                charts.append((f"{name}, {axis}", ", ".join(words), chart))
    return charts


def remarks(report: dict) -> list[tuple[str, list[str]]]:
    """What to know of each set: notes of its evaluation, samples that were left out."""
    found = []
    for name in sets_of(report, "skipped"):
        words = [note for notes in both(report, "notes", name) for note in notes or ()]
        left_out = {title: _left_out(report, model, name) for model, title in models_of(report)}
        if len(set(left_out.values())) == 1:
            words += set(left_out.values())
        else:
            words += [f"{title}: {said or 'no samples left out'}" for title, said in left_out.items()]
        if words := list(dict.fromkeys(filter(None, words))):
            found.append((name, words))
    return found


def _left_out(report: dict, model: str, name: str) -> str:
    """How many samples of a set were left out, in words; "" for none."""
    count = get(report, model, "skipped", name)
    causes = get(report, model, "skipped_causes", name) or {}
    listed = ", ".join(f"{n} {cause}" for cause, n in causes.items())
    return f"{count} sample{'s' * (count != 1)} left out{f' ({listed})' * bool(listed)}" if count else ""


_EXAMPLES = 6  # of each kind, on the page: two full rows

_COLUMNS = {
    **TASKS,
    "top1": "top-1",
    **{f"{way}_r1": f"{arrow} R@1" for way, arrow in DIRECTIONS.items()},
}


def published(report: dict) -> list[dict[str, Any]]:
    """For each set that is the paper's, our scores and the paper's rows."""
    tables = []
    for entry in report.get("published") or []:
        rows, names = entry["rows"], list(entry["rows"][0]["scores"])
        ours = [
            {"model": model, "name": name, "data": None, "values": [get(entry, "ours", model, key) for key in names]}
            for model, name in models_of(report)
            if get(entry, "ours", model)
        ]
        theirs = [
            {
                "model": str(row["model"]).lower(),
                "name": row["model"],
                "data": row["data"],
                "values": [row["scores"].get(key) for key in names],
            }
            for row in rows
        ]
        tables.append(
            {"set": entry["set"], "columns": [_COLUMNS.get(key, key) for key in names], "rows": ours + theirs}
        )
    return tables


def examples(report: dict) -> list[dict[str, Any]]:
    """For each set: images with the caption that each model ranks first, captions with each model's images, and the
    worst mistakes."""
    models = models_of(report)
    found = []
    for name, shown in (report.get("examples") or {}).items():
        images = [
            {
                "image": _image(example.get("image")),
                "caption": example.get("caption"),
                "guesses": [(model, title, example[model]) for model, title in models if example.get(model)],
            }
            for example in (get(shown, "images") or [])[:_EXAMPLES]
        ]
        texts = [
            {
                "caption": example.get("caption"),
                "guesses": [
                    (
                        model,
                        title,
                        [
                            (_image(image), right)
                            for image, right in zip(guess["images"] or [], guess["right"] or [], strict=False)
                        ],
                    )
                    for model, title in models
                    if (guess := example.get(model))
                ],
            }
            for example in (get(shown, "texts") or [])[:_EXAMPLES]
        ]
        worst = []
        for model, title in models:
            own = [example for example in get(shown, "worst") or [] if example.get("model") == model][:_EXAMPLES]
            worst.append((model, title, [{**example, "image": _image(example.get("image"))} for example in own]))
        worst = [entry for entry in worst if entry[2]]
        if images or texts or worst:
            found.append({"set": name, "images": images, "texts": texts, "worst": worst})
    return found


def _image(address: Any) -> str:
    """An address that holds its image itself; of anything else nothing."""
    return address if isinstance(address, str) and address.startswith("data:image/") else ""

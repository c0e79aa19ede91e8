"""Merges the numbers of one or two runs, from run.json, eval.json, metrics.jsonl and compare.json, into the report's
dict."""

from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any, TypedDict

from .. import foreign
from .. import scores as score_files
from ..errors import ConfigError, DataError
from ..files import open_regular
from ..foreign import Count
from ..scores import TASKS
from .compare_runs import check_pair, check_run
from .compared import check_compared
from .paper import rows_for

CURVES = ("t2i_r1", "i2t_r1", "composition", "zero_shot_top1")  # the scores of a set while a run trains

_FROM_RUN = (
    "preset",
    "params",
    "samples_seen",
    "seconds",
    "images_per_s",
    "skipped_pictures",
    "precision",
    "device",
    "config",
    "loss",
    "field",
    "captions",
    "encoder",
    "conditioning",
    "step_ms",
    "step_ms_spread",
    "peak_memory_bytes",
    "best",
)
_SPLITS = ("train", "training")
_LONGEST = 1 << 24  # bytes of a line of metrics.jsonl


class _ReportedConfig(TypedDict):
    data: list[str]
    seed: Count


class _Reported(TypedDict):
    """What a report needs of a run.json, besides the types that run_folder has checked."""

    model: str
    config: _ReportedConfig


class _Point(TypedDict, total=False):
    t2i_r1: float | None
    i2t_r1: float | None
    composition: float | None
    zero_shot_top1: float | None


class _Evaluation(TypedDict):
    """A line of metrics.jsonl with the scores of an evaluation on the way."""

    step: Count
    evaluation: dict[str, _Point]


def gather(
    runs: Mapping[str, dict[str, Any]],
    evals: Mapping[str, dict[str, Any]],
    command: str,
    *,
    compared: dict[str, Any] | None = None,
    data: Mapping[str, dict[str, int]] | None = None,
    curves: Mapping[str, dict[str, list[dict[str, Any]]]] | None = None,
) -> dict[str, Any]:
    """Returns the dict that `measure.report` renders.

    runs: the content of run.json, by "lift" and "clip", or of one of them. evals: the content of eval.json, of those
    runs that were evaluated. command: shown in the report as what made it. compared: the content of compare.json.
    data: set -> split -> number of samples. curves: what read_curves returns, by run.

    Raises ConfigError when the runs cannot be compared, when one is not of the model that it is given as, or when they
    were evaluated on different sets; DataError when compare.json does not compare two runs, an eval.json is of an
    earlier version, or one of the three is not as its command writes it.
    """
    for name, run in runs.items():
        check_run(run, _Reported, name)
        if run["model"] != name:
            raise ConfigError(f"--{name} names a run of {run['model']}")
    if len(runs) == 2:
        check_pair(runs)
    if compared is not None:
        check_compared(compared)
    for model, scores in evals.items():
        check_scores(scores, f"the eval.json of --{model}")
    sets = {model: list(scores.get("benchmarks", {})) for model, scores in evals.items()}
    if len(sets) == 2 and sets["lift"] != sets["clip"]:
        raise ConfigError(f"the runs were evaluated on different sets: {sets['lift']} and {sets['clip']}")
    report: dict[str, Any] = {}
    for model, run in runs.items():
        found = {key: run.get(key) for key in _FROM_RUN}
        if found["peak_memory_bytes"] is not None:
            found["peak_memory_from"] = "measured"
        if model in evals:
            found |= {key: evals[model].get(key) for key in (*TASKS, "skipped", "skipped_causes", "notes")}
        if curves and curves.get(model):
            found["curves"] = curves[model]
        if compared is not None:
            found |= compared["runs"][model]
        report[model] = found
    some = next(iter(runs.values()))
    if compared is not None:
        report |= {key: compared[key] for key in ("savings", "paper_scale", "cost_against_length")}
    return report | {
        "published": _published(runs, evals),
        "examples": _examples(evals),
        "benchmarks": next(iter(evals.values()), {}).get("benchmarks", {}),
        "trained_on": {"sets": [_set_name(path) for path in some["config"]["data"]], "samples": some.get("captions")},
        "data": dict(data or {}),
        "machine": some.get("machine"),
        "versions": some.get("versions"),
        "seed": some["config"]["seed"],
        "command": command,
    }


def check_scores(scores: Any, what: str) -> None:
    """Raises DataError unless `scores` are the content of an eval.json of this version; what: the file, in words."""
    if score_files.is_of_another_version(scores):
        raise DataError(f"{what} is of an earlier lift-fast; make it again with: lift-fast eval --json")
    try:
        score_files.check(scores)
    except ValueError as error:
        raise DataError(
            f"{what} is not as eval writes it ({error}); make it again with: lift-fast eval --json"
        ) from error


def read_curves(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The scores on held-out sets while a run trained, of its metrics.jsonl: set -> [{"step", those of
    CURVES that it has}, …].

    step: how many were done. The file is read a line at a time; a line that is cut, as a killed run leaves its last, is
    passed over, and of a step that occurs twice the later line counts. Empty where there is no such file. Raises
    DataError when it cannot be read.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    try:
        with BufferedReader(open_regular(file)) as lines:
            for step, evaluation in _evaluations(iter(lambda: lines.readline(_LONGEST), b"")):
                for name, scores in evaluation.items():
                    point = {key: scores[key] for key in CURVES if key in scores}
                    found.setdefault(name, {})[step] = {"step": step + 1} | point
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error}); copy it again, or remove it to leave out its curves"
        ) from error
    return {name: [points[step] for step in sorted(points)] for name, points in found.items()}


def _evaluations(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in lines:
        if b'"evaluation"' not in line:  # most of them, which need no parsing
            continue
        try:
            record = foreign.parse_json(line)
            foreign.check(record, _Evaluation)
        except ValueError:
            continue
        yield record["step"], record["evaluation"]


def _set_name(path: str) -> str:
    """The last part of a path, and the one before it where the last is train."""
    parts = PurePath(path).parts
    return "/".join(parts[-2:] if parts[-1:] and parts[-1] in _SPLITS else parts[-1:])


def _published(runs: Mapping[str, dict[str, Any]], evals: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's rows for each set that is the paper's, and which of our scores they may stand next to."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model, scores in evals.items():
        for part in TASKS:
            for name, ours in scores.get(part, {}).items():
                benchmark = scores.get("benchmarks", {}).get(name)
                rows = rows_for(benchmark, part, runs[model], ours.get("n", 0), ours.get("prompts"))
                if not rows:
                    continue
                entry = found.setdefault((name, part), {"set": name, "rows": [row._asdict() for row in rows]})
                entry.setdefault("ours", {})[model] = _like(rows[0].scores, part, ours)
    return list(found.values())


def _like(names: Iterable[str], part: str, scores: dict[str, Any]) -> dict[str, float]:
    """Our scores by the names of the paper's."""
    if part == "first_caption":
        return {name: scores[name[:3]][name[4:]] for name in names}
    if part == "zero_shot":
        scores = scores.get("one_template") or scores
    return {name: scores[name] for name in names if name in scores}


def _examples(evals: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By set: images, each with the caption that each model ranks first; captions, each with each model's images; and
    the worst mistakes of each model."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model, scores in evals.items():
        for name, shown in scores.get("examples", {}).items():
            entry = found.setdefault(name, {"images": [], "texts": [], "worst": []})
            for kind, same, own in (
                ("images", ("image", "caption"), ("first", "right")),
                ("texts", ("caption",), ("images", "right")),
            ):
                known = {tuple(example[key] for key in same): example for example in entry[kind]}
                for example in shown[kind]:
                    key = tuple(example[key] for key in same)
                    if key not in known:
                        known[key] = {key: example[key] for key in same}
                        entry[kind].append(known[key])
                    known[key][model] = {key: example[key] for key in own}
            entry["worst"] += [{"model": model, **example} for example in shown["worst"]]
    return found

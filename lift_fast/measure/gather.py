"""Merges the numbers of two runs, from run.json, eval.json and compare.json, into the report's dict."""

from typing import Any

from ..errors import ConfigError, DataError
from .compare_runs import check_pair
from .paper import PAPER_RESULTS


def gather(
    runs: dict[str, dict[str, Any]],
    evals: dict[str, dict[str, Any]],
    compared: dict[str, Any],
    data: dict[str, dict[str, int]],
    command: str,
) -> dict[str, Any]:
    """Returns the dict that `measure.report` renders.

    runs, evals: by "lift" and "clip", the content of run.json and of eval.json. compared: the content of
    compare.json. data: set -> split -> number of samples. command: shown in the report as what made it.

    Raises ConfigError when the runs cannot be compared, DataError when compare.json does not compare two runs, or an
    eval.json is of an earlier version.
    """
    check_pair(runs)
    if "runs" not in compared:
        raise DataError("this compare.json measured no runs; make it with: lift-fast compare --lift … --clip … --json")
    sets = {model: list(scores["retrieval"]) for model, scores in evals.items()}
    if sets["lift"] != sets["clip"]:
        raise ConfigError(f"the runs were evaluated on different sets: {sets['lift']} and {sets['clip']}")
    if any("image" not in example for scores in evals.values() for example in scores["pictures"]):
        raise DataError("an eval.json is of an earlier lift-fast; make it again with: lift-fast eval --json …")
    report: dict[str, Any] = {}
    for model, run in runs.items():
        report[model] = {
            **{key: run.get(key) for key in _FROM_RUN},
            **{key: evals[model][key] for key in ("retrieval", "composition", "zero_shot")},
            **compared["runs"][model],
        }
    return report | {
        "savings": compared["savings"],
        "paper_scale": compared["paper_scale"],
        "cost_against_length": compared["cost_against_length"],
        "paper_results": PAPER_RESULTS,
        "pictures": _examples(evals),
        "data": data,
        "machine": runs["lift"]["machine"],
        "versions": runs["lift"]["versions"],
        "seed": runs["lift"]["config"]["seed"],
        "command": command,
    }


_FROM_RUN = (
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
    "step_ms_spread",
)


def _examples(evals: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The example images, each with the caption that each model ranks first."""
    return [
        {
            **{key: lift[key] for key in ("set", "image", "caption")},
            "lift": lift["first"],
            "lift_right": lift["right"],
            "clip": clip["first"],
            "clip_right": clip["right"],
        }
        for lift, clip in zip(evals["lift"]["pictures"], evals["clip"]["pictures"], strict=True)
    ]

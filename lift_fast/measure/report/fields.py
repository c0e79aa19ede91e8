"""Access to the report's dict, whose parts and numbers may be missing or null."""

import math
from typing import Any

MODELS = (("lift", "LIFT"), ("clip", "CLIP"))  # key in the report, name on the page


def get(tree: Any, *keys: str) -> Any:
    """The value at a path of keys; None where the path ends early."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def models_of(report: dict) -> list[tuple[str, str]]:
    """Key and name of each model that the report is about."""
    return [(model, name) for model, name in MODELS if report.get(model)]


def both(report: dict, *keys: str) -> tuple[Any, Any]:
    """The values at one path of keys below "lift" and below "clip"."""
    lift, clip = (get(report, model, *keys) for model, _ in MODELS)
    return lift, clip


def either(report: dict, *keys: str) -> Any:
    """LIFT's value at a path of keys, or CLIP's where LIFT's is missing, empty or zero."""
    lift, clip = both(report, *keys)
    return lift or clip or None


def sets_of(report: dict, part: str) -> list[str]:
    """Names of the sets on which at least one model was scored, in the report's order. part: a key of eval.json."""
    return list(dict.fromkeys(name for scores in both(report, part) for name in scores or {}))


def finite(value: Any) -> Any:
    """`value` with each NaN and infinity, as a diverged run has, replaced by None: JSON cannot express them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What the exports of a run whose text vectors are conditioned say of it, to programs and to readers."""

from typing import Any

from ..cache.conditioning import CONDITIONING, Conditioning

REMARK = (
    f"images are compared with conditioned text vectors: those that lift-fast or this folder gives are; condition any "
    f"other vector of the text encoder with {CONDITIONING}, as README.md shows"
)
CODE = f"""\
import json
import numpy as np
from safetensors import safe_open

with safe_open("FOLDER/{CONDITIONING}", "np") as file:
    mean, axes, deviations = (file.get_tensor(name) for name in ("mean", "axes", "deviations"))
    power = json.loads(file.metadata()["conditioning"])["power"]
kept = deviations[: len(axes)]
scales = np.divide(1, kept**power, out=np.zeros_like(kept), where=kept > 0)


def conditioned(x):
    \"\"\"The encoder's vectors [texts, source_dim] -> [texts, dim], of unit length.\"\"\"
    y = (x / np.linalg.norm(x, axis=1, keepdims=True) - mean) @ axes.T * scales
    return y / np.linalg.norm(y, axis=1, keepdims=True)
"""


def entry(conditioning: Conditioning) -> dict[str, Any]:
    """The entry of the target safetensors' config.json; docs/export.md describes it."""
    return {"file": CONDITIONING, "dim": conditioning.dim, **conditioning.as_dict()}


def rows(conditioning: Conditioning) -> dict[str, str]:
    """The rows of the card's table. What the file does not record is said to be missing."""
    report = conditioning.report()
    captions, cosines = report["rows"], report["mean_cosine"]
    return {
        "conditioning": "mean subtracted, principal axes, each divided by its deviation to the power "
        f"{report['power']:g}",
        "numbers before and after": f"{conditioning.source_dim}, {conditioning.dim}",
        "fitted to": f"{sum(captions)} captions" if captions else "not recorded",
        "mean cosine before and after": "{before:.3f}, {after:.3f}".format(**cosines) if cosines else "not recorded",
    }

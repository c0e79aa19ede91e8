"""classes.npz: the features of class names, so that an export classifies images where there is no text encoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..inference import Model


def write_classes(model: Model, names: Sequence[str], templates: Sequence[str], file: Path) -> None:
    """Writes names, str [classes]; weights, float32 [classes, dim] of unit length; logit_scale, float32, the factor of
    the cosines before a softmax. They are those of `Model.zero_shot`, whose errors this raises.
    """
    classifier = model.zero_shot(names, templates)
    np.savez(
        file,
        names=np.array(classifier.classnames),
        weights=classifier.weights.cpu().numpy(),
        logit_scale=np.float32(model.logit_scale),
    )

"""What a step's number decides: the learning rate and the share of patches that are left out."""

import math

from .config import TrainConfig


def lr_factor(step: int, config: TrainConfig) -> float:
    """The factor on config.lr at `step`, counted from 0: a linear warm-up, then what config.schedule names.

    cosine: a cosine to zero, which it would reach at step config.steps. constant: 1, and in the last config.cooldown
    steps a line to zero, which it would reach there too.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
    return min(1.0, (config.steps - step) / config.cooldown) if config.cooldown else 1.0


def patch_dropout(step: int, config: TrainConfig) -> float:
    """The fraction of an image's patches that `step`, counted from 0, leaves out."""
    last = config.patch_dropout_steps
    return config.patch_dropout if last is None or step < last else 0.0

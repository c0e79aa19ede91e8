"""lift-fast train."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from ..data.options import DataOptions
from ..train.config import (
    ImageSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    TrainConfig,
)
from .common import counted, listed, print_problems, printable

if TYPE_CHECKING:
    from ..train.setup import Training


def grouped(
    run: tyro.conf.OmitArgPrefixes[RunSettings],
    model: tyro.conf.OmitArgPrefixes[ModelSettings],
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings],
    images: tyro.conf.OmitArgPrefixes[ImageSettings],
    machine: tyro.conf.OmitArgPrefixes[MachineSettings],
    reading: tyro.conf.OmitArgPrefixes[DataOptions],
) -> TrainConfig:
    """The TrainConfig of these settings. tyro shows each argument as a group of options. Raises ConfigError."""
    settings = (run, model, optimizer, images, machine)
    return TrainConfig(**{name: value for group in settings for name, value in vars(group).items()}, options=reading)


def print_notices(training: "Training") -> None:
    """Prints, on stderr, what opening the data found, and what else to know of it before the first step."""
    print_problems([problem for samples in training.data.sets for problem in samples.problems])
    for line in training.notices:
        print(printable(f"lift-fast: warning: {line}"), file=sys.stderr)


@dataclass(frozen=True)
class Train:
    """Train LIFT against cached text, or CLIP with a text tower, on the same images in the same order."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="", constructor=grouped)]

    def __call__(self) -> None:
        from ..train.loop import train

        run = train(self.config, opened=print_notices)
        print(
            f"{run['model']}: loss {run['loss'][0]:.3f} -> {run['loss'][-1]:.3f}, {run['images_per_s']:.0f} images/s, "
            f"{run['seconds']:.0f} s, in {self.config.out}"
        )
        if run["skipped_pictures"]:
            first = run["skipped"][0]
            met = run["skipped_met"]
            times = f", which came up {met} times" if met > run["skipped_pictures"] else ""
            line = (
                f"skipped {counted(run['skipped_pictures'], 'sample')} ({listed(run['skipped_causes'])}){times}; "
                f"listed in {self.config.out / 'skipped.jsonl'}; first: {first['sample']} ({first['reason']})"
            )
            print(printable(line))

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        out = self.config.out
        if not out.exists():
            return "nothing was written"
        if (out / "run.json").exists():
            return f"the run in {out} is complete"
        return (
            f"the steps until then are in {out / 'metrics.jsonl'}, and no weights were written; remove {out} and run "
            "the same command again"
        )

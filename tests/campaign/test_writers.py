"""Writers at once: several processes write one and the same, and some of them are killed.

All that are not killed succeed, or one does and the others say that it exists already; what is there is whole and the
same as of one process alone, and the next one removes the parts of those that were killed. `make test` runs four
processes of each kind, `make campaign` more, with kills.
"""

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.counted import Counted, asking_set
from support.example_reports import example_report
from support.forked import at_once
from support.small_models import small_model
from support.tiny_caches import write
from support.tiny_models import tiny_model
from support.tiny_sets import make_set, png
from support.tiny_text import captions_of, work, write_lines

from lift_fast.cache import Cache
from lift_fast.cache.parquet import import_parquet
from lift_fast.cache.tools import convert, merge
from lift_fast.cli.common import write_json
from lift_fast.data.index import build_index
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.pack import pack
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import LiftFastError
from lift_fast.eval.images import Images, Pixels, image_features
from lift_fast.eval.kept import Kept
from lift_fast.eval.texts import encode_texts
from lift_fast.export import export
from lift_fast.files import is_part
from lift_fast.inference.feature_files import embed_images
from lift_fast.inference.store import build
from lift_fast.measure.report.output import write as write_report
from lift_fast.ranks import Rank
from lift_fast.text.conditioning import Request
from lift_fast.train import folder as run_folder

CPU = torch.device("cpu")
Write = Callable[[Path], object]  # writes below a folder


class Made:
    """What is read: data sets, caches, models."""

    def __init__(self, root: Path):
        rng = random.Random(0)
        self.root = root
        self.tars = make_set(root / "tars", 12)
        self.lines = write_lines(root / "c.jsonl", captions_of(300, 60))
        self.caches = [root / "cache1", root / "cache2"]
        for seed, cache in enumerate(self.caches):
            write(cache, [30, 20, 10, 25], 16, seed=seed)
        asking_set(root / "asking", 40)
        self.run = small_model(root / "run", "lift", layers=1)
        for number in range(4):
            (root / "vectors" / f"train-{number}").mkdir(parents=True)
            parquet(root / "vectors" / f"train-{number}" / "0.parquet", rng)


def parquet(path, rng):
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [f"{row:06d}.jpg" for row in range(20)]
    pq.write_table(pa.table({"key": keys, "embedding": [[rng.random() for _ in range(8)] for _ in keys]}), path)


def embeds(request: Request | None) -> Callable[[Made], Write]:
    return lambda made: lambda out: work(made.lines, out / "c", 20, conditioning=request)


def converts(made: Made) -> Write:
    return lambda out: convert(Cache(made.caches[0]), out / "c", "bf16", progress=False)


def merges(made: Made) -> Write:
    return lambda out: merge([Cache(cache) for cache in made.caches], out / "c", progress=False)


def imports(made: Made) -> Write:
    return lambda out: import_parquet(made.root / "vectors", out / "c", "int8", {"name": "x"}, "txt", progress=False)


def indexes(made: Made) -> Write:
    return lambda out: build_index(out / "tars", processes=1, progress=False)


def packs(made: Made) -> Write:
    samples = open_data(made.root / "tars", options=DataOptions(skip_bad=True))
    return lambda out: pack(samples, out / "packed", samples_per_shard=5, threads=1, progress=False)


def shards(made: Made) -> Write:
    image = png(random.Random(0))

    def write(out):
        with ShardWriter(out / "shards", 3) as writer:
            for number in range(8):
                writer.write(f"{number}", image, "caption", {})

    return write


def exports(exists: bool) -> Callable[[Made], Write]:
    def of(made: Made) -> Write:
        return lambda out: export(made.run, "safetensors", out / ("empty" if exists else "export"))

    return of


def features(suffix: str) -> Callable[[Made], Write]:
    return lambda made: lambda out: embed_images(tiny_model(), made.tars, out / f"x{suffix}")


def stores(made: Made) -> Write:
    return lambda out: build(tiny_model(), made.tars, out / "features", "id")


def keeps(made: Made) -> Write:
    data = open_data(made.root / "asking")

    def write(out):
        kept, model = Kept(out / "kept", "image", "text"), Counted()
        image_features(model.encode_image, Images(data, Pixels.of_size(16), CPU), kept)
        encode_texts([f"text {number}" for number in range(50)], model.encode_text, Rank(), False, kept.texts())

    return write


def reports(made: Made) -> Write:
    report = example_report(random.Random(0))
    return lambda out: write_report(report, out / "report")


def jsons(made: Made) -> Write:
    return lambda out: write_json(out / "a" / "x.json", {"numbers": [*range(1000)]})


def runs(made: Made) -> Write:
    def write(out):
        with run_folder.locked(out / "run"):
            run_folder.start(out / "run", {"mathematics": {}, "fingerprints": {}}, {})

    return write


ALL, ONE = "all succeed", "one succeeds"
SOME = "those succeed that began before the first had ended, at the least"
KINDS = {
    "embed": (embeds(None), ALL),
    "embed, conditioned": (embeds(Request(0.5, 8, rows=200)), ALL),
    "cache convert": (converts, ALL),
    "cache merge": (merges, ALL),
    "cache import": (imports, ALL),
    "data index": (indexes, ALL),
    "data pack": (packs, ONE),
    "shards": (shards, ONE),
    "export": (exports(False), ONE),
    "export into an empty folder": (exports(True), ONE),
    "embed-images, npy": (features(".npy"), SOME),
    "embed-images, safetensors": (features(".safetensors"), SOME),
    "embed-images, parquet": (features(".parquet"), SOME),
    "search": (stores, ALL),
    "eval": (keeps, ALL),
    "report": (reports, ALL),
    "--json": (jsons, ALL),
    "train": (runs, SOME),
}
EXISTS = ("exists already", "another process", "is training into")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """alone(kind): what one process writes."""
    found: dict[str, dict[str, bytes]] = {}

    def of(kind: str) -> dict[str, bytes]:
        if kind not in found:
            out = started(made, tmp_path_factory.mktemp("alone"))
            assert at_once(1, lambda number: ends(KINDS[kind][0](made), out)) == ["done"]
            found[kind] = contents(out)
            assert not any(map(is_part, found[kind]))
        return found[kind]

    return of


def started(made: Made, out: Path) -> Path:
    """The folder that is written to, with what must be there before."""
    (out / "empty").mkdir(parents=True)
    shutil.copytree(made.root / "tars", out / "tars")
    return out


def contents(out: Path) -> dict[str, bytes]:
    """The files below a folder, by their paths; b"there" for those in which a time or the folder's path is."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        found[name] = path.read_bytes() if path.is_file() else b""
        if name.startswith(("kept/", "features/")) and path.suffix == ".safetensors":
            length = 8 + int.from_bytes(found[name][:8], "little")  # of the header, whose metadata have any order
            found[name] = bytes(sorted(found[name][8:length])) + found[name][length:]
        if path.name in ("index.lift-fast", "started.json", "report.html", "lift_fast.json", "README.md"):
            found[name] = b"there"
    return found


def ends(write: Write, out: Path) -> str:
    """Writes; says how that ended."""
    try:
        write(out)
    except LiftFastError as error:
        return str(error)
    return "done"


def check(kind: str, ended: list[str | None], tally: Callable[..., None]) -> None:
    """Whether the processes of one kind ended as they should; None stands for one that was killed."""
    rest = [end for end in ended if end is not None]
    errors = [end for end in rest if end != "done"]
    assert all(any(word in error for word in EXISTS) for error in errors), errors
    done, alive = rest.count("done"), len(rest) == len(ended)
    if KINDS[kind][1] == ALL:
        assert not errors
    elif KINDS[kind][1] == ONE:
        assert done == 1 or (done == 0 and not alive), ended
    else:
        assert done or not alive, ended
    tally("writer", "right answer", len(ended) - len(errors))
    tally("writer", "error", len(errors))


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
def test_four_writers_at_once(made, alone, tmp_path, tally, kind):
    write, out = KINDS[kind][0](made), started(made, tmp_path / "out")
    check(kind, at_once(4, lambda number: ends(write, out)), tally)
    assert contents(out) == alone(kind)


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_writer_leaves_is_removed_by_the_next(made, alone, tmp_path, tally, kind):
    """Killed where its first part, and its second, would get its name."""
    write, out = KINDS[kind][0](made), started(made, tmp_path / "out")

    def killed(number):
        names = [0]
        for way in ("replace", "rename", "link"):

            def give_name(real, *paths):
                names[0] += 1
                if names[0] > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*paths)

            setattr(os, way, partial(give_name, getattr(os, way)))
        ends(write, out)
        os.kill(os.getpid(), signal.SIGKILL)  # it has only one part

    # Into an empty folder the files of an export go one by one; the next one says that it is not empty.
    for number in range(1 if kind == "export into an empty folder" else 2):
        at_once(1, lambda _, number=number: killed(number), {0})
        if number == 0:
            assert any(is_part(path.name) for path in out.rglob("*"))
    ended = at_once(1, lambda _: ends(write, out))[0]
    assert ended == "done" or "exists already" in ended
    assert contents(out) == alone(kind)
    tally("writer", "right answer", 2)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_writers_of_which_some_are_killed(made, alone, tmp_path, tally, kind, seed):
    """Eight processes that begin at slightly different moments, of which three are killed at random ones."""
    write, out, rng = KINDS[kind][0](made), started(made, tmp_path / "out"), random.Random(f"{kind} {seed}")
    begins = [rng.uniform(0, 0.05) for _ in range(8)]
    killed = {number: rng.uniform(0, 0.1) for number in rng.sample(range(8), 3)}

    def run(number):
        threading.Event().wait(begins[number])
        if number in killed:
            threading.Timer(killed[number], lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        ended = ends(write, out)
        if number in killed:
            os.kill(os.getpid(), signal.SIGKILL)  # it was too fast
        return ended

    check(kind, at_once(8, run, killed), tally)
    at_once(1, lambda number: ends(write, out))  # what the killed ones left
    assert contents(out) == alone(kind)

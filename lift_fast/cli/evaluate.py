"""lift-fast eval, compare and report: what trained runs score and cost."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .. import foreign
from ..data.options import DataOptions
from ..errors import ConfigError, DataError
from ..train.config import PresetName
from .common import counted, listed, print_problems, read_json, say, warn, write_json

_TIMEOUT = 1800.0  # seconds that ranks wait for one that reads, encodes or scores


def named_sets(words: list[str]) -> dict[str, Path]:
    """The data sets that an option --data names: NAME PATH, several times; or paths alone, named by their last part.

    Words are paths alone where their number is odd, or where a slash stands in what would be a name. Raises ValueError
    for a name that occurs twice, and for words that may be either.
    """
    names = words[::2]
    if words and not any("/" in word for word in words) and all(map(os.path.exists, words)) and len(words) % 2 == 0:
        raise ValueError(f"is {words[0]} a name or a data set? Write ./{words[0]} for a data set, or take another name")
    if words and (len(words) % 2 or any("/" in name for name in names)):
        pairs = [(Path(word).resolve().stem, word) for word in words]
    else:
        pairs = list(zip(names, words[1::2], strict=True))
    found = {name: Path(word) for name, word in pairs}
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"two sets are called {twice}; name each: NAME PATH NAME PATH, with no slash in a name")
    return found


_SPEC = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME] PATH [[NAME] PATH ...]",
    instance_from_str=named_sets,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda sets: [word for name, path in sets.items() for word in (name, str(path))],
)
NamedSets = Annotated[dict[str, Path], _SPEC]
NAMED_SETS = tyro.constructors.ConstructorRegistry()  # for settings of packages that do not know of tyro


@NAMED_SETS.primitive_rule
def _named_sets(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    return _SPEC if info.type == dict[str, Path] else None


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained model on held-out sets: retrieval, composition and zero-shot classification, as each set asks.

    Zero-shot classification takes the classes that the metadata of the samples name: a column, or an entry of the
    .json, called group, label, class, class_name or cls; of class folders their names.

    On several GPUs: torchrun --nproc-per-node 8 --no-python -- lift-fast eval … (torchrun would read --run itself
    without the --).
    """

    run: str
    """Folder of a run, a checkpoint, an export, another project's weights, or a name on the hub, owner/model."""
    data: NamedSets
    """Held-out sets: --data DIR, or names and folders of several: --data openmoji DIR scenes DIR."""
    json: Path | None = None
    """File to write the figures to."""
    loader: Literal["auto", "host", "dali"] = "auto"
    """Decoder of the images, as in train."""
    encoder: str | None = None
    """Text encoder as in embed, where the model names none, or one on the hub that is not in the local hub cache."""
    trust_remote_code: bool = False
    """Run Python code that comes with the text encoder."""
    device: str = "auto"
    field: tuple[str, ...] = ()
    """Captions to read, several for several captions of an image. Default: those that the run was trained on, or txt in
    a set that does not have them."""
    pictures: tuple[Path, ...] = ()
    """Folders of the image files, one for each --data; needed when they are not where the captions are."""
    templates: Path | None = None
    """Prompts of zero-shot classification: a file with one a line, {} standing for the class; or imagenet, the 80."""
    classnames: Path | None = None
    """Names of the classes: a file with one a line, or with a label or class folder before it; or imagenet."""
    batch_size: int = 64
    """Images that go through the image tower at once, on each GPU. Features depend on it by rounding errors alone."""
    features: Path | None = None
    """Folder to keep features in, which are used again where nothing that makes them has changed. Models that share a
    text encoder may share it. Default: eval-features in the folder of the run or of the model, if it has one."""
    keep: bool = True
    """Keep no features, and use none that were kept."""
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        """Raises ConfigError for folders of images that do not go with the sets."""
        if self.pictures and len(self.pictures) != len(self.data):
            raise ConfigError(f"one --pictures for each --data, or none: got {len(self.pictures)} for {len(self.data)}")

    def __call__(self) -> None:
        from ..data.reading import cpu_count
        from ..devices import device_of_rank
        from ..eval.run import evaluate
        from ..eval.sets import open_sets, options_of
        from ..inference import load
        from ..inference.subject import features_folder, subject_of
        from ..ranks import Rank, answering, joined, together
        from .use import print_code

        rank = Rank.from_environment()
        device = device_of_rank(self.device, rank, rank.share_of(cpu_count()))
        with joined(rank, device, _TIMEOUT), answering(rank):
            model = together(
                lambda: load(self.run, device=device, encoder=self.encoder, trust_remote_code=self.trust_remote_code)
            )
            if rank.is_first:
                print_code(model, self.trust_remote_code)
            subject, run = together(lambda: subject_of(model)), model.description
            options = options_of(run, self.reading)
            sets = together(
                lambda: open_sets(
                    self.data,
                    self.pictures,
                    options=options,
                    fields=self.field,
                    wanted=run.get("field", "txt"),
                    templates=self.templates,
                    classnames=self.classnames,
                )
            )
            features = (self.features or features_folder(model)) if self.keep else None
            given = [f"--{name}" for name in ("templates", "classnames") if getattr(self, name)]
            if rank.is_first and given and not any(held_out.questions.classes for held_out in sets.values()):
                warn(f"{' and '.join(given)} not used: no set has classes")
            if rank.is_first and self.keep and features is None:
                warn(f"features are not kept: {self.run} is no folder; name one with --features")
            result = evaluate(
                subject,
                sets,
                loader=self.loader,
                skip_bad=options.skip_bad,
                rank=rank,
                batch_size=self.batch_size,
                features=features,
                progress=True,
            )
        if rank.is_first:
            print_scores(result, run)
            if self.json:
                write_json(self.json, result)


def print_scores(result: dict[str, Any], run: Mapping[str, Any]) -> None:
    """Prints what eval.json holds: a line for each score of each set. run: the description of the model."""
    from ..data.samples import Problem
    from ..measure.paper import rows_for

    print_problems([Problem(**problem) for found in result["problems"].values() for problem in found])
    for name, benchmark in result["benchmarks"].items():
        for task, words in (("retrieval", ""), ("first_caption", ", first caption alone")):
            if scores := result[task].get(name):
                say(f"{name}{words}: {_recalls(scores)}")
        if scores := result["composition"].get(name):
            tasks = ", ".join(f"{task} {scores[task]:.1%}" for task in scores["counts"])
            say(
                f"{name}: composition {scores['mean']:.1%} ({tasks}; n = {scores['n']}, "
                f"{counted(sum(scores['ties'].values()), 'tie')}; chance {scores['chance']['mean']:.1%}, by the text "
                f"alone {scores['blind']['mean']:.1%})"
            )
        if scores := result["zero_shot"].get(name):
            one = scores["one_template"]
            alone = f"; with {scores['alone']!r} alone {one['top1']:.1%}" if one else ""
            say(
                f"{name}: zero-shot {scores['top1']:.1%} of {scores['n']} among {scores['classes']} classes, "
                f"top-5 {scores['top5']:.1%} (always naming the commonest class: {scores['majority']:.1%}{alone})"
            )
        for task in ("first_caption", "composition", "zero_shot"):
            if scores := result[task].get(name):
                for row in rows_for(benchmark, task, run, scores["n"], scores.get("prompts")):
                    figures = ", ".join(f"{measure} {value:.1%}" for measure, value in row.scores.items())
                    say(f"{name}: the paper's {row.model}, trained on {row.data}: {figures}")
        if result["skipped"][name]:
            causes = listed(result["skipped_causes"][name])
            say(f"{name}: {counted(result['skipped'][name], 'sample')} left out ({causes})")
        for note in result["notes"][name]:
            say(f"{name}: {note}")


def _recalls(scores: dict[str, Any]) -> str:
    ways = []
    for way, words in (("i2t", "image to text"), ("t2i", "text to image")):
        found, chance = scores[way], scores["chance"][way]["r1"]
        ways.append(f"{words} {found['r1']:.1%} {found['r5']:.1%} {found['r10']:.1%} (chance {chance:.2%})")
    captions = f", {scores['captions']} captions" if scores["captions"] != scores["n"] else ""
    return f"R@1/5/10 {', '.join(ways)}, n = {scores['n']}{captions}"


@dataclass(frozen=True)
class Compare:
    """Compute what LIFT saves: counted for a preset, on no GPU, and measured for two trained runs on this machine."""

    preset: PresetName = "vit-b16"
    """Model sizes that the exact counts are for (no memory is allocated)."""
    context: tuple[int, ...] = (77, 128)
    """Caption lengths of CLIP, in tokens."""
    batch_size: int | None = None
    """Batch size of the memory figures. Default: the paper's."""
    lift: Path | None = None
    """Folder of a LIFT run; with --clip, --data and --cache both runs are measured on this machine."""
    clip: Path | None = None
    """Folder of the CLIP run to compare it with."""
    data: Path | None = None
    """Data set whose captions the text side is timed on."""
    pictures: Path | None = None
    """Folder of the image files of --data; needed when they are not where the captions are."""
    cache: tuple[Path, ...] = ()
    """Caches of --data, one for each --context, embedded from captions of that length."""
    json: Path | None = None
    """File to write the figures to."""
    device: str = "auto"

    def __call__(self) -> None:
        from ..measure import compare
        from ..measure.machine import machine, versions

        measured: dict[str, Any] = {}
        if self.lift and self.clip and self.data and len(self.cache) == len(self.context):
            measured = self.measure(self.lift, self.clip, self.data)
        elif self.lift or self.clip or self.data or self.cache:
            raise ConfigError("measuring runs takes --lift, --clip, --data, and one --cache for each --context")
        scale = compare.paper_scale(self.preset, self.context, self.batch_size)
        say(*compare.format_table(scale).split("\n"))
        if self.json:
            write_json(self.json, {"paper_scale": scale, **measured, "machine": machine(), "versions": versions()})

    def measure(self, lift: Path, clip: Path, data: Path) -> dict[str, Any]:
        """Returns FLOPs, memory, step time and text time of two trained runs (measure.compare_runs)."""
        from .. import run_folder
        from ..cache import Cache
        from ..data.open import open_data
        from ..devices import pick_device
        from ..measure.compare_runs import check_pair, compare_runs
        from ..text.cached import CachedText
        from ..train.setup import open_training_sets, read_as_embedded

        caches = dict(zip(self.context, map(Cache, self.cache), strict=True))
        captions = {}
        for context, cache in caches.items():
            samples = open_data(data, self.pictures, read_as_embedded(DataOptions(), cache))
            cache.check_data(samples)
            captions[context] = [
                caption
                for number in range(len(samples.shard_sizes))
                for caption in samples.captions(number, cache.manifest.field)
                if isinstance(caption, str)
            ]
        runs = {"lift": run_folder.read_description(lift), "clip": run_folder.read_description(clip)}
        check_pair(runs, measured=True)
        config = runs["lift"]["config"]
        trained = [Cache(folder) for folder in config["cache"]]
        try:
            foreign.check(config.get("options", {}), DataOptions, "config.options")
        except ValueError as error:
            raise DataError(
                f"{lift / 'run.json'} is not as training writes it ({error}); train again with: lift-fast train"
            ) from error
        options = DataOptions(**config.get("options", {}))
        sets, _ = open_training_sets(config["data"], config.get("pictures", ()), options, trained)
        return compare_runs(runs, CachedText(trained, sets), caches, captions, pick_device(self.device))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html and report.json of a run, or of two runs and their comparison, and print a table."""

    lift: Path | None = None
    """Folder of a LIFT run, with the eval.json that `lift-fast eval --json` wrote there, if it was evaluated."""
    clip: Path | None = None
    """Folder of a CLIP run, likewise. One of the two is enough."""
    compare: Path | None = None
    """File that `lift-fast compare --json` wrote for the two runs."""
    out: Path
    """Folder for the report."""
    data: NamedSets = field(default_factory=dict)
    """Name and folder of each data set, to count its samples: the folder holds train, heldout, or both."""
    command: str = "lift-fast report"
    """Command that the report names as its origin."""

    def __call__(self) -> None:
        from .. import run_folder
        from ..measure import report
        from ..measure.gather import gather, read_curves

        folders = {name: folder for name, folder in (("lift", self.lift), ("clip", self.clip)) if folder is not None}
        if not folders:
            raise ConfigError("a report is of a run; name one: --lift RUN, --clip RUN, or both")
        if self.compare and len(folders) < 2:
            raise ConfigError("--compare belongs to two runs; name both, --lift RUN --clip RUN, or leave it out")
        runs = {name: run_folder.read_description(folder) for name, folder in folders.items()}
        evals = {}
        for name, folder in folders.items():
            file = folder / "eval.json"
            made_by = f"lift-fast eval --run {folder} --data NAME DIR --json {file}"
            if file.exists():
                evals[name] = read_json(file, made_by)
            else:
                warn(f"no {file}, so the report has no scores of it; make it with: {made_by}")
        numbers = gather(
            runs,
            evals,
            self.command,
            compared=read_json(self.compare, "lift-fast compare --lift … --clip … --json") if self.compare else None,
            data=_sizes(self.data),
            curves={name: read_curves(folder / "metrics.jsonl") for name, folder in folders.items()},
        )
        report.write(numbers, self.out)
        report.print_table(numbers)
        say(f"report: {self.out / 'report.html'}")


def _sizes(data: dict[str, Path]) -> dict[str, dict[str, int]]:
    """The number of samples of each split of each data set that there is. Raises DataError where there is none."""
    from ..data.open import open_data

    sizes = {}
    for name, folder in data.items():
        splits = [split for split in ("train", "heldout") if (folder / split).exists()]
        if not splits:
            raise DataError(f"{folder} holds neither train nor heldout; leave out --data, or name a folder that does")
        sizes[name] = {split: len(open_data(folder / split)) for split in splits}
    return sizes

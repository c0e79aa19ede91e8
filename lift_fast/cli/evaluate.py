"""lift-fast eval, compare and report: what trained runs score and cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .common import read_json, write_json


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained run on held-out sets: retrieval, and composition and zero-shot where a set has them."""

    run: Path
    """Folder of the run."""
    data: dict[str, Path]
    """Name and folder of each held-out set: --data openmoji DIR scenes DIR."""
    json: Path | None = None
    """File to write the figures to."""
    loader: Literal["auto", "host", "dali"] = "auto"
    """Decoder of the images, as in train."""
    trust_remote_code: bool = False
    """Run Python code that comes with LIFT's text encoder."""
    device: str = "auto"

    def __call__(self) -> None:
        from ..devices import pick_device
        from ..eval.run import evaluate

        device = pick_device(self.device)
        trust = self.trust_remote_code
        result = evaluate(self.run, self.data, device, loader=self.loader, trust_remote_code=trust)
        for name, scores in result["retrieval"].items():
            i2t, t2i = scores["i2t"], scores["t2i"]
            print(
                f"{name}: R@1/5/10 image to text {i2t['r1']:.1%} {i2t['r5']:.1%} {i2t['r10']:.1%}, text to image "
                f"{t2i['r1']:.1%} {t2i['r5']:.1%} {t2i['r10']:.1%} (n = {scores['n']}, chance {1 / scores['n']:.2%})"
            )
            if result["skipped"][name]:
                print(f"{name}: {result['skipped'][name]} images do not decode and were left out")
        if result["composition"]:
            print("composition: " + ", ".join(f"{k} {v:.1%}" for k, v in result["composition"].items() if k != "n"))
        if result["zero_shot"]:
            scores = result["zero_shot"]
            print(
                f"zero-shot: {scores['top1']:.1%} of {scores['n']} among {scores['classes']} classes "
                f"(always naming the commonest class: {scores['majority']:.1%})"
            )
        if self.json:
            write_json(self.json, result)


@dataclass(frozen=True)
class Compare:
    """Compute what LIFT saves: counted for a preset, on no GPU, and measured for two trained runs on this machine."""

    preset: str = "vit-b16"
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
        print(compare.format_table(scale))
        if self.json:
            write_json(self.json, {"paper_scale": scale, **measured, "machine": machine(), "versions": versions()})

    def measure(self, lift: Path, clip: Path, data: Path) -> dict[str, Any]:
        """Returns FLOPs, memory, step time and text time of two trained runs (measure.compare_runs)."""
        from .. import run_folder
        from ..cache import Cache
        from ..data.open import open_data, open_sets
        from ..devices import pick_device
        from ..measure.compare_runs import check_pair, compare_runs
        from ..text.cached import CachedText

        samples = open_data(data)
        caches = dict(zip(self.context, map(Cache, self.cache), strict=True))
        captions = {}
        for context, cache in caches.items():
            cache.check_keys(samples)
            captions[context] = [samples.caption(i, cache.manifest.field) for i in range(len(samples))]
        runs = {"lift": run_folder.read_description(lift), "clip": run_folder.read_description(clip)}
        check_pair(runs)
        config = runs["lift"]["config"]
        training = CachedText(
            [Cache(folder) for folder in config["cache"]], open_sets(config["data"], config.get("pictures", ()))
        )
        return compare_runs(runs, training, caches, captions, pick_device(self.device))


@dataclass(frozen=True)
class Report:
    """Write report.html and report.json of two runs, their evaluations and their comparison, and print a table."""

    lift: Path
    """Folder of the LIFT run, with the eval.json that `lift-fast eval --json` wrote."""
    clip: Path
    """Folder of the CLIP run, with its eval.json."""
    compare: Path
    """File that `lift-fast compare --json` wrote for the two runs."""
    out: Path
    """Folder for the report."""
    data: dict[str, Path]
    """Name and folder of each data set; the folder holds train and heldout."""
    command: str = "lift-fast report"
    """Command that the report names as its origin."""

    def __call__(self) -> None:
        from .. import run_folder
        from ..data.open import open_data
        from ..measure import report
        from ..measure.gather import gather

        folders = {"lift": self.lift, "clip": self.clip}
        runs = {name: run_folder.read_description(folder) for name, folder in folders.items()}
        evals = {
            name: read_json(
                folder / "eval.json", f"lift-fast eval --run {folder} --data NAME DIR --json {folder / 'eval.json'}"
            )
            for name, folder in folders.items()
        }
        compared = read_json(self.compare, "lift-fast compare --lift … --clip … --json")
        sizes = {
            name: {split: len(open_data(folder / split)) for split in ("train", "heldout")}
            for name, folder in self.data.items()
        }
        numbers = gather(runs, evals, compared, sizes, self.command)
        report.write(numbers, self.out)
        report.print_table(numbers)
        print(f"report: {self.out / 'report.html'}")

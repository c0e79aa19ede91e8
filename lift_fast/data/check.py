"""Decodes every image and reads every caption of a data set, and lists what is wrong."""

import functools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..errors import DataError
from .images import decode, read_header
from .index import Index, key_and_suffix, scan
from .open import open_data
from .passes import DAMAGED, NO_CAPTION, REPEATED, Findings, caption_column, in_order
from .samples import BadSample, Samples
from .shards import Shards
from .tars import NotWhole, members


def check(
    path: str | Path,
    field: str = "txt",
    images: str | Path | None = None,
    bad: TextIO | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Decodes every image and reads every caption of the data set at `path`, and looks for duplicate keys in a shard,
    in a tar for duplicate file names. Reports tars that are cut or damaged and checks the rest.

    path, images: the arguments of open_data. field: the caption to read. bad: file to write a JSON line to for each
    finding. threads: None for the number of processors, 32 at most.

    Returns, JSON-serialisable, "samples" and "shards" that were checked; "damaged_shards"; "bad": number of samples
    with any finding; "causes": findings by cause; "first": the first five findings as {"sample", "row", "cause",
    "reason"}, with row None for a shard; "seconds"; "images_per_s". Rows are numbered without the damaged shards.

    Raises the errors of open_data except for damaged tars, and DataError when a table has no column `field`.
    """

    def problems(samples: Samples, row: int) -> list[tuple[str, str]]:
        wrong: list[tuple[str, str]] = []
        try:
            data = samples.image_bytes(row)
            decode(data, read_header(data))
        except BadSample as error:
            wrong.append((error.cause, error.reason))
        try:
            samples.caption(row, field)
        except DataError as error:
            wrong.append((NO_CAPTION, str(error)))
        return wrong

    found, began = Findings(bad), time.perf_counter()
    parts, total, damaged = _parts(Path(path), images)
    for name, reason in damaged.items():
        found.add(name, None, [(DAMAGED, reason)])
    done = shards = 0
    with tqdm(total=total, unit="sample", desc="check", disable=not progress, leave=False) as bar:
        for part in parts:
            caption_column(part, field)
            duplicates = _duplicates(part, found)
            for row, wrong in in_order(functools.partial(problems, part), range(len(part)), threads):
                if reason := next(duplicates):
                    wrong.append((REPEATED, reason))
                if wrong:
                    found.add(part.where(row), done + row, wrong)
                bar.update()
            done += len(part)
            shards += len(part.shard_sizes)
    seconds = time.perf_counter() - began
    return {
        "samples": done,
        "shards": shards,
        "damaged_shards": found.causes[DAMAGED],
        **found.report(),
        "seconds": seconds,
        "images_per_s": done / seconds,
    }


def _parts(path: Path, images: str | Path | None) -> tuple[Iterable[Samples], int, dict[str, str]]:
    """The parts of a data set that can be read, their number of samples, and the damaged tars with reasons.

    The whole set is one part, unless a tar is damaged: then each intact tar is one. Raises DataError when the set
    cannot be opened for another reason.
    """
    try:
        samples = open_data(path, images)
        return [samples], len(samples), {}
    except DataError:
        damaged: dict[str, str] = {}
        whole: list[Path] = []
        total = 0
        for tar in sorted(path.glob("*.tar")):
            try:
                total += scan(tar)[0].samples
                whole.append(tar)
            except DataError as error:
                damaged[str(tar)] = str(error)
        if not damaged:
            raise
    indices = (Index(path, [entry], bytearray(segment)) for entry, segment in map(scan, whole) if entry.samples)
    return (Shards(path, index) for index in indices), total, damaged


def _duplicates(samples: Samples, found: Findings) -> Iterator[str]:
    """Yields, per sample, a description of its duplicate entries, or "". Adds shards with unusable keys to `found`."""
    for number, size in enumerate(samples.shard_sizes):
        names: dict[str, str] = {}
        try:
            if isinstance(samples, Shards):
                names = _duplicate_names(samples.paths[number])
            else:
                samples.shard_keys(number)
        except (NotWhole, OSError) as error:  # the tar was damaged after its index was written
            found.add(str(samples.folder / samples.names[number]), None, [(DAMAGED, str(error))])
        except DataError as error:
            found.add(f"{samples.folder}: {samples.names[number]}", None, [(REPEATED, str(error))])
        yield from (names.get(key, "") for key in samples.shard_keys(number)) if names else [""] * size


def _duplicate_names(tar: Path) -> dict[str, str]:
    """The keys in a tar that have a file twice, with a description. WebDataset would make two samples of them."""
    seen: set[bytes] = set()
    found: dict[str, str] = {}
    with open(tar, "rb") as file:
        for name, _, _ in members(file.fileno(), os.fstat(file.fileno()).st_size):
            if name in seen and (named := key_and_suffix(name)):
                base = name.rpartition(b"/")[2].decode(errors="replace")
                found[named[0].decode(errors="replace")] = f"{base} occurs twice in the tar; the last one is read"
            seen.add(name)
    return found

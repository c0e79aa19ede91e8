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
    pictures: str | Path | None = None,
    bad: TextIO | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Decodes every picture and reads every caption of the data set at `path`, and looks for what a shard holds twice:
    a key, in a tar a name. Tars that are cut or damaged are told, and the others gone through. JSON-able.

    "bad": samples with anything wrong; "damaged_shards"; "causes": all that is wrong, counted; "first": the first five
    of it as {"sample", "row", "cause", "reason"}, of a shard the row is null. The file `bad` gets such a line of JSON
    for each. Rows are numbered as if damaged shards were not there.

    path, pictures: as of open_data. Raises as it does, but for damaged tars; DataError for a field that is no column.
    """

    def look(samples: Samples, row: int) -> list[tuple[str, str]]:
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
    parts, total, damaged = _parts(Path(path), pictures)
    for name, reason in damaged.items():
        found.add(name, None, [(DAMAGED, reason)])
    done = shards = 0
    with tqdm(total=total, unit="sample", desc="check", disable=not progress, leave=False) as bar:
        for part in parts:
            caption_column(part, field)
            twice = _twice(part, found)
            for row, wrong in in_order(functools.partial(look, part), range(len(part)), threads):
                if reason := next(twice):
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


def _parts(path: Path, pictures: str | Path | None) -> tuple[Iterable[Samples], int, dict[str, str]]:
    """A data set as parts to go through, their samples, and the tars left out because they are damaged, with reasons.

    It is one part, unless a tar is damaged: then every other tar is one. Raises DataError when that is not why it
    cannot be opened.
    """
    try:
        samples = open_data(path, pictures)
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


def _twice(samples: Samples, found: "Findings") -> Iterator[str]:
    """Of each sample in order what of it its shard holds twice, in words, or "". `found` is told of shards whose keys
    are not of use."""
    for number, size in enumerate(samples.shard_sizes):
        names: dict[str, str] = {}
        try:
            if isinstance(samples, Shards):
                names = _repeated_names(samples.paths[number])
            else:
                samples.shard_keys(number)
        except (NotWhole, OSError) as error:  # what its index says of it has come from a better day
            found.add(str(samples.folder / samples.names[number]), None, [(DAMAGED, str(error))])
        except DataError as error:
            found.add(f"{samples.folder}: {samples.names[number]}", None, [(REPEATED, str(error))])
        yield from (names.get(key, "") for key in samples.shard_keys(number)) if names else [""] * size


def _repeated_names(tar: Path) -> dict[str, str]:
    """Keys of a tar of which a file occurs twice, with words for it: WebDataset makes two samples of them."""
    seen: set[bytes] = set()
    found: dict[str, str] = {}
    with open(tar, "rb") as file:
        for name, _, _ in members(file.fileno(), os.fstat(file.fileno()).st_size):
            if name in seen and (named := key_and_suffix(name)):
                base = name.rpartition(b"/")[2].decode(errors="replace")
                found[named[0].decode(errors="replace")] = f"{base} occurs twice in the tar; the last one is read"
            seen.add(name)
    return found

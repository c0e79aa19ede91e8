"""Decodes every image and reads every caption and .json of a data set, and lists what is wrong."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from ..files import open_regular
from ..progress import bar
from .images import decode, read_header
from .index import INDEX, scanned
from .open import open_data
from .options import DataOptions
from .passes import Findings, in_order, remarks_of
from .samples import BadSample, Problem, Samples
from .scan import key_and_suffix
from .shards import Shards
from .tables import TableSamples
from .tars import NotWhole, members


def check(
    path: str | Path,
    field: str = "txt",
    images: str | Path | None = None,
    bad: TextIO | None = None,
    threads: int | None = None,
    progress: bool = True,
    options: DataOptions | None = None,
) -> dict[str, Any]:
    """Decodes every image and reads every caption and .json of the data set at `path`, and looks for duplicate keys in
    a shard, in a tar for duplicate file names. Bad samples and damaged shards do not end it, whatever options.skip_bad
    is.

    path, images, options: the arguments of open_data. field: the caption to read. bad: file to write a JSON line to for
    each finding. threads: None for the number of processors, 32 at most.

    Returns, JSON-serialisable, "samples" and "shards" that could be opened, "damaged_shards" and "unused_files"; "bad":
    number of samples with any finding; "causes": findings by cause; "first": the first five findings as {"sample",
    "row", "cause", "reason"}, with row None and a "count" for what is no sample; "seconds"; "images_per_s";
    "remarks": sentences on how a table was read.

    Raises the errors of open_data, and DataError when a table has no column `field`.
    """
    samples = _opened(Path(path), images, replace(options or DataOptions(), skip_bad=True))
    samples.caption_field(field)
    found, began = Findings(bad), time.perf_counter()
    for problem in samples.problems:
        found.add_problem(problem)
    keys = _bad_keys(samples, found)
    work = functools.partial(_looked_at, samples, field)
    with bar(total=len(samples), unit="sample", desc="check", disable=not progress, leave=False) as shown:
        for row, wrong in in_order(work, range(len(samples)), threads):
            # A row that cannot be read has neither image nor caption nor key, for one reason.
            if (bad_key := next(keys)) and all(bad_key.reason != error.reason for error in wrong):
                wrong.append(bad_key)
            if wrong:
                found.add(samples.where(row), row, wrong)
            shown.update()
    seconds = time.perf_counter() - began
    return {
        "samples": len(samples),
        "shards": len(samples.shard_sizes),
        "damaged_shards": found.causes["damaged shard"],
        "unused_files": found.causes["unused file"],
        **found.report(),
        "seconds": seconds,
        "images_per_s": len(samples) / seconds,
        "remarks": remarks_of(samples),
    }


def _opened(path: Path, images: str | Path | None, options: DataOptions) -> Samples:
    """Opens the data set; tars that were damaged since their index was written without the index. Raises DataError."""
    try:
        return open_data(path, images, options)
    except DataError:
        if not (path / INDEX).exists():
            raise
        samples = Shards(path, scanned(path, options), options)
        if not any(problem.cause == "damaged shard" for problem in samples.problems):
            raise
        return samples


def _looked_at(samples: Samples, field: str, row: int) -> list[BadSample]:
    """What is wrong with the image, the caption and the metadata of a sample, as training and evaluation read them."""
    wrong: list[BadSample] = []

    def look(read: Callable[[], object]) -> None:
        try:
            read()
        except BadSample as error:
            if all(error.reason != other.reason for other in wrong):
                wrong.append(error)

    def image() -> None:
        data = samples.image_bytes(row)
        decode(data, read_header(data))

    look(image)
    look(lambda: samples.caption(row, field))
    if not isinstance(samples, TableSamples):  # of a table, the metadata are the row
        look(lambda: samples.meta(row))
    return wrong


def _bad_keys(samples: Samples, found: Findings) -> Iterator[BadSample | None]:
    """Yields, for each sample, what is wrong with its key, or None. Adds tars that are damaged to `found`."""
    for number, size in enumerate(samples.shard_sizes):
        bad: dict[int, BadSample] = dict(samples.bad_keys(number))
        if isinstance(samples, Shards):
            path = samples.paths[number]
            twice, damage = _duplicate_names(path)
            bad |= {row: twice[key] for row, key in enumerate(samples.shard_keys(number)) if key in twice}
            if damage and not any(problem.where == str(path) for problem in samples.problems):  # since it was indexed
                found.add_problem(Problem(str(path), "damaged shard", damage))
        yield from (bad.get(row) for row in range(size))


def _duplicate_names(tar: Path) -> tuple[dict[str, BadSample], str]:
    """The keys in a tar that have a file twice, of which WebDataset would make two samples, with what is wrong; and why
    the tar could not be read to its end, "" when it could."""
    seen: set[bytes] = set()
    found: dict[str, BadSample] = {}
    try:
        with open_regular(tar) as file:
            for name, _, _ in members(file.fileno(), os.fstat(file.fileno()).st_size):
                if name in seen and (named := key_and_suffix(name)):
                    base = name.rpartition(b"/")[2].decode(errors="replace")
                    key = named[0].decode(errors="replace")
                    found[key] = BadSample("repeated key", f"{base} occurs twice in the tar; the last one is read")
                seen.add(name)
    except (NotWhole, OSError) as error:
        return found, str(error)
    return found, ""

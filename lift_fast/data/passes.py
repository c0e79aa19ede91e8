"""What stats, check and pack share: a threaded pass over samples, the fields of captions, the list of bad samples.

Memory holds the samples that are being processed and one shard's keys, besides what the opened data set keeps itself.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TextIO, TypeVar

from ..errors import DataError
from .folders import ParquetImages, TableImages, column_of
from .samples import Samples
from .shards import Shards
from .sources import read_parquet

Found = TypeVar("Found")
NO_CAPTION, REPEATED, DAMAGED = "no caption", "repeated key", "damaged shard"  # in addition to samples.Cause
_NAMED = 5  # findings that a report lists


def in_order(work: Callable[[int], Found], rows: Iterable[int], threads: int | None) -> Iterator[tuple[int, Found]]:
    """Yields (row, work(row)) in the order of the rows. Threads work ahead of the caller, on a few rows each.

    threads: None for the number of processors, 32 at most.
    """
    threads = threads or min(32, len(os.sched_getaffinity(0)))
    queue: deque[tuple[int, Future[Found]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for row in rows:
                queue.append((row, pool.submit(work, row)))
                if len(queue) > 4 * threads:
                    row, done = queue.popleft()
                    yield row, done.result()
            while queue:
                row, done = queue.popleft()
                yield row, done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def caption_column(samples: Samples, field: str) -> str:
    """The column, or the entry of the metadata, that holds the captions `field`.

    Raises DataError when a table has no such column.
    """
    if isinstance(samples, TableImages):
        return column_of(samples.folder, field, samples.columns, "caption")
    if isinstance(samples, ParquetImages):
        return column_of(samples.folder, field, samples.columns, "re_caption")
    return field


def text_columns(samples: Samples) -> list[str]:
    """Fields of text that Samples.meta does not hold: the .txt of tars, the text columns of parquet files."""
    if isinstance(samples, Shards):
        return ["txt"]
    if not isinstance(samples, ParquetImages):
        return []
    path = samples.folder / samples.names[0]
    schema = read_parquet(path if path.is_file() else next(path.glob("*.parquet")), lambda file: file.schema_arrow)
    kinds = {column.name: str(getattr(column.type, "value_type", column.type)) for column in schema}
    return [name for name, kind in kinds.items() if kind.endswith("string") and name not in ("key", "extension")]


def whole_meta(samples: Samples, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """The metadata of a sample together with its text in these columns. Raises DataError when it cannot be read."""
    meta = dict(samples.meta(row))
    for column in columns:
        try:
            meta[column] = samples.caption(row, column)
        except DataError:  # missing or blank
            continue
    return meta


class Findings:
    """Collects what is wrong with samples and shards: counts it by cause, and lists it in a file of JSON lines.

    Attributes: bad, the number of bad samples; causes, findings by cause; first, the first few lines.
    """

    def __init__(self, file: TextIO | None):
        self._file = file
        self.bad = 0
        self.causes: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []

    def add(self, where: str, row: int | None, wrong: Sequence[tuple[str, str]]) -> None:
        """Adds all findings about one sample, or about one shard when row is None.

        where: names it in the list. wrong: (cause, reason) of each finding.
        """
        self.bad += row is not None
        for cause, reason in wrong:
            # The line has an entry for the sample's name, which most reasons begin with. Names may not be Unicode.
            reason = reason.removeprefix(where).lstrip(": ").encode(errors="backslashreplace").decode()
            line = {"sample": where, "row": row, "cause": cause, "reason": reason}
            self.causes[cause] += 1
            if len(self.first) < _NAMED:
                self.first.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")

    def report(self) -> dict[str, Any]:
        """{"bad": samples, "causes": {cause: n}, "first": lines}."""
        return {"bad": self.bad, "causes": dict(self.causes.most_common()), "first": self.first}

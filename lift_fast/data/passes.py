"""What stats, check and pack share: samples in order by threads, captions by field, the list of bad samples."""

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
NO_CAPTION, REPEATED, DAMAGED = "no caption", "repeated key", "damaged shard"  # causes beside those of pictures
_NAMED = 5  # bad samples that are listed in the figures


def in_order(work: Callable[[int], Found], rows: Iterable[int], threads: int | None) -> Iterator[tuple[int, Found]]:
    """(row, work(row)) in the order of the rows; threads run ahead of the caller by a few rows each."""
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
    """Where the captions `field` of a sample are: the entry or column. Raises DataError for a column that is none."""
    if isinstance(samples, TableImages):
        return column_of(samples.folder, field, samples.columns, "caption")
    if isinstance(samples, ParquetImages):
        return column_of(samples.folder, field, samples.columns, "re_caption")
    return field


def text_columns(samples: Samples) -> list[str]:
    """Captions that are not in the metadata: the .txt of tars, the columns of text of parquet files."""
    if isinstance(samples, Shards):
        return ["txt"]
    if not isinstance(samples, ParquetImages):
        return []
    path = samples.folder / samples.names[0]
    schema = read_parquet(path if path.is_file() else next(path.glob("*.parquet")), lambda file: file.schema_arrow)
    kinds = {column.name: str(getattr(column.type, "value_type", column.type)) for column in schema}
    return [name for name, kind in kinds.items() if kind.endswith("string") and name not in ("key", "extension")]


def whole_meta(samples: Samples, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """The metadata of a sample, and what these columns hold of it. Raises DataError."""
    meta = dict(samples.meta(row))
    for column in columns:
        try:
            meta[column] = samples.caption(row, column)
        except DataError:  # missing or blank
            continue
    return meta


class Findings:
    """What is wrong with samples: counted by cause, listed in a file of JSON lines."""

    def __init__(self, file: TextIO | None):
        self._file = file
        self.bad = 0  # samples
        self.causes: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []

    def add(self, where: str, row: int | None, wrong: Sequence[tuple[str, str]]) -> None:
        """All that is wrong with a sample, (cause, reason) each; without a row with a shard."""
        self.bad += row is not None
        for cause, reason in wrong:
            # Reasons for people name the sample, which has an entry of its own here; names may be no Unicode.
            told = reason.removeprefix(where).lstrip(": ").encode(errors="backslashreplace").decode()
            line = {"sample": where, "row": row, "cause": cause, "reason": told}
            self.causes[cause] += 1
            if len(self.first) < _NAMED:
                self.first.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")

    def report(self) -> dict[str, Any]:
        """{"bad": samples, "causes": {cause: n}, "first": lines}."""
        return {"bad": self.bad, "causes": dict(self.causes.most_common()), "first": self.first}

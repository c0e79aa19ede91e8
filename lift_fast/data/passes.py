"""What stats, check and pack share: a threaded pass over samples, all texts of a sample, the list of bad samples.

Memory holds the samples that are being processed and one shard's keys, besides what the opened data set keeps itself.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TextIO, TypeVar

from .reading import cpu_count
from .samples import BadSample, BadText, Problem, Samples
from .tables import TableSamples

Found = TypeVar("Found")
_NAMED = 5  # findings that a report lists


def in_order(work: Callable[[int], Found], rows: Iterable[int], threads: int | None) -> Iterator[tuple[int, Found]]:
    """Yields (row, work(row)) in the order of the rows. Threads work ahead of the caller, on a few rows each.

    threads: None for the number of processors, 32 at most.
    """
    threads = threads or min(32, cpu_count())
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


def whole_meta(samples: Samples, row: int, fields: Sequence[str]) -> dict[str, Any]:
    """The metadata of a sample together with its text in these fields. Raises BadText when it cannot be read."""
    meta = dict(samples.meta(row))
    for field in fields:
        try:
            meta[field] = samples.caption(row, field)
        except BadText:  # missing or no text: check counts it
            continue
    return meta


def remarks_of(samples: Samples) -> list[str]:
    """What a user should know of how a table was read, such as the number of rows that span several lines."""
    return samples.remarks() if isinstance(samples, TableSamples) else []


class Findings:
    """Collects what is wrong with samples and shards: counts it by cause, and lists it in a file of JSON lines.

    Attributes: bad, the number of bad samples; causes, findings by cause; first, the first few lines.
    """

    def __init__(self, file: TextIO | None):
        self._file = file
        self.bad = 0
        self.causes: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []

    def add(self, where: str, row: int, wrong: Sequence[BadSample]) -> None:
        """Adds all findings about one sample. where: names it in the list."""
        self.bad += 1
        for error in wrong:
            self._add(where, row, error.cause, error.reason, {})

    def add_problem(self, problem: Problem) -> None:
        """Adds something that is no sample: a damaged shard, unused files."""
        self._add(problem.where, None, problem.cause, problem.reason, {"count": problem.count})

    def _add(self, where: str, row: int | None, cause: str, reason: str, more: dict[str, int]) -> None:
        # The line has an entry for the sample's name, which most reasons begin with. Names may not be Unicode.
        reason = reason.removeprefix(where).lstrip(":, ").encode(errors="backslashreplace").decode()
        line = {"sample": where, "row": row, "cause": cause, "reason": reason, **more}
        self.causes[cause] += more.get("count", 1)
        if len(self.first) < _NAMED:
            self.first.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")

    def report(self) -> dict[str, Any]:
        """{"bad": samples, "causes": {cause: n}, "first": lines}."""
        return {"bad": self.bad, "causes": dict(self.causes.most_common()), "first": self.first}

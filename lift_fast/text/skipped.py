"""Lists the samples that a text cache has no vector of: OUT/skipped.jsonl, a JSON object a line.

    {"sample": shard and key, "shard": name, "row": row in the shard, "cause", "reason"}    a row without a vector
    {"sample": file, "cause", "reason", "count"}                                            the lost part of a shard

The list follows from the finished cache and the data set, so that it is the same whichever rank writes it, and however
often the run was killed.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from ..data.samples import BadText, Samples
from ..data.sources import Source
from ..errors import CacheError
from ..files import write_whole

SKIPPED = "skipped.jsonl"


def reasons(
    samples: Samples, field: str, encoder: str, number: int, first: int, rows: Sequence[int]
) -> dict[int, BadText]:
    """Row of shard `number` -> why a cache has no vector of it, for `rows`: its caption or key is bad, or its caption
    has no tokens.

    first: the number of the shard's first sample. encoder: its name, for messages. Raises DataError when the shard
    cannot be read.
    """
    keys = samples.bad_keys(number) if rows else {}
    found: dict[int, BadText] = {}
    for row in rows:
        try:
            caption = samples.caption(first + row, field)
        except BadText as error:
            found[row] = error.with_traceback(None)
            continue
        found[row] = keys.get(row) or BadText(
            "no tokens",
            f"{samples.where(first + row)}: the tokenizer of {encoder} makes no token of its caption {caption!r}; give "
            "it another caption, or leave it out with --skip-bad",
        )
    return found


class SkippedList:
    """The samples of a source that are left out of a cache. causes: how many, by cause. encoder: as for `reasons`."""

    def __init__(self, source: Source, encoder: str):
        self.source, self.encoder = source, encoder
        self.causes: Counter[str] = Counter()
        self._starts = list(accumulate(source.sizes, initial=0))
        self._lines: list[dict[str, object]] = []

    def reasons(self, number: int, rows: Sequence[int]) -> dict[int, BadText]:
        """Row -> why it has no vector, for rows of a shard. Raises DataError."""
        return reasons(self.source.samples, self.source.field, self.encoder, number, self._starts[number], rows)

    def add(self, number: int, rows: Sequence[int]) -> None:
        """Takes the numbers of the rows of a shard that have no vector. Raises DataError when it cannot be read."""
        for row, error in self.reasons(number, rows).items():
            self.causes[error.cause] += 1
            self._lines.append(
                {
                    "sample": self.source.samples.where(self._starts[number] + row),
                    "shard": self.source.names[number],
                    "row": row,
                    "cause": error.cause,
                    "reason": error.reason,
                }
            )

    def write_to(self, folder: Path) -> None:
        """Writes the list, with what is lost of damaged shards; removes an older one when there is nothing to list.

        Raises CacheError.
        """
        lost = [problem for problem in self.source.samples.problems if problem.cause != "unused file"]
        lines = self._lines + [
            {"sample": problem.where, "cause": problem.cause, "reason": problem.reason, "count": problem.count}
            for problem in lost
        ]
        try:
            if lines:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                write_whole({folder / SKIPPED: text.encode(errors="replace")})
            else:
                (folder / SKIPPED).unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(f"cannot write {folder / SKIPPED}: {error.strerror}; run the command again") from error

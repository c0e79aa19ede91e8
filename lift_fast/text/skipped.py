"""Lists the samples that a text cache has no vector of: OUT/skipped.jsonl, a JSON object a line.

    {"sample": shard and key, "shard": name, "row": row in the shard, "cause", "reason"}    a row without a vector
    {"sample": file, "cause", "reason", "count"}                                            the lost part of a shard

The list follows from the finished cache and the data set, so that it is the same whichever rank writes it, and however
often the run was killed.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from ..data.samples import BadText
from ..data.sources import Source
from ..errors import CacheError
from ..files import write_whole

SKIPPED = "skipped.jsonl"


class SkippedList:
    """The samples of a source that are left out. causes: how many, by cause.

    known: shard -> row -> what is wrong with its caption or key; a shard that is not in it is read again.
    """

    def __init__(self, source: Source, encoder: str, known: Mapping[int, Mapping[int, BadText]]):
        self.source, self.encoder, self.known = source, encoder, known
        self.causes: Counter[str] = Counter()
        self._starts = list(accumulate(source.sizes, initial=0))
        self._lines: list[dict[str, object]] = []

    def add(self, number: int, rows: Sequence[int]) -> None:
        """Takes the numbers of the rows of a shard that have no vector. Raises DataError when it cannot be read."""
        if not rows:
            return
        bad = self.known[number] if number in self.known else self.source.read(number).bad
        for row in rows:
            error = bad[row] if row in bad else self.without_tokens(number, row)
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

    def without_tokens(self, number: int, row: int) -> BadText:
        """The error of a row whose caption has no tokens."""
        sample = self._starts[number] + row
        caption = self.source.samples.caption(sample, self.source.field)
        return BadText(
            "no tokens",
            f"{self.source.samples.where(sample)}: the tokenizer of {self.encoder} makes no token of its caption "
            f"{caption!r}; give it another caption, or leave it out with --skip-bad",
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

"""The bad samples of a run: counted by cause and listed in a file; too many of them end the run."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import foreign
from ..errors import DataError
from ..files import for_appending, open_regular
from .samples import BadSample, Collection

Bad = tuple[int, BadSample]  # a row number, and what is wrong with its sample
_JUDGED_FROM = 1000  # samples: the share of bad ones among fewer means little
_LISTED = 20
_LONGEST_LINE = 1 << 20  # bytes


class RowSet:
    """A set of row numbers below `rows`, in a bit each. Memory that no number touches is never used."""

    def __init__(self, rows: int):
        self.rows = rows
        self._bits = np.zeros(-(-rows // 8), dtype=np.uint8)

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] & 1 << (row & 7))

    def add(self, row: int) -> None:
        """Adds a number."""
        self._bits[row >> 3] |= 1 << (row & 7)


class Skipped:
    """The bad samples that a rank has met: counts them by cause, lists each in a file, and ends the run when they are
    too many.

    causes: number of bad samples by cause, each counted once. met: how often they came up, by cause; a sample that is
    bad in every epoch comes up in every epoch. looked_at: number of samples so far, good and bad, each as often as it
    came up. most: largest share of bad ones among these.

    With several ranks, merged() adds up what each has counted, and rank 0 writes the file: the others' lines go from
    their take_lines() to its write_lines(). A resumed run loads the merged state on every rank. All know its rows from
    then on, but only rank 0 goes on from its counts, the others from 0, so that the ranks' sum stays right.
    """

    def __init__(self, data: Collection, most: float, rank: int = 0):
        self.data, self.most, self.rank = data, most, rank
        self.looked_at = 0
        self.causes: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self._cause_of: dict[int, str] = {}  # of the rows that are counted
        self._listed = RowSet(sum(data.shard_sizes))
        self._first: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []
        self._path: Path | None = None

    def add(self, good: int, bad: Sequence[Bad]) -> None:
        """Counts samples that came up: how many good ones, and the bad ones. Lists the bad ones.

        Raises DataError when the share of bad samples is above `most`.
        """
        self.looked_at += good + len(bad)
        for row, error in bad:
            self.met[error.cause] += 1
            if row not in self._cause_of:
                self._cause_of[row] = error.cause
                self.causes[error.cause] += 1
        self._list(bad)
        if bad and self.too_many(0, 0):
            row, error = bad[-1]
            raise DataError(
                f"{self.met.total()} of {self.looked_at} samples are bad ({in_words(self.met)}), more than "
                f"--max-skipped {self.most}; the last: {self.data.where(row)} ({error.reason}). lift-fast data check "
                "--bad FILE lists all"
            )

    def too_many(self, good: int, bad: int) -> bool:
        """Whether the share of bad samples is above `most`, with so many more good and bad ones."""
        looked_at = self.looked_at + good + bad
        return looked_at >= _JUDGED_FROM and self.met.total() + bad > self.most * looked_at

    def known(self, row: int) -> BadSample | None:
        """What is wrong with a sample that came up before and need not be decoded again; a file that could not be read
        may be there the next time."""
        cause = self._cause_of.get(row)
        return None if cause in (None, "unreadable") else BadSample(cause, f"{cause}, as before")  # type: ignore[arg-type]

    def note(self, row: int, error: BadSample) -> None:
        """Lists one without counting it, unless it is listed already."""
        self._list([(row, error)])

    def _list(self, bad: Iterable[Bad]) -> None:
        lines = []
        for row, error in bad:
            if row not in self._listed:
                self._listed.add(row)
                where = self.data.where(row)
                lines.append({"sample": where, "row": row, "cause": error.cause, "reason": error.reason})
        self._write(lines)

    def write_to(self, path: Path) -> None:
        """Appends a JSON line for each bad sample to this file, once: at once for those so far, then as they occur.

        The file is made with the first line. The samples in a file that is there, of the same run, are not listed
        again, and a last line that was cut short is removed. For rank 0 alone.
        """
        self._path = path
        there: list[dict[str, Any]] = []
        rows: set[int] = set()
        for line in _lines_of(path):
            if 0 <= line["row"] < self._listed.rows:
                rows.add(line["row"])
                self._listed.add(line["row"])
                there += [line] * (len(there) < _LISTED)
        lines = [line for line in self._unwritten if line["row"] not in rows]
        self._unwritten, self._first = [], there
        self._write(lines)

    def take_lines(self) -> list[dict[str, Any]]:
        """Hands over the lines that are not written yet, for rank 0's write_lines()."""
        lines, self._unwritten = self._unwritten, []
        return lines

    def write_lines(self, lines: Iterable[dict[str, Any]]) -> None:
        """Lists what other ranks have met, each sample once."""
        unlisted = []
        for line in lines:
            if line["row"] not in self._listed:
                self._listed.add(line["row"])
                unlisted.append(line)
        self._write(unlisted)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Writes lines to the file, or keeps them until there is one."""
        self._first += lines[: _LISTED - len(self._first)]
        if self._path is None:
            self._unwritten += lines
        elif lines:
            with open(self._path, "a", opener=for_appending) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def state_dict(self) -> dict[str, Any]:
        """{"looked_at": samples, "met": {cause: times}, "rows": {cause: rows}} as this rank has counted them."""
        return _state(self.looked_at, self.met, self._cause_of)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the merged state of all ranks, between two batches: its rows are counted and listed already."""
        first = self.rank == 0
        self.looked_at, self.met = (state["looked_at"], Counter(state["met"])) if first else (0, Counter())
        self._cause_of = _cause_of(state)
        self.causes = Counter(self._cause_of.values())
        for row in self._cause_of:
            self._listed.add(row)

    def report(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"skipped_pictures": samples, "skipped_causes": {cause: samples}, "skipped_met": n, "skipped": [{"sample",
        "row", "cause", "reason"}]}: each bad sample counts once, and skipped_met is how often they came up in all
        epochs. "skipped" lists the first 20 samples. state: of all ranks, from merged(); None for this rank alone."""
        state = state or self.state_dict()
        causes = Counter({cause: len(rows) for cause, rows in state["rows"].items()})
        return {
            "skipped_pictures": causes.total(),
            "skipped_causes": dict(causes.most_common()),
            "skipped_met": sum(state["met"].values()),
            "skipped": self._first,
        }


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state_dict of all ranks together: looked_at and met are added up, and each row is counted once."""
    cause_of: dict[int, str] = {}
    for state in reversed(states):  # where ranks do not agree on a cause, the first has its way
        cause_of |= _cause_of(state)
    met = sum((Counter(state["met"]) for state in states), Counter())
    return _state(sum(state["looked_at"] for state in states), met, cause_of)


def in_words(counts: Counter[str]) -> str:
    """Counts by cause: "3 truncated, 1 empty"."""
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())


def _state(looked_at: int, met: Mapping[str, int], cause_of: Mapping[int, str]) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for row in sorted(cause_of):
        rows.setdefault(cause_of[row], []).append(row)
    return {"looked_at": looked_at, "met": dict(met), "rows": rows}


def _cause_of(state: dict[str, Any]) -> dict[int, str]:
    return {row: cause for cause, rows in state["rows"].items() for row in rows}


def _lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file that Skipped wrote, and removes a last one that was cut short. Raises OSError."""
    if not os.path.lexists(path):
        return
    whole = 0
    with open_regular(path) as opened, io.BufferedReader(opened) as file:
        while text := file.readline(_LONGEST_LINE):
            if not text.endswith(b"\n"):
                break
            whole += len(text)
            with suppress(ValueError):  # damage costs no more than samples that are listed once more
                line = foreign.parse_json(text)
                if isinstance(line, dict) and type(line.get("row")) is int:
                    yield line
        cut = text != b""
    if cut:
        with open(path, "ab", opener=for_appending) as log:
            log.truncate(whole)

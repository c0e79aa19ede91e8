"""Measures, and writes what was measured: {"machine", "versions", "rows", "bars", "notes"}."""

import json
import time
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from lift_fast.measure.machine import machine, versions
from lift_fast.measure.time import Timing, interleaved_ms

from .table import bar_in_words, print_table


class Suite:
    """The rows, bars and notes of one run. quick: fewer repeats, for a machine that is shared.

    seconds: after which `over()` says that no further case is begun.
    """

    def __init__(self, name: str, quick: bool, seconds: float | None = None):
        self.name = name
        self.quick = quick
        self.repeats = 7 if quick else 25
        self.end = None if seconds is None else time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def note(self, text: str) -> None:
        """What was not measured, and why; each once."""
        if text not in self.notes:
            self.notes.append(text)

    def compare(
        self,
        case: Mapping[str, Any],
        rivals: Mapping[str, Callable[[], object]],
        moved: int,
        device: str = "cpu",
    ) -> dict[str, Timing]:
        """Times rivals in turn and adds a row for each: the case, what, median and spread, GB/s of `moved`."""
        timings = interleaved_ms(rivals, self.repeats, warmup=2, device=device)
        for what, (median, spread) in timings.items():
            self.rows.append(
                {
                    **case,
                    "what": what,
                    "device": device,
                    "repeats": self.repeats,
                    "median_ms": median,
                    "spread_ms": spread,
                    "gb_per_s": moved / median / 1e6,
                }
            )
        return timings

    def bar(
        self, name: str, value: float | None, bar: float, tolerance: float | None = None, at_most: bool = False
    ) -> None:
        """A promise: value is at least bar; or within tolerance of it, on either side; or at most bar.

        None, not measured, is a bar missed.
        """
        entry: dict[str, Any] = {"name": name, "value": value, "bar": bar}
        if tolerance is not None:
            entry |= {"tolerance": tolerance, "ok": value is not None and abs(value - bar) <= tolerance}
        elif at_most:
            entry |= {"at_most": True, "ok": value is not None and value <= bar}
        else:
            entry["ok"] = value is not None and value >= bar
        self.bars.append(entry)

    def write(self, file: Path | None) -> None:
        result = {
            "suite": self.name,
            "quick": self.quick,
            "machine": machine(),
            "versions": versions(),
            "rows": self.rows,
            "bars": self.bars,
            "notes": self.notes,
        }
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")

    def print(self) -> None:
        """Rows that have the same columns as one table, then the bars and the notes."""
        for columns, rows in groupby(self.rows, key=tuple):
            print_table([list(columns), *([_cell(value) for value in row.values()] for row in rows)])
        for bar in self.bars:
            print(f"{'ok  ' if bar['ok'] else 'MISS'} {bar['name']}: {bar_in_words(bar)}")
        for note in self.notes:
            print(f"note {note}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

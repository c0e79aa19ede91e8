"""Times implementations and writes the results: {"machine", "versions", "rows", "bars", "notes"}.

"bars" are the targets. Each result is also written to the lines file as soon as it is known; see lines.py.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from lift_fast.measure.machine import machine, versions
from lift_fast.measure.time import Timing, interleaved_ms

from . import lines
from .start import rehearsing
from .table import bar_in_words, print_table

# Environment variable with the measured limits of the GPU, as JSON: {"bytes": per second, "flops": per second}.
CEILINGS = "LIFT_FAST_CEILINGS"
# Columns of a row -> their names in a line of the lines file.
LINE = {"what": "backend", "of_gemm": "of_ceiling", "grad_error": "error"}
# Columns that are measurements; the others describe the case.
FIGURES = frozenset(
    ("what", "device", "repeats", "median_ms", "spread_ms", "gb_per_s", "tflop_per_s", "images_per_s", "of_gemm")
    + ("extra_mib", "peak_mib", "loss_error", "grad_error", "extra_gradients", "threads", "mfu_gemm", "mfu_datasheet")
)


class Suite:
    """The rows, targets and notes of one run.

    quick: fewer repeats, for a shared machine. seconds: the time after which no further case is started. `least` is the
    least number of calls of each implementation that is timed.
    """

    def __init__(self, name: str, quick: bool, seconds: float | None = None):
        self.name = name
        self.phase = lines.phase(name)
        self.quick = quick
        # Times of a rehearsal mean nothing, so it measures once.
        self.repeats, self.least = (1, 1) if rehearsing() else (7 if quick else 25, 3)
        self.end = None if seconds is None else time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def over(self) -> bool:
        """Whether the time for this run is up."""
        return self.end is not None and time.monotonic() > self.end

    def note(self, text: str) -> None:
        """Records what was not measured and why; a repeated note is ignored."""
        if text not in self.notes:
            self.notes.append(text)
            lines.write({"phase": self.phase, "note": text})

    def add(self, row: dict[str, Any], **more: Any) -> None:
        """Adds a row. more: fields that only its line in the lines file has, such as "bytes" and "flops"."""
        self.rows.append(row)
        named = {name: value for name, value in row.items() if name not in FIGURES and value is not None}
        case = ", ".join(str(value) if name == "what of" else f"{name} {value}" for name, value in named.items())
        line = {LINE.get(name, name): value for name, value in row.items() if name != "device"}
        line = {"phase": self.phase, "case": case, "on": row.get("device"), **line, **more}
        if "of_ceiling" not in line and (share := _of_ceiling(line)):
            line["of_ceiling"] = share
        lines.write(line)

    def compare(
        self,
        case: Mapping[str, Any],
        rivals: Mapping[str, Callable[[], object]],
        moved: int,
        device: str = "cpu",
    ) -> dict[str, Timing]:
        """Times rivals in turn and adds a row for each. moved: bytes that one call reads and writes, for GB/s."""
        timings = interleaved_ms(rivals, self.repeats, warmup=self.least - 1, device=device)
        for what, (median, spread) in timings.items():
            row = {
                **case,
                "what": what,
                "device": device,
                "repeats": self.repeats,
                "median_ms": median,
                "spread_ms": spread,
                "gb_per_s": moved / median / 1e6,
            }
            self.add(row, bytes=moved)
        return timings

    def bar(
        self, name: str, value: float | None, bar: float, tolerance: float | None = None, at_most: bool = False
    ) -> None:
        """Adds a target: value is to be at least `bar`, at most `bar`, or within `tolerance` of it.

        A value of None (not measured) misses the target.
        """
        entry: dict[str, Any] = {"name": name, "value": value, "bar": bar}
        if tolerance is not None:
            entry |= {"tolerance": tolerance, "ok": value is not None and abs(value - bar) <= tolerance}
        elif at_most:
            entry |= {"at_most": True, "ok": value is not None and value <= bar}
        else:
            entry["ok"] = value is not None and value >= bar
        self.bars.append(entry)
        figures = {key: value for key, value in entry.items() if key not in ("name", "bar")}
        lines.write({"phase": self.phase, "bar": name, "limit": bar, **figures})

    def write(self, file: Path | None) -> None:
        """Writes the run's results as JSON; without a file, nothing."""
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
        """Prints rows in tables, a new one when the columns change, then the targets and the notes."""
        for columns, rows in groupby(self.rows, key=tuple):
            print_table([list(columns), *([_cell(value) for value in row.values()] for row in rows)])
        for bar in self.bars:
            print(f"{'ok  ' if bar['ok'] else 'MISS'} {bar['name']}: {bar_in_words(bar)}")
        for note in self.notes:
            print(f"note {note}")


def _of_ceiling(line: Mapping[str, Any]) -> float | None:
    """The least possible time by the GPU's limits over the measured time; None if either is unknown."""
    ceilings = json.loads(os.environ.get(CEILINGS, "{}"))
    least = [line[kind] / ceilings[kind] for kind in ("bytes", "flops") if kind in line and kind in ceilings]
    return max(least) * 1e3 / line["median_ms"] if least and "median_ms" in line else None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

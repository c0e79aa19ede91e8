"""Measures, and writes what was measured: {"machine", "versions", "rows", "bars"}."""

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from lift_fast.measure.machine import machine, versions
from lift_fast.measure.time import Timing, interleaved_ms


class Suite:
    """The rows and bars of one run. quick: fewer repeats, for a machine that is shared."""

    def __init__(self, name: str, quick: bool):
        self.name = name
        self.quick = quick
        self.repeats = 7 if quick else 25
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []

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

    def bar(self, name: str, value: float, bar: float, tolerance: float | None = None, at_most: bool = False) -> None:
        """A promise: value is at least bar; or within tolerance of it, on either side; or at most bar."""
        entry: dict[str, Any] = {"name": name, "value": value, "bar": bar}
        if tolerance is not None:
            entry |= {"tolerance": tolerance, "ok": abs(value - bar) <= tolerance}
        elif at_most:
            entry |= {"at_most": True, "ok": value <= bar}
        else:
            entry["ok"] = value >= bar
        self.bars.append(entry)

    def write(self, file: Path | None) -> None:
        result = {
            "suite": self.name,
            "quick": self.quick,
            "machine": machine(),
            "versions": versions(),
            "rows": self.rows,
            "bars": self.bars,
        }
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")

    def print(self) -> None:
        """Rows that have the same columns as one table, then the bars."""
        for columns, rows in groupby(self.rows, key=tuple):
            table = [list(columns), *([_cell(value) for value in row.values()] for row in rows)]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for line in table:
                print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        for bar in self.bars:
            promise = f"{'at most' if 'at_most' in bar else 'bar'} {bar['bar']:g}"
            if "tolerance" in bar:
                promise += f" +- {bar['tolerance']:g}"
            print(f"{'ok  ' if bar['ok'] else 'MISS'} {bar['name']}: {bar['value']:.4g} ({promise})")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Text output: tables, and targets in words."""

from collections.abc import Mapping
from typing import Any


def bar_in_words(bar: Mapping[str, Any]) -> str:
    """A target's value and limit: "2.41 (target 2.3)", "0.04 (at most 0.05)", "not measured (target 1.7)"."""
    value = "not measured" if bar["value"] is None else f"{bar['value']:.4g}"
    words = f"{value} ({'at most' if 'at_most' in bar else 'target'} {bar['bar']:g}"
    return f"{words} +- {bar['tolerance']:g})" if "tolerance" in bar else f"{words})"


def print_table(table: list[list[str]]) -> None:
    """Prints rows of cells, the first of them the header, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

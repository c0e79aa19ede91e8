"""Tables and bars in words."""

from collections.abc import Mapping
from typing import Any


def bar_in_words(bar: Mapping[str, Any]) -> str:
    """A bar's value and its limit: "2.41 (bar 2.3)", "0.04 (at most 0.05)", "not measured (bar 1.7)"."""
    value = "not measured" if bar["value"] is None else f"{bar['value']:.4g}"
    words = f"{value} ({'at most' if 'at_most' in bar else 'bar'} {bar['bar']:g}"
    return f"{words} +- {bar['tolerance']:g})" if "tolerance" in bar else f"{words})"


def print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

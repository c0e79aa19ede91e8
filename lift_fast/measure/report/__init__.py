"""The report of `lift-fast report`: one dict of numbers as JSON, as a page, and as a table in the terminal."""

from .page import Line, costs, line_chart, print_table, render_html, summary, verdict, write

__all__ = ["Line", "costs", "line_chart", "print_table", "render_html", "summary", "verdict", "write"]

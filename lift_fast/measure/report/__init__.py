"""The report of `lift-fast report`: one dict of numbers (measure/gather.py) as JSON, as a page, and as a table.

It is of one run or of two. It shows what was measured or counted, marks which of the two it was, and names the winner,
whichever it is: each measure judges once (comparison.Measure), and the page, the table and the sentences ask it. A
number that one of two models lacks shows as a dash, and a part or a model that is missing is left out.
"""

from .comparison import lead, summary, verdict
from .output import print_table, write
from .page import render_html

__all__ = ["lead", "print_table", "render_html", "summary", "verdict", "write"]

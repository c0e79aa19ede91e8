"""The report of `lift-fast report`: one dict of numbers (measure/gather.py) as JSON, as a page, and as a table.

It shows what was measured or counted, marks which of the two it was, and names the winner whoever it is: `verdict`
sorts the measures, and the page's first sentence is built from it. A number that is null shows as a dash, and a part
that is missing is left out.
"""

from .comparison import summary, verdict
from .output import print_table, write
from .page import render_html

__all__ = ["print_table", "render_html", "summary", "verdict", "write"]

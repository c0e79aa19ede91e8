"""Writes the report: report.json and report.html into a folder, a table to the terminal."""

import json
import sys
from pathlib import Path
from typing import TextIO

from ...files import write_whole
from ..formatting import DASH, HARD, THIN, amount, integer
from .comparison import PAID_ONCE, costs, embedding_s, qualities, summary
from .fields import finite, get
from .page import render_html

# The table is ASCII but for names in the report.
_ASCII = str.maketrans({THIN: " ", HARD: " ", "−": "-", DASH: "-", "→": "->", "µ": "u", "’": "'"})


def write(report: dict, folder: Path) -> None:
    """Writes report.json and report.html into `folder`, each replaced whole; an error leaves the old files."""
    texts = {
        "report.json": json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render_html(report),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole({folder / name: text.encode() for name, text in texts.items()})


def print_table(report: dict, file: TextIO | None = None) -> None:
    """Prints costs, scores and the summary to `file` or stdout; `*` marks the model that is ahead."""
    report = finite(report)
    rows = [("", "LIFT", "CLIP", "LIFT against CLIP")]
    for measure in costs(report) + qualities(report):
        lift, clip = (
            f"{amount(value, measure.kind)} {'*' if measure.ahead == side else ' '}"
            for side, value in (("lift", measure.lift), ("clip", measure.clip))
        )
        rows.append((measure.name, lift, clip, measure.difference))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    if (embedding := embedding_s(report)) is not None:
        captions, each = (get(report, "lift", key) for key in ("captions", "embed_ms_per_caption"))
        paid = f"{integer(captions)} captions x {amount(each, 'ms')} = {amount(embedding, 's')} of embedding"
        lines += ["", f"Text over the whole run holds {paid}.", PAID_ONCE]
    text = "\n".join([*lines, "", summary(report)])
    print(text.translate(_ASCII), file=file or sys.stdout)

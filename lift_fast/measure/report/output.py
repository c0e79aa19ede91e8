"""Writes the report: report.json and report.html into a folder, a table to the terminal."""

import json
import sys
import textwrap
from pathlib import Path
from typing import TextIO

from ...files import remove_abandoned, write_whole
from ...printable import printable
from ..formatting import DASH, HARD, THIN, amount, integer
from .comparison import PAID_ONCE, costs, embedding_s, lead, qualities, summary, verdict
from .fields import finite, get, models_of
from .page import render_html

# The table is ASCII but for names in the report.
_ASCII = str.maketrans({THIN: " ", HARD: " ", "−": "-", DASH: "-", "µ": "u", "’": "'"})
_WIDTH = 100  # of the sentences, in characters


def write(report: dict, folder: Path) -> None:
    """Writes report.json and report.html into `folder`, each replaced whole; an error leaves the old files.

    report.json is the report, and of two runs also "verdict": the names of the measures on which each is ahead.
    """
    content = finite(report)
    if len(models_of(report)) == 2:
        content["verdict"] = {side: [each.name for each in found] for side, found in verdict(content).items()}
    texts = {
        "report.json": json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render_html(report),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in texts:
        remove_abandoned(folder, name)
    write_whole({folder / name: text.encode(errors="replace") for name, text in texts.items()})


def print_table(report: dict, file: TextIO | None = None) -> None:
    """Prints costs, scores and the summary to `file` or stdout; of two runs, `*` marks the model that is ahead."""
    report = finite(report)
    models = models_of(report)
    compared = len(models) == 2
    rows = [["", *(name for _, name in models), *(["LIFT against CLIP"] if compared else [])]]
    for measure in costs(report) + qualities(report):
        values = [amount(getattr(measure, model), measure.kind) for model, _ in models]
        if compared:
            values = [
                f"{value} {'*' if measure.ahead == model else ' '}"
                for value, (model, _) in zip(values, models, strict=True)
            ]
            values.append(measure.difference or "")
        rows.append([measure.name, *values])
    rows = [[_plain(word) for word in row] for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([f"{row[0]:<{first}}", *(f"{word:>{width}}" for word, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    if (embedding := embedding_s(report)) is not None:
        captions, each = (get(report, "lift", key) for key in ("captions", "embed_ms_per_caption"))
        paid = f"{integer(captions)} captions x {amount(each, 'ms')} = {amount(embedding, 's')} of embedding"
        lines += ["", _plain(f"Text over the whole run holds {paid}."), _plain(PAID_ONCE)]
    sentences = [textwrap.fill(_plain(sentence), _WIDTH) for sentence in (lead(report), summary(report))]
    print("\n".join([*lines, "", *sentences]), file=file or sys.stdout)


def _plain(text: str) -> str:
    """The text as it is printed: in ASCII but for names, which are as long as they will be."""
    return printable(text.replace("→", "->").translate(_ASCII))

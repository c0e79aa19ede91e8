"""The measured figures in README.md and docs/ agree with the results, and are only in blocks that tables.py writes.

docs/tuned.md and docs/roofline.md are written by other programs and have tests of their own.
"""

import re

import pytest

from benchmarks import plot, tables

# What a measurement looks like: a number with a unit of time, speed or memory, or "1.5×".
MEASURED = re.compile(
    r"\d ?(ms|µs|MiB|GiB|GB/s|TB/s|TFLOP/s|images/s|rows/s|captions/s)\b|\d\.\d+ ?(s|seconds|times)\b|\d ?×(?! ?\d)"
)
OTHERS = ("tuned.md", "roofline.md")


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_figures_are_those_of_the_results(page):
    assert page.read_text() == tables.current(page.read_text()), "run: python -m benchmarks.tables --write"


@pytest.mark.parametrize(
    "page", [page for page in tables.pages() if page.name not in OTHERS], ids=lambda page: page.name
)
def test_no_figure_is_written_by_hand(page):
    text = tables.BLOCK.sub("", page.read_text())
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = [line for line in text.splitlines() if MEASURED.search(line)]
    assert not found, "measured figures belong in a block that benchmarks/tables.py writes:\n" + "\n".join(found)


def test_every_table_is_used():
    text = "".join(page.read_text() for page in tables.pages())
    assert {name for _, name, _ in tables.BLOCK.findall(text)} == set(tables.FIGURES)
    assert len(re.findall("<!-- figures:", text)) == len(tables.BLOCK.findall(text)), "a block without its end"


def test_a_stale_figure_is_noticed():
    page = tables.ROOT / "README.md"
    figure = re.search(r"\d[\d.,]* (?=ms \|)", tables.headline())
    assert figure
    stale = page.read_text().replace(figure[0], f"1{figure[0]}")
    assert stale != page.read_text() and tables.current(stale) == page.read_text()


def test_the_plot_is_that_of_the_results(tmp_path):
    plot.draw([tables.RESULTS / "bench-contrastive.json"], tmp_path / "plot.svg")
    drawn, kept = tmp_path / "plot.svg", tables.ROOT / "docs" / "contrastive.svg"
    assert drawn.read_text() == kept.read_text(), "run: python -m benchmarks plot … --out docs/contrastive.svg"

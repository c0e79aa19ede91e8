"""docs/roofline.md is up to date, and no estimate is below the limits of the hardware."""

import pytest

from benchmarks import roofline


def test_the_page_is_what_the_program_writes():
    assert roofline.DOCS.read_text() == roofline.page(), "run: python -m benchmarks.roofline --write"


@pytest.mark.parametrize("estimate", roofline.losses() + roofline.attention(), ids=str)
def test_an_estimate_is_no_less_than_its_limits(estimate):
    assert estimate.seconds >= max(estimate.by_products, estimate.by_memory)

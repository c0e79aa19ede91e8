"""The report's style sheet: text is legible in light and in dark mode, and every colour is one of its variables."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from lift_fast.measure.report import page

STYLE = (Path(page.__file__).parent / "style.css").read_text()
TEXTS = ("ink", "soft", "lift", "clip", "good", "bad")
GROUNDS = ("page", "panel", "lift-wash", "clip-wash")


def colours(dark: bool) -> dict[str, tuple[int, ...]]:
    """Name -> red, green, blue of the style sheet's variables."""
    light, _, rest = STYLE.partition("@media (prefers-color-scheme: dark) {")
    blocks = [light[light.index(":root") : light.index("}")], *([rest[: rest.index("}")]] if dark else [])]
    found = {}
    for name, code in re.findall(r"--([a-z-]+): #([0-9a-f]+);", "".join(blocks)):
        code = code if len(code) == 6 else "".join(2 * digit for digit in code)
        found[name] = tuple(int(code[i : i + 2], 16) for i in (0, 2, 4))
    return found


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """The contrast ratio of WCAG 2.2 (w3.org/TR/WCAG22, relative luminance)."""

    def luminance(colour):
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_legible_on_every_ground(dark, ground, text):
    known = colours(dark)
    assert contrast(known[text], known[ground]) >= 4.5


def test_dark_mode_changes_every_colour_and_there_are_no_others():
    light, dark = colours(False), colours(True)
    assert set(light) == set(dark) and all(light[name] != dark[name] for name in light)
    rules = STYLE[STYLE.index("* { box-sizing") :]
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsl", rules)
    used = set(re.findall(r"var\(--([a-z-]+)\)", rules))
    assert used == set(light)
    assert set(re.findall(r"(?:^|[ ;{])(?:color|fill): var\(--([a-z-]+)\)", rules)) == set(TEXTS)
    assert set(re.findall(r"background: var\(--([a-z-]+)\)", rules)) == {*GROUNDS, "lift", "clip", "photo"}

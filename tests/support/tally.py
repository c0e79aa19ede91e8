"""Counts attacks: the fixture `tally`, the table that ends `make campaign`, and what it must reach (--bars).

A plugin of pytest (see conftest.py); counts of xdist's workers reach it with the reports of their tests.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

# What may be counted, and how many of it a campaign has to try at least.
DAMAGED = {"cache": 600, "index": 300, "manifest": 200, "tar": 300, "table": 200, "run": 200, "weights": 100}
BARS = {**DAMAGED, "fork": 100, "writer": 100, "kill": 300, "fault": 300}
ALL_DAMAGED = 2000
OUTCOMES = ("right answer", "error")
NAME = "tally"

Tally = Callable[..., None]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """tally(kind, outcome, count=1): counts attacks that ended well. kind: one of BARS, for damaged files what was
    damaged. outcome: "right answer" (also: a run that went on to the same bytes) or "error" (a typed one)."""
    counts: Counter[tuple[str, str]] = Counter()

    def add(kind: str, outcome: str, count: int = 1) -> None:
        if kind not in BARS or outcome not in OUTCOMES:
            raise ValueError(f"tally({kind!r}, {outcome!r}): the kinds are {[*BARS]}, the outcomes {OUTCOMES}")
        counts[kind, outcome] += count

    yield add
    request.node.user_properties.append((NAME, [[*what, count] for what, count in counts.items()]))


class Table:
    """The sums over all tests."""

    def __init__(self, bars: bool):
        self.bars = bars
        self.counts: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            for name, values in report.user_properties:
                for kind, outcome, count in values if name == NAME else ():
                    self.counts[kind, outcome] += count

    def of(self, kind: str) -> int:
        """How many attacks of a kind there were."""
        return sum(self.counts[kind, outcome] for outcome in OUTCOMES)

    def short(self) -> list[str]:
        """What was tried too seldom, as sentences."""
        reached = {kind: self.of(kind) for kind in BARS} | {"damaged": sum(map(self.of, DAMAGED))}
        return [
            f"{kind}: {reached[kind]}, and a campaign tries {least}"
            for kind, least in {**BARS, "damaged": ALL_DAMAGED}.items()
            if reached[kind] < least
        ]

    def lines(self) -> list[str]:
        """The table."""
        found = [f"{'':12}{'tried':>8}{OUTCOMES[0]:>16}{OUTCOMES[1]:>8}"]
        rows = {kind: (kind,) for kind in DAMAGED} | {"damaged": (*DAMAGED,)}
        rows |= {kind: (kind,) for kind in BARS if kind not in DAMAGED}
        for name, kinds in rows.items():
            each = [sum(self.counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
            if not (self.bars or sum(each)):
                continue
            found.append(f"{name:12}{sum(each):8}{each[0]:16}{each[1]:8}")
        return found

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.bars and self.short() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.bars or self.counts:
            terminalreporter.section("attacks")
            terminalreporter.write_line("\n".join(self.lines()))
        if self.bars:
            for line in self.short():
                terminalreporter.write_line(f"too few: {line}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bars", action="store_true", help="fail unless as many attacks were tried as a campaign has to")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(config.getoption("--bars")))

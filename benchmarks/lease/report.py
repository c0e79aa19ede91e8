"""One table of a run's lines, short enough for the end of a log."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import lines
from ..table import bar_in_words
from . import plan

MOST = 11_000  # characters
OURS = "lift_fast"
WRONG_MOST = 20
Line = dict[str, Any]
GOOD = "ok", "passed", "skipped", "rehearsed"


def wrong(found: Sequence[Line]) -> bool:
    """Whether anything ended otherwise than it should. A bar that is missed is a figure, and no failure."""
    return any(line.get("outcome", "ok") not in GOOD for line in found)


def text(file: Path) -> str:
    found = list(lines.read(file))
    rehearsal = any(line.get("rehearsal") for line in found)  # its figures mean nothing
    parts = [_phases, _rehearsed, _wrong] if rehearsal else [_phases, _wrong, _measured, _tuned, _bars]
    whole = "\n".join(line for part in parts for line in part(found))
    return whole if len(whole) <= MOST else whole[:MOST] + f"\n… the rest is in {file.name}"


def _phases(found: Sequence[Line]) -> Iterator[str]:
    names = {phase.name for phase in plan.PHASES}
    yield f"{'phase':<14}{'outcome':<10}{'seconds':>8}{'planned':>8}  note"
    for line in found:
        if line["phase"] in names | {"peers"} and "outcome" in line and "case" not in line:
            figures = "".join(f"{line.get(name, ''):>8}" for name in ("seconds", "planned"))
            note = line.get("note", line.get("device", "") if line["phase"] == "machine" else "")
            yield f"{line['phase']:<14}{line['outcome']:<10}{figures}  {note[:160]}"
    smoke = Counter(line["outcome"] for line in found if line["phase"] == "smoke" and "outcome" in line)
    yield "smoke: " + (", ".join(f"{count} {outcome}" for outcome, count in sorted(smoke.items())) or "none")


def _rehearsed(found: Sequence[Line]) -> Iterator[str]:
    compiled = [line for line in found if "compile_cpu_s" in line]
    if compiled:
        seconds, count = (sum(line[name] for line in compiled) for name in ("compile_cpu_s", "compiles"))
        yield f"rehearsal: {count} compiles of Triton, {seconds:.0f} CPU seconds"


def _wrong(found: Sequence[Line]) -> Iterator[str]:
    bad = [line for line in found if "case" in line and line.get("outcome", "ok") not in GOOD]
    for line in bad[:WRONG_MOST]:
        tool = f" ({line['tool']})" if "tool" in line else ""
        note = " ".join(line.get("note", "").split())
        yield f"{line['outcome'].upper()} {line['phase']} {line['case'][:110]}{tool}: {note[:140]}"
    if len(bad) > WRONG_MOST:
        yield f"… and {len(bad) - WRONG_MOST} more"


def _measured(found: Sequence[Line]) -> Iterator[str]:
    """For each case the fastest of ours, its share of the ceiling, and the fastest of the others."""
    cases: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        if "median_ms" in line and line["phase"] != "tune":
            cases.setdefault((line["phase"], line["case"]), []).append(line)
    for (phase, case), several in cases.items():
        several.sort(key=lambda line: line["median_ms"])
        ours = [line for line in several if line["backend"].startswith(OURS)]
        others = [line for line in several if not line["backend"].startswith(OURS)]
        yield f"{phase}: {case[:90]}: " + "; ".join(_figure(line) for line in (*ours[:1], *others[:1]))


def _figure(line: Line) -> str:
    share = f", {100 * line['of_ceiling']:.0f} %" if line.get("of_ceiling") else ""
    return f"{line['backend']} {line['median_ms']:.4g} ms{share}"


def _tuned(found: Sequence[Line]) -> Iterator[str]:
    from ..tune import better

    for one in better(found):
        figures = f"{one.value} {one.median:.4g} ms, {one.before_value} {one.before:.4g}"
        yield f"tune: {one.family} {one.setting} {one.when}: {figures}"


def _bars(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        if "bar" in line and not line["ok"]:
            yield f"MISS {line['bar'][:110]}: {bar_in_words({**line, 'bar': line['limit']})}"

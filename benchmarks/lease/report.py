"""The results of a run as text, short enough for the end of a log."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import lines
from ..table import bar_in_words
from . import plan

MAX_CHARACTERS = 11_000
OURS = "lift_fast"
MAX_FAILURES = 20
Line = dict[str, Any]
GOOD = "ok", "passed", "skipped", "rehearsed"


def any_failed(found: Sequence[Line]) -> bool:
    """Whether any phase, test or case failed or was not run. A missed target is a result, not a failure."""
    return any(line.get("outcome", "ok") not in GOOD for line in found)


def text(file: Path) -> str:
    """The text for a run's results.jsonl. That of a rehearsal has no times, which would mean nothing."""
    found = list(lines.read(file))
    rehearsal = any(line.get("rehearsal") for line in found)
    parts = [_phases, _compiles, _failures] if rehearsal else [_phases, _failures, _measured, _tuned, _missed_targets]
    whole = "\n".join(line for part in parts for line in part(found))
    return whole if len(whole) <= MAX_CHARACTERS else whole[:MAX_CHARACTERS] + f"\n… the rest is in {file.name}"


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


def _compiles(found: Sequence[Line]) -> Iterator[str]:
    compiled = [line for line in found if "compile_cpu_s" in line]
    if compiled:
        seconds, count = (sum(line[name] for line in compiled) for name in ("compile_cpu_s", "compiles"))
        yield f"rehearsal: Triton compiled {count} kernels in {seconds:.0f} CPU seconds"


def _failures(found: Sequence[Line]) -> Iterator[str]:
    bad = [line for line in found if "case" in line and line.get("outcome", "ok") not in GOOD]
    for line in bad[:MAX_FAILURES]:
        tool = f" ({line['tool']})" if "tool" in line else ""
        note = " ".join(line.get("note", "").split())
        yield f"{line['outcome'].upper()} {line['phase']} {line['case'][:110]}{tool}: {note[:140]}"
    if len(bad) > MAX_FAILURES:
        yield f"… and {len(bad) - MAX_FAILURES} more"


def _measured(found: Sequence[Line]) -> Iterator[str]:
    """For each case, our fastest backend with its share of the ceiling, and the fastest peer."""
    cases: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        if "median_ms" in line and line["phase"] != "tune":
            cases.setdefault((line["phase"], line["case"]), []).append(line)
    for (phase, case), several in cases.items():
        several.sort(key=lambda line: line["median_ms"])
        ours = [line for line in several if line["backend"].startswith(OURS)]
        peers = [line for line in several if not line["backend"].startswith(OURS)]
        yield f"{phase}: {case[:90]}: " + "; ".join(_figure(line) for line in (*ours[:1], *peers[:1]))


def _figure(line: Line) -> str:
    share = f", {100 * line['of_ceiling']:.0f} %" if line.get("of_ceiling") else ""
    return f"{line['backend']} {line['median_ms']:.4g} ms{share}"


def _tuned(found: Sequence[Line]) -> Iterator[str]:
    from ..tune import better

    for one in better(found):
        figures = f"{one.value} takes {one.median:.4g} ms, {one.before_value} took {one.before:.4g} ms"
        yield f"tune: {one.family} {one.setting} {one.when}: {figures}"


def _missed_targets(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        if "bar" in line and not line["ok"]:
            yield f"MISS {line['bar'][:110]}: {bar_in_words({**line, 'bar': line['limit']})}"

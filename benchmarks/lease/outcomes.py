"""A pytest plugin (-p benchmarks.lease.outcomes) that writes the outcome of each test as a line as soon as it ends.

LIFT_FAST_COLLECTED names a file to which a collection writes {"tests": ids, "missing": {file: package}, "errors":
{file: message}}. If a test leaves the GPU unusable for its process (an illegal access, a device-side assert), the
process exits, because all later tests would fail. It also exits if a test takes longer than one_test_s.

In a rehearsal (-p benchmarks.rehearsal) a test in which only values are wrong is "rehearsed".
"""

import faulthandler
import json
import os
import re
from pathlib import Path
from typing import Any

from .. import lines
from ..start import begin, rehearsing

COLLECTED = "LIFT_FAST_COLLECTED"
GPU_UNUSABLE = 70  # exit status
ONE_TEST_S = 45.0

_reports: dict[str, dict[str, Any]] = {}
_broken: dict[str, str] = {}


def one_test_s(rehearsal: bool) -> float:
    """Time limit of a test in seconds. It is longer in a rehearsal, where compilers may share two cores."""
    return ONE_TEST_S * (6 if rehearsal else 1)


def pytest_load_initial_conftests() -> None:
    """Prepares the process before pytest imports any of our modules."""
    begin()


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _broken[report.nodeid] = str(report.longrepr)


def pytest_collection_finish(session: Any) -> None:
    if not (file := os.environ.get(COLLECTED)):
        return
    missing = {name: _missing(text) for name, text in _broken.items()}
    found = {
        "tests": [item.nodeid for item in session.items],
        "missing": {name: package for name, package in missing.items() if package},
        "errors": {name: text[-500:] for name, text in _broken.items() if not missing[name]},
    }
    Path(file).write_text(json.dumps(found))


def _missing(text: str) -> str | None:
    """The package whose absence stopped a file's collection; None if it failed for another reason."""
    found = re.search(r"ModuleNotFoundError: No module named '([^'.]+)", text)
    return found.group(1) if found and found.group(1) not in ("lift_fast", "benchmarks", "tests") else None


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    faulthandler.dump_traceback_later(one_test_s(rehearsing()), exit=True)


def pytest_runtest_logreport(report: Any) -> None:
    """Adds up setup, call and teardown of a test; the worst outcome of the three counts."""
    line = _reports.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
    line["seconds"] = round(line["seconds"] + report.duration, 3)
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line |= {"outcome": "failed", "note": (crash.message if crash else str(report.longrepr)).strip()[:400]}
    elif hasattr(report, "rehearsed"):
        line["outcome"] = "rehearsed"
    elif report.skipped and line["outcome"] == "passed":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        line |= {"outcome": "skipped", "note": why[:200]}


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    faulthandler.cancel_dump_traceback_later()
    line = _reports.pop(nodeid, None)
    if line is None:
        return
    lines.write({"phase": "tests", "case": nodeid, **line})
    if line["outcome"] == "failed" and _gpu_is_unusable():
        print(f"\n{nodeid} left the GPU unusable: {line['note']}", flush=True)
        os._exit(GPU_UNUSABLE)


def _gpu_is_unusable() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # torch.AcceleratorError or RuntimeError, depending on the version
        return True
    return False

"""python -m benchmarks.gpu --out DIR: builds, tests and measures on the GPU of this machine; `make gpu` runs it.

It needs torch with CUDA, triton, nvcc, numpy, pybind11, setuptools, pip and pytest in this Python, and no network;
the package is installed in this Python from its tree. In nine minutes: the build, the tests marked `gpu`, and every
suite's quick benchmarks with whichever peers are installed. DIR gets gpu.json (the table), tests.xml (JUnit), one
JSON a suite and log.txt. Exit status 1 when the build or a test fails, 2 where there is no GPU.
"""

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .table import bar_in_words, print_table

ROOT = Path(__file__).parent.parent
TOTAL_S = 530.0
BUILD_S, TESTS_S, LEAST_S = 180.0, 180.0, 10.0
# Seconds of benchmarks, in the order in which they are measured; every other suite comes after them and has 30.
SUITES = {"step": 120.0, "vit": 75.0, "contrastive": 75.0, "data": 75.0, "sigmoid": 30.0, "cache": 30.0}
GRACE_S = 25.0  # for the case that a suite is at when its seconds are over


@dataclass
class Result:
    """What came of a step: "ok", "failed" or "skipped", and why in a line."""

    name: str
    outcome: str
    seconds: float = 0.0
    note: str = ""
    bars: list[dict[str, Any]] = field(default_factory=list)


Run = Callable[[Sequence[str], float], tuple[int, str]]  # command, seconds -> exit status, output


class Steps:
    """Runs commands one after the other under one clock; a test puts its own `run` in."""

    def __init__(self, out: Path, run: Run | None = None, total: float = TOTAL_S):
        self.out = out
        self.run = run or self._run
        self.begun = time.monotonic()
        self.total = total
        self.results: list[Result] = []

    def left(self) -> float:
        return self.total - (time.monotonic() - self.begun)

    def build(self) -> bool:
        arguments = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
        return self._step("build", [sys.executable, "-m", "pip", "install", *arguments, "-e", "."], BUILD_S)

    def test(self) -> bool:
        """The files that have tests marked gpu, but for those that import what is not installed here."""
        marked = [file for file in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in file.read_text()]
        lacking = {file: names for file in marked if (names := missing(file))}
        files = [str(file) for file in marked if file not in lacking]
        report = self.out / "tests.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not campaign"]
        good = self._step("tests", [*command, f"--junitxml={report}", *files], TESTS_S)
        if report.exists():
            left_out = [f"{file.name} needs {', '.join(names)}" for file, names in lacking.items()]
            self.results[-1].note = "; ".join([_tests_in_words(report), *left_out])
        return good

    def measure(self, suite: str) -> None:
        seconds = min(SUITES.get(suite, 30.0), self.left() - GRACE_S)
        if seconds < LEAST_S:
            self.results.append(Result(suite, "skipped", note="out of time"))
            return
        file = self.out / f"{suite}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks", suite, "--quick", f"--json={file}", f"--seconds={seconds:.0f}"]
        self._step(suite, command, seconds + GRACE_S, skips=(2, 3))
        if file.exists():
            self.results[-1].bars = json.loads(file.read_text())["bars"]

    def _step(self, name: str, command: Sequence[str], limit: float, skips: Sequence[int] = ()) -> bool:
        print(f"{name} …", flush=True)
        begun = time.monotonic()
        status, output = self.run(command, max(LEAST_S, min(limit, self.left())))
        with (self.out / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{output}\n[exit status {status}]\n\n")
        outcome = "ok" if status == 0 else "skipped" if status in skips else "failed"
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        note = lines[-1][:120] if outcome != "ok" and lines else ""
        self.results.append(Result(name, outcome, time.monotonic() - begun, note))
        return outcome == "ok"

    @staticmethod
    def _run(command: Sequence[str], seconds: float) -> tuple[int, str]:
        """Its output, standard error included; SIGTERM after `seconds`, so that a suite writes what it has."""
        environment = {"LIFT_FAST_CUDA": "1", "LIFT_FAST_CUDA_ARCHS": _arch(), **os.environ}
        # A file, and a session of its own: compile workers that outlive the command would keep a pipe open.
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            options = {"stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
            status, late = None, ""
            for end, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10)):
                try:
                    status = process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    late = f"stopped after {seconds:.0f} s\n"
                    os.killpg(process.pid, end)
            process.wait()
            said.seek(0)
            return (124 if late else status or 0), said.read() + late

    def finish(self) -> None:
        """The table: a line a step, under each suite its bars; and the same as gpu.json."""
        table = [["step", "result", "seconds", "note"]]
        for result in self.results:
            kept = f"{sum(bar['ok'] for bar in result.bars)} of {len(result.bars)} bars" if result.bars else ""
            note = ", ".join(filter(None, (kept, result.note)))
            table.append([result.name, result.outcome, f"{result.seconds:.0f}", note])
            for bar in result.bars:
                mark = "ok" if bar["ok"] else "MISS"
                table.append([f"  {bar['name']}", mark, "", bar_in_words(bar)])
        print_table(table)
        summary = {"seconds": self.total - self.left(), "steps": [asdict(result) for result in self.results]}
        (self.out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")


def steps(all_steps: Steps, suites: Sequence[str]) -> int:
    """Every step there is time for; the exit status. Without a build nothing else can run."""
    good = all_steps.build()
    if good:
        good = all_steps.test()
        for suite in sorted(suites, key=[*SUITES, *sorted(suites)].index):
            all_steps.measure(suite)
    all_steps.finish()
    return 0 if good else 1


def missing(file: Path) -> list[str]:
    """The packages that a test file, or what it imports of ours, imports at its top and this Python does not have."""
    names: set[str] = set()
    files, seen = [file], {file}
    while files:
        here = files.pop()
        for module in _imported(here):
            first = module.partition(".")[0]
            found = [path for path in _sources(here, module) if path.exists()]
            if not (ROOT / first).is_dir() and not (here.parent / f"{first}.py").exists():
                names.add(first)
            files += set(found) - seen
            seen |= set(found)
    return sorted(name for name in names if not find_spec(name))


def _imported(file: Path) -> list[str]:
    """The modules that a file imports at its top, in full; what is imported from one may be a module too."""
    modules: list[str] = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = list(file.relative_to(ROOT).parts[: -node.level]) if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            modules += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return modules


def _sources(file: Path, module: str) -> list[Path]:
    """Where the source of a module would be if it were ours."""
    path = ROOT / module.replace("lift_fast.kernels", "kernels").replace(".", "/")
    return [path.with_suffix(".py"), path / "__init__.py", file.parent / f"{module}.py"]


def _tests_in_words(report: Path) -> str:
    totals: dict[str, int] = {}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in ("tests", "failures", "errors", "skipped"):
            totals[name] = totals.get(name, 0) + int(suite.get(name, 0))
    passed = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    failed = totals["failures"] + totals["errors"]
    return f"{passed} passed, {failed} failed, {totals['skipped']} skipped"


def _arch() -> str:
    """The present GPU's, so that the build compiles for no other: "80", "90a"."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out.resolve()
    try:
        import torch
    except ModuleNotFoundError:
        print(f"make gpu: {sys.executable} has no torch; name one that has: make gpu PYTHON=…", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} of {sys.executable} finds no CUDA GPU here", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    suites = [path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")]
    return steps(Steps(out), suites)


if __name__ == "__main__":
    sys.exit(main())

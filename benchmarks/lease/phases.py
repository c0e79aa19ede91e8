"""Runs the phases of `make gpu` one after another within one time limit; one that fails does not stop the rest."""

import importlib.machinery
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import lines, peers
from ..start import ROOT
from . import plan
from .jobs import NOT_STARTED, TIMED_OUT, Ended, Jobs, Task
from .outcomes import COLLECTED, one_test_s

# Phase -> arguments of `python -m benchmarks`.
SUITES = {
    "contrastive": ("contrastive",),
    "sigmoid": ("sigmoid",),
    "gather": ("cache", "--part", "gpu"),
    "layernorm": ("vit", "--part", "layernorm"),
    "mlp": ("vit", "--part", "mlp"),
    "attention": ("vit", "--part", "attention"),
    "step": ("step",),
}
SANITIZERS = "memcheck", "racecheck"
SMOKE_S, MARGIN_S, START_S = 60.0, 5.0, 30.0
# Tests with one of these words in their names run last: they are large or the likeliest to crash their process.
LAST = "large", "4097", "65536", "huge", "captured", "graph", "extremes", "outside", "pinned"
# A short run has at most SHORT tests, from SHORT_TESTS, and at most SHORT smoke cases.
SHORT, SHORT_TESTS = 3, ("tests/transformer/test_layernorm.py", "tests/pairs/test_contrastive_triton.py")
EXIT_IN_WORDS = {TIMED_OUT: "timed out", NOT_STARTED: "not run"}
COUNTS = "REHEARSAL_COUNTS"  # environment variable: names rehearsal.py's file of counts
TOTALS = {"compiles": "compiles", "compile_cpu_s": "cpu_s"}  # name of a total -> the count that it adds up
Line = dict[str, Any]


class Lease:
    """One run of all phases. machine: the result of machine.py; the other arguments are those of gpu.py."""

    def __init__(
        self,
        out: Path,
        machine: Mapping[str, Any],
        *,
        commit: str,
        seconds: float = plan.TOTAL_S,
        rehearse: bool = False,
        short: bool = False,
        prebuilt: Path = ROOT / ".prebuilt",
        wheels: Path = ROOT / ".peers",
    ):
        self.file, self.machine, self.commit = out / "results.jsonl", machine, commit
        self.rehearse, self.short, self.prebuilt, self.wheels = rehearse, short, prebuilt, wheels
        self.cores = int(machine["cores"])
        self.planned = plan.seconds(seconds, self.cores)
        if rehearse:  # longer limits, which still stop a hang
            slower = max(1.0, plan.CORES / self.cores)
            self.planned = {name: part * slower for name, part in plan.seconds(seconds).items()}
        started = time.monotonic()
        self.ends = {name: started + end for name, end in plan.ends(self.planned).items()}
        self.common = {"device": machine["device"], "commit": commit, **({"rehearsal": True} if rehearse else {})}
        self.scratch = Path(tempfile.mkdtemp(prefix="lift-fast-lease-"))
        self.site, self.counts = self.scratch / "site", self.scratch / "compiles"
        self.ceilings: dict[str, float] = {}
        self.collected: dict[str, Any] = {"tests": [], "missing": {}, "errors": {}}
        self.without_rehearsal: list[str] = []  # the tests that are collected without the rehearsal's plugin
        environment = {
            "LIFT_FAST_CUDA": "1",
            "LIFT_FAST_CUDA_ARCHS": machine["arch"],
            "OMP_WAIT_POLICY": "passive",
            "PYTHONUNBUFFERED": "1",
        }
        if rehearse:
            # An empty cache, because a new machine compiles everything.
            environment |= {"LIFT_FAST_REHEARSE": "1", "TRITON_CACHE_DIR": str(self.scratch / "triton")}
            environment |= {COUNTS: str(self.counts), **({"LIFT_FAST_SHORT": "1"} if short else {})}
        self.jobs = Jobs(ROOT, out / "log.txt", environment)

    def run(self) -> None:
        """Runs all phases. Results are in `file` as soon as they are known."""
        try:
            self._write({"phase": "machine", "outcome": "ok", **self.machine})
            self._start_build()
            self._phase("ceilings", self._ceilings)
            self._phase("smoke triton", lambda: self._smoke(built=False))
            self._phase("build", self._build)
            self._phase("smoke cuda", lambda: self._smoke(built=True))
            self._phase("tests", self._tests)
            if self.rehearse:  # the times mean nothing, so the suites may run at once
                self._suites(SUITES, self.cores)
            else:
                for name in SUITES:
                    self._suites([name], 1)
            self._phase("tune", self._tune)
            self._phase("ncu", self._profile)
        finally:
            self.jobs.stop()
            if self.counts.exists():
                rows = [json.loads(line) for line in self.counts.read_text().splitlines()]
                totals = {name: round(sum(row[of] for row in rows), 1) for name, of in TOTALS.items()}
                self._write({"phase": "rehearsal", **totals})
            shutil.rmtree(self.scratch, ignore_errors=True)

    # Shared by the phases.

    def _write(self, line: Line) -> None:
        lines.write(line, lines.environment(self.file, **self.common))

    def _environment(self, phase: str, **more: str) -> dict[str, str]:
        return {**lines.environment(self.file, phase=phase, **self.common), **more}

    def _phase(self, name: str, work: Any) -> None:
        """Runs work(), which returns an outcome and a note, and writes the phase's line. An exception is a failure."""
        started = time.monotonic()
        print(f"{name} …", flush=True)
        try:
            outcome, note = work()
        except Exception as error:
            outcome, note = "failed", f"{type(error).__name__}: {error}"
        self._write_phase(name, outcome, note, time.monotonic() - started)

    def _write_phase(self, name: str, outcome: str, note: str, seconds: float) -> None:
        line = {"phase": name, "outcome": outcome, "note": note or None, "seconds": round(seconds, 1)}
        self._write({**line, "planned": round(self.planned[name], 1)})

    def _python(self, module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments]

    def _seconds_left(self, name: str) -> float:
        return self.ends[name] - time.monotonic()

    # The build, which runs in the background.

    def _start_build(self) -> None:
        self.built: Ended | None = None

        def built(ended: Ended) -> None:
            self.built = ended

        if not self.rehearse:
            options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
            command = self._python("pip", "install", *options, "-e", ".")
            self.jobs.start(Task("build", command, self._seconds_left("build"), built))
        if command := peers.install_command(self.wheels, self.site):
            self.jobs.start(Task("peers", command, 60, self._peers_ended))

    def _peers_ended(self, ended: Ended) -> None:
        self._write({"phase": "peers", "outcome": "failed" if ended.status else "ok", "note": ended.last_line()})

    def _build(self) -> tuple[str, str]:
        if self.rehearse:
            return "skipped", "a rehearsal uses the installed extension"
        self.jobs.wait("build", self.ends["build"])
        if self.built and not self.built.status:
            return "ok", f"{self.built.seconds:.0f} s in the background"
        why = self.built.last_line() if self.built else "not started"
        found = sorted(self.prebuilt.glob(f"_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}"))
        if not found:
            return "failed", why
        shutil.copy2(found[0], ROOT / "lift_fast")
        return "failed", f"using {found[0].name} from {self.prebuilt}: {why}"

    # Ceilings and smoke tests.

    def _ceilings(self) -> tuple[str, str]:
        command = self._python("benchmarks.lease.ceilings")
        task = Task("ceilings", command, self._seconds_left("ceilings"), environment=self._environment("ceilings"))
        status, note = self._run_one(task, "ceilings")
        cases = {line["case"]: line for line in self._lines("ceilings") if "case" in line}
        for unit, case in (("bytes", "stream copy"), ("flops", "gemm 8192^3")):
            if case in cases:
                self.ceilings[unit] = cases[case][unit] / cases[case]["median_ms"] * 1e3
        return status, note

    def _run_one(self, task: Task, phase: str) -> tuple[str, str]:
        """Runs one task and returns its outcome and, unless it exits with 0, the last line of its output."""
        found: list[Ended] = []
        self.jobs.run([_with_end(task, found.append)], 1, self.ends[phase])
        return _outcome(found[0]), "" if not found[0].status else found[0].last_line()

    def _lines(self, phase: str) -> list[Line]:
        return [line for line in lines.read(self.file) if line["phase"] == phase]

    def _smoke(self, built: bool) -> tuple[str, str]:
        from .smoke import CASES

        phase = "smoke cuda" if built else "smoke triton"
        names = [name for name, case in CASES.items() if case.built == built]
        tools: Sequence[str] = ("plain",)
        if "compute-sanitizer" in self.machine["tools"]:
            tools = SANITIZERS
        failed: list[str] = []

        def task(name: str, tool: str) -> Task:
            sanitizer = [] if tool == "plain" else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            command = [*sanitizer, *self._python("benchmarks.lease.smoke", name)]
            # Each tensor gets an allocation of its own, so that compute-sanitizer sees accesses beyond its end.
            environment = self._environment(phase, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            return Task(f"{name} ({tool})", command, SMOKE_S, lambda ended: report(name, tool, ended), environment)

        def report(name: str, tool: str, ended: Ended) -> None:
            note = ended.last_line() if ended.status else None
            self._write({"phase": "smoke", "case": name, "tool": tool, "outcome": _outcome(ended), "note": note})
            if _outcome(ended) not in ("ok", "skipped"):
                failed.append(f"{name} ({tool})")

        tasks = [task(name, tool) for tool in tools for name in self._sample(names)]
        if built:
            more = [self._collect_without_rehearsal()] if self.rehearse and not self.short else []
            tasks = [self._collect(), *more, *tasks]
        self.jobs.run(tasks, self.cores, self.ends[phase])
        return "failed" if failed else "ok", ", ".join(failed)

    def _sample(self, several: Sequence[Any]) -> list[Any]:
        """In a short run at most SHORT of these, evenly spaced; otherwise all."""
        return list(several[:: -(-len(several) // SHORT)]) if self.short and several else list(several)

    # Tests.

    def _pytest(self, *arguments: str) -> list[str]:
        rehearsal = ("-p", "benchmarks.rehearsal") if self.rehearse else ()
        options = ("-q", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu and not campaign")
        return self._python("pytest", *rehearsal, "-p", "benchmarks.lease.outcomes", *options, *arguments)

    def _collect(self) -> Task:
        file = self.scratch / "collected.json"

        def ended(done: Ended) -> None:
            if file.exists():
                self.collected = json.loads(file.read_text())
            else:
                self.collected["errors"] = {"tests": done.output[-500:]}

        where = SHORT_TESTS if self.short else ("tests",)
        command = self._pytest("--collect-only", "--continue-on-collection-errors", *where)
        return Task("collect", command, self._seconds_left("tests"), ended, {COLLECTED: str(file)})

    def _collect_without_rehearsal(self) -> Task:
        """Collects the tests as a real run does. Those among them that the rehearsal does not schedule are failures."""

        def ended(done: Ended) -> None:
            found = [text for text in done.output.splitlines() if "::" in text and not text.startswith("ERROR")]
            self.without_rehearsal = found

        options = ("-q", "-p", "no:cacheprovider", "-m", "gpu and not campaign")
        command = self._python("pytest", *options, "--collect-only", "--continue-on-collection-errors", "tests")
        seconds, environment = self._seconds_left("tests"), {"LIFT_FAST_REHEARSE": "0"}
        return Task("collect without rehearsal", command, seconds, ended, environment)

    def _tests(self) -> tuple[str, str]:
        for file, package in self.collected["missing"].items():
            self._write({"phase": "tests", "case": file, "outcome": "skipped", "note": f"needs {package}"})
        for file, text in self.collected["errors"].items():
            self._write({"phase": "tests", "case": file, "outcome": "failed", "note": text[-300:]})
        ids = self._sample(self.collected["tests"])
        for test in sorted(set(self.without_rehearsal) - set(ids)):
            self._write({"phase": "tests", "case": test, "outcome": "not scheduled"})
        tasks = [self._group(f"tests {number}", group) for number, group in enumerate(groups(ids, self.cores))]
        self.jobs.run(tasks, self.cores, self.ends["tests"])
        found = self._outcomes()
        for test in ids:
            if test not in found:
                self._write({"phase": "tests", "case": test, "outcome": "not run"})
                found[test] = "not run"
        counts = {outcome: list(found.values()).count(outcome) for outcome in sorted(set(found.values()))}
        good = set(counts) <= {"passed", "skipped", "rehearsed"} and not self.collected["errors"]
        words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        more = f"; {len(self.without_rehearsal)} collected without rehearsal" if self.without_rehearsal else ""
        return "ok" if good else "failed", f"{len(ids)} of {len(self.collected['tests'])} scheduled: {words}{more}"

    def _outcomes(self) -> dict[str, str]:
        found = self._lines("tests")
        return {line["case"]: line["outcome"] for line in found if "::" in line.get("case", "")}

    def _group(self, name: str, ids: Sequence[str]) -> Task:
        """Runs tests in one process; each test that the process did not finish then gets a process of its own."""

        def ended(done: Ended) -> list[Task]:
            have = self._outcomes()
            lost = [test for test in ids if test not in have]
            if done.status == NOT_STARTED:
                return []
            if len(ids) == 1:
                for test in lost:
                    outcome = EXIT_IN_WORDS.get(done.status, f"ended its process ({done.status})")
                    self._write({"phase": "tests", "case": test, "outcome": outcome, "note": done.last_line()})
                return []
            return [self._group(f"{name}, {test}", [test]) for test in lost]

        seconds = one_test_s(self.rehearse) + START_S if len(ids) == 1 else self.planned["tests"]
        return Task(name, self._pytest(*ids), seconds, ended, self._environment("tests"))

    # Measurements.

    def _suites(self, names: Iterable[str], slots: int) -> None:
        def task(name: str) -> Task:
            seconds = self._seconds_left(name)
            suite, *options = SUITES[name]
            command = self._python("benchmarks", suite, "--quick", "--seconds", f"{seconds - MARGIN_S:.0f}", *options)
            path = os.pathsep.join(filter(None, (str(self.site), os.environ.get("PYTHONPATH"))))
            environment = self._environment(name, PYTHONPATH=path)
            if self.ceilings:
                environment["LIFT_FAST_CEILINGS"] = json.dumps(self.ceilings)
            return Task(name, command, seconds, lambda ended: report(name, ended), environment)

        def report(name: str, ended: Ended) -> None:
            self._write_phase(name, _outcome(ended), ended.last_line() if ended.status else "", ended.seconds)

        names = list(names)
        print(f"{', '.join(names)} …", flush=True)
        self.jobs.wait("peers", time.monotonic() + 30)
        self.jobs.run([task(name) for name in names], slots, max(self.ends[name] for name in names))

    def _tune(self) -> tuple[str, str]:
        seconds = self._seconds_left("tune")
        command = self._python("benchmarks.lease.sweep", "--seconds", f"{seconds - MARGIN_S:.0f}")
        command += ["--short"] if self.short else []
        return self._run_one(Task("tune", command, seconds, environment=self._environment("tune")), "tune")

    def _profile(self) -> tuple[str, str]:
        if "ncu" not in self.machine["tools"]:
            return "skipped", "ncu is not installed"
        command = self._python("benchmarks.lease.hot")
        task = Task("ncu", command, self._seconds_left("ncu"), environment=self._environment("ncu"))
        return self._run_one(task, "ncu")


def _outcome(ended: Ended) -> str:
    """The outcome for an exit status; commands that cannot run on this machine exit with 2 or 3."""
    return {0: "ok", 2: "skipped", 3: "skipped", **EXIT_IN_WORDS}.get(ended.status, "failed")


def _with_end(task: Task, ended: Any) -> Task:
    return Task(task.name, task.command, task.seconds, ended, task.environment)


def groups(ids: Sequence[str], slots: int) -> list[list[str]]:
    """Groups tests by file, with about three groups per slot. Tests with one of LAST's words come at the end."""
    size = max(3, -(-len(ids) // (3 * slots)))
    found: list[list[str]] = []
    for last in (False, True):
        files: dict[str, list[str]] = {}
        for test in ids:
            if any(word in test.lower() for word in LAST) == last:
                files.setdefault(test.partition("::")[0], []).append(test)
        found += [tests[start : start + size] for tests in files.values() for start in range(0, len(tests), size)]
    return found

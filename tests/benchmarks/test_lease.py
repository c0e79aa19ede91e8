"""`make gpu` without a GPU: its plan, its results, kills at random moments, tests that crash, and a rehearsal."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import lines, peers, tune
from benchmarks.harness import Suite
from benchmarks.lease import hot, phases, plan, report, smoke, sweep
from benchmarks.lease.jobs import NOT_STARTED, TIMED_OUT, Jobs, Task
from benchmarks.pairs import unneeded_gradients
from lift_fast.ops import tuned as tuned_tables

ROOT = Path(__file__).parents[2]
STUB = [sys.executable, str(ROOT / "tests/support/lease_stub.py")]
MACHINE = {"device": "a GPU", "capability": "sm_90", "arch": "90a", "cores": 4, "tools": []}
TESTS = [f"tests/test_{file}.py::test_it[{number}]" for file in "abc" for number in range(5)]


def test_the_plan_fits_a_lease():
    parts = plan.seconds()
    assert sum(parts.values()) <= 540 and list(parts) == [phase.name for phase in plan.PHASES]
    assert list(plan.ends(parts).values())[-1] == pytest.approx(sum(parts.values()))
    few = plan.seconds(540, cores=4)
    assert sum(few.values()) == pytest.approx(540)
    assert few["tests"] > parts["tests"] and few["contrastive"] < parts["contrastive"]
    assert sum(plan.seconds(100).values()) == pytest.approx(100)
    assert set(phases.SUITES) < set(parts)


def test_lines_of_several_processes(tmp_path, monkeypatch):
    file = tmp_path / "lines"
    write = "from benchmarks import lines\nfor i in range(200): lines.write({'case': 'x' * 5000, 'i': i, 'none': None})"
    environment = {**os.environ, **lines.environment(file, phase="p", device="d")}
    writers = [subprocess.Popen([sys.executable, "-c", write], cwd=ROOT, env=environment) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    found = list(lines.read(file))
    assert Counter(line["i"] for line in found) == dict.fromkeys(range(200), 4)
    assert all(line["phase"] == "p" and line["device"] == "d" and "none" not in line for line in found)

    lines.write({"case": "of no file"})
    monkeypatch.setenv(lines.FILE, str(file))
    lines.write({"value": None, "x": float("nan")})
    *_, last = lines.read(file)
    assert last["value"] is None and last["x"] == "nan"


def test_a_suite_writes_as_it_goes(tmp_path, monkeypatch):
    for name, value in lines.environment(tmp_path / "lines", phase="gather", device="a GPU").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LIFT_FAST_CEILINGS", '{"bytes": 1e9, "flops": 1e12}')
    suite = Suite("cache", quick=True)
    suite.add({"what of": "rows", "dim": 3, "what": "ours", "device": "cuda", "median_ms": 2.0}, bytes=10**6)
    suite.note("no more")
    suite.bar("speed", 2.0, 3)
    row, note, bar = lines.read(tmp_path / "lines")
    assert row["case"] == "rows, dim 3" and row["backend"] == "ours" and row["of_ceiling"] == 0.5
    assert row["device"] == "a GPU" and row["on"] == "cuda" and {row["phase"], bar["phase"]} == {"gather"}
    assert note["note"] == "no more" and bar["limit"] == 3 and bar["ok"] is False


@pytest.fixture
def lease(tmp_path, monkeypatch):
    """lease(**options): a Lease in tmp_path that runs lease_stub.py instead of the real commands."""
    monkeypatch.setattr(phases.Lease, "_python", lambda self, *command: [*STUB, *command])
    monkeypatch.setenv("STUB_FINISHED", str(tmp_path / "finished"))
    monkeypatch.setenv("STUB_TESTS", " ".join(TESTS))

    def make(**options):
        return phases.Lease(tmp_path, MACHINE, commit="abc", **{"prebuilt": tmp_path, "wheels": tmp_path, **options})

    return make


def outcomes(file):
    return {line["phase"]: line["outcome"] for line in lines.read(file) if "outcome" in line and "case" not in line}


def test_a_run_from_end_to_end(lease, tmp_path, capsys):
    one = lease()
    one.run()
    found = outcomes(one.file)
    assert list(found) == ["machine", *[name for name in one.planned if name != "machine"]]
    assert found == {**dict.fromkeys(one.planned, "ok"), "ncu": "skipped"}
    tests = {
        line["case"]: line["outcome"] for line in lines.read(one.file) if line["phase"] == "tests" and "case" in line
    }
    assert tests == {"tests/test_far.py": "skipped", **dict.fromkeys(TESTS, "passed")}
    assert not report.any_failed(list(lines.read(one.file)))
    text = report.text(one.file)
    assert len(text) < 12_000 and "15 of 15 scheduled: 15 passed" in text
    assert all(line["commit"] == "abc" for line in lines.read(one.file))
    assert "[tune: exit status 0]" in (tmp_path / "log.txt").read_text()


def test_what_fails_ends_nothing_else(lease, monkeypatch, tmp_path):
    monkeypatch.setattr(phases, "ROOT", tmp_path)
    monkeypatch.setenv("STUB_BROKEN", "pip benchmarks.lease.ceilings benchmarks.lease.sweep")
    one = lease()
    one.run()
    found = outcomes(one.file)
    assert {name for name, outcome in found.items() if outcome == "failed"} == {"build", "ceilings", "tune"}
    assert found["tests"] == found["step"] == "ok" and report.any_failed(list(lines.read(one.file)))
    assert re.search(r"build +failed .* no such thing", report.text(one.file))


def test_a_prebuilt_extension_when_the_build_fails(lease, monkeypatch, tmp_path):
    monkeypatch.setattr(phases, "ROOT", tmp_path)
    monkeypatch.setenv("STUB_BROKEN", "pip")
    (tmp_path / "lift_fast").mkdir()
    name = f"_C{phases.importlib.machinery.EXTENSION_SUFFIXES[0]}"
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt" / name).write_text("built before")
    one = lease(prebuilt=tmp_path / "prebuilt")
    one.run()
    assert (tmp_path / "lift_fast" / name).read_text() == "built before"
    assert outcomes(one.file)["build"] == "failed" and name in report.text(one.file)


def test_a_test_that_ends_its_process_costs_one_group(lease, monkeypatch):
    bad = {"tests/test_a.py::test_crash": "ended its process (70)", "tests/test_b.py::test_hang": "timed out"}
    ids = [
        *TESTS[:2],
        "tests/test_a.py::test_crash",
        *TESTS[2:6],
        "tests/test_b.py::test_hang",
        *TESTS[6:],
        "x::test_wrong",
    ]
    monkeypatch.setenv("STUB_TESTS", " ".join(ids))
    monkeypatch.setattr(phases, "one_test_s", lambda rehearsal: 0.5 - phases.START_S)
    one = lease()
    one.planned["tests"] = 2.0  # time limit of a group
    one.run()
    tests = {
        line["case"]: line["outcome"] for line in lines.read(one.file) if line["phase"] == "tests" and "case" in line
    }
    del tests["tests/test_far.py"]
    assert tests == {**dict.fromkeys(TESTS, "passed"), **bad, "x::test_wrong": "failed"}
    assert outcomes(one.file)["tests"] == "failed"


def test_out_of_time_everything_is_accounted_for(lease):
    one = lease(seconds=0.5)
    started = time.monotonic()
    one.run()
    assert time.monotonic() - started < 10
    found = list(lines.read(one.file))
    tests = {line["case"] for line in found if line["phase"] == "tests" and "case" in line}
    assert set(outcomes(one.file)) == set(one.planned) and tests >= set(one.collected["tests"])


def test_a_kill_loses_no_finished_case(lease, tmp_path, monkeypatch):
    """Kills a run at ten random moments."""
    monkeypatch.setenv("STUB_PAUSE_S", "0.005")
    generator = random.Random(0)
    counts = []
    for number in range(10):
        monkeypatch.setenv("STUB_FINISHED", str(tmp_path / f"finished{number}"))
        one = lease()
        one.file = tmp_path / f"results{number}.jsonl"
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            one.run()
            os._exit(0)
        time.sleep(generator.uniform(0.05, 1.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(0.2)  # for the processes it started, which end with it
        found = list(lines.read(one.file)) if one.file.exists() else []
        time.sleep(0.2)
        assert len(found) == (len(list(lines.read(one.file))) if one.file.exists() else 0)
        finished = tmp_path / f"finished{number}"
        cases = Counter(finished.read_text().splitlines()) if finished.exists() else Counter()
        assert not cases - Counter(line["case"] for line in found if "case" in line and "tool" not in line)
        counts.append(len(found))
    assert len(set(counts)) > 3, counts


def test_jobs_keep_their_limits(tmp_path):
    jobs = Jobs(ROOT, tmp_path / "log", {"X": "1"})
    ended = {}
    keep = lambda done: ended.update({done.task.name: (done.status, done.output)})  # noqa: E731
    sleeps = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"]
    prints = [sys.executable, "-c", "import os; print(os.environ['X'] + os.environ['Y'])"]
    tasks = [Task("long", sleeps, 0.5, keep), Task("print", prints, 9, keep, {"Y": "2"}), Task("late", prints, 9, keep)]
    jobs.run(tasks, 1, time.monotonic() + 0.6 + 5)
    assert ended["long"][0] == TIMED_OUT and ended["long"][1].splitlines()[0] == "started"
    assert ended["print"] == (0, "12\n") and ended["late"][0] == 1  # without Y
    jobs.run([Task("late", prints, 9, keep)], 1, time.monotonic() - 1)
    assert ended["late"][0] == NOT_STARTED
    jobs.start(Task("background", sleeps, 60, keep))
    jobs.wait("background", time.monotonic() + 0.5)
    assert ended["background"][0] == TIMED_OUT and not jobs.running


def test_groups():
    ids = [f"tests/test_{file}.py::test_{name}[{n}]" for file in "ab" for name in ("x", "large") for n in range(50)]
    found = phases.groups(ids, 4)
    assert sorted(test for group in found for test in group) == sorted(ids)
    assert all(len({test.partition("::")[0] for test in group}) == 1 and len(group) <= 17 for group in found)
    large = ["large" in group[0] for group in found]
    assert large == sorted(large)
    assert phases.groups([], 4) == []


NOT_COLLECTED = """
import absent_package  # noqa
"""
OUTCOMES = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "a message"
@pytest.mark.skip(reason="a reason")
def test_left(): pass
@pytest.fixture
def broken(): raise OSError("no file")
def test_broken(broken): pass
"""


def test_the_plugin_says_what_came_of_each_test(tmp_path):
    (tmp_path / "test_absent.py").write_text(NOT_COLLECTED)
    (tmp_path / "test_some.py").write_text(OUTCOMES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **lines.environment(tmp_path / "lines", phase="tests")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.lease.outcomes", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "."]
    environment["LIFT_FAST_COLLECTED"] = str(tmp_path / "collected")
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    found = {line["case"].partition("::")[2]: line for line in lines.read(tmp_path / "lines")}
    outcome = {name: line["outcome"] for name, line in found.items()}
    assert outcome == {"test_good": "passed", "test_bad": "failed", "test_left": "skipped", "test_broken": "failed"}
    assert "a message" in found["test_bad"]["note"] and "a reason" in found["test_left"]["note"]
    assert "no file" in found["test_broken"]["note"]
    collected = json.loads((tmp_path / "collected").read_text())
    assert len(collected["tests"]) == 4 and collected["missing"] == {"test_absent.py": "absent_package"}
    assert collected["errors"] == {}


def test_a_smoke_of_every_kernel():
    """The smoke tests cover each Triton kernel, and each function of _C that launches a CUDA kernel."""
    triton = {
        f"{file.stem}.{name}"
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    cuda = {
        f"_C.{name}"
        for file in (ROOT / "csrc").glob("*/bind_cuda.cpp")
        for name in re.findall(r'module\.def\("(\w+_cuda)"', file.read_text())
    }
    smoked = {kernel for case in smoke.CASES.values() for kernel in case.kernels}
    assert smoked == triton | cuda
    assert {case.built for case in smoke.CASES.values()} == {True, False}


def test_a_gradient_that_nobody_asked_for_is_seen():
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return (a * b).sum()

        @staticmethod
        def backward(ctx, g):
            return torch.ones(3, 4), torch.ones(3, 4)

    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    with unneeded_gradients() as found:
        torch.autograd.grad(Both.apply(a, b), [a])
    assert found == [(3, 4)]
    with unneeded_gradients() as found:
        torch.autograd.grad(Both.apply(a, b.requires_grad_()), [a, b])
        torch.autograd.grad((a * 2).sum(), [a])
    assert found == []


def test_peers_are_fetched_and_installed_one_by_one(tmp_path):
    fetch = peers.fetch_command(tmp_path, ["memeff"])
    assert fetch[-1] == "memeff" and "--no-deps" in fetch and "--only-binary=:all:" in fetch and "3.12" in fetch
    assert peers.install_command(tmp_path, tmp_path / "site") is None
    (tmp_path / "one-1.0-py3-none-any.whl").write_text("")
    install = peers.install_command(tmp_path, tmp_path / "site")
    assert install[-1].endswith("one-1.0-py3-none-any.whl") and "--no-index" in install and "--no-deps" in install


def test_a_sweep_measures_the_table_that_would_be():
    found = list(sweep.sweeps("sm_90"))
    assert {"backend", "block", "band", "keep"} <= {one.setting for one in found}
    before = tuned_tables.lookup("pairs", "sm_90", "block", dim=768)
    with sweep.with_first_entry("pairs", "sm_90", {"setting": "block", "when": {"dim": [None, 1023]}, "value": [1, 2]}):
        assert tuned_tables.lookup("pairs", "sm_90", "block", dim=768) == [1, 2]
        assert tuned_tables.lookup("pairs", "sm_90", "block", dim=1024) == before
    assert tuned_tables.lookup("pairs", "sm_90", "block", dim=768) == before
    ones = [torch.ones(3), torch.ones(1)]
    error = sweep._largest_error
    assert error(sweep._tensors([ones[0], (None, ones[1])]), ones) == 0
    assert error([ones[0], torch.tensor([torch.nan])], ones) > error([2 * ones[0], ones[1]], ones) > 0.9
    found = list(sweep.variants({"rows": 64, "warps": 1, "stages": 1}))
    assert [(one["rows"], one["warps"], one["stages"]) for one in found] == [
        (64, 2, 1),
        (32, 1, 1),
        (128, 1, 1),
        (64, 1, 2),
    ]


NCU = """==PROF== Profiling
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","ns","register/thread"
"0","void lift_fast::gpu::stats<256>(Scores)","1,250,000","96"
"1","backward_kernel","500000","168"
"2","sm90_xmma_gemm","9000000","255"
"""


def test_what_ncu_says():
    found = list(hot.kernels(NCU))
    assert [kernel["median_ms"] for kernel in found] == [1.25, 0.5, 9.0] and found[0]["registers"] == 96
    assert list(hot.kernels("==ERROR== no permission")) == []
    cuda = {name for file in (ROOT / "csrc").rglob("*.cu") for name in re.findall(r"(\w+)<<<", file.read_text())}
    assert {"dequant_kernel", "forward_kernel"} <= hot.ours() and cuda - {"kernel"} <= hot.ours()
    assert hot.command()[:5] == ["ncu", "--profile-from-start", "off", "--clock-control", "none"]


def tuned(value, median, spread=0.1, present=False, **more):
    common = {
        "phase": "tune",
        "family": "pairs",
        "device": "sm_90",
        "gpu": "H",
        "commit": "abc",
        "setting": "block",
        "case": "c",
    }
    figures = {"value": value, "median_ms": median, "spread_ms": spread, "present": present}
    return {**common, "when": {"dim": [None, 9]}, **figures, **more}


def test_tables_from_measurements(tmp_path):
    table = {
        "extends": "sm_80",
        "entries": [{"setting": "block", "when": {}, "value": 1, "source": "reasoned", "why": "x"}],
    }
    (tmp_path / "pairs.sm_90.json").write_text(tune.in_json(table))
    measured = [tuned(1, 5.0, present=True), tuned(2, 4.0), tuned(3, 3.0), tuned(4, 2.0, note="failed")]
    measured[3].pop("median_ms")
    near = [tuned(1, 5.0, 0.5, True, when={}), tuned(2, 4.6, when={})]
    alone = [tuned(2, 1.0, when={"dim": 1})]
    (found,) = tune.better([*measured, *near, *alone])
    assert (found.value, found.median, found.before_value, found.before) == (3, 3.0, 1, 5.0)
    for _ in range(2):  # the second time it replaces itself
        tune.write([found], "benchmarks/results/x.jsonl", tmp_path)
        first, second = json.loads((tmp_path / "pairs.sm_90.json").read_text())["entries"]
    assert first["value"] == 3 and first["when"] == {"dim": [None, 9]} and second == table["entries"][0]
    assert first["source"] == {"commit": "abc", "device": "H", "results": "benchmarks/results/x.jsonl"}
    text = tune.docs(tmp_path)
    assert (
        "1 of these 2 entries" in text
        and "| block | dim up to 9 | `3` | H, abc: `benchmarks/results/x.jsonl` |" in text
    )
    assert "| block | all | `1` | no | x |" in text


def test_the_tables_are_in_the_docs():
    assert tune.DOCS.read_text() == tune.docs(), "python -m benchmarks tune --docs"


def test_tune_on_the_command_line(tmp_path):
    (tmp_path / "lines").write_text("")
    for arguments, status in ((["--from", str(tmp_path / "lines")], 0), (["--from", str(tmp_path / "no")], 2)):
        command = [sys.executable, "-m", "benchmarks", "tune", *arguments]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == status


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so there is nothing to rehearse")
def test_a_short_rehearsal(tmp_path):
    """Runs every phase with the real commands on a few tests and cases with small shapes."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--rehearse", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = list(lines.read(tmp_path / "results.jsonl"))
    assert set(outcomes(tmp_path / "results.jsonl")) == {phase.name for phase in plan.PHASES}
    tests = [line for line in found if line["phase"] == "tests" and "::" in line.get("case", "")]
    assert len(tests) == phases.SHORT and all(line["rehearsal"] for line in found)
    measured = {line["phase"] for line in found if "median_ms" in line}
    assert measured >= {"ceilings", "tune", *phases.SUITES}
    (compiled,) = [line for line in found if "compile_cpu_s" in line]
    assert compiled["compiles"] > 3 and "540 s" in done.stdout

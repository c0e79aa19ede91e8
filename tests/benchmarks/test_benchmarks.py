"""The benchmarks at tiny sizes: rows, targets, notes, memory measurements and the plot.

test_lease.py tests `make gpu`.
"""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import bench_contrastive, bench_host, bench_sigmoid, pairs, plot
from benchmarks.harness import Suite
from lift_fast.errors import ConfigError
from lift_fast.measure.time import Timing

ROOT = Path(__file__).parents[2]


def test_a_suite_prints_writes_and_keeps_time(tmp_path, capsys):
    suite = Suite("x", quick=True, seconds=1e6)
    assert not suite.over() and Suite("x", True, seconds=-1).over() and not Suite("x", True).over()
    suite.add({"what": "a", "extra_mib": None, "median_ms": 1.23456})
    suite.bar("least", 3, 2)
    suite.bar("most", 3, 2, at_most=True)
    suite.bar("near", None, 2, tolerance=1)
    suite.note("no GPU")
    suite.note("no GPU")
    suite.print()
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["a", "-", "1.23"]
    targets = ["ok   least: 3 (target 2)", "MISS most: 3 (at most 2)", "MISS near: not measured (target 2 +- 1)"]
    assert printed[2:] == [*targets, "note no GPU"]
    suite.write(tmp_path / "x.json")
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["notes"] == ["no GPU"] and [bar["ok"] for bar in written["bars"]] == [True, False, False]


@pytest.fixture
def small(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench_contrastive, "SPEED_ROWS", 24)
    monkeypatch.setattr(bench_contrastive, "MEMORY_ROWS", 40)
    monkeypatch.setattr(bench_sigmoid, "QUICK_ROWS", 24)
    monkeypatch.setattr(pairs, "device", lambda: "cpu")
    monkeypatch.setattr(bench_contrastive, "device", lambda: "cpu")
    monkeypatch.setattr(bench_sigmoid, "device", lambda: "cpu")
    peaks = {pairs.OURS: 2.0, pairs.LEAN: 1.0, "open_clip": 25.0}
    monkeypatch.setattr(pairs, "cpu_peak", lambda op, case, what, kind: peaks[what])
    yield
    torch.set_num_threads(threads)


def quick(module) -> Suite:
    suite = Suite(module.OP.suite, quick=True)
    suite.repeats = 3
    module.run(suite)
    return suite


@pytest.fixture
def contrastive(small, tmp_path):
    suite = quick(bench_contrastive)
    suite.write(tmp_path / "contrastive.json")
    return suite


def test_contrastive(contrastive, tmp_path):
    rows = contrastive.rows
    assert {row["what"] for row in rows} == {"lift_fast", "lift_fast lean", "open_clip", "torch.mm"}
    assert {(row["dim"], row["dtype"]) for row in rows} == {(d, t) for d in (4096, 512) for t in ("fp32", "bf16")}
    for row in rows:
        gemms = 1 if row["what"] == "torch.mm" else {"frozen": 2, "int8": 2, "trainable": 3}[row["text"]]
        flops = 2 * gemms * row["rows"] ** 2 * row["dim"]
        assert row["tflop_per_s"] == pytest.approx(flops / row["median_ms"] / 1e9)
        if row["loss_error"] is not None and row["what"] != "open_clip":
            assert row["loss_error"] < 1e-5 and row["grad_error"] < {"fp32": 5e-5, "bf16": 5e-3}[row["dtype"]], row
    bars = {bar["name"]: bar for bar in contrastive.bars}
    speeds = [bar["bar"] for name, bar in bars.items() if "faster than open_clip" in name and "lean" not in name]
    assert speeds == [2.3, 2.5, 3.0, 2.3, 1.7, 1.7, 1.7, 1.7]
    memory = {name: bar["value"] for name, bar in bars.items() if "peak extra memory" in name}
    assert sorted(memory.values()) == [0.04, 0.04, 0.08, 0.08]
    assert sum("int8 text, speed against bf16 text" in name for name in bars) == 2
    assert all(bars[name]["ok"] for name in bars if "gradient's relative error" in name or "peak extra" in name)
    assert "inf_cl: runs on CUDA only" in contrastive.notes

    plot.draw([tmp_path / "contrastive.json"] * 2, tmp_path / "plot.svg")
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * sum(row["what"] != "torch.mm" for row in rows)


def test_sigmoid(small):
    suite = quick(bench_sigmoid)
    assert {row["what"] for row in suite.rows} == {"lift_fast", "lift_fast lean", "open_clip", "torch.mm"}
    for row in suite.rows:
        if row["what"] != "torch.mm" and row["dtype"] == "fp32":
            assert row["loss_error"] < 1e-4 and row["grad_error"] < 1e-5, row


@pytest.mark.parametrize("module", [bench_contrastive, bench_sigmoid])
def test_the_truth_is_the_definition(module):
    """The chunked and sampled truth equals autograd through open_clip's formula, in float64."""
    image, text = (x.detach().double() for x in pairs.features(pairs.Case(30, 8, "fp32", False), "cpu"))
    sample = torch.tensor([0, 7, 29])
    truth = module.truth(image, text, *module.OP.parameters, sample)
    leaves = [image.requires_grad_(), text.requires_grad_()]
    loss = module.open_clip(*leaves, *(torch.tensor(p, dtype=torch.float64) for p in module.OP.parameters))
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(truth.loss, loss.detach())
    torch.testing.assert_close(truth.image, grads[0][sample])
    torch.testing.assert_close(truth.text, grads[1][sample])


def test_what_fails_is_noted_and_misses_its_bar(small, monkeypatch):
    def rivals(where, note):
        def broken(*_):
            raise RuntimeError("no such shape\nmore")

        return {"open_clip": bench_contrastive.open_clip, pairs.OURS: broken}

    monkeypatch.setattr(bench_contrastive, "OP", bench_contrastive.OP._replace(rivals=rivals))
    monkeypatch.setattr(bench_contrastive, "_int8_error", lambda suite: None)
    suite = quick(bench_contrastive)
    assert {row["what"] for row in suite.rows} == {"open_clip", "torch.mm"}
    assert suite.bars and not any(bar["ok"] for bar in suite.bars)
    assert any(note.endswith("RuntimeError: no such shape") for note in suite.notes)


def test_a_part_and_lines_by_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "cache", "--quick", "--part"]
    done = subprocess.run([*command, "none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "cache has no part 'none'; it has gpu" in done.stderr
    lines = tmp_path / "lines"
    done = subprocess.run([*command, "gpu", "--lines", str(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or '"note": "no GPU' in lines.read_text()


def test_out_of_time_no_case_is_begun(small):
    suite = Suite("contrastive", quick=True, seconds=-1)
    case = pairs.Case(24, 8, "fp32", False)
    assert pairs.measure(suite, bench_contrastive.OP, case) == {} and not suite.rows
    assert suite.notes == [f"out of time: not measured: {case}"]


def test_the_slow_are_timed_once():
    suite = Suite("x", quick=True)
    calls = {("slow", ""): lambda: pytest.fail("called again"), ("fast", ""): lambda: None}
    timings, repeats = pairs._timed(suite, calls, {("slow", ""): 200.0, ("fast", ""): 1.0}, "cpu", 3)
    assert timings["slow", ""] == Timing(200e3, 0.0)
    assert repeats == {("slow", ""): 1, ("fast", ""): 7}


def test_peak_memory_is_the_growth_of_a_fresh_process():
    """open_clip's formula holds two logits and two log-softmaxes at its peak: 4 matrices of 16 MiB."""
    case = pairs.Case(2048, 16, "fp32", False)
    peak = pairs.cpu_peak(bench_contrastive.OP, case, "open_clip", "frozen")
    assert 60 < peak < 120
    with pytest.raises(RuntimeError, match="nobody"):
        pairs.cpu_peak(bench_contrastive.OP, case, "nobody", "frozen")


def test_plot_refuses_what_it_cannot_draw(tmp_path):
    (tmp_path / "empty.json").write_text('{"suite": "x", "rows": [{"model": "lift"}]}')
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot.draw([tmp_path / "empty.json"], tmp_path / "plot.svg")
    command = [sys.executable, "-m", "benchmarks", "plot", str(tmp_path / "empty.json"), "--out", "plot.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "must end in .svg" in done.stderr


def test_plot_draws_the_results_that_are_kept(tmp_path):
    plot.draw([ROOT / "benchmarks/results/cpu/bench-dequant.json"], tmp_path / "plot.svg")
    assert "GB/s" in (tmp_path / "plot.svg").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA GPU here" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", ["contrastive", "sigmoid"])
def test_python_time_is_until_the_last_launch(op, backend):
    pytest.importorskip("triton")
    op = {"contrastive": bench_host.contrastive, "sigmoid": bench_host.sigmoid}[op]
    found = bench_host.loss(op, 32768, 768, backend, 3)
    assert 0 < found["python_us"] < found["whole_call_us"]

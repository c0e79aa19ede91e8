"""Checkpoints: whole or absent whatever happens; the same values on any number of ranks; any damage is noticed."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import threading
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lift_fast.errors import RankLost, TrainingError
from lift_fast.ranks import Rank
from lift_fast.train import checkpoints as module
from lift_fast.train.checkpoints import Checkpoints
from lift_fast.train.storage import Writer

TIMEOUT = 20.0  # seconds that a rank waits for another; only the test in which one dies could need it
FULL = OSError(errno.ENOSPC, "No space left on device")


def reference(seed=0):
    """Model, optimizer and EMA with uneven and tiny sizes, 0-dim, empty and bf16 tensors."""
    random = torch.Generator().manual_seed(seed)
    rows, side = torch.randn(7, 3, generator=random), torch.randn(2, 9, generator=random)
    return {
        "model": {
            "rows": rows,  # 7 rows over 4 ranks: 2, 2, 2, 1
            "few": torch.randn(3, 5, generator=random),  # 3 rows over 4 ranks: 1, 1, 1, 0
            "side": side,
            "bias": torch.randn(5, generator=random).bfloat16(),
            "scale": torch.randn((), generator=random),
        },
        "optimizer": {"rows": {"exp_avg": rows + 1, "step": torch.tensor(float(seed))}, 3: {"exp_avg": side.t() + 1}},
        "ema": {"copied": torch.randn(4, generator=random), "empty": torch.empty(0, 2)},
    }


def sharded(tensors):
    """The same tensors in the shards of all ranks; some are whole on each rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, optimizer, ema = ({**tensors[name]} for name in ("model", "optimizer", "ema"))
    for name, placement in {"rows": Shard(0), "few": Shard(0), "side": Shard(1)}.items():
        model[name] = distribute_tensor(model[name], mesh, [placement])
    exp_avg = distribute_tensor(optimizer["rows"]["exp_avg"], mesh, [Shard(0)])
    optimizer["rows"] = {**optimizer["rows"], "exp_avg": exp_avg}
    ema = {
        "copied": distribute_tensor(ema["copied"], mesh, [Replicate()]),
        "empty": distribute_tensor(ema["empty"], mesh, [Shard(0)]),
    }
    return {"model": model, "optimizer": optimizer, "ema": ema}


def leaves(tensors):
    for value in tensors.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value.full_tensor() if isinstance(value, DTensor) else value


def same(left, right):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(leaves(left), leaves(right), strict=True))


def zeros(tensors):
    return {k: zeros(v) if isinstance(v, dict) else torch.zeros_like(v) for k, v in tensors.items()}


def save(folder, *steps, **options):
    """A new process's object, that has saved these steps; step k has the values of seed k."""
    checkpoints = Checkpoints(folder, Rank(), **options)
    for step in steps:
        checkpoints.save(step, reference(step), {"step": step})
    checkpoints.wait(raising=True)
    return checkpoints


def newest(folder):
    """(step of the newest whole checkpoint or None, what is said), as a new process finds it; its values are right."""
    said = []
    checkpoints = Checkpoints(folder, Rank())
    found = checkpoints.newest(said.append)
    if found is not None:
        tensors = zeros(reference())
        checkpoints.load(found, tensors)
        assert same(tensors, reference(found.step)) and found.state == {"step": found.step}
    return found and found.step, said


def names(folder):
    return sorted(os.listdir(folder))


# One process.


def test_saves_and_loads(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, Rank())
    assert checkpoints.newest(print) is None
    tensors = reference(3)
    state = {"loader": {"epoch": 1, "skipped": [1, 2]}, "loss": 0.1, "nan": float("inf"), 7: "ä"}
    checkpoints.save(3, tensors, state)
    for tensor in leaves(tensors):
        tensor.zero_()  # training goes on
    state["loader"]["skipped"].append(3)
    checkpoints.wait(raising=True)
    found = Checkpoints(folder, Rank()).newest(print)
    assert found.step == 3
    assert found.state == {"loader": {"epoch": 1, "skipped": [1, 2]}, "loss": 0.1, "nan": float("inf"), "7": "ä"}
    checkpoints.load(found, tensors)
    assert same(tensors, reference(3))
    assert names(folder) == ["step-00000003"]
    assert names(found.folder) == ["checkpoint.json", "rank-00000.safetensors"]
    json.loads((found.folder / "checkpoint.json").read_text())


def test_values_of_each_save_though_the_memory_is_reused(tmp_path):
    checkpoints = save(tmp_path, 1, 2, 3, keep_last=3)
    for step in (1, 2, 3):
        tensors = zeros(reference())
        checkpoints.load(module.verified(tmp_path / f"step-{step:08d}", step), tensors)
        assert same(tensors, reference(step))


def test_tensors_may_change_in_number_and_shape(tmp_path):
    checkpoints = Checkpoints(tmp_path, Rank())
    for step, tensors in enumerate([{}, {"a": torch.ones(3)}, {"a": torch.ones(2), "b": {"c": torch.zeros(1)}}, {}]):
        checkpoints.save(step, tensors, {})
        checkpoints.wait(raising=True)
        found, loaded = checkpoints.newest(print), zeros(tensors)
        checkpoints.load(found, loaded)
        assert found.step == step and same(loaded, tensors)


def test_loads_parameters_of_a_model_and_its_optimizer(tmp_path):
    def trained(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        return model, {"model": model.state_dict(), "optimizer": state, "params": dict(model.named_parameters())}

    checkpoints = Checkpoints(tmp_path, Rank())
    first, saved = trained(1)
    checkpoints.save(1, saved, {})
    checkpoints.wait(raising=True)
    second, loaded = trained(2)
    assert not same(loaded, saved)
    checkpoints.load(checkpoints.newest(print), loaded)
    assert same(loaded, saved) and all(p.requires_grad and p.is_leaf for p in second.parameters())


def test_a_step_is_saved_once(tmp_path):
    checkpoints = save(tmp_path, 4)
    before = (tmp_path / "step-00000004").stat().st_ino
    checkpoints.save(4, reference(4), {"step": 4})
    checkpoints.wait(raising=True)
    resumed = Checkpoints(tmp_path, Rank())
    resumed.load(resumed.newest(print), zeros(reference()))
    resumed.save(4, reference(4), {"step": 4})
    resumed.wait(raising=True)
    assert (tmp_path / "step-00000004").stat().st_ino == before and newest(tmp_path) == (4, [])


def test_save_returns_before_it_is_written(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = Writer.write_data
    monkeypatch.setattr(Writer, "write_data", lambda *args: go_on.wait(10) and write(*args))
    checkpoints = Checkpoints(tmp_path, Rank())
    checkpoints.save(1, reference(1), {"step": 1})
    assert newest(tmp_path / "elsewhere") == (None, []) and "step-00000001" not in names(tmp_path)
    go_on.set()
    checkpoints.save(2, reference(2), {"step": 2})  # waits for the first
    assert "step-00000001" in names(tmp_path)
    checkpoints.wait(raising=True)
    assert newest(tmp_path) == (2, []) and not any(t.name.startswith("checkpoint") for t in threading.enumerate())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [6, 7]),
        ({"keep_last": 1}, [7]),
        ({"keep_last": 3, "keep_every": 3}, [0, 3, 5, 6, 7]),
        ({"keep_last": 9}, [*range(8)]),
        ({"keep_last": 1, "keep_every": 4}, [0, 4, 7]),
    ],
)
def test_keeps_the_newest_and_every_kth(tmp_path, options, kept):
    save(tmp_path, *range(8), **options)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=4)
    for step in (3, 4):
        (tmp_path / f"step-{step:08d}" / "rank-00000.safetensors").unlink()
    checkpoints = Checkpoints(tmp_path, Rank())
    said = []
    checkpoints.load(checkpoints.newest(said.append), zeros(reference()))
    reason = "rank-00000.safetensors is missing"
    assert said == [
        f"the checkpoint of step {step} is damaged ({reason}); going on from that of step 2" for step in (4, 3)
    ]
    checkpoints.save(3, reference(3), {"step": 3})
    checkpoints.wait(raising=True)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_damaged_one_is_written_anew(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "rank-00000.safetensors").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, Rank(), keep_last=1)
    checkpoints.load(checkpoints.newest([].append), zeros(reference()))
    checkpoints.save(2, reference(2), {"step": 2})
    checkpoints.wait(raising=True)
    assert newest(tmp_path) == (2, []) and names(tmp_path) == ["step-00000002"]


def test_files_of_killed_runs_are_removed(tmp_path):
    save(tmp_path, 1)
    left = [tmp_path / name for name in (".step-00000002.part", ".step-00000000.old")]
    for action in (lambda: newest(tmp_path), lambda: save(tmp_path, 2)):
        for folder in left:
            folder.mkdir()
            (folder / "rank-00003.safetensors").write_bytes(b"x")
        action()
        assert not any(folder.exists() for folder in left)
    assert newest(tmp_path) == (2, [])


def test_other_files_stay(tmp_path):
    save(tmp_path, 1)
    for name in ("notes.txt", ".hidden", "step-1", "step-00000009.bak"):
        (tmp_path / name).write_text("x")
    save(tmp_path, 2, 3, 4)
    assert names(tmp_path) == [".hidden", "notes.txt", "step-00000003", "step-00000004", "step-00000009.bak", "step-1"]


@pytest.mark.parametrize("value", [3, "text", None, [torch.ones(1)], nn.Linear(1, 1)])
def test_only_tensors(tmp_path, value):
    with pytest.raises(TypeError, match=r"model\.x is not a tensor but a"):
        Checkpoints(tmp_path, Rank()).save(1, {"model": {"x": value}}, {})
    with pytest.raises(TypeError, match="two tensors have the name"):
        Checkpoints(tmp_path, Rank()).save(1, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, {})
    with pytest.raises(TypeError):
        Checkpoints(tmp_path, Rank()).save(1, {}, {"x": torch.ones(1)})
    assert not names(tmp_path)


CHANGES = {
    "model.more is not in it, and float32 [1] in this run": lambda t: t["model"].update(more=torch.zeros(1)),
    "model.bias is bfloat16 [5], and not in this run": lambda t: t["model"].pop("bias"),
    "model.rows is float32 [7, 3], and float32 [3, 7] in this run": lambda t: t["model"].update(rows=torch.zeros(3, 7)),
    "model.bias is bfloat16 [5], and float32 [5] in this run": lambda t: t["model"].update(bias=torch.zeros(5)),
    "optimizer.rows.step is float32 [], and float32 [1] in this run": lambda t: t["optimizer"]["rows"].update(
        step=torch.zeros(1)
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_tensors_are_refused_before_any_is_changed(tmp_path, message):
    checkpoints = save(tmp_path, 1)
    tensors = zeros(reference())
    CHANGES[message](tensors)
    with pytest.raises(
        TrainingError, match=f"^{re.escape('the checkpoint of step 1 does not fit this run: ' + message)}"
    ):
        checkpoints.load(checkpoints.newest(print), tensors)
    assert same(tensors, zeros(tensors))


def test_a_file_that_goes_while_it_is_loaded(tmp_path):
    checkpoints = save(tmp_path, 1)
    found = checkpoints.newest(print)
    shutil.rmtree(found.folder)
    with pytest.raises(TrainingError, match="cannot read the checkpoint of step 1"):
        checkpoints.load(found, zeros(reference()))


def test_reading_unpickles_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refused(*_, **__):
        raise AssertionError("pickle")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    assert newest(tmp_path) == (1, [])


# Damage.


@pytest.fixture
def two(tmp_path):
    """A folder with whole checkpoints of steps 1 and 2, and the folder of step 2."""
    save(tmp_path, 1, 2)
    return tmp_path, tmp_path / "step-00000002"


def damages(raw, chance):
    """Every kind of damage to the bytes of a file, at random places and at both ends."""
    for at in {0, 7, 8, 9, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(150))}:
        yield raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
    for length in {0, 1, 8, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(20))}:
        yield raw[:length]
        yield raw[:length] + raw[length + 1 :]
        yield raw[:length] + b"\0" * (len(raw) - length - 1) + b"\1"
        yield raw[:length] + b" " + raw[length:]
    yield raw + b"\n"
    yield b"[" * 100_000
    yield b"\xff" + raw


@pytest.mark.parametrize("name", ["checkpoint.json", "rank-00000.safetensors"])
def test_damage_to_any_byte_is_noticed(two, name):
    folder, second = two
    raw = (second / name).read_bytes()
    assert newest(folder) == (2, [])
    for damaged in damages(raw, random.Random(3)):
        if damaged != raw:
            (second / name).write_bytes(damaged)
            said = []
            assert Checkpoints(folder, Rank()).newest(said.append).step == 1
            assert len(said) == 1 and said[0].startswith("the checkpoint of step 2 is damaged (")
            assert said[0].endswith("); going on from that of step 1")
    (second / name).write_bytes(raw)
    assert newest(folder) == (2, [])


def test_missing_foreign_and_exchanged_files_are_noticed(two):
    folder, second = two
    first = folder / "step-00000001"
    kept = folder.parent / "kept"
    shutil.copytree(second, kept)

    def exchange(*files):
        for name in files:
            shutil.copy(first / name, second / name)

    def is_a_file():
        shutil.rmtree(second)
        second.write_text("x")

    def altered(**entries):
        content = json.loads((second / "checkpoint.json").read_text())["checkpoint"] | entries
        (second / "checkpoint.json").write_bytes(module._sealed(json.dumps(content).encode()))

    def no_checkpoint():
        (second / "checkpoint.json").write_bytes(module._sealed(b"[1, 2]"))

    def a_folder():
        (second / "rank-00000.safetensors").unlink()
        (second / "rank-00000.safetensors").mkdir()

    cases = {
        "checkpoint.json": lambda: (second / "checkpoint.json").unlink(),
        "rank-00000.safetensors is missing": lambda: (second / "rank-00000.safetensors").unlink(),
        "rank-00001.safetensors does not belong to it": lambda: (second / "rank-00001.safetensors").write_text("x"),
        "rank-00000.safetensors is cut short or altered": lambda: exchange("rank-00000.safetensors"),
        "rank-00000.safetensors is cut": lambda: exchange("checkpoint.json") or altered(step=2),
        "it is that of step 1": lambda: exchange("checkpoint.json", "rank-00000.safetensors"),
        "Not a directory": is_a_file,
        "format version 2": lambda: altered(format=2),
        "it must be an object, not a list": no_checkpoint,
        "it is a folder, not a file": a_folder,
    }
    for reason, damage in cases.items():
        damage()
        step, said = newest(folder)
        assert step == 1 and len(said) == 1 and reason in said[0], (reason, said)
        shutil.rmtree(second) if second.is_dir() else second.unlink()
        shutil.copytree(kept, second)
        assert newest(folder) == (2, [])


def test_all_damaged(two):
    folder, second = two
    for step in (1, 2):
        (folder / f"step-{step:08d}" / "checkpoint.json").unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint in .* is whole \(the newest: .*step-00000002"):
        newest(folder)


# Failures and kills.


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


def failing(monkeypatch, at, error, after=False):
    """Lets the `at`-th operation of the writing thread on the file system fail, before or after it is done; returns
    the list that the names of all operations are added to."""
    done = []

    def wrapped(name, action):
        def operation(*args, **kwargs):
            if not threading.current_thread().name.startswith("checkpoint"):
                return action(*args, **kwargs)
            done.append(name)
            if len(done) == at + 1 and not after:
                raise error
            result = action(*args, **kwargs)
            if len(done) == at + 1:
                raise error
            return result

        return operation

    for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    monkeypatch.setattr("builtins.open", wrapped("open", open))
    return done


def operations_of(tmp_path, monkeypatch):
    """(a folder with checkpoints of steps 1 and 2 and what a killed run left; the operations of the next save)."""
    start, folder = tmp_path / "start", tmp_path / "counted"
    save(start, 1, 2)
    (start / ".step-00000003.part").mkdir()
    (start / ".step-00000003.part" / "rank-00000.safetensors").write_text("x")
    shutil.copytree(start, folder)
    with monkeypatch.context() as patch:
        operations = failing(patch, -1, None)
        save(folder, 3)
    assert {*operations} == {"replace", "fsync", "mkdir", "unlink", "rmdir", "open"}
    assert operations.count("fsync") == 4 and operations.count("replace") == 2
    return start, operations


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_time_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, after):
    start, operations = operations_of(tmp_path, monkeypatch)
    steps = []
    for at in range(len(operations)):
        folder = tmp_path / f"{at}"
        shutil.copytree(start, folder)
        checkpoints = Checkpoints(folder, Rank(), warn=pytest.fail)
        with monkeypatch.context() as patch:
            assert failing(patch, at, Killed(), after) == []
            checkpoints.save(3, reference(3), {"step": 3})
            with pytest.raises(TrainingError, match="ended with Killed") as raised:
                checkpoints.wait()
        assert isinstance(raised.value.__cause__, Killed)
        step, said = newest(folder)
        assert not said
        steps.append(step)
        save(folder, 4)
        assert newest(folder) == (4, []) and len(names(folder)) == 2
    # The second last renaming is that which makes it whole; the last one removes step 1.
    committed = operations.index("replace") + (not after)
    assert steps == [2] * committed + [3] * (len(operations) - committed)


@pytest.mark.parametrize("error", [FULL, OSError(errno.EIO, "Input/output error"), PermissionError(13, "Permission")])
def test_a_save_that_fails_anywhere_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, error):
    start, operations = operations_of(tmp_path, monkeypatch)
    outcomes = []
    for at in range(len(operations)):
        folder, warned = tmp_path / f"{at}", []
        shutil.copytree(start, folder)
        checkpoints = Checkpoints(folder, Rank(), warn=warned.append)
        checkpoints.load(module.verified(folder / "step-00000002", 2), zeros(reference()))
        with monkeypatch.context() as patch:
            failing(patch, at, error)
            checkpoints.save(3, reference(3), {"step": 3})
            checkpoints.wait()
        outcomes.append(bool(warned))
        if warned:
            text = "cannot write the checkpoint of step 3 ({}); the last is that of step 2; free some space"
            reasons = [str(error)]
            if operations[at] in ("unlink", "rmdir"):  # what the killed run left stands in the way
                reasons.append(f"[Errno 17] File exists: '{folder}/.step-00000003.part'")
            assert warned in [[f"{text.format(reason)}: the next save tries again"] for reason in reasons]
            with pytest.raises(TrainingError, match=r"^cannot write the checkpoint of step 3 \(.*; free some space"):
                checkpoints.wait(raising=True)
            assert all(name.startswith("step-") for name in names(folder)) or "rmdir" in operations[: at + 1]
        else:
            checkpoints.wait(raising=True)
        step, said = newest(folder)
        assert step in ((2, 3) if warned else (3,)) and not said
        checkpoints.save(4, reference(4), {"step": 4})
        checkpoints.wait(raising=True)
        assert newest(folder) == (4, []) and len(names(folder)) == 2
    assert True in outcomes and False in outcomes


def test_the_first_save_fails(tmp_path, monkeypatch):
    warned = []
    checkpoints = Checkpoints(tmp_path / "a" / "b", Rank(), warn=warned.append)
    with monkeypatch.context() as patch:
        failing(patch, 0, FULL)
        checkpoints.save(1, reference(1), {"step": 1})
        checkpoints.wait()
    assert len(warned) == 1 and "there is none before" in warned[0]
    assert newest(tmp_path / "a" / "b") == (None, [])
    checkpoints.save(1, reference(1), {"step": 1})
    checkpoints.wait(raising=True)
    assert newest(tmp_path / "a" / "b") == (1, [])


def test_a_bug_in_the_thread_is_an_error_of_the_next_call(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Rank(), warn=[].append)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_data", lambda *_: 1 / 0)
        checkpoints.save(1, reference(1), {"step": 1})
        with pytest.raises(TrainingError, match="the thread that writes checkpoints ended with ZeroDivisionError"):
            checkpoints.save(2, reference(2), {"step": 2})
    assert names(tmp_path) == []
    checkpoints.save(2, reference(2), {"step": 2})
    checkpoints.wait(raising=True)
    assert newest(tmp_path) == (2, [])


def test_closing_waits_and_leaves_errors_to_wait(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Rank())
    checkpoints.close()
    checkpoints.save(1, reference(1), {"step": 1})
    checkpoints.close()
    assert newest(tmp_path) == (1, [])

    def broken_pipe(text):
        raise BrokenPipeError(text)

    checkpoints.warn = broken_pipe
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(FULL))
    checkpoints.save(2, reference(2), {"step": 2})
    checkpoints.close()
    with pytest.raises(TrainingError, match="BrokenPipeError: cannot write the checkpoint of step 2"):
        checkpoints.wait()


@pytest.mark.gpu
def test_tensors_of_a_gpu(tmp_path):
    """The copies are still under way when `save` returns; the tensors change at once."""
    checkpoints = Checkpoints(tmp_path, Rank(), keep_last=3)
    random = [torch.randn(1 << 24, device="cuda") for _ in range(3)]
    tensors = {"model": {"w": torch.empty(1 << 24, device="cuda")}, "step": torch.tensor(0.0)}
    for step, values in enumerate(random):
        tensors["model"]["w"].copy_(values)
        tensors["step"].fill_(step)
        checkpoints.save(step, tensors, {})
        tensors["model"]["w"].zero_()
    checkpoints.wait(raising=True)
    for step, values in enumerate(random):
        checkpoints.load(module.verified(tmp_path / f"step-{step:08d}", step), tensors)
        assert torch.equal(tensors["model"]["w"], values) and tensors["step"] == step


# Several ranks. Each function below runs on WORLD ranks; all of them in one start of four processes.


def saves_shards(rank, folder):
    checkpoints = Checkpoints(folder / f"of {rank.world}", rank, timeout=TIMEOUT)
    for step in (1, 2):
        tensors = sharded(reference(step))
        checkpoints.save(step, tensors, {"step": step, "rank": rank.number})
        for tensor in [*tensors["model"].values()]:
            with torch.no_grad():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    checkpoints.wait(raising=True)
    found = checkpoints.newest(print)
    assert found.step == 2 and found.state == {"step": 2, "rank": 0}
    assert names(found.folder) == ["checkpoint.json", *(f"rank-{k:05d}.safetensors" for k in range(rank.world))]
    chunks = [(fqn, *chunk["offsets"]) for fqn, t in found.index["tensors"].items() for chunk in t["chunks"]]
    assert len(chunks) == len(set(chunks))


def loads_on_other_ranks(rank, folder):
    """What 1, 2 and 4 ranks have written, in shards and whole."""
    for name in ("of 1", "of 2", "of 4"):
        checkpoints = Checkpoints(folder / name, rank, timeout=TIMEOUT)
        found = checkpoints.newest(print)
        for tensors in (sharded(zeros(reference())), zeros(reference())):
            checkpoints.load(found, tensors)
            assert same(tensors, reference(2)), name


def saves_whole_tensors_once(rank, folder):
    """As DDP has them: the same on all ranks; about as many bytes in each file."""
    checkpoints = Checkpoints(folder / "whole", rank, timeout=TIMEOUT)
    tensors = {"model": {f"{k}": torch.full((100,), float(k)) for k in range(10)}}
    for step in (1, 2, 3):
        checkpoints.save(step, tensors, {})
    checkpoints.wait(raising=True)
    found = checkpoints.newest(print)
    sizes = [(found.folder / file).stat().st_size for file in found.index["files"]]
    assert len(sizes) == rank.world and max(sizes) < 2 * min(sizes) and sum(sizes) < 4 * 1000 + 2000
    loaded = zeros(tensors)
    checkpoints.load(found, loaded)
    assert same(loaded, tensors)


def saves_one_tensor(rank, folder):
    """A rank that has nothing to write writes no file."""
    checkpoints = Checkpoints(folder / "one", rank, timeout=TIMEOUT)
    checkpoints.save(1, {"a": torch.arange(3)}, {})
    checkpoints.wait(raising=True)
    found, loaded = checkpoints.newest(print), {"a": torch.zeros(3, dtype=torch.int64)}
    checkpoints.load(found, loaded)
    assert len(found.index["files"]) == 1 and loaded["a"].tolist() == [0, 1, 2]


def fsdp_model(seed, shard):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 1))
    if shard:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * (seed + 1)
    optimizer.step()
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return {"model": model.state_dict(), "optimizer": state}


def saves_fsdp(rank, folder):
    checkpoints = Checkpoints(folder / "fsdp", rank, timeout=TIMEOUT)
    checkpoints.save(1, fsdp_model(1, shard=True), {})
    checkpoints.wait(raising=True)
    assert isinstance(fsdp_model(1, shard=True)["optimizer"]["0.weight"]["exp_avg"], DTensor)
    tensors = fsdp_model(2, shard=True)
    checkpoints.load(checkpoints.newest(print), tensors)
    assert same(tensors, fsdp_model(1, shard=False))


def one_rank_cannot_write(rank, folder):
    for name, failing_rank, method in (("a", 1, "write_data"), ("b", 0, "write_data"), ("c", 0, "finish")):
        warned = []
        checkpoints = Checkpoints(folder / f"full {name}", rank, timeout=TIMEOUT, warn=warned.append)
        checkpoints.save(1, sharded(reference(1)), {"step": 1})
        checkpoints.wait(raising=True)
        usual = getattr(Writer, method)

        def refused(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        if rank.number == failing_rank:
            setattr(Writer, method, refused)
        began = time.monotonic()
        checkpoints.save(2, sharded(reference(2)), {"step": 2})
        checkpoints.wait()
        assert time.monotonic() - began < TIMEOUT / 2
        setattr(Writer, method, usual)
        reason = f"rank {failing_rank} of {rank.world}: [Errno 28] No space left on device"
        assert warned == (
            [
                f"cannot write the checkpoint of step 2 ({reason}); the last is that of step 1; free some space: the "
                "next save tries again"
            ]
            if rank.is_first
            else []
        )
        try:
            checkpoints.wait(raising=True)
        except TrainingError as error:
            assert str(error).startswith(
                f"cannot write the checkpoint of step 2 ({reason}); the last is that of step 1"
            )
        else:
            raise AssertionError("no error")
        dist.barrier()
        assert names(checkpoints.folder) == ["step-00000001"]
        assert checkpoints.newest(print).step == 1
        checkpoints.save(3, sharded(reference(3)), {"step": 3})
        checkpoints.wait(raising=True)
        found, tensors = checkpoints.newest(print), sharded(zeros(reference()))
        checkpoints.load(found, tensors)
        assert found.step == 3 and same(tensors, reference(3))


def a_bug_on_one_rank(rank, folder):
    warned = []
    checkpoints = Checkpoints(folder / "bug", rank, timeout=TIMEOUT, warn=warned.append)
    if rank.number == 1:
        checkpoints._copies.write = lambda writer: 1 / 0
    checkpoints.save(1, reference(1), {"step": 1})
    try:
        checkpoints.wait()
    except TrainingError as error:
        assert rank.number == 1 and "ZeroDivisionError" in str(error)
    else:
        assert rank.number != 1
    assert len(warned) == rank.is_first


def decisions_are_shared(rank, folder):
    """Only rank 0 looks at the files; every rank gets its decision, or its error."""
    checkpoints = Checkpoints(folder / "decisions", rank, timeout=TIMEOUT)
    assert checkpoints.newest(print) is None
    for step in (1, 2):
        checkpoints.save(step, reference(step), {"step": step})
    checkpoints.wait(raising=True)
    said = []
    if rank.is_first:
        (checkpoints.folder / "step-00000002" / "rank-00001.safetensors").unlink()
    found = checkpoints.newest(said.append)
    assert found.step == 1 and len(said) == rank.is_first
    # One rank has another shape: none is changed, and all raise.
    tensors = zeros(reference())
    if rank.number == 1:
        tensors["model"]["rows"] = torch.zeros(1)
    for prepare, message in ((lambda: None, "does not fit"), (lambda: shutil.rmtree(found.folder), "cannot read")):
        dist.barrier()
        if rank.is_first:
            prepare()
        dist.barrier()
        try:
            checkpoints.load(found, tensors if message == "does not fit" else zeros(reference()))
        except TrainingError as error:
            assert message in str(error)
        else:
            raise AssertionError("no error")
    assert same(tensors, zeros(tensors))
    if rank.is_first:
        (checkpoints.folder / "step-00000001").mkdir()
    try:
        checkpoints.newest(print)
    except TrainingError as error:
        assert "no checkpoint in" in str(error)
    else:
        raise AssertionError("no error")


def a_rank_dies(rank, folder):
    checkpoints = Checkpoints(folder / "dies", rank, timeout=TIMEOUT)
    checkpoints.save(1, sharded(reference(1)), {"step": 1})
    checkpoints.wait(raising=True)
    dist.barrier()
    if rank.number == 1:
        checkpoints._copies.write = lambda writer: os._exit(0)
    began = time.monotonic()
    checkpoints.save(2, sharded(reference(2)), {"step": 2})
    try:
        checkpoints.wait()
    except RankLost as error:
        assert "has lost another rank" in str(error)
    else:
        raise AssertionError("no error")
    assert time.monotonic() - began < TIMEOUT + 5


# In this order: the last ends a process.
SCENARIOS = [
    (saves_shards, 4),
    (saves_shards, 2),
    (saves_shards, 1),
    (loads_on_other_ranks, 4),
    (loads_on_other_ranks, 2),
    (saves_whole_tensors_once, 4),
    (saves_one_tensor, 2),
    (saves_fsdp, 4),
    (one_rank_cannot_write, 2),
    (a_bug_on_one_rank, 4),
    (decisions_are_shared, 2),
    (a_rank_dies, 2),
]


def work(number, folder):
    torch.set_num_threads(1)
    for scenario, world in SCENARIOS:
        name = f"{scenario.__name__} {world}"
        if number >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}",
            rank=number,
            world_size=world,
            timeout=timedelta(seconds=3 * TIMEOUT),
        )
        try:
            scenario(Rank(number, world), folder)
            outcome = "ok"
        except BaseException:
            outcome = traceback.format_exc()
        (folder / f"{name} {number}.txt").write_text(outcome)
        if scenario is not a_rank_dies:
            time.sleep(0.02)  # torch 2.6 may hang in the next call right after a collective
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that all scenarios have run in."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["lift_fast.train.checkpoints", "torch.distributed.fsdp"])  # imported once
    mp.start_processes(work, (folder,), nprocs=4, start_method="forkserver")
    return folder


@pytest.mark.parametrize(("scenario", "world"), SCENARIOS)
def test_ranks(ran, scenario, world):
    name = f"{scenario.__name__} {world}"
    outcomes = [ran / f"{name} {number}.txt" for number in range(world)]
    if scenario is a_rank_dies:
        assert not outcomes.pop().exists()
    for outcome in outcomes:
        assert outcome.read_text() == "ok", outcome.read_text()


@pytest.mark.parametrize("name", ["of 4", "of 2", "of 1", "full a", "full b", "full c", "dies"])
def test_one_process_loads_what_several_ranks_wrote(ran, name):
    checkpoints = Checkpoints(ran / name, Rank())
    found, tensors = checkpoints.newest(pytest.fail), zeros(reference())
    checkpoints.load(found, tensors)
    assert found.step == (1 if name == "dies" else 3 if "full" in name else 2) and same(tensors, reference(found.step))


def test_one_process_loads_what_fsdp_wrote(ran):
    checkpoints = Checkpoints(ran / "fsdp", Rank())
    tensors = fsdp_model(2, shard=False)
    checkpoints.load(checkpoints.newest(pytest.fail), tensors)
    assert same(tensors, fsdp_model(1, shard=False))

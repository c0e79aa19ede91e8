"""Runs functions and training in several processes that are the ranks of one group."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from queue import Empty
from typing import Any

from lift_fast.nn import PRESETS, Preset, TextConfig, VitConfig
from lift_fast.ranks import Rank, joined
from lift_fast.train.config import TrainConfig

SMALL = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(width=16, layers=1, heads=2), embed_dim=16, text_dim=24)


def free_port() -> int:
    """A TCP port that nothing listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(number: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank."""
    ranks = {"RANK": number, "WORLD_SIZE": world, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": world}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def on_ranks(world: int, work: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """What work(*args) returns on each of `world` ranks; an exception stands for itself. work: a function of a module.

    Processes that are left after `timeout` seconds are killed, and their entries are TimeoutErrors."""
    context = multiprocessing.get_context("forkserver")  # each is forked from a process that has loaded torch
    context.set_forkserver_preload(["lift_fast.cli.main", "lift_fast.train.loop"])
    results: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(os.environ | environment(number, world, port), results, work, args))
        for number in range(world)
    ]
    for process in processes:
        process.start()
    found: list[Any] = [TimeoutError(f"rank {number} has not ended") for number in range(world)]
    try:
        for _ in range(world):
            number, value = results.get(timeout=timeout)
            found[number] = pickle.loads(value)
    except Empty:
        pass
    for process in processes:
        process.join(5)
        process.kill()
    return found


def _rank(variables: Mapping[str, str], results: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    PRESETS["small"] = SMALL
    try:
        value = work(*args)
    except BaseException as error:
        traceback.print_exc()
        value = error
    # As bytes: a queue would pass tensors on in memory that ends with this process.
    results.put((int(variables["RANK"]), pickle.dumps(value)))


def in_group(work: Callable[..., Any], *args: Any) -> Any:
    """work(rank, *args) within a gloo group of all ranks."""
    import torch

    rank = Rank.from_environment()
    with joined(rank, torch.device("cpu"), 60):
        return work(rank, *args)


def trained(config: TrainConfig, **changes: Any) -> dict[str, Any]:
    """Trains in this process as one of the ranks; the content of run.json."""
    from lift_fast.train.loop import train

    return train(replace(config, **changes), progress=False)

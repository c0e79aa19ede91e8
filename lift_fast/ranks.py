"""Ranks: the processes that share one piece of work, as torchrun starts them, and what they tell each other.

torchrun --nproc-per-node 8 --no-python lift-fast train …
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError, LiftFastError, RankLost, TrainingError

T = TypeVar("T")
_stores: "dict[tuple[object, ...], dist.Store]" = {}
_groups = count()  # that this process has joined: each finds its members under a name of its own
_NOISE = re.compile(r"^\[\S+:\d+\] |\. This is typically.*")  # of gloo: a place in its source, and advice
_COMMUNICATION = re.compile(r"^Dist|gloo|[Cc]onnection (closed|reset|refused)|[Tt]imed out|peer|NCCL|Broken pipe")


@dataclass(frozen=True)
class Rank:
    """One of `world` processes that share the work.

    number: its rank. local: its rank on its machine. local_world: number of ranks on its machine.

    Raises ConfigError for numbers that are not those of a rank.
    """

    number: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.number < self.world and 0 <= self.local and self.local_world >= 1):
            raise ConfigError(
                f"RANK {self.number} of WORLD_SIZE {self.world}, LOCAL_RANK {self.local} is not a rank: RANK must be "
                "less than WORLD_SIZE, and none may be negative; start the processes with torchrun"
            )

    @staticmethod
    def from_environment() -> "Rank":
        """The rank of this process from torchrun's environment variables, else rank 0 of 1. Raises ConfigError."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        try:
            number, world, local, local_world = (int(os.environ.get(name, usual)) for name, usual in names.items())
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, as torchrun sets them: {error}"
            ) from error
        return Rank(number, world, local, local_world)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes what all share."""
        return self.number == 0

    def share_of(self, cores: int) -> int | None:
        """The number of CPU threads of a rank on a machine with so many cores; None, for torch's own number, on the
        only rank of a machine and where OMP_NUM_THREADS is above 1: torchrun sets it to 1."""
        if self.local_world == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
            return None
        return max(1, cores // self.local_world)

    def __str__(self) -> str:
        return f"rank {self.number} of {self.world}"


@contextmanager
def joined(rank: Rank, device: torch.device, timeout: float) -> Iterator[None]:
    """Within it the ranks are a process group, torch's default one: NCCL for tensors on GPUs, gloo for others.

    Does nothing for a single rank, or where the caller has made a group. timeout: seconds that a collective waits.
    Raises ConfigError for a torch without distributed, or when the ranks do not find each other in time.
    """
    if rank.world == 1 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    if not dist.is_available():
        raise ConfigError(f"{rank}: this torch is built without torch.distributed, which ranks need; use one process")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    # torchrun keeps one store through its restarts, in which a restarted rank may find the addresses of dead ones.
    attempt = f"lift-fast attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}, group {next(_groups)}"
    try:
        store = dist.PrefixStore(attempt, _store(rank, limit))
        dist.init_process_group(backend, store=store, timeout=limit, rank=rank.number, world_size=rank.world)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{rank}: the ranks did not find each other ({error}); start them with torchrun") from error
    try:
        yield
    finally:
        time.sleep(0.02)  # torch 2.6 hangs where gloo's thread is still about the last collective
        dist.destroy_process_group()


def _store(rank: Rank, limit: timedelta) -> "dist.Store":
    """Where the ranks find each other. It lasts as long as the process: a rank that joined its next group while rank 0
    ends the server of the last one would connect to that."""
    address = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), rank.number, rank.world)
    if address not in _stores:
        _stores[address], *_ = next(dist.rendezvous("env://", rank.number, rank.world, timeout=limit))
    _stores[address].set_timeout(limit)
    return _stores[address]


@contextmanager
def answering(rank: Rank) -> Iterator[None]:
    """Makes a RankLost of what torch.distributed raises within it when another rank has died or does not answer."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own.
        if rank.world == 1 or not _COMMUNICATION.search(f"{type(error).__name__}: {error}"):
            raise
        reason = _NOISE.sub("", str(error).splitlines()[0])
        raise RankLost(
            f"{rank} has lost another rank, which has died or did not answer in time ({reason}); run the same command "
            "again"
        ) from error


def every(value: T) -> list[T]:
    """The values that all ranks pass, in their order. A collective: all ranks call it. [value] without a group."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first(value: T) -> T:
    """The value that rank 0 passes. A collective: all ranks call it. `value` without a group."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def together(work: Callable[[], T], only_first: bool = False) -> T:
    """Runs work() on every rank, or on rank 0 alone, and returns what it returns, in the latter case to every rank.

    When it raises a LiftFastError or OSError on any rank, all raise: those on which it did their own, the others a
    LiftFastError of that kind. Only the first one's `reported` is False: one rank says what is wrong. A collective.
    """
    value: T | None = None
    error: LiftFastError | OSError | None = None
    try:
        if not only_first or rank_number() == 0:
            value = work()
    except (LiftFastError, OSError) as raised:
        error = raised
    # The nearest class of errors.py: its errors are made of a message alone.
    kinds = [kind for kind in type(error).__mro__ if kind.__module__ == LiftFastError.__module__] or [TrainingError]
    found = every((value if only_first else None, None if error is None else (kinds[0], str(error))))
    failed = [(number, what) for number, (_, what) in enumerate(found) if what is not None]
    if not failed:
        return found[0][0] if only_first else value  # type: ignore[return-value]
    number, (kind, reason) = failed[0]
    error = error or kind(reason)
    if isinstance(error, LiftFastError):
        error.reported = rank_number() != number
    raise error


def rank_number() -> int:
    """This process's rank in the default process group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

"""Checkpoints of a run: all that it needs to go on, written while it trains.

    OUT/checkpoints/step-00000100/         whole: it gets this name by one renaming, when all of it is on disk
        checkpoint.json                    {"checksum", "checkpoint": {"format", "step", "state", "files", "tensors"}}
        rank-00000.safetensors …           the tensors, each chunk once; storage.py describes "files" and "tensors"
    OUT/checkpoints/.step-00000200.part/   being written
    OUT/checkpoints/.step-00000050.old/    being removed

A run that is killed leaves at most folders whose names begin with a dot; the next start or save removes them. No file
is unpickled, and none is loaded that does not have its SHA-256.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from .. import foreign
from ..errors import RankLost, TrainingError
from ..files import flush_names, open_regular, read_regular
from ..ranks import Rank, answering, together
from .storage import Index, Reader, Writer, sizes_and_dtype

FORMAT = 1
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"\.step-\d{8,}\.(part|old)")
_THREADS = 8  # that read files to verify them
_READ = 1 << 20  # bytes
_LARGEST = 1 << 30  # bytes of a checkpoint.json, which lists the samples that were skipped


class _Manifest(Index):
    """The content of checkpoint.json."""

    format: int
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A whole checkpoint. state: what `save` was given. index: its files and tensors (storage.py)."""

    step: int
    folder: Path
    state: dict[str, Any]
    index: Index


class Checkpoints:
    """The checkpoints of a run, in `folder`: one folder each, whole or absent.

    All ranks create one and call its methods in the same order; all see the same file system. keep_last, keep_every:
    a save removes all but the newest keep_last and those at multiples of keep_every. timeout: seconds that a rank waits
    for the others. warn: is given, on rank 0 and by the thread that writes, why a checkpoint could not be written.
    """

    def __init__(
        self,
        folder: Path,
        rank: Rank,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        timeout: float = 600.0,
        warn: Callable[[str], object] = print,
    ):
        self.folder, self.rank, self.warn = folder, rank, warn
        self.keep_last, self.keep_every = keep_last, keep_every
        self._ranks = _Ranks(rank, timeout)
        self._copies = _Copies(rank, self._ranks)
        self._last: int | None = None  # step of the newest checkpoint that was written or loaded
        self._damaged: set[int] = set()
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, str] | None = None  # step and reason of the last save, where it failed
        self._broken: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Begins to write a checkpoint, after waiting for the one before. The tensors may change when it returns.

        A step that was written or loaded before is not written again. Where it cannot be written, on whichever rank,
        the earlier checkpoints stay as they are, `warn` is called, and the next save tries again.

        tensors: nested dicts of tensors and DTensors, with the same names on all ranks. state: anything JSON knows;
        that of rank 0 is written. Raises TypeError for other values, and TrainingError as `wait` does.
        """
        self.wait()
        if step == self._last:
            return
        state = json.loads(json.dumps(state))  # as it will be read: the caller goes on changing it
        writer = Writer(self._part(step), self.rank.number, partial(self._commit, step, state))
        copied = self._copies.take(_flat(tensors), writer)
        self._thread = threading.Thread(target=self._write, args=(step, writer, copied), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self, *, raising: bool = False) -> None:
        """Waits for the save under way. raising: a last save that could not be written is an error.

        Raises TrainingError for that, and when anything but the file system kept this rank from writing; RankLost.
        """
        self.close()
        if self._broken is not None:
            error, self._broken = self._broken, None
            if isinstance(error, RankLost):
                raise error
            raise TrainingError(
                f"{self.rank}: the thread that writes checkpoints ended with {type(error).__name__}: {error}; run the "
                "same command again: it goes on from the last checkpoint"
            ) from error
        if raising and self._failed is not None:
            step, reason = self._failed
            failed = TrainingError(
                f"cannot write the checkpoint of step {step} ({reason}); {self._last_one()}; free some space and run "
                "the same command again: it goes on from there"
            )
            failed.reported = not self.rank.is_first  # all ranks raise it
            raise failed

    def close(self) -> None:
        """Waits for the save under way, whatever becomes of it: before the ranks part, or an error ends the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def newest(self, say: Callable[[str], object]) -> Found | None:
        """The newest whole checkpoint, None where there is none. All files are read and compared with their SHA-256.

        say: is given, on rank 0, what is wrong with each newer one. Raises TrainingError when none is whole, OSError
        when the folder cannot be listed.
        """
        return together(lambda: self._search(say), only_first=True)

    def load(self, found: Found, tensors: dict[str, Any]) -> None:
        """Copies the values of a checkpoint into these tensors, however they were sharded when it was written.

        tensors: as for `save`. Raises TrainingError, before any is changed, when names, shapes or dtypes are not those
        of the checkpoint; and when a file cannot be read.
        """
        wanted = _flat(tensors)
        together(lambda: _check_fits(wanted, found))
        together(lambda: self._read(found, wanted))
        self._last = found.step

    def _write(self, step: int, writer: Writer, copied: "torch.cuda.Event | None") -> None:
        """The thread: writes what `save` has copied. All ranks end with the same outcome, whichever failed."""
        try:
            if copied is not None:
                copied.synchronize()
            with answering(self.rank):
                reason = self._written(writer)
            self._failed = None if reason is None else (step, reason)
            if reason is None:
                self._last = step
            elif self.rank.is_first:
                self.warn(
                    f"cannot write the checkpoint of step {step} ({reason}); {self._last_one()}; free some space: the "
                    "next save tries again"
                )
        except BaseException as error:
            self._broken = error

    def _written(self, writer: Writer) -> str | None:
        """None, or why the checkpoint could not be written."""
        first, reason = self.rank.is_first, None
        if first:
            _, reason = self._tried(self._begin, writer)
        reason = self._ranks.of_first(reason)
        if reason is None:
            results, reason = self._tried(self._copies.write, writer)
            parts = self._ranks.gathered((results, reason))
            if first:
                reason = next((failed for _, failed in parts if failed), None)
                if reason is None:
                    _, reason = self._tried(writer.finish, self._copies.metadata, [results for results, _ in parts])
            reason = self._ranks.of_first(reason)
        if first and reason is not None:
            shutil.rmtree(writer.folder, ignore_errors=True)
        return reason

    def _tried(self, action: Callable[..., Any], *values: Any) -> tuple[Any, str | None]:
        """(what it returns, None), or (None, why it failed): a rank that fails must say so, since others wait."""
        try:
            return action(*values), None
        except Exception as error:
            if not isinstance(error, OSError):
                self._broken = error
            return None, str(error) if self.rank.world == 1 else f"{self.rank}: {error}"

    def _begin(self, writer: Writer) -> None:
        """Removes what killed runs have left, and makes the folder that is written to."""
        self._clear()
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            flush_names(self.folder.parent)
        writer.set_up_storage_writer(True)

    def _commit(self, step: int, state: dict[str, Any], index: Index) -> None:
        """On rank 0, when the files of all ranks are on disk: makes the checkpoint whole, and removes old ones."""
        part, whole = self._part(step), self._whole(step)
        content = {"format": FORMAT, "step": step, "state": state, **index}
        with open(part / MANIFEST, "xb") as file:
            file.write(_sealed(json.dumps(content).encode()))
            file.flush()
            os.fsync(file.fileno())
        flush_names(part)
        if whole.exists():  # a damaged one
            os.replace(whole, self._old(step))
        os.replace(part, whole)
        flush_names(self.folder)
        self._damaged.discard(step)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Removes what need not be kept: damaged ones, and those before `newest` by keep_last and keep_every."""
        steps = _steps(self.folder)
        whole = [step for step in steps if step <= newest and step not in self._damaged]
        kept = {*whole[-self.keep_last :], *(step for step in whole if self.keep_every and step % self.keep_every == 0)}
        for step in steps:
            if step in self._damaged or step <= newest and step not in kept:
                try:
                    os.replace(self._whole(step), self._old(step))
                except OSError:
                    continue  # the next save tries again
        self._clear()

    def _clear(self) -> None:
        """Removes the folders of saves and removals that were not finished."""
        if self.folder.exists():
            for entry in [*self.folder.iterdir()]:
                if _LEFT_OVER.fullmatch(entry.name):
                    with suppress(OSError):  # the next save tries again
                        # What stood at a checkpoint's name may have been a file or a link.
                        entry.unlink() if entry.is_symlink() or entry.is_file() else shutil.rmtree(entry)

    def _search(self, say: Callable[[str], object]) -> Found | None:
        """`newest`, on rank 0."""
        if not self.folder.exists():
            return None
        self._clear()
        found, damaged = newest_whole(self.folder)
        if found is not None:
            for later, reason in damaged.items():
                say(f"the checkpoint of step {later} is damaged ({reason}); going on from that of step {found.step}")
            self._damaged = set(damaged)
            return found
        if damaged:
            raise TrainingError(
                f"no checkpoint in {self.folder} is whole (the newest: {next(iter(damaged.values()))}); put an intact "
                "copy of one there, or remove the folder to begin from the first step"
            )
        return None

    def _read(self, found: Found, wanted: dict[str, Tensor]) -> None:
        """Copies the values into these tensors."""
        reader = Reader(found.folder, found.index)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(wanted, reader.read_metadata(), self.rank.is_first)
        try:
            with torch.no_grad():
                reader.read_data(planner.create_local_plan(), planner)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{self.rank} cannot read the checkpoint of step {found.step} ({error}); all ranks must see the same "
                "files; run the same command again"
            ) from error

    def _last_one(self) -> str:
        return "there is none before" if self._last is None else f"the last is that of step {self._last}"

    def _whole(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _part(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.part"

    def _old(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.old"


def newest_whole(folder: Path) -> tuple[Found | None, dict[int, str]]:
    """The newest whole checkpoint in `folder`, None where there is none; and step -> what is wrong with each newer one.

    All its files are read and compared with their SHA-256. Changes nothing, so that it may run while a run is training.
    Raises OSError when the folder cannot be listed.
    """
    damaged: dict[int, str] = {}
    for step in reversed(_steps(folder)):
        try:
            return verified(folder / f"step-{step:08d}", step), damaged
        except (OSError, ValueError) as error:
            damaged[step] = str(error)
    return None, damaged


class _Ranks:
    """Messages between the ranks about checkpoints, in a group of their own: they never mix with the training's.

    Every method is a collective. timeout: seconds that it waits before it raises RuntimeError.
    """

    def __init__(self, rank: Rank, timeout: float):
        self.rank = rank
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if rank.world > 1 else None

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        flag = torch.tensor(int(value))
        if self.group is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return bool(flag)

    def of_first(self, value: Any) -> Any:
        """The value of rank 0."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, 0, self.group)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, on rank 0; an empty list on the others."""
        if self.group is None:
            return [value]
        values = [None] * self.rank.world if self.rank.is_first else None
        dist.gather_object(value, values, 0, self.group)
        return values or []

    def scattered(self, values: list[Any]) -> Any:
        """The value that rank 0 has for this rank."""
        if self.group is None:
            return values[0]
        mine = [None]
        dist.scatter_object_list(mine, values or None, 0, self.group)
        return mine[0]


class _Copies(DefaultSavePlanner):
    """DCP's planner, over copies in the CPU's memory of the chunks that this rank writes; the memory is kept.

    The plan is made once and again only when names, shapes or sharding have changed. metadata: that of rank 0's plan.
    """

    metadata: Metadata
    plan: SavePlan

    def __init__(self, rank: Rank, ranks: _Ranks):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.rank, self.ranks = rank, ranks
        self.copies: dict[str, Tensor] = {}
        self._planned: list[Any] | None = None

    def take(self, tensors: dict[str, Tensor], writer: Writer) -> "torch.cuda.Event | None":
        """Copies the tensors. Returns what to wait for, where a GPU may be copying still. A collective."""
        layout = [
            (name, tensor.shape, tensor.dtype, tensor.placements if isinstance(tensor, DTensor) else None)
            for name, tensor in tensors.items()
        ]
        if self.ranks.any(layout != self._planned):
            self._make_plan(tensors, writer)
            self._planned = layout
        with torch.no_grad():
            local = [_local(tensors[name]) for name in self.copies]
            if local:
                torch._foreach_copy_([*self.copies.values()], local, non_blocking=True)
        if not any(tensor.is_cuda for tensor in local):
            return None
        copied = torch.cuda.Event()
        copied.record()  # later work of this stream changes the tensors only after the copies
        return copied

    def write(self, writer: Writer) -> list[WriteResult]:
        """Writes the copies."""
        return writer.write_data(self.plan, self).value()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of this rank's chunk of a tensor: DCP's planner asks for it."""
        return self.copies[index.fqn]

    def _make_plan(self, tensors: dict[str, Tensor], writer: Writer) -> None:
        self.set_up_planner(tensors, is_coordinator=self.rank.is_first)
        plans = self.ranks.gathered(writer.prepare_local_plan(self.create_local_plan()))
        if self.rank.is_first:
            plans, self.metadata = self.create_global_plan(plans)
        self.finish_plan(self.ranks.scattered(plans))
        self.state_dict = {}  # else it would keep these tensors alive
        self.copies = {}
        for item in self.plan.items:
            sizes, dtype = sizes_and_dtype(item)
            pinned = tensors[item.index.fqn].is_cuda
            self.copies[item.index.fqn] = torch.empty(sizes, dtype=dtype, device="cpu", pin_memory=pinned)


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(tensors: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts by their names: the keys on the way, joined by dots."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if not isinstance(value, dict | Tensor):
            raise TypeError(f"{name} is not a tensor but a {type(value).__name__}; give it as part of the state")
        inner = _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
        if not found.keys().isdisjoint(inner):
            raise TypeError(f"two tensors have the name {name}")
        found |= inner
    return found


def _check_fits(wanted: dict[str, Tensor], found: Found) -> None:
    """Raises TrainingError for the first difference in names, shapes and dtypes between tensors and a checkpoint's."""
    saved = found.index["tensors"]
    for name in sorted(wanted.keys() | saved.keys()):
        theirs = f"{saved[name]['dtype']} {saved[name]['size']}" if name in saved else "not in it"
        ours = f"{wanted[name].dtype} {[*wanted[name].shape]}".removeprefix("torch.") if name in wanted else "not"
        if ours != theirs:
            raise TrainingError(
                f"the checkpoint of step {found.step} does not fit this run: {name} is {theirs}, and {ours} in this "
                "run; use the settings and the version of lift-fast that wrote it, or name another --out"
            )


def _steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are in the folder, ascending."""
    names = [_NAME.fullmatch(entry.name) for entry in folder.iterdir()]
    return sorted(int(name[1]) for name in names if name)


def verified(folder: Path, step: int) -> Found:
    """The checkpoint in a folder. Raises OSError and ValueError for anything but a whole one."""
    raw = read_regular(folder / MANIFEST, _LARGEST)
    content = raw[_BEFORE:-_AFTER]
    if _sealed(content) != raw:
        raise ValueError(f"{MANIFEST} is cut short or altered")
    entries = foreign.parse_json(content, values=_LARGEST)
    foreign.check(entries, dict[str, Any])
    if entries.get("format") != FORMAT:
        raise ValueError(f"it has format version {entries.get('format')!r}, and this lift-fast reads {FORMAT}")
    foreign.check(entries, _Manifest)
    if entries["step"] != step:
        raise ValueError(f"it is that of step {entries['step']}")
    files = entries["files"]
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    for name in sorted(present ^ {MANIFEST, *files}):
        raise ValueError(f"{name} does not belong to it" if name in present else f"{name} is missing")
    with ThreadPoolExecutor(_THREADS) as threads:
        for name, digest in zip(files, threads.map(_sha256, [folder / name for name in files]), strict=True):
            if digest != files[name]:
                raise ValueError(f"{name} is cut short or altered")
    return Found(step, folder, entries["state"], {"files": files, "tensors": entries["tensors"]})


def _sealed(content: bytes) -> bytes:
    """checkpoint.json with this content: JSON whose checksum, a 128-bit hash, is that of the bytes of the content."""
    checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
    return f'{{"checksum": "{checksum}", "checkpoint": '.encode() + content + b"}\n"


_AFTER = len(b"}\n")
_BEFORE = len(_sealed(b"")) - _AFTER


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()

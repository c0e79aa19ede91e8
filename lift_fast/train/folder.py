"""The folder of a run: whether a command may begin or go on there, its lock, and its logs cut back to a checkpoint.

started.json      the first file: the settings and fingerprints (identity.py) that a command must have to go on; only
                  conditioning.safetensors comes before it, in a run whose text is conditioned (cache/conditioning.py)
metrics.jsonl     a line for each step, and for each evaluation
spikes.jsonl      a line for each spike of the loss
run.json          the last file: the run is complete (run_folder.py)
.lock             held by the process that trains
"""

import errno
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, Literal, TypedDict

from .. import foreign
from ..cache.conditioning import CONDITIONING, Conditioning
from ..errors import ConfigError, TrainingError
from ..files import for_appending, is_part, open_regular, remove_abandoned, write_whole, written_whole
from ..foreign import Number
from ..text.identity import FEATURES
from .identity import Fingerprints, Mathematics, differences, digest_of

FORMAT = 1  # of started.json
STARTED, METRICS, SPIKES, COMPLETE, LOCK = "started.json", "metrics.jsonl", "spikes.jsonl", "run.json", ".lock"
_SHOWN = 3  # differences in a message
# What a run that ended before it had begun may leave, and parts; those of an older version have no tag.
_BEFORE_START = {LOCK, f"{STARTED}.part", CONDITIONING, f"{CONDITIONING}.part", FEATURES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # of file systems without them
_TRIES = 100
_LONGEST_LINE = 1 << 24  # bytes

State = Literal["new", "begun", "complete"]


class About(TypedDict, total=False):
    """What started.json says for people, and of how the weights are used."""

    config: dict[str, Any]
    vit: dict[str, Any]


class Started(TypedDict):
    """The types of what is used of started.json."""

    format: int
    checksum: str
    mathematics: Mathematics
    fingerprints: Fingerprints
    about: About


class _Line(TypedDict):
    """A line of a log."""

    step: int


class _Metrics(_Line, total=False):
    """A line of metrics.jsonl. Of a step that was skipped the loss may be null."""

    loss: Number | None
    step_ms: Number


@dataclass
class History:
    """What the logs have of the steps before a checkpoint, in order: the loss of a step that was skipped is NaN.
    warnings: lines to print about what they lack."""

    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_started(out: Path, resume: bool) -> dict[str, Any] | None:
    """The content of started.json in the run's folder `out`, None where nothing has begun there. Changes nothing.

    Its "checksum" tells this run from others; each checkpoint may store it.

    resume: whether only a run that has begun will do. Raises ConfigError when it has not, when `out` is something else
    than a folder of a run that this version can go on with, and when started.json is damaged.
    """
    file = out / STARTED
    try:
        begun = file.exists()
        if not begun and (out.is_symlink() or out.exists()):
            if not out.is_dir() or any(name not in _BEFORE_START and not is_part(name) for name in os.listdir(out)):
                raise ConfigError(f"{out} exists already; remove it or name another --out")
        if not begun and resume:
            raise ConfigError(f"there is no run in {out} to go on with; leave out --resume")
        return _read(file) if begun else None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is damaged or cannot be read ({error}); name another --out, or remove {out}"
        ) from error


def open_folder(out: Path, settings: dict[str, Any], resume: bool) -> State:
    """Whether a command with these settings begins a run in `out`, goes on with one, or finds it complete.

    settings: {"mathematics": …, "fingerprints": …} of identity.py. Changes nothing. Raises ConfigError as read_started
    does, and for a run with other settings.
    """
    started = read_started(out, resume)
    if started is None:
        return "new"
    if found := differences(started, settings):
        more = f"; and {len(found) - _SHOWN} more differences" if len(found) > _SHOWN else ""
        raise ConfigError(
            f"{out} holds another run ({'; '.join(found[:_SHOWN])}{more}); name another --out, or remove {out}"
        )
    return "complete" if (out / COMPLETE).exists() else "begun"


def start(
    out: Path, settings: dict[str, Any], about: dict[str, Any], conditioning: Conditioning | None = None
) -> dict[str, Any]:
    """Writes started.json, atomically, and returns its content; no other file of the run may be written before it but
    conditioning.safetensors, so that a run that has begun has it, and features of the held-out sets' texts.

    about: for people to read. conditioning: of the run's text. Raises TrainingError when a file cannot be written.
    """
    entries = json.loads(json.dumps({"format": FORMAT, **settings, "about": about}, default=str))
    entries["checksum"] = digest_of(entries)
    files = {} if conditioning is None else {out / CONDITIONING: conditioning.to_bytes()}
    files[out / STARTED] = (json.dumps(entries, indent=1) + "\n").encode()
    with writing(out):
        write_whole(files)
    return entries


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes a TrainingError of what the file system raises within it: a full disk, a folder that is gone."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write the run to {out}: {error}") from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within it no other process can lock the run's folder `out`, which is made if need be.

    A folder that is still empty at the end is removed, with the parents that were made. The lock is POSIX's
    (fcntl.lockf): the system drops it when the process dies, however it dies, and processes forked by it do not hold it
    (with flock they would, and a restart would find the folder locked). Where there are no such locks, on Windows and
    on some file systems, two processes are not kept apart. The parts that killed processes left in it are removed.

    Raises ConfigError when another process has the lock, TrainingError when the folder cannot be written to.
    """
    made: list[Path] = []
    try:
        file = _make_and_lock(out, made)
    except BaseException as error:
        _remove_empty(made)
        if isinstance(error, OSError):
            raise TrainingError(f"cannot write the run to {out}: {error}") from error
        raise
    try:
        remove_abandoned(out)
        yield
    finally:
        with suppress(OSError):
            (out / LOCK).unlink()  # while it is locked, so that no other process can have locked it
        if file is not None:
            file.close()
        _remove_empty(made)


def rewind(out: Path, step: int) -> History:
    """Cuts metrics.jsonl and spikes.jsonl in `out` back to the steps before `step`, the number of steps that are done.

    A line that a killed process left unfinished is dropped. A run can go on without its logs, so missing steps are a
    warning. A file is written anew, a line at a time, and renamed. Raises TrainingError when it cannot be.
    """
    history = History()

    def note(record: dict[str, Any]) -> None:
        if {"loss", "step_ms"} <= record.keys():  # else it is an evaluation
            spike = record["loss"] is None or record.get("skipped_step", False)
            history.losses.append(math.nan if spike else float(record["loss"]))
            history.step_ms.append(float(record["step_ms"]))

    with writing(out):
        _cut(out / METRICS, step, note, _Metrics)
        _cut(out / SPIKES, step, lambda record: None, _Line)  # where a loss is text, since it may be infinite
    if missing := max(0, step - len(history.losses)):
        history.warnings.append(
            f"{out / METRICS} lacks {missing} of the {step} steps before the checkpoint, and so will run.json; the "
            "weights are not affected"
        )
    return history


def _read(file: Path) -> dict[str, Any]:
    """The content of started.json. Raises OSError, ValueError for a damaged one, ConfigError for another version."""
    entries = foreign.read_json(file)
    foreign.check(entries, dict[str, Any])
    if entries.get("checksum") != digest_of(_but(entries, "checksum")):
        raise ValueError("its checksum is wrong")
    if entries.get("format") != FORMAT:
        raise ConfigError(
            f"{file} has format version {foreign.shown(entries.get('format'))} and this lift-fast goes on with "
            f"{FORMAT}; use the version that wrote it, or name another --out"
        )
    foreign.check(entries, Started)
    return entries


def _but(entries: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key != name}


def _make_and_lock(out: Path, made: list[Path]) -> FileIO | None:
    """Makes the folder and locks it: the locked file, None without locks. made: gets the folders that were made."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # the last holder is just removing the lock or the folder
            for path in (*reversed(out.parents), out):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    made.append(path)
            return _lock(out / LOCK)
    raise OSError(errno.ENOENT, "the folder is removed again and again", str(out))


def _lock(path: Path) -> FileIO | None:
    """Opens and locks a file. Raises OSError, FileNotFoundError where it has been removed meanwhile, ConfigError."""
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, "a+b", buffering=0, opener=for_appending)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "removed while it was being locked", str(path))
        with suppress(OSError):  # on a full disk the lock says nothing of its holder
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    except BaseException as error:
        holder = _holder(file)
        file.close()
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"another process{holder} is training into {path.parent}; wait for it or name another --out"
            ) from error
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            return None
        raise
    return file


def _holder(file: FileIO) -> str:
    """What a lock file says of its holder: " (pid 7 on host a)", "" where it says nothing."""
    try:
        file.seek(0)
        entries = foreign.parse_json(file.read(1000))
        return f" (pid {entries['pid']} on host {entries['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def _cut(path: Path, step: int, note: Callable[[dict[str, Any]], None], of: type) -> None:
    """Leaves the lines of a file of JSON lines whose "step" is below `step`, and calls note(record) for each. of: the
    TypedDict that a line without damage is."""
    if not os.path.lexists(path):
        return
    with BufferedReader(open_regular(path)) as lines, written_whole(path) as kept:
        while line := lines.readline(_LONGEST_LINE):
            record = _record(line, of)
            if record is not None and record["step"] < step:
                note(record)
                kept.write(line)


def _record(line: bytes, of: type) -> dict[str, Any] | None:
    """The object of a line, None for one that is unfinished or damaged."""
    try:
        record = foreign.parse_json(line)
        foreign.check(record, of)
    except ValueError:
        return None
    return record if line.endswith(b"\n") else None

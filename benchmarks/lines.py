"""Results as they come: one JSON object a line, written whole and flushed, by any number of processes into one file.

LIFT_FAST_LINES names the file; without it nothing is written. LIFT_FAST_COMMON holds what every line of a process
has beside its own, as JSON: {"phase", "device", "commit", ...}. A process that is killed loses the case in flight and
no more: a line is one write to a file that is opened to append, and is on the disk before the next case begins.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE, COMMON = "LIFT_FAST_LINES", "LIFT_FAST_COMMON"


def write(line: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """What is None is left out, but for a setting's "value". "at" is when, in seconds since 1970."""
    if not (file := environment.get(FILE)):
        return
    whole = {**json.loads(environment.get(COMMON, "{}")), **line, "at": round(time.time(), 1)}
    said = {key: _plain(value) for key, value in whole.items() if value is not None or key == "value"}
    text = json.dumps(said, default=str)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def phase(otherwise: str) -> str:
    """The phase that this process is part of."""
    return json.loads(os.environ.get(COMMON, "{}")).get("phase", otherwise)


def environment(file: Path, **common: Any) -> dict[str, str]:
    """What a process must have in its environment to write to `file`."""
    return {FILE: str(file), COMMON: json.dumps(common)}


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file. Raises ValueError for one that is no JSON object."""
    for number, text in enumerate(file.read_text().splitlines(), 1):
        line = json.loads(text)
        if not isinstance(line, dict):
            raise ValueError(f"{file}, line {number} is no JSON object")
        yield line

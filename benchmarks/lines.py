"""Writes each result at once, as one JSON object per line; several processes may write to the same file.

LIFT_FAST_LINES names the file; without it nothing is written. LIFT_FAST_COMMON is a JSON object with the fields that
all lines of a process share: {"phase", "device", "commit", ...}. A process that is killed loses only the case in
flight: each line is a single write to a file opened for appending, and is on the disk before the next case begins.
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
    """Writes one line and adds "at", the time in seconds since 1970. Leaves out None, except a setting's "value"."""
    if not (file := environment.get(FILE)):
        return
    whole = {**json.loads(environment.get(COMMON, "{}")), **line, "at": round(time.time(), 1)}
    fields = {key: _plain(value) for key, value in whole.items() if value is not None or key == "value"}
    text = json.dumps(fields, default=str)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """The value, or its text for NaN and infinity, which JSON does not have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def phase(default: str) -> str:
    """The phase that LIFT_FAST_COMMON names for this process."""
    return json.loads(os.environ.get(COMMON, "{}")).get("phase", default)


def environment(file: Path, **common: Any) -> dict[str, str]:
    """The environment variables that make a process write to `file`; common: fields that its lines share."""
    return {FILE: str(file), COMMON: json.dumps(common)}


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file. Raises ValueError for a line that is not a JSON object."""
    for number, text in enumerate(file.read_text().splitlines(), 1):
        line = json.loads(text)
        if not isinstance(line, dict):
            raise ValueError(f"{file}, line {number} is not a JSON object")
        yield line

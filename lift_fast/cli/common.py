"""What the commands share: JSON files, checks of options, words for counts."""

import json
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, DataError
from ..files import write_whole

CodecName = Literal["f32", "bf16", "int8", "int8r", "fp8", "int4r", "int2r"]  # codecs.py has them, behind torch


def write_json(path: Path, content: Any) -> None:
    """Writes all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: json.dumps(content, indent=1, default=str).encode()})


def read_json(path: Path, made_by: str) -> Any:
    """A JSON file one of our commands wrote. Raises DataError."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"no {path}; make it with: {made_by}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); make it again with: {made_by}") from error


def _printable(text: str) -> str:
    """Names of files may hold what a terminal takes for commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")


def _many(count: int, noun: str) -> str:
    """1, "shard" -> "1 shard"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _counts(counts: dict[str, int]) -> str:
    """{"empty": 1, "corrupt": 2} -> "1 empty, 2 corrupt"."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _tell_size(folder: Path, told: dict[str, Any]) -> None:
    """What a command that wrote a cache says last."""
    print(f"{told['rows']} rows of {told['dim']}, {told['codec']}, {told['bytes'] / 1e6:.1f} MB, in {folder}")

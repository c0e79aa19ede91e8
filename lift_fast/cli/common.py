"""What the commands share: JSON files, the check of --threads, counts in words, warnings about data sets."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import foreign
from ..errors import ConfigError, DataError
from ..files import remove_abandoned, write_whole
from ..printable import printable

if TYPE_CHECKING:
    from ..data.samples import Problem

_NOUNS = ("unused file", "damaged shard", "repeated key")  # causes that have a plural
_MOST_PROBLEMS = 5  # that are printed

# The keys of ops.rows.codecs.CODECS, repeated because that module imports torch.
CodecName = Literal["f32", "bf16", "int8", "int8r", "fp8", "int4r", "int2r"]


def write_json(path: Path, content: Any) -> None:
    """Writes the whole file or nothing, as files.write_whole; makes its folder where there is none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    write_whole({path: json.dumps(content, indent=1, default=str).encode()})


def read_json(path: Path, made_by: str) -> Any:
    """Reads a JSON file that another command wrote; `made_by` is that command. Raises DataError."""
    try:
        return foreign.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}; make it with: {made_by}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}); make it again with: {made_by}") from error


def check_threads(threads: int | None) -> None:
    """Raises ConfigError for a number of threads below 1. None stands for the default."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")


class _Record(logging.LogRecord):
    """What a library logs, such as transformers of a configuration: as printable text."""

    def getMessage(self) -> str:  # noqa: N802
        return printable(super().getMessage(), lines=True)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Within it a warning of this package is printed as a line of its command, without Python's line of source; and
    what is not printable in warnings, and in what libraries log, is escaped."""
    usual, package = warnings.formatwarning, str(Path(__file__).parents[1])
    records = logging.getLogRecordFactory()

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and filename.startswith(package):
            return f"lift-fast: warning: {printable(str(message))}\n"
        return printable(usual(message, category, filename, lineno, line), lines=True)

    warnings.formatwarning = formatted
    logging.setLogRecordFactory(_Record)
    try:
        yield
    finally:
        warnings.formatwarning = usual
        logging.setLogRecordFactory(records)


def counted(count: int, noun: str) -> str:
    """1, "shard" -> "1 shard"; 2, "shard" -> "2 shards"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(counts: dict[str, int]) -> str:
    """{"empty": 1, "corrupt": 2, "unused file": 2} -> "1 empty, 2 corrupt, 2 unused files"; {} -> "none"."""
    words = (counted(count, name) if name in _NOUNS else f"{count} {name}" for name, count in counts.items())
    return ", ".join(words) or "none"


def print_problems(problems: "Sequence[Problem]") -> None:
    """Prints, on stderr, what opening data sets found that belongs to no sample: damaged shards, unused files."""
    for problem in problems[:_MOST_PROBLEMS]:
        what = problem.cause if problem.count == 1 else counted(problem.count, problem.cause)
        warn(f"{problem.where}: {what} ({problem.reason})")
    if len(problems) > _MOST_PROBLEMS:
        warn(f"{len(problems) - _MOST_PROBLEMS} more; data check lists all")


def print_size(folder: Path, info: dict[str, Any]) -> None:
    """Prints the size of a cache that a command wrote; info: of cache.tools.info."""
    say(f"{info['rows']} rows of {info['dim']}, {info['codec']}, {info['bytes'] / 1e6:.1f} MB, in {folder}")


def print_conditioning(report: dict[str, Any]) -> None:
    """Prints what a conditioning changes; report: of Conditioning.report."""
    cosine, rank, dim = report["mean_cosine"], report["effective_rank"], report["dim"]
    rows = report["rows"] or []
    fitted = f", fitted to {' + '.join(map(str, rows))} captions" if rows else ""
    say(f"conditioned with power {report['power']:g}{fitted}, before -> after:")
    if cosine:
        say(f"  mean cosine between captions  {cosine['before']:.4f} -> {cosine['after']:.4f}")
    say(f"  effective rank  {rank['before']:.1f} -> {rank['after']:.1f}")
    say(f"  dim  {dim['before']} -> {dim['after']}, which keeps {100 * report['variance_kept']:.2f} % of the variance")


def say(*lines: str, error: bool = False) -> None:
    """Prints lines: all that a command prints goes through here. What is not printable in them is escaped, and so is
    what the terminal's encoding does not have. error: to stderr."""
    stream = sys.stderr if error else sys.stdout
    text = "\n".join(map(printable, lines))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    say(f"lift-fast: warning: {text}", error=True)

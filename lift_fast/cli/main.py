"""The entry point: parses the command line and runs the command that it names.

Exit statuses: 0 for success; 1 where `data check` or `classify` met bad images; 2 for wrong arguments or bad input,
with one message on stderr; 75 where a signal stopped a run, with which the same command goes on; 130 after Ctrl-C; 141
where the reader of the output has gone, as `head` does.

Commands import torch, and the parts that need it, when they run, so that `lift-fast --help` answers at once.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from .. import __version__, progress
from ..errors import ConfigError, LiftFastError, Stopped
from .cache import CacheTools
from .common import plain_messages, say
from .data import DataTools
from .demo import Demo
from .embed import Embed
from .evaluate import NAMED_SETS, Compare, Eval, Report
from .export import Export
from .gallery import Gallery
from .interrupt import INTERRUPTED, after_imports, say_interrupted
from .inverse import Inverse
from .threads import wait_briefly
from .train import Train
from .use import Classify, EmbedImages, Search

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again

Command = (
    Annotated[DataTools, tyro.conf.subcommand("data")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[CacheTools, tyro.conf.subcommand("cache")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Inverse, tyro.conf.subcommand("inverse")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Classify, tyro.conf.subcommand("classify")]
    | Annotated[EmbedImages, tyro.conf.subcommand("embed-images")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Gallery, tyro.conf.subcommand("gallery")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


@dataclass(frozen=True)
class Line:
    """A whole command line: the command, and the options that all commands take."""

    command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Command]]
    quiet: tyro.conf.CascadeSubcommandArgs[bool] = False
    """Show no progress."""
    log_every: tyro.conf.CascadeSubcommandArgs[float] = 30.0
    """Seconds between lines of progress, where stderr is no terminal."""

    def __post_init__(self) -> None:
        if not self.log_every > 0:
            raise ConfigError(f"log_every must be above 0 seconds, not {self.log_every}")


def parse(args: list[str] | None = None) -> Command:
    """Returns the command that the arguments describe. args: sys.argv[1:] where None. Raises as parse_line does."""
    return parse_line(args).command


def parse_line(args: list[str] | None = None) -> Line:
    """Returns the command and the options of all commands.

    Raises ConfigError for a setting out of range, SystemExit for arguments that do not parse.
    """
    return tyro.cli(
        Line,
        prog="lift-fast",
        description="Contrastive image training against text embedded once (LIFT, arXiv 2506.04209). "
        "--version prints the version; --tyro-print-completion bash (or zsh, tcsh) a script that completes options.",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=NAMED_SETS,
    )


def main(args: list[str] | None = None) -> None:
    """Runs `lift-fast`. args: sys.argv[1:] where None. Raises SystemExit unless the command succeeds."""
    wait_briefly()
    line: Line | None = None
    try:
        with after_imports(), plain_messages():
            try:
                if (sys.argv[1:] if args is None else args) == ["--version"]:
                    say(f"lift-fast {__version__}")
                    return
                line = parse_line(args)
                progress.configure(quiet=line.quiet, every=line.log_every)
                line.command()
                return
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt:
        say_interrupted(left_by(line.command) if line else "")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it exits
        sys.exit(141)
    except Stopped as stopped:
        if not stopped.reported:
            say(*f"lift-fast: {stopped}".split("\n"), error=True)
        sys.exit(STOPPED)
    except LiftFastError as error:
        if error.reported:
            sys.exit(2)
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    say(*f"lift-fast: error: {message}".split("\n"), error=True)
    sys.exit(2)


def left_by(command: Command) -> str:
    """What an interrupted command leaves, and how to go on: its method `interrupted` says it; "" where it has none."""
    command = getattr(command, "command", command)  # that of a group, such as data stats
    left = getattr(command, "interrupted", None)
    return left() if left else ""

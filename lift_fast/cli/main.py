"""The command line: lift-fast data | embed | cache | train | eval | compare | report | demo.

A command that cannot go on prints one message and leaves with exit status 2.
"""

import sys
from typing import Annotated

import tyro

from ..errors import LiftFastError
from .cache import CacheTools
from .data import DataTools
from .demo import Demo
from .embed import Embed
from .evaluate import Compare, Eval, Report
from .train import Train

# Imports of torch and the rooms that need it stand inside the commands: `lift-fast --help` answers at once.

Command = (
    Annotated[DataTools, tyro.conf.subcommand("data")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[CacheTools, tyro.conf.subcommand("cache")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def parse(args: list[str] | None = None) -> Command:
    """Arguments, the process's own without any, -> the command they name. Raises ConfigError, SystemExit."""
    return tyro.cli(
        Command,
        prog="lift-fast",
        description="Contrastive image training against text embedded once (LIFT, arXiv 2506.04209).",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of `lift-fast`."""
    try:
        parse(args)()
    except LiftFastError as error:
        sys.exit(_told(str(error)))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_told(f"{error.strerror or error}{where}"))


def _told(message: str) -> int:
    print(f"lift-fast: error: {message}", file=sys.stderr)
    return 2

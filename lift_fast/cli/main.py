"""The entry point: parses the command line and runs the command that it names.

Exit statuses: 0 for success; 1 where `lift-fast data check` found bad samples; 2 for wrong arguments or bad input,
with one message on stderr.

Commands import torch, and the rooms that need it, when they run, so that `lift-fast --help` answers at once.
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
    """Returns the command that the arguments describe. args: sys.argv[1:] where None.

    Raises ConfigError for a setting out of range, SystemExit for arguments that do not parse.
    """
    return tyro.cli(
        Command,
        prog="lift-fast",
        description="Contrastive image training against text embedded once (LIFT, arXiv 2506.04209).",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(args: list[str] | None = None) -> None:
    """Runs `lift-fast`. args: sys.argv[1:] where None. Raises SystemExit unless the command succeeds."""
    try:
        parse(args)()
        return
    except LiftFastError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    print(f"lift-fast: error: {message}", file=sys.stderr)
    sys.exit(2)

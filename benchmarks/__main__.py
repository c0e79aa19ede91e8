"""python -m benchmarks NAME [--quick] --json FILE: runs the suite of bench_NAME.py and writes its results.

--part runs only one of the module's PARTS. --lines FILE appends each row, target and note as soon as it is known (see
lines.py). `python -m benchmarks plot FILE… --out PLOT.svg` draws such results; `python -m benchmarks tune` updates the
tables of settings (see tune.py).

Exit status 2: the run is impossible, with the reason on stderr; 3: a package that the suite needs is not installed.
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

from lift_fast.errors import ConfigError, LiftFastError

from . import lines, plot, tune
from .harness import Suite
from .start import begin

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
MISSING_PACKAGE = 3  # exit status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in NAMES:
        suite = names.add_parser(name)
        suite.add_argument("--quick", action="store_true", help="fewer repeats and smaller shapes")
        suite.add_argument("--json", type=Path, help="write machine, versions, rows, targets and notes to this file")
        suite.add_argument("--part", help="measure only this part of the suite")
        suite.add_argument("--lines", type=Path, help="append each result to this file as a line of JSON")
        suite.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        suite.add_argument("--seconds", type=float, help="start no further case after this time")
    plot.add_parser(names)
    tune.add_parser(names)
    arguments = parser.parse_args()
    try:
        if arguments.name == "plot":
            plot.draw(arguments.results, arguments.out)
        elif arguments.name == "tune":
            tune.run(arguments)
        else:
            _run(arguments)
    except LiftFastError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("lift_fast", "benchmarks"):
            raise
        print(f"{arguments.name} needs {error.name}, which is not installed", file=sys.stderr)
        sys.exit(MISSING_PACKAGE)


def _run(arguments: argparse.Namespace) -> None:
    begin()
    if arguments.lines:
        os.environ[lines.FILE] = str(arguments.lines.resolve())
    torch.set_num_threads(arguments.threads)
    module = importlib.import_module(f"benchmarks.bench_{arguments.name}")
    parts = getattr(module, "PARTS", {})
    if arguments.part and arguments.part not in parts:
        raise ConfigError(f"{arguments.name} has no part {arguments.part!r}; it has {', '.join(parts) or 'none'}")
    run = parts[arguments.part] if arguments.part else module.run
    suite = Suite(arguments.name, arguments.quick, arguments.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        run(suite)
    finally:  # also keeps what was measured before a case failed or the run was stopped
        suite.print()
        suite.write(arguments.json)


if __name__ == "__main__":
    main()

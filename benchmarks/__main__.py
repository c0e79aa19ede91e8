"""python -m benchmarks NAME [--quick] --json FILE: calls run(suite) of bench_NAME.py, which lies beside this."""

import argparse
import importlib
import os
from pathlib import Path

import torch

from .harness import Suite

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller shapes")
    parser.add_argument("--json", type=Path, help="where machine, versions, rows and bars are written")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    suite = Suite(arguments.name, arguments.quick)
    importlib.import_module(f"benchmarks.bench_{arguments.name}").run(suite)
    suite.print()
    suite.write(arguments.json)


if __name__ == "__main__":
    main()

"""python -m benchmarks.gpu --out DIR: builds, tests and measures on the GPU of this machine; `make gpu` runs it.

It needs nvcc and a Python with torch (built with CUDA), triton, numpy, pybind11, setuptools, pip and pytest; it needs
no network. The package is installed into that Python from this source tree. A run takes nine minutes (lease/plan.py):
ceilings of the device, a smoke test of every kernel, the tests marked `gpu`, every op against its peers, sweeps of
settings, and a profile by ncu if that is installed. DIR gets results.jsonl, one line per result, written at once, and
log.txt. The exit status is 1 if anything failed, and 2 without a GPU.

Two folders are optional: .peers/ has wheels of the peers (`python -m benchmarks.peers .peers`), and .prebuilt/ has an
extension built for this Python, which is used if the build fails. --rehearse runs all of it without a GPU
(rehearsal.py).
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .lease import plan, report
from .lease.phases import Lease
from .start import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=plan.TOTAL_S, help="time limit of the whole run")
    parser.add_argument("--commit", help="identifies the sources; default: from git")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / ".prebuilt", metavar="DIR", help="has a built _C*.so")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", metavar="DIR", help="has the peers' wheels")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: kernels are compiled, not executed")
    parser.add_argument("--short", action="store_true", help="only a few tests and cases")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    machine = describe_machine(arguments.rehearse)
    if machine is None:
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (out / name).unlink(missing_ok=True)
    print(f"plan: {_plan_in_words(plan.seconds(arguments.seconds))} on {plan.CORES} cores")
    lease = Lease(
        out,
        machine,
        commit=arguments.commit or commit(),
        seconds=arguments.seconds,
        rehearse=arguments.rehearse,
        short=arguments.short,
        prebuilt=arguments.prebuilt.resolve(),
        wheels=arguments.peers.resolve(),
    )
    try:
        lease.run()
    finally:
        print(report.text(lease.file), flush=True)
    return int(report.any_failed(list(report.lines.read(lease.file))))


def describe_machine(rehearse: bool) -> dict[str, Any] | None:
    """Returns what lease/machine.py reports, or None after printing why there is no GPU.

    machine.py runs in a process of its own, because this process never touches the GPU.
    """
    environment = {**os.environ, **({"LIFT_FAST_REHEARSE": "1"} if rehearse else {})}
    command = [sys.executable, "-m", "benchmarks.lease.machine"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    printed = done.stdout.strip().splitlines()
    if done.returncode or not printed:
        print(printed[-1] if printed else done.stderr, file=sys.stderr)
        return None
    return dict(json.loads(printed[-1]))


def commit() -> str:
    """The commit by `git describe`, with "-dirty" if files differ from it; without git, a hash of the sources."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for folder in ("csrc", "kernels", "lift_fast", "benchmarks"):
            for file in sorted((ROOT / folder).rglob("*.[cphj]*")):
                if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".json"):
                    digest.update(file.read_bytes())
        return f"sources {digest.hexdigest()[:12]}"


def _plan_in_words(seconds: dict[str, float]) -> str:
    each = ", ".join(f"{name} {part:.0f}" for name, part in seconds.items())
    return f"{sum(seconds.values()):.0f} s ({each})"


if __name__ == "__main__":
    sys.exit(main())

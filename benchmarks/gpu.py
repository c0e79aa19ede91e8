"""python -m benchmarks.gpu --out DIR: builds, checks and measures on the GPU of this machine; `make gpu` runs it.

It needs torch with CUDA, triton, nvcc, numpy, pybind11, setuptools, pip and pytest in this Python, and no network; the
package is installed in this Python from its tree. In nine minutes (lease/plan.py): ceilings, a smoke of every kernel,
the tests marked `gpu`, every op against its peers, sweeps of settings, and ncu where it is installed. DIR gets
results.jsonl, a line a result as it comes, and log.txt. Exit status 1 when anything was wrong, 2 where there is no GPU.

What can be brought along: wheels of peers in .peers/ (`python -m benchmarks.peers .peers`), and an extension for this
Python in .prebuilt/, taken when the build fails. --rehearse: the same on a machine without a GPU, see rehearsal.py.
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
    parser.add_argument("--seconds", type=float, default=plan.TOTAL_S, help="for all of it")
    parser.add_argument("--commit", help="what is measured; the default asks git")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / ".prebuilt", metavar="DIR", help="has a built _C*.so")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", metavar="DIR", help="has their wheels")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: kernels are compiled, not executed")
    parser.add_argument("--short", action="store_true", help="a handful of the tests and of the cases")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    machine = look(arguments.rehearse)
    if machine is None:
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (out / name).unlink(missing_ok=True)
    print(f"plan: {_in_words(plan.seconds(arguments.seconds))} on {plan.CORES} cores")
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
    return int(report.wrong(list(report.lines.read(lease.file))))


def look(rehearse: bool) -> dict[str, Any] | None:
    """What machine.py says, in a process of its own: this one never touches the GPU. None without one, and said so."""
    environment = {**os.environ, **({"LIFT_FAST_REHEARSE": "1"} if rehearse else {})}
    command = [sys.executable, "-m", "benchmarks.lease.machine"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        print(said[-1] if said else done.stderr, file=sys.stderr)
        return None
    return dict(json.loads(said[-1]))


def commit() -> str:
    """git's, "-dirty" where files differ from it; where there is no git, a hash of the sources."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        whole = hashlib.sha256()
        for folder in ("csrc", "kernels", "lift_fast", "benchmarks"):
            for file in sorted((ROOT / folder).rglob("*.[cphj]*")):
                if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".json"):
                    whole.update(file.read_bytes())
        return f"sources {whole.hexdigest()[:12]}"


def _in_words(seconds: dict[str, float]) -> str:
    each = ", ".join(f"{name} {part:.0f}" for name, part in seconds.items())
    return f"{sum(seconds.values()):.0f} s ({each})"


if __name__ == "__main__":
    sys.exit(main())

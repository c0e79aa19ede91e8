"""python -m benchmarks.peers DIR: fetches the wheels of peers that a machine without a network can be given.

For Python 3.12 on x86-64 Linux, each by itself: what else they need, torch, triton and numpy first, is there already.
`make gpu` installs what lies in .peers/ into a folder that only the benchmarks see.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = ("siglip-kernel", "inf-cl", "memeff", "liger-kernel", "xformers", "open_clip_torch", "ftfy", "wcwidth")
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)) + ("manylinux2014_x86_64",)


def fetch_command(folder: Path, names: Sequence[str] = PEERS) -> list[str]:
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    return [*_pip("download"), *options, "--dest", str(folder), *names]


def install_command(folder: Path, site: Path) -> list[str] | None:
    """Of the wheels in a folder, into another that is put on PYTHONPATH; None where there are none."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    options = ["--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    return [*_pip("install"), *options, *wheels] if wheels else None


def _pip(verb: str) -> list[str]:
    return [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check"]


def main(folder: Path) -> int:
    """One pip for each: one that is not to be had leaves the others."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PEERS if subprocess.run(fetch_command(folder, [name])).returncode]
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    if missing:
        print(f"not fetched: {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.peers DIR")
    sys.exit(main(Path(sys.argv[1])))

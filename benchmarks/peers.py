"""python -m benchmarks.peers DIR: downloads the peers' wheels, for a GPU machine that has no network.

The wheels are for Python 3.12 on x86-64 Linux, and come without their dependencies: the GPU machine must have those
(torch, triton, numpy). `make gpu` installs the wheels in .peers/ into a folder that only the benchmarks import from.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = ("siglip-kernel", "inf-cl", "memeff", "liger-kernel", "xformers", "open_clip_torch", "ftfy", "wcwidth")
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)) + ("manylinux2014_x86_64",)


def fetch_command(folder: Path, names: Sequence[str] = PEERS) -> list[str]:
    """The command that downloads the wheels of `names` to a folder."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    return [*_pip("download"), *options, "--dest", str(folder), *names]


def install_command(folder: Path, site: Path) -> list[str] | None:
    """The command that installs a folder's wheels into `site`, to be put on PYTHONPATH; None without wheels."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    options = ["--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    return [*_pip("install"), *options, *wheels] if wheels else None


def _pip(verb: str) -> list[str]:
    return [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check"]


def main(folder: Path) -> int:
    """Downloads each wheel by a pip of its own, so that one that is not available does not stop the rest."""
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

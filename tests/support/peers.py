"""Runs a piece of Python with open_clip, timm and clip_benchmark, as `make` installs them in .venv/peers.

torchvision's wheel does not load its compiled operators with every build of torch (a CPU build, for one), and then does
not import, though its transforms need none of them: PRELUDE leaves out its rules for operators that do not exist. All
of it happens in a process of its own, so that transformers finds no torchvision in the tests' process.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(sys.prefix) / "peers"
ROOT = Path(__file__).parents[2]

PRELUDE = f"""
import sys
sys.path.append({str(PEERS)!r})
import torch

register_fake = torch.library.register_fake

def register_fake_if_there(op, func=None, /, **options):
    def register(function):
        try:
            return register_fake(op, function, **options)
        except RuntimeError as error:
            if "does not exist" not in str(error) or not op.startswith("torchvision::"):
                raise
            return function
    return register if func is None else register(func)

torch.library.register_fake = register_fake_if_there
import timm, open_clip
torch.library.register_fake = register_fake
torch.set_num_threads(2)
"""


def run(code: str, *arguments: object, ours: bool = False, cwd: Path | None = None) -> str:
    """Runs code after PRELUDE, with the arguments in sys.argv[1:] and no network; returns its stdout.

    Asserts that it succeeds, and unless `ours` that it did not import lift_fast. Skips the test when open_clip or timm
    is not installed.
    """
    for name in ("open_clip", "timm"):
        if not (PEERS / name).is_dir() and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed, neither in {PEERS.name}/ of this environment nor in itself")
    end = "" if ours else "\nassert not [name for name in sys.modules if name.startswith('lift_fast')]\n"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code + end, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

"""How OpenMP's threads wait under `lift-fast`: what libgomp itself says that it has read."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lift_fast.cli.threads import SPINS, wait_briefly

LIBRARY = next((Path(find_spec("torch").origin).parent / "lib").glob("libgomp*.so*"), None)
LOAD = f"from lift_fast.cli.threads import wait_briefly; wait_briefly(); import ctypes; ctypes.CDLL({str(LIBRARY)!r})"
COMMAND = "from lift_fast.cli import main; main()"

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="this torch brings no libgomp")


@pytest.fixture
def environment(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def read_by_libgomp(code: str, *arguments: str) -> list[str]:
    """GOMP_SPINCOUNT as libgomp prints it when a process loads it."""
    variables = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=variables)
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)


def test_a_command_sets_it_before_torch_is_loaded(environment, tmp_path):
    """The command imports torch, and then fails because there is no such run."""
    command = ("eval", "--run", str(tmp_path / "none"), "--data", str(tmp_path))
    assert set(read_by_libgomp(COMMAND, *command)) == {str(SPINS)}


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, str(SPINS)),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "1"}, str(SPINS)),
    ],
)
def test_a_users_setting_wins(environment, own, expected):
    for name, value in own.items():
        environment.setenv(name, value)
    assert read_by_libgomp(LOAD) == [expected]


def test_nothing_else_is_set(environment):
    before = dict(os.environ)
    wait_briefly()
    assert os.environ.pop("GOMP_SPINCOUNT") == str(SPINS) and dict(os.environ) == before

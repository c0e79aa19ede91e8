"""Runs a script in a process of its own, in which packages cannot be imported."""

import subprocess
import sys
from collections.abc import Sequence

_BLOCKED = """
import sys
blocked = {blocked!r}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Finder())
"""


def run_without(blocked: Sequence[str], script: str, *args: str) -> str:
    """What the script prints. Fails when it fails, or when a blocked package could be imported after all."""
    check = "".join(f"\ntry:\n    import {name}\nexcept ImportError:\n    pass\nelse:\n    1 / 0\n" for name in blocked)
    command = [sys.executable, "-c", _BLOCKED.format(blocked=list(blocked)) + check + script, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return done.stdout

"""Prepares a process that measures: finds the kernels, and starts a rehearsal if the environment asks for one.

LIFT_FAST_REHEARSE=1: a machine without a GPU simulates one (rehearsal.py); kernels are compiled and launched, and
compute nothing. LIFT_FAST_SHORT=1: shapes are small as well.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parent.parent


def rehearsing() -> bool:
    return os.environ.get("LIFT_FAST_REHEARSE") == "1"


def small(full: T, tiny: T) -> T:
    """Returns `tiny` in a short rehearsal, and `full` otherwise."""
    return tiny if os.environ.get("LIFT_FAST_SHORT") == "1" else full


def begin() -> None:
    find_kernels()
    if rehearsing():
        from benchmarks import rehearsal

        rehearsal.install()


def find_kernels() -> None:
    """Makes the tree's kernels/ importable as lift_fast.kernels, even before anything is installed."""
    if importlib.util.find_spec("lift_fast.kernels"):
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "lift_fast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

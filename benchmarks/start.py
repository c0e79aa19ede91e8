"""The first thing in every process that measures: where our kernels are, and whether this is a rehearsal.

LIFT_FAST_REHEARSE=1: on a machine without a GPU the process is to believe that it has one (rehearsal.py); kernels are
compiled and launched, and do nothing. LIFT_FAST_SHORT=1: shapes are small, too.
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
    """tiny in a short rehearsal."""
    return tiny if os.environ.get("LIFT_FAST_SHORT") == "1" else full


def begin() -> None:
    find_kernels()
    if rehearsing():
        from benchmarks import rehearsal

        rehearsal.install()


def find_kernels() -> None:
    """lift_fast.kernels, which is kernels/ in the tree, also where nothing is installed yet."""
    if importlib.util.find_spec("lift_fast.kernels"):
        return
    folder = ROOT / "kernels"
    places = [str(folder)]
    spec = importlib.util.spec_from_file_location(
        "lift_fast.kernels", folder / "__init__.py", submodule_search_locations=places
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

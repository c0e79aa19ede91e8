"""Modules that have moved can still be imported by their former paths."""

import importlib
import sys

import pytest

from lift_fast.former_paths import MOVED


@pytest.mark.parametrize("former", MOVED)
def test_a_former_path_gives_the_module_and_warns(former):
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=f"{former} has moved to {MOVED[former]}"):
        module = importlib.import_module(former)
    assert module is importlib.import_module(MOVED[former]) and module.__spec__.name == MOVED[former]


def test_an_unknown_module_is_still_unknown():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lift_fast.ops.nothing")

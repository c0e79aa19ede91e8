"""Errors pass from process to process: a DataLoader's workers, a pool's and ranks pickle them."""

import copy
import importlib
import pickle
import pkgutil

import lift_fast
from lift_fast.data.samples import BadSample, BadText, SeveralCaptions
from lift_fast.errors import LiftFastError
from lift_fast.text.encoder import NoTokens

MADE_OF_MORE = [
    BadSample("corrupt", "a.png does not decode"),
    BadText("not UTF-8", "a.txt is not UTF-8"),
    SeveralCaptions("a.json has two captions", ["one", "two"]),
    NoTokens([2, 5], "captions 2 and 5 have no tokens"),
]


def kinds():
    for module in pkgutil.walk_packages(lift_fast.__path__, "lift_fast."):
        if not module.name.startswith(("lift_fast.kernels", "lift_fast.ops")):
            importlib.import_module(module.name)
    left, found = [BadSample, LiftFastError], set()
    while left:
        found.add(kind := left.pop())
        left += kind.__subclasses__()
    return {kind for kind in found if kind.__module__.startswith("lift_fast.")}


def test_every_error_can_be_pickled():
    errors = [kind("what is wrong") for kind in kinds() - {type(error) for error in MADE_OF_MORE}]
    assert len(errors) >= 10
    for error in errors + MADE_OF_MORE:
        error.reported = True
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)

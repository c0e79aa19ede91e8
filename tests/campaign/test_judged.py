"""That the judge of the campaign condemns what it must, and that its table counts."""

import os
import signal
import time

import pytest
from support import complete  # noqa: F401
from support.judged import judged, judged_command
from support.tally import BARS, Table

from lift_fast.errors import DataError


def raise_error(error):
    raise error


def test_right_answers_and_typed_errors():
    assert judged(lambda: [1, 2]) == ("right answer", [1, 2], "")
    error = judged(lambda: raise_error(DataError("a.tar is cut short; copy it again")))
    assert error == ("error", None, "a.tar is cut short; copy it again")


@pytest.mark.parametrize(
    ("operation", "limits", "words"),
    [
        (lambda: raise_error(ValueError("no")), {}, "ValueError: no"),
        (lambda: raise_error(AssertionError("a wrong row")), {}, "a wrong row"),
        (lambda: raise_error(SystemExit(2)), {}, "SystemExit"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), {}, "status -9"),
        (lambda: os._exit(3), {}, "status 3"),
        (lambda: time.sleep(60), {"seconds": 0.2}, "has not ended after 0.2 s"),
        (lambda: len(bytearray(64 << 20)), {"most": 32 << 20}, "its memory grew by 6"),
    ],
)
def test_what_is_neither_fails(operation, limits, words):
    with pytest.raises(AssertionError, match=words):
        judged(operation, **limits)


def test_commands(tmp_path):
    error = judged_command(["data", "check", tmp_path / "nothing"])
    assert error.outcome == "error" and "nothing" in error.message and error.value.status == 2
    right = judged_command(["--version"])
    assert right.outcome == "right answer" and right.value.out.startswith("lift-fast ")


def test_the_table(pytestconfig):
    table = Table(bars=True)
    assert len(table.short()) == len(BARS) + 1
    table.counts.update({(kind, "error"): 2000 for kind in BARS})
    table.counts["kill", "right answer"] = 5
    assert table.short() == []
    assert [line.split() for line in table.lines()[-2:]] == [
        ["kill", "2005", "5", "2000"],
        ["fault", "2000", "0", "2000"],
    ]

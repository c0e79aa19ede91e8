"""ranks.py: what ranks tell each other, and errors on some of them."""

import time

import pytest
import torch
from support.ranks import in_group, on_ranks

from lift_fast.errors import BackendError, ConfigError, DataError, TrainingError
from lift_fast.ranks import Rank, every, joined, of_first, together


def talk(rank: Rank):
    return every(rank.number * 10), of_first(f"from {rank.number}"), together(lambda: rank.number, only_first=True)


def test_values_of_all_ranks():
    for found in on_ranks(3, in_group, talk):
        assert found == ([0, 10, 20], "from 0", 0)


def one_group_after_another(late: int):
    """Joins groups in each of which one rank ends later than the others."""
    rank, found = Rank.from_environment(), []
    for number in range(8):
        with joined(rank, torch.device("cpu"), 20):
            found.append(every(10 * number + rank.number))
            time.sleep(0.25 if rank.number == late else 0)
    return found


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_join_one_group_after_another(late):
    """Also where a rank joins the next before rank 0, which holds their store, has left the last."""
    want = [[10 * number + rank for rank in range(3)] for number in range(8)]
    assert on_ranks(3, one_group_after_another, late) == [want] * 3


def test_one_process_is_its_own_group():
    assert talk(Rank(0, 1)) == ([0], "from 0", 0)
    with joined(Rank(), torch.device("cpu"), 1):
        assert every("x") == ["x"]
    with pytest.raises(ValueError):
        together(lambda: int("x"))
    with pytest.raises(ConfigError, match="wrong") as caught:
        together(lambda: fail(ConfigError("wrong")))
    assert not caught.value.reported


def fail(error: Exception):
    raise error


def some_fail(rank: Rank, failing: dict[int, Exception], only_first: bool = False):
    try:
        together(lambda: fail(failing[rank.number]) if rank.number in failing else 7, only_first)
    except Exception as error:
        return type(error), str(error), getattr(error, "reported", None), every("still here")
    return None


@pytest.mark.parametrize(
    ("failing", "kinds"),
    [
        ({1: DataError("no such file")}, [DataError, DataError, DataError]),
        ({0: ConfigError("a"), 2: BackendError("c")}, [ConfigError, ConfigError, BackendError]),
        ({2: OSError(28, "No space left")}, [TrainingError, TrainingError, OSError]),
    ],
)
def test_an_error_of_one_rank_ends_all_and_is_said_once(failing, kinds):
    found = on_ranks(3, in_group, some_fail, failing)
    assert [kind for kind, *_ in found] == kinds
    first = min(failing)
    assert all(str(failing[first]) in message or number in failing for number, (_, message, _, _) in enumerate(found))
    silent = [reported for _, _, reported, _ in found if reported is not None]
    assert silent.count(False) == (0 if isinstance(failing[first], OSError) else 1)
    assert all(left == ["still here"] * 3 for *_, left in found)


def test_an_error_of_the_first_rank_alone():
    found = on_ranks(2, in_group, some_fail, {0: ConfigError("exists already"), 1: ConfigError("never run")}, True)
    assert [(kind, message, reported) for kind, message, reported, _ in found] == [
        (ConfigError, "exists already", False),
        (ConfigError, "exists already", True),
    ]


def test_ranks_out_of_range(monkeypatch):
    for numbers in ((2, 2), (-1, 2), (0, 1, -1), (0, 1, 0, 0)):
        with pytest.raises(ConfigError, match="is not a rank"):
            Rank(*numbers)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="whole numbers"):
        Rank.from_environment()

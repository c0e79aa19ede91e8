"""data/skipped.py: bad samples are counted and listed once, over ranks and over stops."""

import json

import pytest

from lift_fast.data.samples import BadSample
from lift_fast.data.skipped import Skipped, merged
from lift_fast.errors import DataError


class Numbers:
    """A Collection of 100 numbered samples."""

    shard_sizes = [60, 40]

    def where(self, row):
        return f"sample {row}"


def bad(*rows, cause="corrupt"):
    return [(row, BadSample(cause, f"row {row} is {cause}")) for row in rows]


def skipped(rank=0, most=1.0):
    return Skipped(Numbers(), most, rank)


def rows_in(path):
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


def test_each_is_counted_and_listed_once_however_often_it_comes_up(tmp_path):
    found = skipped()
    found.add(6, bad(7, 8))
    found.write_to(tmp_path / "skipped.jsonl")
    found.add(3, [*bad(8, 9), *bad(15, cause="truncated"), *bad(9)])
    assert found.causes == {"corrupt": 3, "truncated": 1} and found.met == {"corrupt": 5, "truncated": 1}
    assert found.looked_at == 15 and found.causes.total() == 4
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines[3] == {"sample": "sample 15", "row": 15, "cause": "truncated", "reason": "row 15 is truncated"}
    assert [line["row"] for line in lines] == [7, 8, 9, 15]
    assert found.report() == {
        "skipped_pictures": 4,
        "skipped_causes": {"corrupt": 3, "truncated": 1},
        "skipped_met": 6,
        "skipped": lines,
    }


def test_a_note_is_listed_and_not_counted(tmp_path):
    found = skipped()
    found.write_to(tmp_path / "skipped.jsonl")
    found.note(*bad(5)[0])
    assert found.looked_at == found.causes.total() == 0 and found.known(5) is None
    found.add(1, bad(5))
    assert found.causes.total() == 1 and rows_in(tmp_path / "skipped.jsonl") == [5]


def test_what_is_known_to_be_bad_and_what_may_be_readable_again():
    found = skipped()
    found.add(0, bad(1, cause="truncated") + bad(2, cause="unreadable"))
    assert found.known(1).cause == "truncated" and found.known(2) is None and found.known(3) is None


def test_too_many():
    found = skipped(most=0.25)
    found.add(699, bad(*range(50)) * 6)  # 999 samples
    assert not found.too_many(0, 0) and found.too_many(0, 1) and not found.too_many(300, 0)
    with pytest.raises(
        DataError, match=r"^301 of 1000 samples are bad \(301 corrupt\), more than .* 0.25; .*sample 3 "
    ):
        found.add(0, bad(3))
    found = skipped(most=0.25)
    found.add(750, bad(*range(50)) * 5)  # not more than a quarter


def resumed(state, world):
    """The ranks of a run that goes on: each has loaded the state from JSON."""
    ranks = [skipped(rank) for rank in range(world)]
    for rank in ranks:
        rank.load_state_dict(json.loads(json.dumps(state)))
    return ranks


def gathered(ranks, path):
    """What a run does at a checkpoint. Returns the merged state."""
    lines = [line for rank in ranks[1:] for line in rank.take_lines()]
    ranks[0].write_lines(lines)
    assert not any(rank.take_lines() for rank in ranks)
    state = merged([rank.state_dict() for rank in ranks])
    assert rows_in(path) == list(dict.fromkeys(rows_in(path)))
    return state


def test_ranks_add_up_over_stops_and_other_numbers_of_ranks(tmp_path):
    path = tmp_path / "skipped.jsonl"
    ranks = [skipped(rank) for rank in range(3)]
    ranks[0].write_to(path)
    ranks[0].add(8, bad(1, 2))
    ranks[1].add(9, bad(50))
    ranks[2].add(7, bad(2, 77) + bad(3, cause="empty"))
    state = gathered(ranks, path)
    assert state["looked_at"] == 30 and state["met"] == {"corrupt": 5, "empty": 1}
    assert state["rows"] == {"corrupt": [1, 2, 50, 77], "empty": [3]}
    assert rows_in(path) == [1, 2, 50, 77, 3]
    assert ranks[0].report(state)["skipped_pictures"] == 5 and len(ranks[0].report(state)["skipped"]) == 5

    for world in (2, 5, 1):
        ranks = resumed(state, world)
        assert merged([rank.state_dict() for rank in ranks]) == state
        assert sum(rank.met.total() for rank in ranks) == sum(state["met"].values())
        assert all(rank.known(77).cause == "corrupt" for rank in ranks)
        ranks[0].write_to(path)
        ranks[-1].add(10, bad(77, 99))
        state, before = gathered(ranks, path), state
        assert state["looked_at"] == before["looked_at"] + 12
        assert state["met"]["corrupt"] == before["met"]["corrupt"] + 2 and 99 in state["rows"]["corrupt"]
        assert rows_in(path) == [1, 2, 50, 77, 3, 99]
        # At a checkpoint the ranks of a run that goes on may load it, too.
        for rank in ranks:
            rank.load_state_dict(state)
        assert merged([rank.state_dict() for rank in ranks]) == state
    assert ranks[0].report()["skipped_met"] == 12 and ranks[0].report()["skipped_pictures"] == 6


def test_ranks_that_disagree_on_a_cause_count_the_row_once():
    one, other = skipped(), skipped(1)
    one.add(0, bad(4, cause="unreadable"))
    other.add(0, bad(4, 5))
    assert merged([one.state_dict(), other.state_dict()])["rows"] == {"unreadable": [4], "corrupt": [5]}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path, cut):
    path = tmp_path / "skipped.jsonl"
    found = skipped()
    found.write_to(path)
    found.add(0, bad(4, 5, 6))
    whole = path.read_text()
    path.write_text(whole[:-cut])
    again = skipped()
    again.add(0, bad(5))  # before there is a file
    again.write_to(path)
    assert rows_in(path) == [4, 5] and [line["row"] for line in again.report()["skipped"]] == [4, 5]
    again.add(0, bad(4, 6))
    assert path.read_text() == whole


def test_lines_that_are_damaged_or_of_something_else_are_passed_over(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_bytes(b'{"row": 4}\n\0\0\0\n\xff\n[5]\n{"row": "6"}\n{"row": 100}\n{"row": -1}\n')
    found = skipped()
    found.write_to(path)
    assert found.report()["skipped"] == [{"row": 4}]
    found.add(0, bad(4, 5, 99))
    assert [json.loads(line)["row"] for line in path.read_bytes().split(b"\n")[7:] if line] == [5, 99]


def test_the_first_twenty_are_reported(tmp_path):
    found = skipped()
    found.add(0, bad(*range(15)))
    found.write_to(tmp_path / "skipped.jsonl")
    found.add(0, bad(*range(40)))
    again = skipped()
    again.write_to(tmp_path / "skipped.jsonl")
    for one in (found, again):
        assert [line["row"] for line in one.report()["skipped"]] == list(range(20))

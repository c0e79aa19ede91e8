"""data/loading.py: batches, skipped samples and the position of a pipeline, with a decoder that only counts."""

import json
import random
import threading
import time

import pytest
import torch

from lift_fast.data.loading import DRAWS, Batch, Loading, Pipeline
from lift_fast.data.order import uniform
from lift_fast.data.samples import BadSample
from lift_fast.errors import ConfigError, DataError


class Numbers:
    """A Collection of numbered samples; those in `bad` do not decode."""

    def __init__(self, count=103, bad=()):
        self.shard_sizes, self.bad = [count // 2, count - count // 2], set(bad)

    def where(self, row):
        return f"shard 0: sample 'k{row}'"


class Counting(Pipeline):
    """pixels: the epoch and the row."""

    def __init__(self, data, depth=0, slow=False, **options):
        super().__init__(data, Loading(**{"batch_size": 8, "image_size": 4, "max_skipped": 1.0, **options}))
        self.depth, self.slow = depth, slow

    def __iter__(self):
        for made in self._assembled(self.work, self.depth):
            self._place = made.after
            yield Batch(torch.tensor(made.items), made.rows)

    def work(self, row, draws):
        epoch = next(e for e in range(100) if (draws == uniform(DRAWS, self.loading.seed, e, row)).all())
        if self.slow:
            time.sleep(random.random() / 500)
        if row in self.data.bad:
            raise BadSample("corrupt", f"row {row} is bad")
        return [epoch, row]


def take(pipeline, count):
    batches = iter(pipeline)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    assert all(torch.equal(batch.pixels[:, 1], batch.rows) for batch in taken)
    return [batch.pixels.tolist() for batch in taken]


def test_an_epoch_holds_each_sample_at_most_once():
    batches = take(Counting(Numbers()), 36)  # 12 an epoch
    for epoch in range(3):
        seen = [pair for batch in batches[12 * epoch : 12 * epoch + 12] for pair in batch]
        assert {of for of, _ in seen} == {epoch}
        assert len({row for _, row in seen}) == 96


@pytest.mark.parametrize("bad", [(), range(0, 103, 5)])
def test_threads_and_depth_change_nothing(bad):
    expected = take(Counting(Numbers(bad=bad), threads=1), 30)
    for depth, threads in ((0, 3), (1, 2), (5, 4)):
        assert take(Counting(Numbers(bad=bad), depth, slow=True, threads=threads), 30) == expected


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("bad", [(), range(3, 103, 9)])
def test_resumed_anywhere_it_is_the_same_sequence(world, bad):
    """Also between two epochs, and from a state taken while batches were decoded ahead."""
    for rank in range(world):
        options = {"rank": rank, "world": world, "batch_size": 5}
        whole = take(Counting(Numbers(bad=bad), **options), 40)
        for stop in (1, 6, 7, 19, 20, 21, random.randrange(2, 39)):
            pipeline = Counting(Numbers(bad=bad), depth=3, **options)
            before = take(pipeline, stop)
            state = json.loads(json.dumps(pipeline.state_dict()))
            other = Counting(Numbers(bad=bad), **options)
            other.load_state_dict(state)
            assert before + take(other, 40 - stop) == whole
            assert before + take(pipeline, 40 - stop) == whole  # the same object goes on as well


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_epoch(world):
    ranks = [
        take(Counting(Numbers(), rank=rank, world=world, batch_size=4), 2 * (103 // (4 * world)))
        for rank in range(world)
    ]
    for epoch in range(2):
        seen = [row for batches in ranks for batch in batches for of, row in batch if of == epoch]
        assert len(seen) == len(set(seen)) == 103 - 103 % (4 * world)


def test_bad_samples_give_their_place_to_the_next():
    bad = {5, 6, 50, 99}
    clean, holed = take(Counting(Numbers()), 12), take(Counting(Numbers(bad=bad)), 12)
    rows = [row for batch in clean for _, row in batch if row not in bad]
    assert [row for batch in holed for _, row in batch][: len(rows)] == rows
    pipeline = Counting(Numbers(bad=range(40)))
    epochs = [{of for of, _ in batch} for batch in take(pipeline, 14)]
    assert epochs == [{0}] * 7 + [{1}] * 7  # 63 good ones make 7 batches


def test_bad_samples_are_counted_and_listed_once(tmp_path):
    pipeline = Counting(Numbers(bad=range(30)), threads=2)
    take(pipeline, 2)
    pipeline.skipped.write_to(tmp_path / "skipped.jsonl")
    take(pipeline, 20)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(30))
    assert lines[0].keys() == {"sample", "row", "cause", "reason"} and lines[0]["cause"] == "corrupt"
    report = pipeline.skipped.report()
    assert report["skipped_pictures"] == report["skipped_causes"]["corrupt"] > 45  # in each epoch again
    assert len(report["skipped"]) == 20
    assert 0 <= pipeline.skipped.looked_at - report["skipped_pictures"] - 22 * 8 < 3 * 8  # what fills no batch


def test_without_bad_samples_there_is_no_file(tmp_path):
    pipeline = Counting(Numbers())
    pipeline.skipped.write_to(tmp_path / "skipped.jsonl")
    take(pipeline, 20)
    assert not (tmp_path / "skipped.jsonl").exists()


def test_too_many_bad_samples_stop_it():
    pipeline = Counting(Numbers(5000, bad=range(0, 5000, 5)), max_skipped=0.15)
    with pytest.raises(DataError, match=r"of 1\d\d\d samples are bad \(\d+ corrupt\), more than --max-skipped 0.15"):
        take(pipeline, 1000)
    take(Counting(Numbers(5000, bad=range(0, 5000, 5)), max_skipped=0.25), 600)


def test_not_one_batch():
    with pytest.raises(DataError, match=r"only 7 of 103 .* too few for a batch of 8 \(bad so far: 96 corrupt\)"):
        take(Counting(Numbers(bad=range(96))), 1)


def test_an_error_in_the_decoder_is_raised_and_threads_end():
    class Broken(Counting):
        def work(self, row, draws):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        take(Broken(Numbers(), depth=2), 1)
    take(Counting(Numbers(), depth=2), 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_a_state_of_something_else_is_refused():
    state = Counting(Numbers()).state_dict()
    for name, other in (
        ("seed", Counting(Numbers(), seed=3)),
        ("samples", Counting(Numbers(104))),
        ("batch_size", Counting(Numbers(), batch_size=4)),
        ("shuffle_buffer", Counting(Numbers(), shuffle_buffer=10)),
        ("world", Counting(Numbers(), world=2)),
    ):
        with pytest.raises(ConfigError, match=f"with {name} "):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="with samples unknown"):
        Counting(Numbers()).load_state_dict({})


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"image_size": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"threads": 0},
        {"ahead": -1},
        {"min_crop_area": 0},
        {"min_crop_area": 1.5},
        {"flip": -0.1},
        {"colour": 2},
        {"max_skipped": 1.1},
        {"dtype": torch.float64},
    ],
)
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ConfigError):
        Loading(**{"batch_size": 2, "image_size": 8, **wrong})

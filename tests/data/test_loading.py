"""data/loading.py: batches, skipped samples and the position of a pipeline, with a decoder that only counts."""

import json
import random
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from support.hostile import encoded

from lift_fast.data.host import HostPipeline
from lift_fast.data.loading import DRAWS, Batch, Loading, Pipeline
from lift_fast.data.order import uniform
from lift_fast.data.samples import BadSample, BadText, Collection
from lift_fast.data.skipped import merged
from lift_fast.errors import ConfigError, DataError


class Numbers:
    """A Collection of numbered samples; those in `bad` do not decode."""

    def __init__(self, count=103, bad=()):
        self.shard_sizes, self.bad = [count // 2, count - count // 2], set(bad)

    def where(self, row):
        return f"shard 0: sample 'k{row}'"


class Counting(Pipeline):
    """pixels: the epoch and the row. decoded: the rows that were decoded."""

    def __init__(self, data, depth=0, slow=False, **options):
        super().__init__(data, Loading(**{"batch_size": 8, "image_size": 4, "max_skipped": 1.0, **options}))
        self.depth, self.slow, self.decoded = depth, slow, []

    def __iter__(self):
        for made in self._assembled(self.work, self.depth):
            self._reach(made)
            yield Batch(torch.tensor(made.items), made.rows)

    def work(self, row, draws):
        self.decoded.append(row)
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


def streams(data, world, count, *, global_batch, **options):
    """The global batches that some ranks make together: (epoch, row) of each sample."""
    ranks = [
        take(Counting(data, rank=rank, world=world, batch_size=global_batch // world, **options), count)
        for rank in range(world)
    ]
    return [[tuple(pair) for part in parts for pair in part] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("shuffle_buffer", [None, 30])
def test_the_sample_a_batch_later_stands_in(shuffle_buffer):
    """Slot i's stand-in is slot i's sample of the batch after it, then of the one after that; all others stay."""
    order = Counting(Numbers(), shuffle_buffer=shuffle_buffer).order
    rows = order.rows(0, np.arange(103)).tolist()
    bad = {rows[3], rows[24], rows[32], rows[88], rows[96]}  # slots 3, 0 (twice in a row), and 0 of the last batch
    found = take(Counting(Numbers(bad=bad), shuffle_buffer=shuffle_buffer), 12)
    wanted = rows[:96]
    wanted[3], wanted[24], wanted[32] = rows[11], rows[40], rows[40]
    wanted[88] = rows[1]  # 88 + 8 is bad, and 88 + 16 is position 104 of 103
    assert [row for batch in found for _, row in batch] == wanted


@pytest.mark.parametrize("bad", [range(40), range(3, 103, 33)])
def test_epochs_are_as_long_as_without_bad_samples(bad):
    epochs = [{of for of, _ in batch} for batch in take(Counting(Numbers(bad=bad)), 30)]
    assert epochs == [{0}] * 12 + [{1}] * 12 + [{2}] * 6


@pytest.mark.parametrize("shuffle_buffer", [None, 17])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.8])
def test_global_batches_are_the_same_for_any_ranks(share, shuffle_buffer):
    rng = random.Random(5)
    bad = {row for row in range(103) if rng.random() < share}
    data, options = Numbers(bad=bad), {"global_batch": 12, "shuffle_buffer": shuffle_buffer}
    expected = streams(data, 1, 10, **options)
    assert all(len(set(batch)) == 12 and not {row for _, row in batch} & bad for batch in expected)
    for world in (2, 3, 4, 12):
        assert streams(data, world, 10, threads=4, depth=3, **options) == expected


def test_small_sets_of_which_a_batch_takes_most_or_all():
    """Slots without a good candidate take what others leave, whichever ranks these belong to."""
    rng = random.Random(11)
    for _ in range(40):
        world = rng.choice([2, 3, 4])
        size = world * rng.randrange(1, 5)
        count = rng.randrange(size, 3 * size)
        bad = set(rng.sample(range(count), rng.randrange(count - size + 1)))
        expected = streams(Numbers(count, bad), 1, 7, global_batch=size)
        assert all(len(set(batch)) == size and not {row for _, row in batch} & bad for batch in expected)
        assert streams(Numbers(count, bad), world, 7, global_batch=size, depth=1, threads=3) == expected


def test_too_few_good_samples_end_it_on_a_rank():
    rng = random.Random(12)
    for _ in range(30):
        world = rng.choice([1, 2, 3])
        size = world * rng.randrange(1, 5)
        count = rng.randrange(size, 4 * size)
        good = rng.randrange(size)
        bad = set(rng.sample(range(count), count - good))
        with pytest.raises(DataError, match=f"only {good} of {count} images decode, too few for a batch of {size} "):
            streams(Numbers(count, bad), world, 1, global_batch=size)


def test_samples_that_become_bad_after_they_were_judged():
    """Such as those of a disk that fails: no batch has one of them, or another sample twice."""
    rng = random.Random(13)
    for _ in range(25):
        count = rng.randrange(6, 30)
        size = rng.randrange(count // 2, count)
        data = Numbers(count)
        pipeline = Counting(data, batch_size=size)
        batches = iter(pipeline)
        for made, row in enumerate(rng.sample(range(count), count - size), 1):
            data.bad.add(row)
            rows = set(next(batches).rows.tolist())
            assert len(rows) == size and not rows & data.bad
            assert pipeline.skipped.looked_at == made * size + pipeline.skipped.met.total()
        data.bad.add(rng.choice([row for row in range(count) if row not in data.bad]))
        with pytest.raises(
            DataError, match=rf"only {size - 1} of {count} images decode, too few for a batch of {size} "
        ):
            next(batches)


def test_known_bad_samples_are_met_without_decoding_them():
    pipeline = Counting(Numbers(bad=range(30)), threads=2)
    take(pipeline, 5 * 12)
    assert all(pipeline.decoded.count(row) == 1 for row in range(30))
    assert pipeline.skipped.met["corrupt"] > 100


def test_a_data_set_of_bad_samples_ends_before_all_of_it_is_decoded():
    pipeline = Counting(Numbers(200_000, bad=range(200_000)), max_skipped=0.5, batch_size=16)
    with pytest.raises(DataError, match=r"1\d\d\d of 1\d\d\d samples are bad"):
        take(pipeline, 1)
    assert len(pipeline.decoded) < 2000 and len(pipeline.skipped.report()["skipped"]) == 20


def test_bad_samples_are_counted_and_listed_once(tmp_path):
    pipeline = Counting(Numbers(bad=range(30)), threads=2)
    take(pipeline, 2)
    pipeline.skipped.write_to(tmp_path / "skipped.jsonl")
    take(pipeline, 20)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(30))
    assert lines[0].keys() == {"sample", "row", "cause", "reason"} and lines[0]["cause"] == "corrupt"
    report = pipeline.skipped.report()
    assert report["skipped_pictures"] == report["skipped_causes"]["corrupt"] == 30
    assert report["skipped_met"] > 45  # in each epoch again
    assert len(report["skipped"]) == 20
    assert pipeline.skipped.looked_at == report["skipped_met"] + 22 * 8


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_ranks_count_together_what_one_counts(share):
    """Also where a rank judges samples of other ranks' slots, which it does not count."""
    rng = random.Random(3)
    data = Numbers(40, bad={row for row in range(40) if rng.random() < share})

    def counted(world):
        ranks = [Counting(data, rank=rank, world=world, batch_size=12 // world) for rank in range(world)]
        for rank in ranks:
            take(rank, 9)
        return merged([rank.skipped.state_dict() for rank in ranks])

    alone = counted(1)
    assert alone["looked_at"] == 9 * 12 + alone["met"]["corrupt"]
    assert counted(2) == counted(3) == counted(4) == alone


def test_one_bad_sample_of_twelve_epochs_is_one_bad_sample():
    pipeline = Counting(Numbers(16, bad=[3]), batch_size=5)
    take(pipeline, 3 * 12)
    report = pipeline.skipped.report()
    assert report["skipped_pictures"] == 1 and report["skipped_causes"] == {"corrupt": 1}
    assert 6 < report["skipped_met"] <= 12  # not where it comes after the last batch of an epoch
    assert [line["row"] for line in report["skipped"]] == [3]


def test_what_comes_up_is_judged_as_often_as_it_comes_up():
    """Four of forty samples are bad, in 25 epochs: 4 of 1000 different samples would be no reason to end."""
    with pytest.raises(DataError, match=r"\d\d of 10\d\d samples are bad \(\d\d corrupt\), more than .* 0.05;"):
        take(Counting(Numbers(40, bad=range(4)), batch_size=9, max_skipped=0.05), 200)


class Untouched:
    """A data set of 8 samples whose images of `unread` must not be read."""

    folder, shard_sizes = None, [8]

    def __init__(self, unread):
        self.unread = unread

    def __len__(self):
        return 8

    def where(self, i):
        return f"sample {i}"

    def image_bytes(self, i):
        assert i not in self.unread
        return encoded(np.full((8, 8, 3), 10 * i, np.uint8), "PNG")


def test_what_has_no_caption_is_skipped_by_its_own_cause_and_its_image_is_not_read():
    collection = Collection([Untouched({9}), Untouched({2, 5})])
    collection.leave_out({10: BadText("no caption", "sample 2 has no caption"), 13: BadText("no tokens", "sample 5")})
    pipeline = HostPipeline(collection, Loading(7, 4, max_skipped=1.0))
    batches = iter(pipeline)
    rows = torch.cat([next(batches).rows for _ in range(4)])
    batches.close()
    assert set(rows.tolist()) == set(range(16)) - {10, 13}
    report = pipeline.skipped.report()
    assert report["skipped_causes"] == {"no caption": 1, "no tokens": 1}
    assert report["skipped_pictures"] == 2 and report["skipped_met"] in (3, 4)
    reasons = {line["row"]: line["reason"] for line in report["skipped"]}
    assert reasons == {10: "sample 2 has no caption", 13: "sample 5"}


def test_an_error_that_comes_up_again_does_not_grow():
    collection = Collection([Untouched({2})])
    collection.leave_out({2: BadText("no caption", "sample 2 has no caption")})
    errors = []
    for _ in range(3):
        with pytest.raises(BadText, match="sample 2 has no caption") as caught:
            collection.image_bytes(2)
        errors.append(caught.value)
    lengths = [len(traceback.extract_tb(error.__traceback__)) for error in errors]
    assert lengths == [lengths[0]] * 3


@pytest.mark.parametrize("world, most", [(1, "at most 103"), (2, "at most 51"), (104, "104 ranks need a sample each")])
def test_a_batch_larger_than_the_data_names_the_largest(world, most):
    with pytest.raises(ConfigError, match=f"larger than the data .103 samples.; .*{most}"):
        Counting(Numbers(), batch_size=104, world=world)
    if world < 104:
        assert Counting(Numbers(), batch_size=int(most.split()[-1]), world=world).order.batches == 1


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
    with pytest.raises(DataError, match=r"only 7 of 103 .* too few for a batch of 8 \(bad: 96 corrupt\)"):
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
    wanted = {"epoch": 0, "batch": 0, "samples": 103, "seed": 0, "global_batch": 8, "shuffle_buffer": None}
    assert state == wanted
    for name, other in (
        ("seed", Counting(Numbers(), seed=3)),
        ("samples", Counting(Numbers(104))),
        ("global_batch", Counting(Numbers(), batch_size=4)),
        ("shuffle_buffer", Counting(Numbers(), shuffle_buffer=10)),
        ("global_batch", Counting(Numbers(), world=2)),
    ):
        with pytest.raises(ConfigError, match=f"with {name} "):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="with samples unknown"):
        Counting(Numbers()).load_state_dict({})
    Counting(Numbers(), batch_size=2, rank=3, world=4).load_state_dict(state)


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

"""The host pipeline over real tars; test_pipelines.py tests what it shares with the DALI pipeline."""

import threading

import pytest
import torch
from support import complete  # noqa: F401
from support.tiny_sets import make_set

from lift_fast.data.host import HostPipeline, load_images
from lift_fast.data.images import decode, read_header
from lift_fast.data.loading import Loading
from lift_fast.data.samples import Collection
from lift_fast.errors import ConfigError, DataError


def decoded(data):
    return decode(data, read_header(data))


def take(pipeline, count):
    batches = iter(pipeline)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_batches_depend_on_the_seed_alone(tmp_path):
    data = Collection([make_set(tmp_path / "a", 10, seed=1), make_set(tmp_path / "b", 9, seed=2)])

    def batches(seed, threads, ahead):
        return take(HostPipeline(data, Loading(4, 8, seed, threads=threads, ahead=ahead)), 12)

    first, again, other = batches(5, 1, 1), batches(5, 3, 3), batches(6, 1, 1)
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x.rows, y.rows)
        assert torch.equal(x.pixels, y.pixels)
    assert any(not torch.equal(x.rows, y.rows) for x, y in zip(first, other, strict=True))


def test_an_epoch_visits_no_sample_twice(tmp_path):
    data = Collection([make_set(tmp_path / "a", 10, seed=1), make_set(tmp_path / "b", 9, seed=2)])
    batches = take(HostPipeline(data, Loading(4, 8)), 12)
    for epoch in range(3):
        rows = torch.cat([batch.rows for batch in batches[4 * epoch : 4 * epoch + 4]])
        assert len(rows.unique()) == 16
    assert batches[0].pixels.shape == (4, 8, 8, 3)
    assert batches[0].pixels.dtype == torch.uint8


def test_rows_name_the_pictures(tmp_path):
    data = Collection([make_set(tmp_path / "a", 5, seed=1), make_set(tmp_path / "b", 6, seed=2)])
    batch = take(HostPipeline(data, Loading(11, 10, min_crop_area=1.0)), 1)[0]
    for pixels, row in zip(batch.pixels, batch.rows.tolist(), strict=True):
        assert data.caption(row, "txt") == f"caption {row if row < 5 else row - 5}"
        mean = decoded(data.image_bytes(row)).mean()
        assert abs(pixels.double().mean().item() - mean) < 12
    assert data.where(7).endswith("sample 's2-002'")


def test_broken_pictures_are_skipped_and_counted(tmp_path):
    data = Collection([make_set(tmp_path / "a", 12, broken={3, 7})])
    pipeline = HostPipeline(data, Loading(5, 8, max_skipped=1.0))
    batches = take(pipeline, 6)
    assert all(len(batch.rows) == 5 and not {3, 7} & set(batch.rows.tolist()) for batch in batches)
    report = pipeline.skipped.report()
    assert report["skipped_causes"] == {"not a picture": 2} and report["skipped_pictures"] == 2
    assert report["skipped_met"] >= 4  # in each epoch again
    assert {line["row"] for line in report["skipped"]} == {3, 7}
    assert report["skipped"][0]["sample"].endswith(f"'s0-00{report['skipped'][0]['row']}'")


def test_nothing_decodes(tmp_path):
    shards = make_set(tmp_path / "a", 6, broken=set(range(6)))
    with pytest.raises(DataError, match="only 0 of 6 images decode"):
        take(HostPipeline(Collection([shards]), Loading(2, 8)), 1)
    with pytest.raises(DataError, match=r"no image decodes \(6 not a picture\)"):
        load_images(shards, 8)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="larger than the data"):
        HostPipeline(Collection([make_set(tmp_path / "a", 3)]), Loading(4, 8))


def test_threads_end_with_the_iteration(tmp_path):
    take(HostPipeline(Collection([make_set(tmp_path / "a")]), Loading(2, 8)), 2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_load_pictures_leaves_out_the_broken(tmp_path):
    pixels, samples, causes = load_images(make_set(tmp_path / "a", 5, broken={2}), 8)
    assert samples == [0, 1, 3, 4] and causes == {"not a picture": 1}
    assert pixels.shape == (4, 8, 8, 3)

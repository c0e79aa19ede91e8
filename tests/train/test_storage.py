"""The storage of DCP without pickle: what it writes safetensors reads, and DCP's own save and load work with it."""

import hashlib
import json
import pickle
from typing import get_args

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lift_fast.train import storage
from lift_fast.train.storage import Reader, Writer, whole_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def values():
    """Every dtype, in an order that would leave some unaligned; 0-dim, empty and non-contiguous tensors."""
    return {
        "flags": torch.tensor([True, False, True]),
        "bf16": torch.randn(3, 5).bfloat16(),
        "f64": torch.randn(3, dtype=torch.float64),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(1).half(),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "fp8 wide": torch.randn(3).to(torch.float8_e5m2),
        "ints": torch.arange(-2, 3),
        "int32": torch.arange(3, dtype=torch.int32),
        "int16": torch.arange(3, dtype=torch.int16),
        "int8": torch.arange(-3, 0, dtype=torch.int8),
        "step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "strided": torch.randn(9)[::2],
        'a "quoted" näme@0,0': torch.randn(2, 1, 3),
        "needs grad": torch.randn(3, requires_grad=True),
    }


def saved(folder, tensors, **options):
    """Saves them with DCP itself; returns the index."""
    found = []
    dcp.save(tensors, storage_writer=Writer(folder, 0, found.append, **options))
    return json.loads(json.dumps(found[0]))


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and as_bytes(left) == as_bytes(right)


def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_dcp_saves_it_loads(tmp_path):
    tensors = values()
    index = saved(tmp_path / "new" / "folder", tensors)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, storage_reader=Reader(tmp_path / "new" / "folder", index))
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert index["tensors"].keys() == tensors.keys()
    assert index["tensors"]["step"] == {
        "dtype": "float32",
        "size": [],
        "chunks": [{"offsets": [], "sizes": [], "file": "rank-00000.safetensors", "name": "step@"}],
    }


def test_the_file_is_one_of_safetensors(tmp_path):
    tensors = values()
    index = saved(tmp_path / "x", tensors)
    [file] = (tmp_path / "x").iterdir()
    assert index["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    read = load_file(file)
    assert len(read) == len(tensors)
    for name, entry in index["tensors"].items():
        assert same(read[entry["chunks"][0]["name"]], tensors[name])
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    for entry in header.values():
        assert entry["data_offsets"][0] % sizes.get(entry["dtype"], 1) == 0


def test_whole_tensors(tmp_path):
    """Those of one part of a checkpoint, put together from the chunks of several ranks."""
    tensors = values()
    index = saved(
        tmp_path / "x", {f"model.{name}": tensor for name, tensor in tensors.items()} | {"ema.a": torch.ones(1)}
    )
    read = whole_tensors(tmp_path / "x", index, "model.")
    assert read.keys() == tensors.keys() and all(same(read[name], tensors[name]) for name in tensors)
    assert whole_tensors(tmp_path / "x", index, "ema.").keys() == {"a"}

    matrix, chunks = torch.randn(7, 5), []
    for rank, (rows, columns) in enumerate([((0, 3), (0, 5)), ((3, 7), (0, 2)), ((3, 7), (2, 5))]):
        part = matrix[slice(*rows), slice(*columns)].contiguous()
        save_file({"part": part, "other": torch.zeros(1)}, tmp_path / f"{rank}.safetensors")
        place = {"offsets": [rows[0], columns[0]], "sizes": [*part.shape]}
        chunks.append(place | {"file": f"{rank}.safetensors", "name": "part"})
    index = {"files": dict.fromkeys(chunk["file"] for chunk in chunks)}
    index["tensors"] = {"model.matrix": {"dtype": "float32", "size": [7, 5], "chunks": chunks}}
    assert torch.equal(whole_tensors(tmp_path, index, "model.")["matrix"], matrix)


def test_nothing_at_all(tmp_path):
    index = saved(tmp_path / "x", {})
    assert index == {"files": {}, "tensors": {}} and not list((tmp_path / "x").iterdir())
    dcp.load({}, storage_reader=Reader(tmp_path / "x", index))


def test_parts_of_chunks_go_to_parts_of_tensors(tmp_path):
    """A reader that wants other chunks than were written: DCP's planner cuts them, the reader takes the parts."""
    whole = torch.randn(7, 5)
    index = saved(tmp_path / "x", {"w": whole})
    reader = Reader(tmp_path / "x", index)
    chunk = dcp.ChunkStorageMetadata(offsets=torch.Size([2, 1]), sizes=torch.Size([4, 3]))
    items = dcp.planner_helpers.create_read_items_for_chunk_list(
        "w", reader.read_metadata().state_dict_metadata["w"], [chunk]
    )
    target = torch.zeros(4, 3)

    class Planner(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, item):
            return target[tuple(slice(a, a + n) for a, n in zip(item.dest_offsets, item.lengths, strict=True))]

    reader.read_data(dcp.LoadPlan(items), Planner()).wait()
    assert torch.equal(target, whole[2:6, 1:4])


@pytest.mark.parametrize("value", [3, "text", None, torch.ones(2, dtype=torch.complex64)])
def test_only_tensors_that_safetensors_knows(tmp_path, value):
    with pytest.raises(BaseException, match=r"x.* (is not a tensor|has dtype torch.complex64)"):
        saved(tmp_path / "x", {"w": torch.ones(1), "x": value})


def test_a_folder_that_is_there_is_not_written_to(tmp_path):
    with pytest.raises(BaseException, match="exist"):
        saved(tmp_path, {"w": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "save", refused)
    monkeypatch.setattr(torch, "load", refused)
    index = saved(tmp_path / "x", {"w": torch.ones(3)})
    loaded = {"w": torch.zeros(3)}
    dcp.load(loaded, storage_reader=Reader(tmp_path / "x", index))
    assert loaded["w"].tolist() == [1, 1, 1]
    with safe_open(tmp_path / "x" / "rank-00000.safetensors", framework="pt") as file:
        assert file.get_tensor("w@0").tolist() == [1, 1, 1]


def test_the_dtypes_that_an_index_may_name_are_those_that_are_written():
    assert [getattr(torch, name) for name in get_args(storage.Dtype)] == [*storage._SAFETENSORS]

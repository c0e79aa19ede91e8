"""Storage of torch.distributed.checkpoint (DCP) without pickle: a safetensors file of each rank, and an index of them.

DCP's planners decide which rank writes which chunk of which tensor, and which chunks a rank reads. The index is made of
what JSON knows; its owner keeps it (see checkpoints.py):

    files     name of a file -> SHA-256 of its bytes, in hex
    tensors   name of a tensor -> {"dtype": "float32", "size": [7, 3], "chunks": [chunk, …]}
    chunk     {"offsets": [4, 0], "sizes": [3, 3], "file": "rank-00001.safetensors", "name": "model.weight@4,0"}
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..foreign import Count

# Those of _SAFETENSORS.
Dtype = Literal[
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Chunk(TypedDict):
    offsets: list[Count]
    sizes: list[Count]
    file: str
    name: str


class _Tensor(TypedDict):
    dtype: Dtype
    size: list[Count]
    chunks: list[_Chunk]


class Index(TypedDict):
    """What the files of a checkpoint hold, see above."""

    files: dict[str, str]
    tensors: dict[str, _Tensor]


class Writer(StorageWriter):
    """Writes the chunks of this rank's plan to FOLDER/rank-NNNNN.safetensors, flushed to disk.

    rank: the number of this rank. finished: called on the coordinator with the index when all ranks have written.

    Raises TypeError for what is no tensor, or a tensor of a dtype that safetensors does not know; OSError when the
    file cannot be written.
    """

    def __init__(self, folder: Path, rank: int, finished: Callable[[Index], None]):
        self.folder, self.file, self.finished = folder, f"rank-{rank:05d}.safetensors", finished

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Takes another folder, if one is given."""
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder, on the coordinator. Raises OSError, also where there is one."""
        if is_coordinator:
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Checks that there are only tensors that can be written."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is not a tensor; only tensors are written to a checkpoint's files")
            if item.tensor_data.properties.dtype not in _SAFETENSORS:
                raise TypeError(
                    f"{item.index.fqn} has dtype {item.tensor_data.properties.dtype}, unknown to safetensors"
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The same plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the file and reads none of it again: its hash is computed on the way. storage_data of a result:
        (file, name of the tensor in it, SHA-256 of the file)."""
        # By falling size of an element, so that each tensor is aligned to it, as safetensors wants it.
        items = sorted(plan.items, key=lambda item: -sizes_and_dtype(item)[1].itemsize)
        digest = hashlib.sha256()
        if items:
            with open(self.folder / self.file, "xb") as file:  # through no link
                parts: Iterable[bytes | memoryview] = chain([_header(items)], (_bytes(planner, item) for item in items))
                for part in parts:
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        data = digest.hexdigest()
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [WriteResult(item.index, _nbytes(item), (self.file, _name(item.index), data)) for item in items]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hands the index to its owner."""
        written = {_name(result.index): result.storage_data for each in results for result in each}
        tensors: dict[str, Any] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # prepare_local_plan has checked it
            chunks = []
            for chunk in entry.chunks:
                file, name, _ = written[_name(MetadataIndex(fqn, chunk.offsets))]
                chunks.append({"offsets": [*chunk.offsets], "sizes": [*chunk.sizes], "file": file, "name": name})
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[fqn] = {"dtype": dtype, "size": [*entry.size], "chunks": chunks}
        self.finished({"files": {file: digest for file, _, digest in written.values()}, "tensors": tensors})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be a folder."""
        return not str(checkpoint_id).startswith(("http:", "https:", "s3:", "gs:"))


class Reader(StorageReader):
    """Reads the chunks that a plan needs from the files of FOLDER, in place. index: the one that Writer has made.

    Raises OSError and safetensors.SafetensorError for a file that cannot be read.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Takes another folder, if one is given."""
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index as DCP's planners take it."""
        return Metadata(
            {
                fqn: TensorStorageMetadata(
                    properties=TensorProperties(dtype=getattr(torch, entry["dtype"])),
                    size=torch.Size(entry["size"]),
                    chunks=[
                        ChunkStorageMetadata(offsets=torch.Size(chunk["offsets"]), sizes=torch.Size(chunk["sizes"]))
                        for chunk in entry["chunks"]
                    ],
                )
                for fqn, entry in self.index["tensors"].items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The same plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The same plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the parts of chunks that the plan names into the planner's tensors; each file is opened once."""
        files = {chunk["name"]: chunk["file"] for entry in self.index["tensors"].values() for chunk in entry["chunks"]}
        by_file = defaultdict(list)
        for item in plan.items:
            name = _name(item.storage_index)
            by_file[files[name]].append((name, item))
        for file, items in by_file.items():
            with safe_open(self.folder / file, framework="pt") as opened:
                for name, item in items:
                    part = opened.get_tensor(name)
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        part = part.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be a folder."""
        return Writer.validate_checkpoint_id(checkpoint_id)


def whole_tensors(folder: Path, index: Index, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with `prefix`, by the rest of their names: whole, on the CPU.

    Raises OSError and safetensors.SafetensorError for a file that cannot be read.
    """
    found = {}
    with ExitStack() as stack:
        files = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name in index["files"]}
        for name, entry in index["tensors"].items():
            if name.startswith(prefix):
                tensor = torch.empty(entry["size"], dtype=getattr(torch, entry["dtype"]))
                for chunk in entry["chunks"]:
                    ends = zip(chunk["offsets"], chunk["sizes"], strict=True)
                    place = tuple(slice(start, start + length) for start, length in ends)
                    tensor[place] = files[chunk["file"]].get_tensor(chunk["name"])
                found[name.removeprefix(prefix)] = tensor
    return found


def sizes_and_dtype(item: WriteItem) -> tuple[torch.Size, torch.dtype]:
    """Of the chunk that an item of a plan writes."""
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype


def _nbytes(item: WriteItem) -> int:
    sizes, dtype = sizes_and_dtype(item)
    return math.prod(sizes) * dtype.itemsize


def _name(index: MetadataIndex) -> str:
    """The name of a chunk: that of its tensor, and where it begins in it."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _header(items: list[WriteItem]) -> bytes:
    """The bytes of a safetensors file before its first tensor: the header's length, and the header as JSON."""
    entries, end = {}, 0
    for item in items:
        begin, end = end, end + _nbytes(item)
        sizes, dtype = sizes_and_dtype(item)
        entry = {"dtype": _SAFETENSORS[dtype], "shape": [*sizes], "data_offsets": [begin, end]}
        entries[_name(item.index)] = entry
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(planner: SavePlanner, item: WriteItem) -> memoryview:
    """The bytes of a chunk, row-major; without a copy where it lies so in the memory of the CPU."""
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor)
    return data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Reads the tensors of TorchScript archives, such as those of OpenAI's CLIP, without running their code.

An archive is a zip of NAME/data.pkl (the modules as pickled objects, whose attributes are tensors and modules),
NAME/data/K (the bytes of storage K, uncompressed) and NAME/code/ (their Python code), which is not read.
"""

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Functions of torch.jit._pickle that wrap an attribute which is a list or a dict.
_CONTAINERS = {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"}


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with constants.pkl, which torch.save does not write."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def check_stored(path: Path) -> None:
    """Raises pickle.UnpicklingError for a zip whose pickles or storages are compressed, or share their bytes: torch
    writes none, and a small file could take all memory, or hours."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED and re.search(r"\.pkl$|/data/", entry.filename):
                raise pickle.UnpicklingError(f"{entry.filename} is compressed, as torch writes none")
        # Of TorchScript, the code is compressed. It is not read.
        stored = sum(entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED)
        if stored > path.stat().st_size:
            raise pickle.UnpicklingError("its parts have more bytes than the file")


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive on the CPU, under the keys that its module's state_dict has.

    Raises pickle.UnpicklingError for anything but modules, tensors and plain values, before it is called; and for a
    damaged archive whatever zipfile, pickle and torch raise.
    """
    with zipfile.ZipFile(path) as archive:
        [data] = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        with archive.open(data) as file:
            module = _Unpickler(file, archive, data.removesuffix(".pkl")).load()
    return dict(_tensors(module, "", set()))


class _Module:
    """A pickled object of the archive: only its attributes."""


class _Unpickler(pickle.Unpickler):
    """Knows the tensors, lists and dicts of torch's own pickler. Objects of the archive's classes become _Modules."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._loaded: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        # A pickle can set attributes of what it finds, so each time it finds a new object.
        if module.split(".")[0] == "__torch__":
            return type("_Module", (_Module,), {})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name in _CONTAINERS:
            return _first_argument()
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilder()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """The elements of a storage, 1-D."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it names a {kind}")
        if key not in self._loaded:
            entry = self._archive.getinfo(f"{self._folder}/{key}")
            if entry.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"{entry.filename} is not {count} numbers of {dtype}")
            data = bytearray(self._archive.read(entry))
            self._loaded[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._loaded[key]


def _first_argument() -> Callable[..., Any]:
    return lambda value, *tag: value


def _rebuilder() -> Callable[..., Tensor]:
    def rebuild(elements: Tensor, offset: int, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> Tensor:
        if math.prod(size) > elements.numel():
            raise pickle.UnpicklingError(f"a tensor of {list(size)} in a storage of {elements.numel()}")
        return elements.as_strided(size, stride, offset)  # raises RuntimeError outside of the storage

    return rebuild


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a module and those below it; a module that is met again is passed over."""
    if not isinstance(module, _Module):
        raise pickle.UnpicklingError(f"a {type(module).__name__} in the place of a module")
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module) and id(value) not in seen:
            yield from _tensors(value, f"{prefix}{name}.", seen)

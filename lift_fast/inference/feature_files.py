"""The image features of a data set, written to one file: safetensors, npy or parquet."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..data.samples import Samples
from ..errors import BackendError, ConfigError, DataError
from ..files import remove_abandoned, shared_folder, written_whole
from .features import how_read
from .model import Model
from .store import Store, build, model_identity

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def embed_images(
    model: Model,
    data: Samples,
    out: str | Path,
    dtype: str = "float32",
    *,
    read: object = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Store:
    """Writes the features of a data set's images and their keys, in the order of the samples, to one file, and returns
    them. Bad images are left out (`Store.bad`).

    data: as features.open_images returns it. read: how it was read, where not by default (features.how_read). dtype:
    "float32" or "float16". out: its suffix is the format:

    .safetensors  tensors features [n, dim]; keys, uint8, the keys in UTF-8 one after the other; key_ends, int64 [n],
                  where each key ends
    .npy          an array [n, dim], for numpy.load; the keys are in NAME.keys.txt, one a line
    .parquet      columns key (string) and feature (fixed-size list of dim numbers); needs pyarrow

    While features are computed they are kept in the folder OUT.partial, from which a run that was killed goes on, and
    which processes that write the same features at once share. The file appears whole or not at all. Memory is needed
    for the keys, and 10 000 features at a time.

    Raises ConfigError for another suffix or dtype, for a key that holds a line break where the format is npy, and when
    files cannot be written; DataError when `out` exists, unless another process has written the same features to it
    meanwhile, and when no image decodes; BackendError without pyarrow.
    """
    out = Path(out)
    writers: dict[str, Callable[[Store, Path, torch.dtype], None]] = {
        ".safetensors": _safetensors,
        ".npy": _npy,
        ".parquet": _parquet,
    }
    if out.suffix not in writers:
        raise ConfigError(f"{out} must end in {', '.join(writers)}, which chooses the format")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be float32 or float16, not {dtype}")
    if out.suffix == ".parquet":
        _pyarrow()
    partial = out.with_name(f"{out.name}.partial")
    paths = (out, _keys_file(out)) if out.suffix == ".npy" else (out,)
    for path in paths:
        remove_abandoned(path.parent, path.name)
    for path in paths:
        # A run that was killed may have written the keys and not the features.
        if path.exists() and (path == out or not partial.exists()):
            if partial.exists():
                with suppress(OSError), shared_folder(partial):  # one that was killed before it removed the folder
                    pass
            raise _exists(path)
    with ExitStack() as stack:
        with _writing(partial):
            stack.enter_context(shared_folder(partial))
        store = build(
            model,
            data,
            partial,
            model_identity(model, read or how_read()),
            codec="f32",
            remedy="name another --out",
            batch_size=batch_size,
            progress=progress,
        )
        if not len(store):
            raise store.nothing(data)
        writers[out.suffix](store, out, DTYPES[dtype])
        return store


def _safetensors(store: Store, out: Path, dtype: torch.dtype) -> None:
    sizes = [(part.ends.diff(prepend=part.ends.new_zeros(1))) for part in store.parts]
    ends = torch.cat(sizes).cumsum(0)
    n = len(store)
    layout = {
        "key_ends": ("I64", [n], 8 * n),
        "features": ("F32" if dtype == torch.float32 else "F16", [n, store.dim], n * store.dim * dtype.itemsize),
        "keys": ("U8", [int(ends[-1])], int(ends[-1])),
    }
    stops = list(accumulate((size for *_, size in layout.values()), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "lift-fast image features"}}
    for (name, (kind, shape, _)), begin, end in zip(layout.items(), stops, stops[1:], strict=False):
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _whole(out) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(ends.numpy().tobytes())
        for features in _features(store, dtype):
            file.write(features.tobytes())
        for part in store.parts:
            file.write(part.keys.numpy().tobytes())


def _npy(store: Store, out: Path, dtype: torch.dtype) -> None:
    keys = [key for part in store.parts for key in part.all_keys()]
    for key in keys:
        if len(key.splitlines()) > 1 or key.endswith("\n"):
            raise ConfigError(f"the key {key!r} holds a line break; write .safetensors or .parquet instead of .npy")
    with _whole(_keys_file(out)) as file:
        file.write("".join(f"{key}\n" for key in keys).encode())
    with _whole(out) as file:
        shape = len(store), store.dim
        described = {"descr": np.dtype(f"<f{dtype.itemsize}").str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        for features in _features(store, dtype):
            file.write(features.tobytes())


def _keys_file(out: Path) -> Path:
    return out.with_suffix(".keys.txt")


def _parquet(store: Store, out: Path, dtype: torch.dtype) -> None:
    pa = _pyarrow()
    number = pa.float32() if dtype == torch.float32 else pa.float16()
    schema = pa.schema([("key", pa.string()), ("feature", pa.list_(number, store.dim))])
    with _whole(out) as file, pa.parquet.ParquetWriter(file, schema) as writer:
        for part, features in zip(store.parts, _features(store, dtype), strict=True):
            lists = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
            writer.write_table(pa.table([pa.array(part.all_keys(), pa.string()), lists], schema=schema))


def _features(store: Store, dtype: torch.dtype) -> Iterator[np.ndarray]:
    """The features of each part."""
    for part in store.parts:
        yield part.features.widen().to(dtype).numpy()


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when it is complete. Raises ConfigError; DataError when there is one now
    with another content."""
    with _writing(path), written_whole(path, replace=False) as file:
        yield file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError while `path` is written into the typed error."""
    try:
        yield
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: the features cannot be written ({reason}); name another --out") from error


def _exists(path: Path) -> DataError:
    return DataError(f"{path} exists already; remove it or name another --out")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(".parquet needs pyarrow: pip install 'lift-fast[parquet]'") from error
    return pyarrow

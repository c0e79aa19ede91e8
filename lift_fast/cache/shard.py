"""One shard: a safetensors file whose header follows from the manifest.

    8 bytes     length of the header, little-endian
    header      JSON: the tensors below, and __metadata__ with the cache's identity, the shard's number, source,
                captions and stamp, and the SHA-256 of everything after the header; padded with spaces
    keys        int64 [rows]                hashes of the sample keys
    skipped     int64 [skipped]             only if there are any: numbers of rows without a vector, ascending; their
                                            codes are those of a row of zeros
    scales      float32 [rows]              only for codecs with scales
    pad         float32 [1], 0              only with scales of an odd number of rows: keeps the codes aligned
    codes       [rows, columns]             float32, bfloat16, int8, float8_e4m3, or uint8 for packed codecs

The spaces align the codes to a page of 4096 bytes, so that a row of 4096 codes needs one page of the disk and one entry
of the TLB instead of two. The manifest and a shard's number determine the header byte for byte. A reader refuses a file
with any other header without parsing it, so that a damaged or hostile shape or offset is never used.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
import torch
from torch import Tensor

from .. import foreign
from ..errors import CacheError
from ..files import open_regular
from ..foreign import Count
from ..ops.rows.codecs import CODECS
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import MappedFile
from .manifest import MOST_ROWS, Manifest, Shard

PAGE = 4096
AGAIN = "run the same lift-fast embed again"  # the end of messages: embed writes only the shards that are missing
_LONGEST_HEADER = 1 << 20
_SAFETENSORS = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


class _Texts(TypedDict):
    sha256: str
    captions: str


class _Metadata(_Texts, total=False):
    stamp: str


class _OneDimension(TypedDict):
    shape: tuple[Count]


class _Needed(TypedDict):
    __metadata__: _Metadata
    keys: _OneDimension


class _Header(_Needed, total=False):
    """What a header says of the rows."""

    skipped: _OneDimension


def tensors(manifest: Manifest, rows: int, skipped: int = 0) -> dict[str, tuple[torch.dtype, list[int]]]:
    """The tensors of a shard in the order of the file: name -> dtype and shape. skipped: rows without a vector."""
    codec = CODECS[manifest.codec]
    layout: dict[str, tuple[torch.dtype, list[int]]] = {"keys": (torch.int64, [rows])}
    if skipped:
        layout["skipped"] = (torch.int64, [skipped])
    if codec.scaled:
        layout["scales"] = (torch.float32, [rows])
        if rows % 2:
            layout["pad"] = (torch.float32, [1])
    return layout | {"codes": (codec.dtype, [rows, codec.columns(manifest.dim)])}


def header(manifest: Manifest, number: int, shard: Shard) -> bytes:
    """The bytes of shard `number` before its first tensor: the length, and the padded JSON."""
    metadata = {"cache": manifest.identity, "shard": str(number), "source": shard.source, "captions": shard.captions}
    if manifest.format >= 3:
        metadata["stamp"] = shard.stamp
    entries: dict[str, object] = {"__metadata__": {**metadata, "sha256": shard.sha256}}
    begin = end = 0
    for name, (dtype, shape) in tensors(manifest, shard.rows, shard.skipped).items():
        begin, end = end, end + int(np.prod(shape, dtype=object)) * dtype.itemsize
        entries[name] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + begin) % PAGE)  # begin: of the codes, which come last
    return len(text).to_bytes(8, "little") + text


def content(manifest: Manifest, rows: QuantizedRows, keys: np.ndarray, skipped: Sequence[int] = ()) -> bytes:
    """Everything after the header of a shard with these rows. keys: key hashes, int64 [rows]. skipped: the numbers of
    the rows without a vector, ascending."""
    values: dict[str, Tensor] = {"keys": torch.from_numpy(keys), "pad": torch.zeros(1), "codes": rows.codes}
    values["skipped"] = torch.tensor(skipped, dtype=torch.int64)
    if rows.scales is not None:
        values["scales"] = rows.scales
    flat = [values[name].cpu().contiguous().flatten() for name in tensors(manifest, len(rows), len(skipped))]
    return b"".join(part.view(torch.uint8).numpy().tobytes() for part in flat if part.numel())


def content_bytes(manifest: Manifest, shard: Shard) -> int:
    """The length of the `content` of a shard, in bytes."""
    layout = tensors(manifest, shard.rows, shard.skipped).values()
    return sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for dtype, shape in layout)


def describe(manifest: Manifest, number: int, path: Path) -> Shard:
    """The manifest's entry of shard `number`, read from the shard file that an earlier run or another rank wrote.

    Raises CacheError when the file is not a complete shard `number` of this cache. Its content is not checked.
    """
    entry = manifest.shards[number]
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("the length of its header is wrong")
            entries = foreign.parse_json(file.read(length))
        foreign.check(entries, _Header)
        metadata, [rows] = entries["__metadata__"], entries["keys"]["shape"]
        [skipped] = entries["skipped"]["shape"] if "skipped" in entries else [0]
        if not skipped <= rows <= MOST_ROWS:
            raise ValueError(f"its number of rows is {rows}, of which {skipped} are left out")
        texts = {name: metadata[name] for name in ("sha256", "captions")}
        found = replace(entry, rows=rows, skipped=skipped, stamp=metadata.get("stamp", ""), **texts)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged: {error}; remove it and {AGAIN}") from error
    with _opened(manifest, number, found, path):
        return found


class MappedShard:
    """Views of one memory-mapped file: codes [rows, columns], scales float32 [rows] or None, keys int64 [rows]; and
    skipped, int64, a copy: the numbers of the rows without a vector.

    A file that takes the place of this one changes nothing: what is mapped is the one that was opened. Call
    `check` after reading from the views.
    """

    def __init__(self, manifest: Manifest, number: int, path: Path, file: BinaryIO, begin: int):
        """begin: where the content of `file` begins. Raises OSError."""
        self._manifest, self._number, self._path = manifest, number, path
        status = os.fstat(file.fileno())
        self._file = status.st_dev, status.st_ino
        self._stamp = status.st_size, status.st_mtime_ns
        self._changed = status.st_ctime_ns
        self._mapped = MappedFile(file.fileno(), begin + content_bytes(manifest, manifest.shards[number]))
        views = _views(manifest, manifest.shards[number], self._mapped.bytes[begin:])
        self.codes, self.scales, self.keys = views["codes"], views.get("scales"), views["keys"]
        self.skipped = views["skipped"].clone()

    @property
    def lost(self) -> bool:
        """Whether a part of the file could not be read: all views are zeros from then on."""
        return self._mapped.lost

    def check(self) -> None:
        """Raises CacheError when the file was cut short or written to since it was mapped: what was read may be wrong.

        A file that only got another owner, mode or link has its checksum compared.
        """
        try:
            status = os.stat(self._path)
        except OSError:
            status = None
        if status is not None and (status.st_dev, status.st_ino) != self._file:
            status = None  # replaced, or removed; the file stays while it is mapped
        if self.lost or (status is not None and status.st_size < self._stamp[0]):
            raise CacheError(
                f"{self._path} was cut short while it was mapped, or its disk cannot be read; remove it and {AGAIN}"
            )
        if status is None:
            return
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise CacheError(
                f"{self._path} was written to while it was mapped, and rows that were read meanwhile may be wrong; "
                f"restore it, or remove it and {AGAIN}"
            )
        if status.st_ctime_ns != self._changed:
            check_content(self._manifest, self._number, self._path)
            self._changed = status.st_ctime_ns


def map_shard(manifest: Manifest, number: int, path: Path) -> MappedShard:
    """Maps shard `number`; reads only its header.

    Raises CacheError when it is missing, cut short, too long, or not the shard that the manifest describes, and when
    the operating system does not map it.
    """
    shard = manifest.shards[number]
    with _opened(manifest, number, shard, path) as file:
        try:
            mapped = MappedShard(manifest, number, path, file, file.tell())
        except OSError as error:
            raise CacheError(
                f"{path} cannot be mapped into memory: {error.strerror}; raise the limit on memory (ulimit -v) or on "
                "maps (vm.max_map_count), or close other programs"
            ) from error
    skipped = mapped.skipped.numpy()
    if mapped.lost:
        mapped.check()
    if len(skipped) and not (0 <= skipped[0] and skipped[-1] < shard.rows and (np.diff(skipped) > 0).all()):
        raise CacheError(f"{path} is damaged: the numbers of the rows left out are wrong; remove it and {AGAIN}")
    return mapped


def check_content(manifest: Manifest, number: int, path: Path) -> None:
    """Reads a whole shard and compares its checksum.

    Raises CacheError when it is missing or any bit has changed, and for a row that is not finite.
    """
    for _ in _checked_blocks(manifest, number, path):
        pass


def read_shard(manifest: Manifest, number: int, path: Path) -> tuple[QuantizedRows, Tensor]:
    """The rows and the key hashes of a shard, in memory of their own: those whose checksum was compared, whatever
    happens to the file. Raises CacheError as check_content."""
    shard, content = manifest.shards[number], bytearray()
    for block in _checked_blocks(manifest, number, path):
        content += block
    whole = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    views = _views(manifest, shard, whole)
    return QuantizedRows(views["codes"], views.get("scales"), manifest.codec, manifest.dim), views["keys"]


def _views(manifest: Manifest, shard: Shard, content: Tensor) -> dict[str, Tensor]:
    """The tensors of a shard as views of its content, uint8."""
    views, begin = {"skipped": torch.empty(0, dtype=torch.int64)}, 0
    for name, (dtype, shape) in tensors(manifest, shard.rows, shard.skipped).items():
        end = begin + int(np.prod(shape)) * dtype.itemsize
        views[name] = content[begin:end].view(dtype).view(shape)
        begin = end
    return views


def _checked_blocks(manifest: Manifest, number: int, path: Path) -> Iterator[bytes]:
    """The content of a shard in blocks, whose checksum is compared after the last one. Raises CacheError as
    check_content."""
    shard, digest, bad = manifest.shards[number], hashlib.sha256(), None
    with _opened(manifest, number, shard, path) as file:
        for name, (dtype, shape) in tensors(manifest, shard.rows, shard.skipped).items():
            row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
            at_once = max(1, (1 << 22) // row_bytes)
            for first in range(0, shape[0], at_once):
                size = min(at_once, shape[0] - first) * row_bytes
                block = _read(file, size, path)
                digest.update(block)
                if bad is None and name in ("scales", "codes") and len(block) == size:
                    bad = _first_not_finite(block, dtype, row_bytes, first)
                yield block
    if digest.hexdigest() != shard.sha256:
        raise CacheError(f"{path} is damaged: its checksum is not the manifest's; remove it and {AGAIN}")
    if bad is not None:
        raise CacheError(f"{path}: row {bad} is not finite, which no vector of an encoder is; remove it and {AGAIN}")


def _first_not_finite(block: bytes, dtype: torch.dtype, row_bytes: int, first: int) -> int | None:
    """The number of the first row with an element that is infinite or NaN; first: the number of the first row."""
    if dtype == torch.float32:
        bad = ~np.isfinite(np.frombuffer(block, "<f4"))
    elif dtype == torch.bfloat16:
        bad = (np.frombuffer(block, "<u2") & 0x7F80) == 0x7F80
    elif dtype == torch.float8_e4m3fn:
        bad = (np.frombuffer(block, np.uint8) & 0x7F) == 0x7F
    else:
        return None
    return first + int(bad.argmax()) // (row_bytes // dtype.itemsize) if bad.any() else None


def _opened(manifest: Manifest, number: int, shard: Shard, path: Path) -> BinaryIO:
    """Opens a shard after its header, which it validates, as it does the length. Raises CacheError."""
    expected = header(manifest, number, shard)
    wanted = len(expected) + content_bytes(manifest, shard)
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {AGAIN}") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    try:
        size = os.fstat(file.fileno()).st_size
        if _read(file, len(expected), path) != expected:
            raise CacheError(
                f"{path} is not the shard that the manifest describes: its header is damaged, or the file belongs to "
                f"another shard or another cache; remove it and {AGAIN}"
            )
        if size != wanted:
            raise CacheError(f"{path} is damaged: it has {size} bytes instead of {wanted}; remove it and {AGAIN}")
    except BaseException:
        file.close()
        raise
    return file


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    """The next bytes of a file, fewer where it ends. Raises CacheError."""
    try:
        data = file.read(size)
        while len(data) < size and (more := file.read(size - len(data))):
            data += more
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    return data

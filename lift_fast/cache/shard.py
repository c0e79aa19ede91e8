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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..ops.rows.codecs import CODECS
from ..ops.rows.quantized import QuantizedRows
from .manifest import Manifest, Shard

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
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("the length of its header is wrong")
            entries = json.loads(file.read(length))
        metadata, rows = entries["__metadata__"], entries["keys"]["shape"][0]
        if type(rows) is not int or not 0 <= rows < 1 << 48:
            raise ValueError(f"its number of rows is {rows!r}")
        skipped = entries["skipped"]["shape"][0] if "skipped" in entries else 0
        if type(skipped) is not int or not 0 <= skipped <= rows:
            raise ValueError(f"its number of rows left out is {skipped!r}")
        texts = {name: str(metadata[name]) for name in ("sha256", "captions")}
        found = replace(entry, rows=rows, skipped=skipped, stamp=str(metadata.get("stamp", "")), **texts)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: {error}; remove it and {AGAIN}") from error
    _check(path, header(manifest, number, found), manifest, found)
    return found


@dataclass(frozen=True)
class MappedShard:
    """Views of one memory-mapped file: codes [rows, columns], scales float32 [rows] or None, keys int64 [rows], and
    skipped, int64: the numbers of the rows without a vector."""

    codes: Tensor
    scales: Tensor | None
    keys: Tensor
    skipped: Tensor


def map_shard(manifest: Manifest, number: int, path: Path) -> MappedShard:
    """Maps shard `number`; reads only its header.

    Raises CacheError when it is missing, cut short, too long, or not the shard that the manifest describes.
    """
    shard = manifest.shards[number]
    expected = header(manifest, number, shard)
    size = _check(path, expected, manifest, shard)
    # A private map through torch: no file descriptor stays open, and a write to the tensors does not reach the file.
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    views, begin = {}, len(expected)
    for name, (dtype, shape) in tensors(manifest, shard.rows, shard.skipped).items():
        end = begin + int(np.prod(shape)) * dtype.itemsize
        views[name] = whole[begin:end].view(dtype).view(shape)
        begin = end
    skipped = views.get("skipped", torch.empty(0, dtype=torch.int64))
    if len(skipped) and not (0 <= skipped[0] and skipped[-1] < shard.rows and (skipped.diff() > 0).all()):
        raise CacheError(f"{path} is damaged: the numbers of the rows left out are wrong; remove it and {AGAIN}")
    return MappedShard(views["codes"], views.get("scales"), views["keys"], skipped)


def check_content(manifest: Manifest, number: int, path: Path) -> None:
    """Reads a whole shard and compares its checksum. Raises CacheError when it is missing or any bit has changed."""
    shard = manifest.shards[number]
    expected = header(manifest, number, shard)
    _check(path, expected, manifest, shard)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(len(expected))
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise CacheError(f"{path} is damaged: its checksum is not the manifest's; remove it and {AGAIN}")


def _check(path: Path, expected: bytes, manifest: Manifest, shard: Shard) -> int:
    """Validates a file's header and length, and returns the length in bytes. Raises CacheError."""
    wanted = len(expected) + content_bytes(manifest, shard)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            found = file.read(len(expected))
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {AGAIN}") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise CacheError(
            f"{path} is not the shard that the manifest describes: its header is damaged, or the file belongs to "
            f"another shard or another cache; remove it and {AGAIN}"
        )
    if size != wanted:
        raise CacheError(f"{path} is damaged: it has {size} bytes instead of {wanted}; remove it and {AGAIN}")
    return size

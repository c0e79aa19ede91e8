"""One shard: a safetensors file whose header is known before it is read.

    8 bytes     length of the header, little-endian
    header      JSON: the tensors below, and __metadata__ with the cache's identity, the shard's number, source and
                captions, and the SHA-256 of everything after the header; spaces to its end
    keys        int64 [rows]                hashes of the sample keys
    scales      float32 [rows]              codecs with scales
    pad         float32 [1]                 beside scales of an odd number of rows: 0
    codes       [rows, columns]             float32, bfloat16, int8, float8_e4m3, or uint8 for packed codecs

The spaces put the codes on a page of 4096 bytes: a row of 4096 codes is then one page of the disk and one entry of
the TLB, not two. The manifest and the number of a shard give its header byte for byte. A file with another one is
refused without a look at what it says, so that shapes and offsets in it cannot lead anywhere.
"""

import hashlib
import json
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
AGAIN = "run the same lift-fast embed again"  # it writes the shards that are missing
_LONGEST_HEADER = 1 << 20
_SAFETENSORS = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def tensors(manifest: Manifest, rows: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Name -> dtype and shape, in the order in which they lie in the file."""
    codec = CODECS[manifest.codec]
    layout: dict[str, tuple[torch.dtype, list[int]]] = {"keys": (torch.int64, [rows])}
    if codec.scaled:
        layout["scales"] = (torch.float32, [rows])
        if rows % 2:
            layout["pad"] = (torch.float32, [1])
    return layout | {"codes": (codec.dtype, [rows, codec.columns(manifest.dim)])}


def header(manifest: Manifest, number: int, shard: Shard) -> bytes:
    """The bytes before the first tensor of shard `number`."""
    told = {"cache": manifest.identity, "shard": str(number), "source": shard.source, "captions": shard.captions}
    entries: dict[str, object] = {"__metadata__": {**told, "sha256": shard.sha256}}
    at = codes = 0
    for name, (dtype, shape) in tensors(manifest, shard.rows).items():
        codes, begin = at, at
        at += int(np.prod(shape, dtype=object)) * dtype.itemsize
        entries[name] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": [begin, at]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + codes) % PAGE)
    return len(text).to_bytes(8, "little") + text


def content(manifest: Manifest, rows: QuantizedRows, keys: np.ndarray) -> bytes:
    """Everything after the header. keys: int64 [rows]."""
    values: dict[str, Tensor] = {"keys": torch.from_numpy(keys), "pad": torch.zeros(1), "codes": rows.codes}
    if rows.scales is not None:
        values["scales"] = rows.scales
    flat = [values[name].cpu().contiguous().flatten() for name in tensors(manifest, len(rows))]
    return b"".join(part.view(torch.uint8).numpy().tobytes() for part in flat if part.numel())


def content_bytes(manifest: Manifest, rows: int) -> int:
    """The length of `content`, in bytes."""
    return sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for dtype, shape in tensors(manifest, rows).values())


def describe(manifest: Manifest, number: int, path: Path) -> Shard:
    """The manifest's entry of a shard that an earlier run or another rank wrote, from the shard itself.

    Raises CacheError: not a whole shard `number` of this cache.
    """
    entry = manifest.shards[number]
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("its header does not fit in it")
            read = json.loads(file.read(length))
        told, rows = read["__metadata__"], read["keys"]["shape"][0]
        if type(rows) is not int or not 0 <= rows < 1 << 48:
            raise ValueError(f"it says it has {rows!r} rows")
        found = replace(entry, rows=rows, sha256=str(told["sha256"]), captions=str(told["captions"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: {error}; remove it and {AGAIN}") from error
    _check(path, header(manifest, number, found), manifest, found)
    return found


@dataclass(frozen=True)
class MappedShard:
    """codes [rows, columns], scales float32 [rows] or None, keys int64 [rows]: views of one mapped file."""

    codes: Tensor
    scales: Tensor | None
    keys: Tensor


def map_shard(manifest: Manifest, number: int, path: Path) -> MappedShard:
    """Maps shard `number`, having read its header and nothing else.

    Raises CacheError: missing, cut short, too long, or not the shard that the manifest describes.
    """
    shard = manifest.shards[number]
    before = header(manifest, number, shard)
    size = _check(path, before, manifest, shard)
    # A private map through torch: no file descriptor stays open, and a write would not reach the file.
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    views, at = {}, len(before)
    for name, (dtype, shape) in tensors(manifest, shard.rows).items():
        end = at + int(np.prod(shape)) * dtype.itemsize
        views[name] = whole[at:end].view(dtype).view(shape)
        at = end
    return MappedShard(views["codes"], views.get("scales"), views["keys"])


def check_content(manifest: Manifest, number: int, path: Path) -> None:
    """Reads a whole shard. Raises CacheError when it is missing or one bit of it is not what was written."""
    shard = manifest.shards[number]
    before = header(manifest, number, shard)
    _check(path, before, manifest, shard)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(len(before))
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise CacheError(f"{path} is damaged: its checksum is not the manifest's; remove it and {AGAIN}")


def _check(path: Path, before: bytes, manifest: Manifest, shard: Shard) -> int:
    """The size of a file that begins with `before` and has the length it must have. Raises CacheError."""
    wanted = len(before) + content_bytes(manifest, shard.rows)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            found = file.read(len(before))
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {AGAIN}") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    if found != before:
        raise CacheError(
            f"{path} is not the shard that the manifest describes: its header is damaged, or it is another shard's or "
            f"another cache's; remove it and {AGAIN}"
        )
    if size != wanted:
        raise CacheError(f"{path} is damaged: it has {size} bytes and should have {wanted}; remove it and {AGAIN}")
    return size

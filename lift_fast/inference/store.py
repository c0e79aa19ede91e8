"""The features of a data set's images on disk: safetensors files, which are mapped when they are read.

    00000.safetensors, …       one file for each shard of the data set, or for each 10 000 samples of a larger one
        codes, scales          the features in a codec of the text cache (ops/rows/codecs.py)
        rows     int64 [n]     their samples, counted from the first one of the file, ascending
        keys     uint8         the sample keys in UTF-8, one after the other
        ends     int64 [n]     where each key ends
        bad      uint8         JSON: [row, cause, reason] of each sample that has no feature
        __metadata__           format, codec, and a stamp of the model, of the data and of the place in it

A file whose stamp is another, or that is damaged, is made again. Each appears whole or not at all, so a run that was
killed goes on at the first missing one.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import foreign
from ..cache.codec import encode as quantize
from ..data.samples import BadSample, Samples, located
from ..data.skipped import in_words
from ..data.stamps import data_stamp
from ..errors import ConfigError, DataError
from ..files import open_regular, remove_abandoned, write_whole
from ..ops.rows.codecs import CODECS
from ..ops.rows.quantized import QuantizedRows
from ..progress import bar
from .features import encode_images
from .model import Model

_FORMAT = "lift-fast image features 1"
_ROWS = 10_000  # samples of a file at most


class Bad(NamedTuple):
    """A sample without a feature. sample: its number in the data set; cause, reason: as of data.samples.BadSample."""

    sample: int
    cause: str
    reason: str


@dataclass(frozen=True)
class Part:
    """The features of some successive samples of a data set, those of one file.

    first: the number of the first sample. rows: int64 [n], the samples of the n features, counted from it. keys, ends:
    uint8 and int64 [n], the sample keys one after the other and where each ends. bad: [row, cause, reason] of the
    samples without a feature.
    """

    first: int
    features: QuantizedRows
    rows: Tensor
    keys: Tensor
    ends: Tensor
    bad: list[list[Any]]

    def __len__(self) -> int:
        return len(self.features)

    def key(self, i: int) -> str:
        """The key of feature i."""
        begin = int(self.ends[i - 1]) if i else 0
        return self.keys[begin : int(self.ends[i])].numpy().tobytes().decode(errors="replace")

    def all_keys(self) -> list[str]:
        """The keys of all features."""
        text, ends = self.keys.numpy().tobytes(), self.ends.tolist()
        return [text[begin:end].decode(errors="replace") for begin, end in zip([0, *ends], ends, strict=False)]


class Store:
    """The features of a data set's images, in the order of its samples, without those of bad samples.

    len(store): number of features. dim: length of one. parts: in order. starts: the number of the first feature of each
    part, and at the end of all. bad: the samples without a feature.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.dim = parts[0].features.dim
        self.starts = list(accumulate(map(len, parts), initial=0))
        self.bad = [Bad(part.first + row, cause, reason) for part in parts for row, cause, reason in part.bad]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def causes(self) -> dict[str, int]:
        """How many samples have no feature, by cause."""
        return dict(Counter(bad.cause for bad in self.bad).most_common())

    def nothing(self, data: Samples) -> DataError:
        """The error for a data set of which no image decodes."""
        return DataError(f"{data.folder}: no image decodes ({in_words(Counter(self.causes))})")

    def key(self, i: int) -> str:
        """The sample key of feature i. Raises IndexError."""
        number, row = located(i, self.starts[1:], Path("the features"))
        return self.parts[number].key(row)

    def sample(self, i: int) -> int:
        """The number of the sample of feature i in the data set. Raises IndexError."""
        number, row = located(i, self.starts[1:], Path("the features"))
        return self.parts[number].first + int(self.parts[number].rows[row])


@dataclass(frozen=True)
class _Piece:
    """A file of a store: samples `first` to `first + size - 1`, from row `row` of shard `number`."""

    path: Path
    stamp: str
    number: int
    row: int
    first: int
    size: int


def build(
    model: Model,
    data: Samples,
    folder: Path,
    identity: str,
    *,
    codec: str = "int8",
    remedy: str = "name another folder",
    batch_size: int = 64,
    progress: bool = False,
) -> Store:
    """The store of a data set in `folder`: computes the features that it lacks, or under which the data has changed.

    identity: of the model and of how the data is read (model_identity). codec: how features are stored, a key of
    ops.rows.codecs.CODECS that is not rotated. remedy: what to do where the folder cannot be written, for the message.
    batch_size: images encoded at once. progress: whether to show a bar on stderr.

    Needs memory for 10 000 features, and for three batches of decoded images. Bad images get no feature; `Store.bad`
    has them.

    Raises ConfigError when files cannot be written, and for features that are not finite; DataError when a shard
    of the data set cannot be read at all.
    """
    pieces = _pieces(data, folder, identity)
    parts = [_read(piece, codec) for piece in pieces]
    missing = [piece for piece, part in zip(pieces, parts, strict=True) if part is None]
    done = len(data) - sum(piece.size for piece in missing)
    remove_abandoned(folder)
    with bar(desc="images", total=len(data), initial=done, unit="image", disable=not progress or not missing) as shown:
        for piece in missing:
            _write(piece.path, _content(model, data, piece, codec, batch_size, shown.update), remedy)
    if missing:
        for path in {*folder.glob("*.safetensors")} - {piece.path for piece in pieces}:
            with suppress(OSError):
                path.unlink()  # of samples that are gone
        parts = [_read(piece, codec) for piece in pieces]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts) or len({part.features.dim for part in whole}) > 1:
        raise ConfigError(f"{folder}: another process changes the features there; run the command again")
    return Store(whole)


def model_identity(model: Model, *more: object) -> str:
    """A digest of all that decides a model's image features: its weights, their dtype and the preprocessing; 32 hex
    digits. more: JSON values that enter it too."""
    return weights_digest(model.module.state_dict(), model.preprocess.as_dict(), *more)


def weights_digest(state: Mapping[str, Any], *more: object) -> str:
    """A digest of weights and their dtypes, and of the JSON values `more`; 32 hex digits."""
    digest = hashlib.sha256(json.dumps([*more], sort_keys=True).encode())
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _pieces(data: Samples, folder: Path, identity: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    first = 0
    for number, size in enumerate(data.shard_sizes):
        stamp = f"{identity} {data_stamp(data, number, first)}"
        for row in range(0, size, _ROWS):
            path = folder / f"{len(pieces):05d}.safetensors"
            pieces.append(_Piece(path, f"{stamp} {row}", number, row, first + row, min(_ROWS, size - row)))
        first += size
    return pieces


def _content(
    model: Model, data: Samples, piece: _Piece, codec: str, batch_size: int, update: Callable[[int], Any]
) -> bytes:
    """The content of a file: computes its features. update: is given the numbers of samples that are done."""
    first, names = piece.first, data.shard_keys(piece.number)[piece.row : piece.row + piece.size]
    bad: dict[int, BadSample] = {
        row - piece.row: error
        for row, error in data.bad_keys(piece.number).items()
        if piece.row <= row < piece.row + piece.size
    }
    update(len(bad))
    wanted = [first + row for row in range(piece.size) if row not in bad]
    features: list[QuantizedRows] = []
    rows: list[int] = []
    for batch in encode_images(model, data.image_bytes, wanted, batch_size=batch_size):
        features.append(quantize(batch.features.cpu(), codec))
        rows += [i - first for i in batch.numbers]
        bad |= {i - first: error for i, error in batch.bad.items()}
        update(len(batch.numbers) + len(batch.bad))
    whole = QuantizedRows.cat(features or [quantize(model.encode_image([]).cpu(), codec)])
    keys = [names[row].encode() for row in rows]
    tensors = {
        "codes": whole.codes,
        "rows": torch.tensor(rows, dtype=torch.int64),
        "keys": _as_tensor(b"".join(keys)),
        "ends": torch.tensor(list(accumulate(map(len, keys))), dtype=torch.int64),
        "bad": _as_tensor(json.dumps([[row, bad[row].cause, bad[row].reason] for row in sorted(bad)]).encode()),
    }
    if whole.scales is not None:
        tensors["scales"] = whole.scales
    return save(tensors, _metadata(piece, codec))


def _metadata(piece: _Piece, codec: str) -> dict[str, str]:
    return {"format": _FORMAT, "codec": codec, "stamp": piece.stamp}


def _as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _write(path: Path, content: bytes, remedy: str) -> None:
    """Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content})
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path.parent}: the features cannot be written ({reason}); {remedy}") from error


def _read(piece: _Piece, codec: str) -> Part | None:
    """The part in a file, mapped; None where there is none, it is damaged, or made from something else."""
    try:
        open_regular(piece.path).close()
        with safe_open(piece.path, "pt") as file:
            if file.metadata() != _metadata(piece, codec):
                return None
            names = ("codes", "rows", "keys", "ends", "bad", *(("scales",) if CODECS[codec].scaled else ()))
            tensors = {name: file.get_tensor(name) for name in names}
        codes, rows, ends, scales = tensors["codes"], tensors["rows"], tensors["ends"], tensors.get("scales")
        features = QuantizedRows(codes, scales, codec, codes.shape[1])  # checks their shapes
        bad = foreign.parse_json(tensors["bad"].numpy().tobytes())
        foreign.check(bad, list[tuple[int, str, str]])
        part = Part(piece.first, features, rows, tensors["keys"], ends, bad)
        known = torch.cat([rows, torch.tensor([row for row, _, _ in bad], dtype=torch.int64)]).sort().values
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError, OverflowError):
        return None
    whole = rows.dtype == ends.dtype == torch.int64 and part.keys.dtype == torch.uint8
    whole = whole and torch.equal(known, torch.arange(piece.size)) and bool((rows.diff() > 0).all())
    whole = whole and len(rows) == len(ends) == len(part) and bool((ends.diff() >= 0).all())
    whole = whole and (ends[-1:].tolist() or [0]) == [len(part.keys)]
    finite = scales is None or bool((scales.isfinite() & (scales >= 0)).all())
    return part if whole and finite else None

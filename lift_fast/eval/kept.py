"""Features that evaluation keeps on disk and uses again: safetensors files in a folder, which may be deleted any time.

    images/MODEL/PIECE.safetensors   of successive samples of a data set
        features  float32 [n, dim]   of the samples whose image decodes
        samples   int64 [n]          their numbers, counted from the first one of the piece, ascending
        causes    uint8              JSON: {cause: number of the other samples}
    texts/MODEL/DIGEST.safetensors   of texts; each evaluation that meets new ones adds files
        vectors   float32 [n, dim]   zeros for a text without tokens
        texts     uint8              in UTF-8, one after the other
        ends      int64 [n]          where each ends
        __metadata__ of both         format, identity, and sha256 of the tensors

MODEL is a digest of all that decides the features (Subject, Images.made_by), PIECE one of the images: of sizes and
times of their files, and of the content of a few, which differs where another column of a table is read. So a set has
the same files under any name, and what has changed has others. Versions of libraries are not in it: they change
features by rounding errors. A text's vector may also differ by rounding with the texts that were encoded with it.

A file that is damaged or of another format is made again. Each appears whole or not at all: an evaluation that was
killed goes on at the first missing one.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import foreign
from ..data.samples import BadSample, Samples, located
from ..data.stamps import data_stamp
from ..files import remove_abandoned, write_whole

_FORMAT = "lift-fast evaluation features 1"
_TEXTS = 1 << 13  # in a file at most
_MOST_DIM = 1 << 16
_MOST_BYTES = {"texts": 1 << 28, "causes": 1 << 16}
_DTYPES = {"features": "F32", "samples": "I64", "causes": "U8", "vectors": "F32", "texts": "U8", "ends": "I64"}
# What reading a file that is missing, damaged or made to do harm may raise.
_UNUSABLE = (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, RecursionError)


class Piece(NamedTuple):
    """The images of some successive samples that decode. features: float32 [n, dim] on the CPU; samples: their n sample
    numbers, ascending; causes: how many others there are, by cause."""

    features: Tensor
    samples: list[int]
    causes: Counter[str]


class Kept:
    """A folder of the features of a model. One that cannot be written to is read all the same; a warning says so once.

    image_identity, text_identity: as Subject has them; of None nothing is kept.
    """

    def __init__(self, folder: Path, image_identity: str | None, text_identity: str | None):
        self.folder, self._image, self._text = folder, image_identity, text_identity
        self._refused = False

    def images(self, data: Samples, made_by: Sequence[object]) -> "KeptImages | None":
        """Those of the images of a data set. made_by: of eval.images.Images. Raises DataError as shard_hashes of it."""
        return None if self._image is None else KeptImages(self, data, _digest(self._image, *made_by))

    def texts(self) -> "KeptTexts | None":
        """Those of texts."""
        return None if self._text is None else KeptTexts(self, _digest(self._text))

    def write(self, path: Path, tensors: Mapping[str, Tensor], identity: str) -> None:
        """Writes a file of features, unless one of them is not finite."""
        if self._refused or not all(tensor.isfinite().all() for tensor in tensors.values()):
            return
        about = _metadata(identity) | {"sha256": _sha256(tensors)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: save(dict(tensors), about)})
        except OSError as error:
            self._refused = True
            reason = error.strerror or error
            warnings.warn(f"features are not kept: {self.folder} cannot be written ({reason})", stacklevel=2)


class KeptImages:
    """The features of the images of a data set, in pieces: ranges of sample numbers."""

    def __init__(self, kept: Kept, data: Samples, identity: str):
        self._kept, self._data, self._identity = kept, data, identity
        self._folder = kept.folder / "images" / identity
        remove_abandoned(self._folder)
        self._starts = [0, *accumulate(data.shard_sizes)]
        self._stamps = [data_stamp(data, number, first) for number, first in enumerate(self._starts[:-1])]

    def read(self, piece: range) -> Piece | None:
        """The features of a piece; None where they are not kept."""
        path, identity = self._place(piece)
        try:
            tensors = _read(path, identity, ("features", "samples", "causes"), len(piece))
            features, samples = tensors["features"], tensors["samples"]
            causes = foreign.parse_json(tensors["causes"].numpy().tobytes())
            foreign.check(causes, dict[str, foreign.Count])
            rows = samples.tolist()
            known = len(rows) + sum(causes.values())
        except _UNUSABLE:
            return None
        whole = samples.dim() == 1 and len(features) == len(rows) and known == len(piece) and 0 not in causes.values()
        whole = whole and rows == sorted({*rows}) and all(0 <= row < len(piece) for row in rows)
        return Piece(features, [piece.start + row for row in rows], Counter(causes)) if whole else None

    def write(self, piece: range, made: Piece) -> None:
        """Keeps the features of a piece."""
        path, identity = self._place(piece)
        causes = json.dumps(dict(sorted(made.causes.items()))).encode()
        samples = torch.tensor(made.samples, dtype=torch.int64) - piece.start
        self._kept.write(path, {"features": made.features, "samples": samples, "causes": _as_tensor(causes)}, identity)

    def _place(self, piece: range) -> tuple[Path, str]:
        """The file of a piece, and its identity."""
        first = located(piece[0], self._starts[1:], self._data.folder)[0]
        last = located(piece[-1], self._starts[1:], self._data.folder)[0]
        stamps = self._stamps[first : last + 1]
        shown = sorted({piece[0], piece[len(piece) // 2], piece[-1]})
        name = _digest(piece[0] - self._starts[first], len(piece), stamps, *map(self._content, shown))
        return self._folder / f"{name}.safetensors", f"{self._identity} {name}"

    def _content(self, sample: int) -> str:
        try:
            return hashlib.sha256(self._data.image_bytes(sample)).hexdigest()
        except BadSample as error:
            return error.cause


class KeptTexts:
    """The features of texts."""

    def __init__(self, kept: Kept, identity: str):
        self._kept, self._identity = kept, identity
        self._folder = kept.folder / "texts" / identity
        remove_abandoned(self._folder)

    def find(self, texts: Sequence[str]) -> list[tuple[list[int], Tensor]]:
        """Those of the texts, each different, that are kept: their positions, and their vectors, float32 [n, dim]; in
        several parts."""
        wanted = {text: i for i, text in enumerate(texts)}
        parts: list[tuple[list[int], Tensor]] = []
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                rows = {wanted[text]: row for row, text in enumerate(self._texts(path)) if text in wanted}
                if not rows:
                    continue
                found = _read(path, self._identity, ("vectors", "texts", "ends"), _TEXTS)["vectors"]
                parts.append(([*rows], found[[*rows.values()]]))
            except _UNUSABLE:
                continue
            for position in rows:
                del wanted[texts[position]]
        return parts

    def add(self, texts: Sequence[str], vectors: Tensor) -> None:
        """Keeps the vectors of texts, float32 [n, dim]."""
        encoded = [text.encode() for text in texts]
        for start in range(0, len(texts), _TEXTS):
            several = encoded[start : start + _TEXTS]
            tensors = {
                "vectors": vectors[start : start + _TEXTS].contiguous(),
                "texts": _as_tensor(b"".join(several)),
                "ends": torch.tensor(list(accumulate(map(len, several))), dtype=torch.int64),
            }
            self._kept.write(self._folder / f"{_sha256(tensors)[:32]}.safetensors", tensors, self._identity)

    def _texts(self, path: Path) -> list[str]:
        """The texts in a file. Raises one of _UNUSABLE."""
        tensors = _read(path, self._identity, ("texts", "ends"), _TEXTS, whole=False)
        content, ends = tensors["texts"].numpy().tobytes(), tensors["ends"].tolist()
        if not ends or ends != sorted(ends) or ends[0] < 0 or ends[-1] != len(content):
            raise ValueError("these are not the ends of texts")
        return [content[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]


def _read(path: Path, identity: str, names: Sequence[str], most: int, whole: bool = True) -> dict[str, Tensor]:
    """Tensors of a file. most: rows. whole: they are all that it has, and are checked to be those that were written.

    Raises one of _UNUSABLE for a file that is not one of these.
    """
    if not path.is_file():  # opening a pipe would wait forever
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        checksum = about.pop("sha256", "")
        if about != _metadata(identity):
            raise ValueError("it is of another format, or of something else")
        for name in names:
            part = file.get_slice(name)
            size, *width = part.get_shape()
            if part.get_dtype() != _DTYPES[name] or len(width) != (name in ("features", "vectors")):
                raise ValueError(f"{name} is of another dtype or shape")
            if size > _MOST_BYTES.get(name, most) or not all(1 <= dim <= _MOST_DIM for dim in width):
                raise ValueError(f"{name} is larger than what is written")
        tensors = {name: file.get_tensor(name).clone() for name in names}  # they would end with the file
    if whole and _sha256(tensors) != checksum:
        raise ValueError("it is damaged")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("a feature is not finite")
    return tensors


def _metadata(identity: str) -> dict[str, str]:
    return {"format": _FORMAT, "identity": identity}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(*values: object) -> str:
    """Of JSON values; 32 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())

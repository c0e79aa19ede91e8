"""The conditioning of a cache that is being made: fitted to a sample of captions, found in its folder, or of another.

Every rank fits to the same sample and writes its fit into the cache's folder unless there is one; then all read the one
that is there. Conditioning.about["asked"] says what the command asked for, so that a run that goes on takes the fit of
the run before, and a command that asks for something else is refused.
"""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache, Conditioning, Manifest
from ..cache.conditioning import CONDITIONING, Dim, Power, Statistics, check_rows, check_settings, fit
from ..cache.manifest import MANIFEST, PARTIAL
from ..cache.tools import sample_of, statistics_of
from ..data.sources import Source
from ..errors import CacheError, CacheMismatch, ConfigError
from ..files import write_first
from ..progress import bar
from .spec import without_path

_LEAST_ROWS, _ROWS_PER_AXIS = 1 << 14, 4  # of the default sample: 16 384, or 4 for each axis of the encoder
_CHUNK = 1 << 14  # captions encoded in one call
_LONGEST = -1.2345678901234567e-100  # a float of the most digits, for the size of a file that is not there yet


@dataclass(frozen=True)
class Request:
    """A conditioning that is to be fitted.

    power, dim: as for cache.conditioning.fit. rows: captions of the sample, at most, drawn without repeats by `seed`;
    None: 16 384, or 4 for each axis of the encoder's vectors if that is more.

    Raises ConfigError for a value out of range.
    """

    power: Power = "auto"
    dim: Dim = None
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.power, self.dim)
        sample_of(0, self.sample_rows(0), self.seed)  # for its checks
        if self.seed < 0:
            raise ConfigError(f"the seed of a sample must be 0 or above, not {self.seed}")

    def sample_rows(self, source_dim: int) -> int:
        """The captions of the sample, at most, for vectors of length source_dim."""
        return max(_LEAST_ROWS, _ROWS_PER_AXIS * source_dim) if self.rows is None else self.rows

    def check(self, source_dim: int, captions: Sequence[int]) -> None:
        """Raises ConfigError when more axes are to be kept than vectors of length source_dim have, or than samples of
        sets with so many captions determine: both are known before any is encoded."""
        if isinstance(self.dim, int) and self.dim > source_dim:
            raise ConfigError(f"vectors of length {source_dim} have {source_dim} axes, not {self.dim}; keep fewer")
        if self.dim != "auto" and all(captions):  # of an empty set `fit` says so
            most = self.sample_rows(source_dim)
            check_rows(sum(min(most, count) for count in captions), self.dim or source_dim)

    def asked(self, encoder: dict[str, Any], source_dim: int, **sample: Any) -> dict[str, Any]:
        """The request as JSON values, for Conditioning.about. encoder: its settings. sample: what it is drawn from.

        Runs and exports carry them to other machines: of the path of an encoder's folder they have a hash.
        """
        if (name := str(encoder.get("name", ""))) != (known := without_path(name)):
            digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
            encoder = encoder | {"name": f"{known} (path {digest})"}
        power = self.power if self.power == "auto" else float(self.power)
        settings = {"power": power, "dim": self.dim, "rows": self.sample_rows(source_dim), "seed": self.seed}
        return json.loads(json.dumps(settings | {"encoder": encoder} | sample))

    def of_source(self, source: Source, encoder: dict[str, Any], source_dim: int) -> dict[str, Any]:
        """`asked` for a sample of the captions of a source."""
        return self.asked(encoder, source_dim, field=source.field, captions=sum(source.sizes))

    def of_caches(self, caches: Sequence[Cache], weights: Sequence[float]) -> dict[str, Any]:
        """`asked` for samples of the vectors of caches, of which each counts as much as its weight."""
        shards = ["".join(shard.sha256 for shard in cache.manifest.shards) for cache in caches]
        drawn = [blake2b(hashes.encode(), digest_size=16).hexdigest() for hashes in shards]
        first = caches[0]
        return self.asked(first.manifest.encoder, first.dim, caches=drawn, weights=[float(w) for w in weights])

    def at_most(self, source_dim: int, asked: dict[str, Any]) -> Conditioning:
        """A conditioning of zeros whose file is at most as much smaller than the fitted one's as numbers have digits,
        and never smaller, to estimate sizes with. `auto` dims are all."""
        dim = self.dim if isinstance(self.dim, int) else source_dim
        rows = min(self.sample_rows(source_dim), asked["captions"])
        cosines = {"before": _LONGEST, "after": _LONGEST}
        known = {"asked": asked, "rows": [rows], "weights": [1.0], "mean_cosine": cosines}
        zeros = torch.zeros(source_dim, dtype=torch.float64)
        power = 0.75 if self.power == "auto" else float(self.power)
        return Conditioning(zeros, torch.zeros(dim, source_dim), zeros.clone(), power, known)


def fit_to_source(
    request: Request,
    source: Source,
    encode: Callable[[list[str], Callable[[int], object]], Tensor],
    source_dim: int,
    asked: dict[str, Any],
    title: str,
    progress: bool = True,
) -> Conditioning:
    """Fits a conditioning to a sample of the captions of a source, read shard by shard.

    encode(captions, done) returns their vectors [n, source_dim], zeros for a caption without tokens, which is passed
    over as bad captions are; it calls done with a count after each batch. asked: of `request`. title: of the bar.

    Raises DataError as Source.read, ConfigError for a sample that is too small for the axes, and what encode raises.
    """
    chosen = sample_of(sum(source.sizes), request.sample_rows(source_dim), request.seed)
    captions, found = _captions(source, chosen), Statistics(source_dim)
    with bar(total=len(chosen), unit=" captions", unit_scale=True, desc=title, disable=not progress) as shown:
        while chunk := list(islice(captions, _CHUNK)):
            found.add(encode(chunk, shown.update))
    return fit([found], power=request.power, dim=request.dim, about={"asked": asked})


def fit_to_caches(
    request: Request,
    caches: Sequence[Cache],
    weights: Sequence[float],
    asked: dict[str, Any],
    progress: bool = True,
) -> Conditioning:
    """Fits a conditioning to samples of caches of one encoder, of which each counts as much as its weight.

    asked: of `request`. Raises ConfigError as cache.conditioning.fit and for a conditioned cache, CacheError for a
    damaged shard.
    """
    rows = request.sample_rows(caches[0].dim)
    statistics = [statistics_of(cache, rows, request.seed, progress) for cache in caches]
    return fit(statistics, weights, power=request.power, dim=request.dim, about={"asked": asked})


def found_in(folder: Path, asked: dict[str, Any]) -> Conditioning | None:
    """The conditioning in the folder of a cache, which an earlier run or another rank has written; None without one.

    Raises CacheMismatch when something else was asked for, or the folder holds a cache that is not conditioned;
    CacheError for a damaged file.
    """
    manifest = _manifest_of(folder)
    if manifest is None and not (folder / CONDITIONING).exists():
        return None
    if manifest is not None and manifest.conditioning is None:
        raise CacheMismatch(f"{folder} holds a cache that is not conditioned; name another folder")
    entry, dim = (manifest.conditioning, manifest.dim) if manifest else (None, None)
    found = Conditioning.load(folder, entry, dim)
    differences = _differences(found.about.get("asked"), asked)
    if differences:
        raise CacheMismatch(
            f"{folder / CONDITIONING} was fitted for another command ({'; '.join(differences)}); repeat that command's "
            "options, or name another folder"
        )
    return found


def check_folder(folder: Path, conditioning: Conditioning | None) -> None:
    """Raises CacheMismatch when the folder has another conditioning and no cache yet: one that was to be conditioned by
    it is not begun. CacheWriter compares with a cache that is."""
    if _manifest_of(folder) is None and (folder / CONDITIONING).exists():
        found = Conditioning.load(folder)
        if conditioning is None or conditioning.as_dict() != found.as_dict():
            raise CacheMismatch(
                f"{folder / CONDITIONING} is the conditioning of another cache, which is not begun; remove it, or name "
                "another folder"
            )


def publish(folder: Path, fitted: Conditioning) -> Conditioning:
    """Writes a conditioning into the folder of a cache unless there is one, and returns the one that is there.

    Raises CacheError when it cannot be written, and as `found_in`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_first(folder / CONDITIONING, fitted.to_bytes())
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise CacheError(
            f"cannot write {folder / CONDITIONING}: {reason}; remove the cause and run the same command again"
        ) from error
    found = found_in(folder, fitted.about["asked"])
    assert found is not None
    return found


def conditioning_of(cache: Cache, encoder: dict[str, Any], source_dim: int, what: str) -> Conditioning:
    """The conditioning of a cache, for the vectors of another one. encoder, source_dim, what: as for `check_encoder`.

    Raises ConfigError when the cache is not conditioned, CacheMismatch when its encoder is another.
    """
    found = cache.conditioning
    if found is None:
        raise ConfigError(f"{cache.folder} is not conditioned; name a cache that is, or a power from 0 to 1")
    check_encoder(cache, encoder, source_dim, what)
    return found


def check_encoder(cache: Cache, encoder: dict[str, Any], source_dim: int, what: str) -> None:
    """Raises CacheMismatch unless a cache was made by the encoder with these settings, whose vectors have length
    source_dim. what: names the captions that it encodes, for the message."""
    mine, theirs = json.loads(json.dumps(encoder)), cache.manifest.encoder
    differences = _differences({"encoder": theirs}, {"encoder": mine})
    length = cache.conditioning.source_dim if cache.conditioning else cache.dim
    if length != source_dim:
        differences.append(f"its vectors have length {length}, not {source_dim}")
    if differences:
        raise CacheMismatch(
            f"{cache.folder} was not made by the encoder of {what} ({'; '.join(differences)}), and a conditioning is "
            "for one encoder; embed both with the same settings, or fit another conditioning"
        )


def _captions(source: Source, chosen: np.ndarray) -> Iterator[str]:
    """The captions with these numbers, ascending, that can be used. Raises as Source.read."""
    starts = np.cumsum([0, *source.sizes])
    for number, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, stop)] - start
        if not len(rows):
            continue
        read = source.read(number)
        usable = (read.captions[row] for row in rows.tolist() if row not in read.bad)
        yield from (caption for caption in usable if caption is not None)


def _manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a cache, finished or not, None without one. Raises CacheError for a damaged one."""
    # Another process may replace partial.json by manifest.json meanwhile.
    for path in (folder / MANIFEST, folder / PARTIAL, folder / MANIFEST):
        if path.exists():
            try:
                return Manifest.load(path)
            except CacheError:
                if path.exists():
                    raise
    return None


def _differences(found: Any, asked: dict[str, Any]) -> list[str]:
    """How what was asked for before differs, each difference as a text such as "power is 'auto', not 0.5"."""
    theirs, mine = _flat(found), _flat(asked)
    return [
        f"{name} is {theirs.get(name)!r}, not {mine.get(name)!r}"
        for name in sorted({*theirs, *mine})
        if theirs.get(name) != mine.get(name)
    ]


def _flat(asked: Any) -> dict[str, Any]:
    """The settings with those of the encoder among them."""
    settings = dict(asked) if isinstance(asked, dict) else {}
    encoder = settings.pop("encoder", None)
    named = encoder if isinstance(encoder, dict) else {}  # what a file holds need not be of `asked`
    return settings | {f"encoder {name}": value for name, value in named.items()}

"""Conditioning of text vectors: mean subtracted, principal axes, each divided by a power of its deviation.

A frozen encoder's vectors crowd into a cone: they share a mean, and few directions hold most of what tells captions
apart. With m the mean of the encoder's unit vectors, a_i their principal axes (rows of A), s_i the standard deviation
along a_i and p the power,

    y_i = s_i^-p · a_i · (x/|x| - m),    i = 0 … dim - 1,    c(x) = y/|y|

p = 0 subtracts the mean and rotates; p = 1 whitens (Su et al., arXiv 2103.15316). Axes come in descending order of
their deviation, so that keeping the first `dim` of them shortens vectors at the least loss of variance. An axis without
variance gives 0. A row of zeros, which stands for a missing vector, stays one.

The statistics are those of a sample of captions. They are stored once, in conditioning.safetensors beside the manifest,
which holds the file's SHA-256, so that all caches with one conditioning are known to have it. A query is conditioned by
the same numbers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from .. import foreign
from ..errors import CacheError, ConfigError
from ..files import read_regular

CONDITIONING = "conditioning.safetensors"
_BLOCK = 1 << 22  # numbers conditioned at a time: 16 MB of float32, enough rows for a fast matrix product
_SAMPLE = 1 << 11  # vectors that are kept to measure the mean cosine
_LOST = 1e-5  # axes with a smaller deviation, as a fraction of the largest, hold rounding errors alone
_LEAST = 1e-6  # and so do axes of unit vectors with a smaller one: its square is what sums of many rows round by
_AUTO_VARIANCE = 0.99  # of the vectors' variance that `auto` dims keep
_AUTO_MULTIPLE = 32  # of which `auto` dims are a multiple: rows stay aligned
_AUTO_POWER = (0.0, 0.75)  # limits of the power that `auto` chooses

_LARGEST_DIM = 1 << 24
_MOST_BYTES = 1 << 32  # of a file: axes of 32 768 numbers

Power = float | Literal["auto"]
Dim = int | Literal["auto"] | None


class _Entry(TypedDict):
    """An entry of a manifest and of run.json, as `as_dict` makes it."""

    power: float
    source_dim: int
    sha256: str


class _Metadata(TypedDict):
    conditioning: str


class _Header(TypedDict):
    """The header of conditioning.safetensors."""

    __metadata__: _Metadata


class _Settings(TypedDict):
    power: float
    about: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A conditioning, as fitted to a sample of the encoder's vectors.

    mean: float64 [source_dim], m above. axes: float32 [dim, source_dim], the kept axes, orthonormal rows. deviations:
    float64 [source_dim], of all axes, descending; 0 where the sample has no variance. power: p, from 0 to 1. about: how
    it was fitted, as JSON: see `fit`.
    """

    mean: Tensor
    axes: Tensor
    deviations: Tensor
    power: float
    about: dict[str, Any] = field(default_factory=dict)
    _maps: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def source_dim(self) -> int:
        """The length of the encoder's vectors."""
        return self.axes.shape[1]

    @property
    def dim(self) -> int:
        """The length of conditioned vectors: the number of kept axes."""
        return self.axes.shape[0]

    @torch.no_grad()
    def apply(self, x: Tensor) -> Tensor:
        """Conditions the encoder's vectors x [..., source_dim], of any length, on their device.

        Returns [..., dim] of unit length, float32, or float64 for float64, without a gradient. A row of zeros gives
        zeros, one that is not finite NaN. Raises ValueError for another source_dim.
        """
        if x.shape[-1] != self.source_dim:
            raise ValueError(f"this conditioning is for vectors of {self.source_dim}, not {list(x.shape)}")
        wide = x if x.dtype == torch.float64 else x.float()
        key = wide.device, wide.dtype
        if key not in self._maps:
            self._maps[key] = self.weight().to(*key), self.mean.to(*key)
        weight, mean = self._maps[key]
        rows = wide.reshape(-1, self.source_dim)
        out = rows.new_empty(len(rows), self.dim)
        step = max(1, _BLOCK // self.source_dim)
        for part, y in zip(rows.split(step), out.split(step), strict=True):
            length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            tiny, huge = length < 1e-15, length > 1e15
            if (tiny | huge).any():  # squares of such numbers leave the range of float32
                part = part * torch.where(tiny, 2.0**96, torch.where(huge, 2.0**-96, 1.0))
                length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            # The mean is subtracted before the product, not after it: the errors are those of the smaller numbers.
            torch.mm((part / length).sub_(mean), weight.T, out=y)
            norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
            y.div_(torch.where(norm > 0, norm, 1)).masked_fill_(length == 0, 0)
        return out.view(*x.shape[:-1], self.dim)

    def weight(self) -> Tensor:
        """The matrix W of rows s_i^-p · a_i, float64 [dim, source_dim]: c(x) is the direction of W · (x/|x| - m)."""
        kept = self.deviations[: self.dim, None]
        return self.axes.double() * torch.where(kept > 0, kept**-self.power, 0)

    def report(self) -> dict[str, Any]:
        """What conditioning changes, of the sample, as JSON values.

        rows: of the samples, a list. mean_cosine, effective_rank: {"before", "after"}; the rank is that of the
        covariance, the exponential of the entropy of its eigenvalues (Roy and Vetterli 2007). variance_kept: of the
        encoder's vectors about their mean, in the kept axes. dim: {"before", "after"}. power. rows and mean_cosine are
        None where `about` is not as `fit` makes it.
        """
        rows, cosine = self.about.get("rows"), self.about.get("mean_cosine")
        counted = isinstance(rows, list) and all(type(count) is int for count in rows)
        measured = (
            isinstance(cosine, dict)
            and cosine.keys() == {"before", "after"}
            and all(type(value) is float for value in cosine.values())
        )
        variances = self.deviations**2
        kept = variances[: self.dim]
        return {
            "rows": rows if counted else None,
            "power": self.power,
            "dim": {"before": self.source_dim, "after": self.dim},
            "mean_cosine": cosine if measured else None,
            "effective_rank": {
                "before": effective_rank(variances),
                "after": effective_rank(torch.where(kept > 0, kept ** (1 - self.power), 0)),
            },
            "variance_kept": (kept.sum() / variances.sum()).item(),
        }

    @cached_property
    def _content(self) -> bytes:
        tensors = {"mean": self.mean, "axes": self.axes, "deviations": self.deviations}
        settings = json.dumps({"power": self.power, "about": self.about}, sort_keys=True)
        return save({name: t.contiguous() for name, t in tensors.items()}, {"conditioning": settings})

    def to_bytes(self) -> bytes:
        """The content of conditioning.safetensors: the three tensors, and power and about in its metadata. Of one that
        was read, the bytes that were read."""
        return self._content

    def as_dict(self) -> dict[str, Any]:
        """The entry of a manifest and of run.json: {"power", "source_dim", "sha256"}, the last of the file."""
        digest = hashlib.sha256(self.to_bytes()).hexdigest()
        return {"power": self.power, "source_dim": self.source_dim, "sha256": digest}

    @staticmethod
    def check(entry: Any) -> None:
        """Validates an entry as `as_dict` makes it. Raises CacheError."""
        try:
            foreign.check(entry, _Entry)
            known = entry.keys() == _Entry.__annotations__.keys() and len(entry["sha256"]) == 64
            valid = known and 0 < entry["source_dim"] <= _LARGEST_DIM and 0 <= entry["power"] <= 1
        except ValueError:
            valid = False
        if not valid:
            raise CacheError(f"this version of lift-fast does not know the conditioning {str(entry)[:200]}")

    @staticmethod
    def load(folder: Path, entry: dict[str, Any] | None = None, dim: int | None = None) -> "Conditioning":
        """Reads conditioning.safetensors of a folder. entry: what the folder's manifest or run.json says of it. dim: of
        the folder's vectors.

        Raises CacheError when the file is missing, damaged or not the one of `entry`.
        """
        path = folder / CONDITIONING
        again = "copy it from a cache or run with the same conditioning"
        try:
            data = read_regular(path, _MOST_BYTES)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be read ({error.strerror or error}), without which no text can be compared with the "
                f"vectors of this folder; {again}"
            ) from error
        if entry is not None:
            Conditioning.check(entry)
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise CacheError(f"{path} is damaged or another cache's: its checksum is wrong; {again}")
        try:
            found = _parsed(data)
        except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
            raise CacheError(f"{path} is damaged ({error}); {again}") from error
        if entry is not None and (found.power, found.source_dim) != (entry["power"], entry["source_dim"]):
            raise CacheError(f"{path} is damaged or another cache's: its settings are not those of {entry}; {again}")
        if dim is not None and found.dim != dim:
            raise CacheError(f"{path} is another cache's: it keeps {found.dim} axes, not {dim}; {again}")
        return found


def _parsed(data: bytes) -> Conditioning:
    """The conditioning of a file's content. Raises ValueError and others for one that is not valid."""
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    header = foreign.parse_json(data[8 : 8 + length])
    foreign.check(header, _Header)
    settings = foreign.parse_json(header["__metadata__"]["conditioning"].encode())
    foreign.check(settings, _Settings)
    mean, axes, deviations = tensors["mean"], tensors["axes"], tensors["deviations"]
    power, about = settings["power"], settings["about"]
    if [t.dtype for t in (mean, axes, deviations)] != [torch.float64, torch.float32, torch.float64]:
        raise ValueError("a tensor has another dtype")
    if axes.dim() != 2 or not 0 < axes.shape[0] <= axes.shape[1]:
        raise ValueError(f"its axes are {list(axes.shape)}")
    if not mean.shape == deviations.shape == axes.shape[1:]:
        raise ValueError(f"its mean is {list(mean.shape)}, its deviations are {list(deviations.shape)}")
    if not all(t.isfinite().all() for t in (mean, axes, deviations)):
        raise ValueError("a number is not finite")
    if (deviations.diff() > 0).any() or deviations[-1] < 0 or not deviations[0] > 0:
        raise ValueError("its deviations are not in descending order, or are negative")
    if ((axes.norm(dim=1) - 1).abs() > 1e-3).any() or (deviations[deviations > 0] < 0.1 * _LOST * deviations[0]).any():
        raise ValueError("its axes are not of unit length, or a deviation is too small")
    if not 0 <= power <= 1:
        raise ValueError("its power is out of range")
    found = Conditioning(mean, axes, deviations, float(power), about)
    vars(found)["_content"] = data
    return found


class Statistics:
    """Mean and covariance of unit vectors, accumulated in float64 block by block.

    dim: length of a vector. rows: how many were added, those of zeros not counted. sample: at most 2 048 of them,
    float32, evenly spread.
    """

    def __init__(self, dim: int):
        self.dim, self.rows = dim, 0
        self.sample = torch.empty(0, dim)
        self._every = 1  # of the rows the sample has one in so many
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Adds vectors [n, dim] of any length but 0, each divided by its length; rows of zeros are passed over.

        Raises CacheError for a row that is not finite.
        """
        for part in x.detach().split(max(1, _BLOCK // self.dim)):
            rows = part.cpu().double()
            length = torch.linalg.vector_norm(rows, dim=1)
            if not length.isfinite().all():
                raise CacheError("a vector to condition is not finite; embed it again with another dtype (float32)")
            rows = rows[length > 0] / length[length > 0, None]
            self._sum += rows.sum(dim=0)
            self._products.addmm_(rows.T, rows)
            self.sample = torch.cat([self.sample, rows[-self.rows % self._every :: self._every].float()])
            self.rows += len(rows)
            while len(self.sample) > _SAMPLE:
                self.sample, self._every = self.sample[::2].clone(), 2 * self._every

    def mean(self) -> Tensor:
        """float64 [dim]."""
        return self._sum / max(1, self.rows)

    def second_moment(self) -> Tensor:
        """The mean of x xᵀ, float64 [dim, dim]."""
        return self._products / max(1, self.rows)


def fit(
    statistics: Sequence[Statistics],
    weights: Sequence[float] | None = None,
    *,
    power: Power = "auto",
    dim: Dim = None,
    about: dict[str, Any] | None = None,
) -> Conditioning:
    """The conditioning of vectors with these statistics.

    statistics: one for each set of captions. weights: how much each set counts, in any unit; default: its rows. power:
    p, or "auto": the one whose effective rank is nearest to half of the axes that have variance, from 0 to 0.75; an
    encoder that is isotropic already gets 0. dim: axes to keep; None: all; "auto": the fewest, a multiple of 32, that
    hold 99 % of the variance. about: entries for Conditioning.about, which also gets "rows", "weights" and
    "mean_cosine".

    Raises ConfigError for a power, dim or weight out of range, for sets whose vectors differ in length, for a sample
    without variance, and for one that has no more vectors than axes are kept.
    """
    check_settings(power, dim)
    if weights is not None and (len(weights) != len(statistics) or not all(0 < w < float("inf") for w in weights)):
        raise ConfigError(f"weights must be {len(statistics)} numbers above 0, one for each set, not {list(weights)}")
    if len({one.dim for one in statistics}) > 1:
        raise ConfigError(f"the sets have vectors of lengths {[one.dim for one in statistics]}; fit to one encoder's")
    rows = [one.rows for one in statistics]
    if 0 in rows:
        raise ConfigError("a set has no vectors to fit a conditioning to; leave it out")
    given = [float(w) for w in (weights or rows)]
    shares = [w / sum(given) for w in given]
    mean = sum(share * one.mean() for share, one in zip(shares, statistics, strict=True))
    assert isinstance(mean, Tensor)
    covariance = sum(share * one.second_moment() for share, one in zip(shares, statistics, strict=True))
    covariance -= torch.outer(mean, mean)
    variances, vectors = torch.linalg.eigh(covariance)
    del covariance
    deviations = variances.flip(0).clamp(min=0).sqrt()
    deviations = torch.where(deviations > max(_LEAST, _LOST * float(deviations[0])), deviations, 0)
    most = int((deviations > 0).sum())
    if not most:
        raise ConfigError("all vectors of the sample are the same; they have no axes to condition")
    kept = _dims(dim, deviations)
    if kept > len(mean):
        raise ConfigError(f"conditioning keeps at most the {len(mean)} axes that the vectors have, not {kept}")
    check_rows(sum(rows), kept)
    axes = vectors.flip(1)[:, :kept].T.float().contiguous()
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes *= largest.sign()  # of the two directions of an axis always the same one
    found = Conditioning(mean, axes, deviations, _power(power, deviations[:most]))
    sample = torch.cat([one.sample for one in statistics])
    cosines = {"before": mean_cosine(sample), "after": mean_cosine(found.apply(sample))}
    known = (about or {}) | {"rows": rows, "weights": shares, "mean_cosine": cosines}
    return replace(found, about=json.loads(json.dumps(known)))


def check_settings(power: Power, dim: Dim) -> None:
    """Validates the settings of `fit`. Raises ConfigError."""
    if power != "auto" and not (isinstance(power, int | float) and 0 <= power <= 1):
        raise ConfigError(f"the power of conditioning must be from 0 to 1, or auto, not {power}")
    if dim is not None and dim != "auto" and not (isinstance(dim, int) and dim >= 1):
        raise ConfigError(f"conditioning keeps at least 1 axis, or auto, not {dim}")


def check_rows(rows: int, axes: int) -> None:
    """Raises ConfigError when a sample of `rows` captions does not determine so many axes."""
    if rows <= axes:
        raise ConfigError(
            f"{rows} captions do not determine {axes} axes; keep fewer (a quarter of the captions at most), or fit to "
            "more captions"
        )


def mean_cosine(vectors: Tensor) -> float | None:
    """The mean cosine over all pairs of rows, None for fewer than two rows."""
    n = len(vectors)
    if n < 2:
        return None
    unit = F.normalize(vectors.double(), dim=1)
    total = unit.sum(dim=0)
    return ((total @ total - (unit * unit).sum()) / (n * (n - 1))).item()


def effective_rank(variances: Tensor) -> float:
    """The exponential of the entropy of variances [n] as shares of their sum: n if all are equal, 1 if one is all."""
    shares = variances.double() / variances.double().sum()
    return float(torch.special.entr(shares).sum().exp())


def _dims(dim: Dim, deviations: Tensor) -> int:
    if dim is None:
        return len(deviations)
    if dim != "auto":
        return dim
    held = (deviations**2).cumsum(0) / (deviations**2).sum()
    fewest = int((held < _AUTO_VARIANCE).sum()) + 1
    return min(len(deviations), -(-fewest // _AUTO_MULTIPLE) * _AUTO_MULTIPLE)


def _power(power: Power, deviations: Tensor) -> float:
    """power, or the one that `auto` chooses: by bisection, as the effective rank grows with the power."""
    if power != "auto":
        return float(power)
    low, high = _AUTO_POWER
    if effective_rank(deviations**2) >= len(deviations) / 2:
        return low
    for _ in range(20):
        middle = (low + high) / 2
        smaller = effective_rank(deviations ** (2 - 2 * middle)) < len(deviations) / 2
        low, high = (middle, high) if smaller else (low, middle)
    return round(high, 2)

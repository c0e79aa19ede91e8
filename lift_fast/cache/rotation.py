"""A seeded random rotation for vectors of any dim. It makes their coordinates near Gaussian, as the code books expect.

    two rounds of:
        x = sign * x            random signs
        x = x[order]            a random permutation
        x = H x                 H: the orthonormal Hadamard matrix of size 2^k, the largest power of two up to dim,
                                applied to the first 2^k coordinates
        if 2^k < dim: new random signs, then H applied to the last 2^k coordinates

The map is orthogonal, so dot products and norms are preserved. An element of a round takes additions and one
multiplication, in a fixed order, so every device and every batch size gives the same bits.

Signs and permutations come from SplitMix64 (Steele, Lea and Flood 2014), so that any program can reproduce them. Let
mix(i) be its i-th output for the seed, counted from 0, and n = dim. For i = 0 … n - 1 round r (0 or 1) uses
mix(3·r·n + i) for the first signs (-1 where the number is odd), mix((3·r + 1)·n + i) for the permutation (the numbers'
ascending order), and mix((3·r + 2)·n + i) for the second signs. The second signs are needed: a Hadamard matrix maps its
own rows to one-hot vectors, so that without new signs a dim such as 640 could keep a large coordinate.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError

KIND = "hadamard"
_ROUNDS = 2
_CHUNK = {"cpu": 1 << 18}  # elements rotated at a time: 1 MB of float32, about a core's own cache


@dataclass(frozen=True)
class Rotation:
    """The rotation of vectors of length dim that a seed in [0, 2^64) determines.

    `apply` and `undo` take floating [..., dim] and return float32, or float64 for float64.
    """

    dim: int
    seed: int = 0
    _rounds: list[tuple[Tensor, Tensor, Tensor]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = _splitmix64(self.seed, 3 * _ROUNDS * self.dim).reshape(_ROUNDS, 3, self.dim)
        rounds = [
            (_signs(first), torch.from_numpy(np.argsort(order, kind="stable")), _signs(second))
            for first, order, second in numbers
        ]
        object.__setattr__(self, "_rounds", rounds)

    @staticmethod
    def from_dict(entry: dict[str, Any], dim: int) -> "Rotation":
        """The rotation of a manifest's entry, such as {"kind": "hadamard", "seed": 0}. Raises CacheError if invalid."""
        Rotation.check(entry)
        return Rotation(dim, entry["seed"])

    @staticmethod
    def check(entry: Any) -> None:
        """Validates a manifest's entry. Raises CacheError."""
        seed = entry.get("seed") if isinstance(entry, dict) and entry.keys() == {"kind", "seed"} else None
        if type(seed) is not int or not 0 <= seed < 1 << 64 or entry["kind"] != KIND:
            raise CacheError(f"this version of lift-fast does not know the rotation {str(entry)[:200]}")

    def as_dict(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {"kind": KIND, "seed": self.seed}

    def apply(self, x: Tensor) -> Tensor:
        """Rotates x [..., dim], on its device. Raises ValueError for another dim."""
        return self._map(x, self._forward)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply`, up to rounding. Raises ValueError for another dim."""
        return self._map(x, self._back)

    def _map(self, x: Tensor, turn: Any) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"this rotation is for vectors of {self.dim}, not {list(x.shape)}")
        wide = x if x.dtype == torch.float64 else x.float()
        rows = wide.reshape(-1, self.dim)
        rounds = [(a.to(rows), order.to(rows.device), b.to(rows)) for a, order, b in self._rounds]
        chunk = _CHUNK.get(x.device.type, 1 << 24)
        parts = [turn(part, rounds) for part in rows.split(max(1, chunk // max(1, self.dim)))]
        return torch.cat(parts).reshape(x.shape)

    def _forward(self, x: Tensor, rounds: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        for first, order, second in rounds:
            x = _hadamard((x * first).index_select(1, order), last=False)
            if self._overlapping():
                x = _hadamard(x * second, last=True)
        return x

    def _back(self, x: Tensor, rounds: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        for first, order, second in reversed(rounds):
            if self._overlapping():
                x = _hadamard(x.clone(), last=True) * second
            x = _hadamard(x.clone(), last=False).index_select(1, order.argsort()) * first
        return x

    def _overlapping(self) -> bool:
        """Whether a round applies H twice, to the first and to the last 2^k coordinates: dim is no power of two."""
        return self.dim & (self.dim - 1) != 0


def _signs(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(1 - 2 * (numbers & np.uint64(1)).astype(np.float32))


def _hadamard(x: Tensor, last: bool) -> Tensor:
    """Applies the orthonormal Hadamard matrix to the first, or last, 2^k columns of x [rows, dim]; may overwrite x."""
    dim = x.shape[1]
    size = 1 << (dim.bit_length() - 1)
    columns = slice(dim - size, dim) if last else slice(size)
    a = x[:, columns].contiguous()
    b = torch.empty_like(a)
    half = 1
    while half < size:
        pairs, out = (t.view(len(x), size // (2 * half), 2, half) for t in (a, b))
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        a, b, half = b, a, 2 * half
    a *= 1 / math.sqrt(size)
    if size == dim:
        return a
    x[:, columns] = a
    return x


def _splitmix64(seed: int, count: int) -> np.ndarray:
    """The first `count` outputs of SplitMix64 from the state `seed`, uint64 [count]."""
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

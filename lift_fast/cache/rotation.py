"""A seeded rotation of any dim, for codecs that want coordinates which look Gaussian.

    twice:  x = sign * x            random signs
            x = x[order]            random order
            x = H x                 the Hadamard matrix of 2^k, the greatest power of two up to dim, over the first 2^k
                                    coordinates; where dim is larger, again with new signs over the last 2^k

An orthogonal map: dot products and lengths stay what they were. It is computed by additions and one multiplication an
element and round in a fixed order, so that every device and batch size gives the same bits.

The signs and orders come from SplitMix64 (Steele, Lea and Flood 2014), so that any program can make them again: with
mix(i) its output i for the seed, counted from 0, round r has n = dim numbers mix(3·r·n + i) and signs -1 where they are
odd, then n numbers mix((3·r + 1)·n + i), whose ascending order is the order, then n more for the second signs. Without
those a coordinate of a dim such as 640 could stay a spike: a Hadamard matrix turns its own rows back into spikes.
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
_CHUNK = {"cpu": 1 << 18}  # elements that are rotated at a time: what a core's own cache holds


@dataclass(frozen=True)
class Rotation:
    """seed, dim: what decides it. apply and undo take floating [..., dim] and return float32 (float64 stays)."""

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
        """What a manifest says: {"kind": "hadamard", "seed": 0}. Raises CacheError for a kind that is none."""
        Rotation.check(entry)
        return Rotation(dim, entry["seed"])

    @staticmethod
    def check(entry: Any) -> None:
        """Raises CacheError unless a rotation can be made from it."""
        seed = entry.get("seed") if isinstance(entry, dict) and entry.keys() == {"kind", "seed"} else None
        if type(seed) is not int or not 0 <= seed < 1 << 64 or entry["kind"] != KIND:
            raise CacheError(f"rotation {entry!r} is unknown to this lift-fast")

    def as_dict(self) -> dict[str, Any]:
        return {"kind": KIND, "seed": self.seed}

    def apply(self, x: Tensor) -> Tensor:
        """x [..., dim] rotated, on its device."""
        return self._map(x, self._forward)

    def undo(self, x: Tensor) -> Tensor:
        """The x whose rotation this is, to rounding."""
        return self._map(x, self._back)

    def _map(self, x: Tensor, one: Any) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"this rotation is for vectors of {self.dim}, not {list(x.shape)}")
        wide = x if x.dtype == torch.float64 else x.float()
        rows = wide.reshape(-1, self.dim)
        rounds = [(a.to(rows), order.to(rows.device), b.to(rows)) for a, order, b in self._rounds]
        chunk = _CHUNK.get(x.device.type, 1 << 24)
        parts = [one(part, rounds) for part in rows.split(max(1, chunk // max(1, self.dim)))]
        return torch.cat(parts).reshape(x.shape)

    def _forward(self, x: Tensor, rounds: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        for first, order, second in rounds:
            x = _hadamard((x * first).index_select(1, order), last=False)
            if self._two():
                x = _hadamard(x * second, last=True)
        return x

    def _back(self, x: Tensor, rounds: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        for first, order, second in reversed(rounds):
            if self._two():
                x = _hadamard(x.clone(), last=True) * second
            x = _hadamard(x.clone(), last=False).index_select(1, order.argsort()) * first
        return x

    def _two(self) -> bool:
        """Whether one Hadamard matrix leaves coordinates out."""
        return self.dim & (self.dim - 1) != 0


def _signs(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(1 - 2 * (numbers & np.uint64(1)).astype(np.float32))


def _hadamard(x: Tensor, last: bool) -> Tensor:
    """x [rows, dim], which may be written to, with the Hadamard matrix over its first, or last, 2^k columns."""
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
    """uint64 [count]: the generator's outputs from its state `seed`."""
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

"""Data sets whose captions are embedded and conditioned in no time, and the formula of conditioning, for the tests."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lift_fast.cache import Cache, Conditioning
from lift_fast.cache.conditioning import fit
from lift_fast.cache.tools import condition, statistics_of
from lift_fast.data.sources import open_source
from lift_fast.text.embed import embed_share
from lift_fast.text.spec import EncoderSpec

from .tiny_text import DIM, TinyEncoder


@dataclass
class ConeEncoder(TinyEncoder):
    """TinyEncoder with vectors as language models have them: they share a mean, axes differ much in their deviations,
    and no vector has length 1."""

    mixed: bool = False
    spec: EncoderSpec = field(default_factory=lambda: EncoderSpec("tiny"))

    def vector(self, caption):
        scales = np.linspace(3, 0.2, self.dim, dtype=np.float32)
        return super().vector(caption) * scales + np.cos(np.arange(self.dim, dtype=np.float32)) + 2


def make_encoder(spec: EncoderSpec, *, device: torch.device, download: bool = False) -> ConeEncoder:
    """In the place of text.encoder.Encoder. "short": the name of an encoder with shorter vectors."""
    return ConeEncoder(spec=spec, dim=DIM - 5 if spec.name == "short" else DIM)


def embedded(data: Path, out: Path, codec: str = "f32") -> Cache:
    """The cache of a data set's captions, not conditioned."""
    embed_share(open_source(data), out, ConeEncoder(), codec=codec, progress=False)
    return Cache(out)


def fitted(*caches: Cache, power: float = 0.5, dim: int = 11, rows: int = 1000) -> Conditioning:
    """A conditioning of all captions, or some, of several caches."""
    return fit([statistics_of(cache, rows, progress=False) for cache in caches], power=power, dim=dim)


def conditioned(source: Cache, out: Path, conditioning: Conditioning, codec: str = "f32") -> Path:
    condition(source, out, conditioning, codec, progress=False)
    return out


def formula(conditioning: Conditioning, captions: list[str]) -> Tensor:
    """The conditioned vectors of captions in float64, by the definition, axis by axis: [captions, dim]."""
    x = torch.from_numpy(np.stack([ConeEncoder().vector(caption) for caption in captions])).double()
    x = x / x.square().sum(dim=1, keepdim=True).sqrt()
    columns = []
    for i in range(len(conditioning.axes)):
        along = (x - conditioning.mean) @ conditioning.axes[i].double()
        columns.append(along / conditioning.deviations[i] ** conditioning.power)
    y = torch.stack(columns, dim=1)
    return y / y.square().sum(dim=1, keepdim=True).sqrt()

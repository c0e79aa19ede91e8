"""The first vectors of a run: whether the encoder can tell captions apart is found out before anything is written."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import Rotation
from ..errors import EncoderError
from ..ops.rows.quantized import QuantizedRows

_COMPARED = 1 << 10  # vectors that are looked at
_LEAST_COMPARED = 8  # vectors below which nothing is said about them
_SAME = 0.9999  # vectors of different captions that all have at least this cosine with the first are one vector
_NEARLY_SAME = 0.95  # mean cosine between vectors of different captions above which there is a warning


class FirstVectors:
    """The vectors of the first different captions, at most 1 024, and what they say about the encoder and the codec.

    cosine: mean cosine between the vectors of the first call and their codes, None without a vector. spread: mean
    cosine between two of the vectors, None for fewer than 8.

    encoder: its name, for messages. rotation: of the codes. warn: called with a warning for the user.
    """

    def __init__(self, encoder: str, rotation: Rotation | None, warn: Callable[[str], object]):
        self.encoder, self.rotation, self.warn = encoder, rotation, warn
        self.cosine: float | None = None
        self.spread: float | None = None
        self._captions: set[str] = set()
        self._vectors: list[Tensor] = []
        self._warned = False

    def look(self, captions: Sequence[str], vectors: Tensor, rows: QuantizedRows, empty: Sequence[int]) -> None:
        """Takes the next captions, with their vectors, codes, and the numbers of those without tokens.

        Raises EncoderError when different captions have one vector.
        """
        chosen: list[int] = []  # those that are not in the sample
        for i, caption in enumerate(captions):
            if len(self._captions) == _COMPARED:
                break
            if caption not in self._captions and i not in empty:
                self._captions.add(caption)
                chosen.append(i)
        if not chosen:
            return
        if self.cosine is None:
            self.cosine = _cosine(vectors[chosen], rows[torch.tensor(chosen)], self.rotation)
        self._vectors.append(vectors[chosen].cpu())
        if len(self._captions) < _LEAST_COMPARED:
            return
        unit = F.normalize(torch.cat(self._vectors).double(), dim=1)
        if (unit @ unit[0]).min() >= _SAME:
            raise EncoderError(
                f"{self.encoder} gives one vector for {len(unit)} different captions: what it pools does not depend on "
                "the text, or max_length cuts all of it off; choose another --pooling (mean), a larger --max-length, "
                "or another encoder"
            )
        total = unit.sum(dim=0)
        self.spread = ((total @ total - len(unit)) / (len(unit) * (len(unit) - 1))).item()
        if self.spread > _NEARLY_SAME and not self._warned:
            self._warned = True
            self.warn(
                f"the vectors of {self.encoder} for different captions are nearly the same (mean cosine "
                f"{self.spread:.3f}); --pooling mean or another encoder may tell them apart better"
            )


def _cosine(vectors: Tensor, rows: QuantizedRows, rotation: Rotation | None) -> float:
    """The mean cosine between vectors and the vectors that their codes stand for, in the space of the codes."""
    exact = vectors.float() if rotation is None else rotation.apply(vectors)
    return F.cosine_similarity(exact.double(), rows.widen().double()).mean().item()

"""The first vectors of a run: whether the encoder can tell captions apart is found out before anything is written."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import Rotation
from ..cache.conditioning import mean_cosine
from ..errors import EncoderError
from ..ops.rows.quantized import QuantizedRows

_COMPARED = 1 << 10  # vectors that are looked at
_LEAST_COMPARED = 8  # vectors below which nothing is said about them
_SAME = 0.9999  # vectors of different captions that all have at least this cosine with the first are one vector
_NEARLY_SAME = 0.95  # mean cosine between vectors of different captions above which there is a warning


class FirstVectors:
    """The vectors of the first different captions, at most 1 024, and what they say about the encoder and the codec.

    cosine: mean cosine between the first stored vectors, at most 1 024, and their codes, None before there are any.
    spread: mean cosine between two of the encoder's vectors, None for fewer than 8.

    encoder: its name, for messages. warn: called with a warning for the user.
    """

    def __init__(self, encoder: str, warn: Callable[[str], object]):
        self.encoder, self.warn = encoder, warn
        self.cosine: float | None = None
        self.spread: float | None = None
        self._captions: set[str] = set()
        self._vectors: list[Tensor] = []
        self._warned = False

    def look(self, captions: Sequence[str], vectors: Tensor, empty: Sequence[int]) -> None:
        """Takes the next captions, with the encoder's vectors, and the numbers of those without tokens.

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
        self.spread = mean_cosine(unit)
        if self.spread is not None and self.spread > _NEARLY_SAME and not self._warned:
            self._warned = True
            self.warn(
                f"the vectors of {self.encoder} for different captions are nearly the same (mean cosine "
                f"{self.spread:.3f}); --pooling mean or another encoder may tell them apart better"
            )

    def compare(self, vectors: Tensor, rows: QuantizedRows, rotation: Rotation | None, empty: Sequence[int]) -> None:
        """Takes the next vectors that are stored, conditioned if the cache is, with their codes, the rotation of these,
        and the numbers of the vectors that stand for captions without tokens."""
        if self.cosine is not None:
            return
        without = set(empty)
        kept = torch.tensor([i for i in range(len(vectors)) if i not in without][:_COMPARED], dtype=torch.int64)
        if len(kept):
            self.cosine = _cosine(vectors[kept.to(vectors.device)], rows[kept], rotation)


def _cosine(vectors: Tensor, rows: QuantizedRows, rotation: Rotation | None) -> float:
    """The mean cosine between vectors and the vectors that their codes stand for, in the space of the codes."""
    exact = vectors.float() if rotation is None else rotation.apply(vectors)
    return F.cosine_similarity(exact.double(), rows.widen().double()).mean().item()

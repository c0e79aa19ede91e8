"""The features of the texts of a held-out set: captions, foils and class prompts."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import DataError, EncoderError
from ..ranks import Rank, of_first, together
from ..run_folder import EncodeText
from .shares import cut, in_order, mine, rounds

_CHUNK = 128  # texts that are encoded at once


class Texts:
    """The features of distinct texts: texts(list of some of them) -> float32 [len(list), dim] on the CPU.

    vectors: float32 [texts, dim], of unit length, or zeros for a text without tokens. numbers: text -> row. empty:
    these texts.
    """

    def __init__(self, texts: Sequence[str], vectors: Tensor):
        self.vectors = vectors
        self.numbers = {text: i for i, text in enumerate(texts)}
        self.empty = {texts[i] for i in (~vectors.any(dim=1)).nonzero().flatten().tolist()}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.vectors[[self.numbers[text] for text in texts]]


def encode_texts(texts: Sequence[str] | None, encode_text: EncodeText, rank: Rank, skip_bad: bool) -> Texts:
    """The features of texts, each once, which rank 0 passes. A collective: the ranks share the encoding.

    Every rank calls encode_text equally often, since with FSDP2 each call of CLIP's text tower is a collective.
    skip_bad: texts without tokens get zeros. Raises what encode_text raises.
    """
    texts = of_first(list(texts or ()))
    chunks = [[texts[i] for i in chunk] for chunk in cut(len(texts), _CHUNK)]
    own = mine(chunks, rank)

    def encode() -> list[Tensor]:
        return [
            _encoded(own[i] if i < len(own) else chunks[0], encode_text, skip_bad)
            for i in range(rounds(len(chunks), rank))
        ]

    return Texts(texts, in_order(together(encode)[: len(own)]))


def _encoded(texts: list[str], encode_text: EncodeText, skip_bad: bool) -> Tensor:
    try:
        return encode_text(texts)
    except EncoderError as error:
        # Those of text.encoder.NoTokens, which lies outside of what this package may import.
        empty = getattr(error, "captions", None)
        if empty is None or not skip_bad:
            raise
    without = set(empty)
    kept = [i for i in range(len(texts)) if i not in without]
    if not kept:
        raise DataError(f"no caption can be used; the first: {texts[0]!r} has no tokens")
    encoded = encode_text([texts[i] for i in kept])
    vectors = encoded.new_zeros(len(texts), encoded.shape[1])
    vectors[kept] = encoded
    return vectors

"""The features of the texts of a held-out set: captions, foils and class prompts."""

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from ..errors import DataError, EncoderError
from ..progress import bar
from ..ranks import Rank, of_first, together
from ..run_folder import EncodeText
from .kept import KeptTexts
from .shares import cut, in_order, mine, rounds

_CHUNK = 128  # texts that are encoded at once
_PIECE = 64 * _CHUNK  # texts that are kept at once


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


def encode_texts(
    texts: Sequence[str] | None,
    encode_text: EncodeText,
    rank: Rank,
    skip_bad: bool,
    kept: KeptTexts | None = None,
    title: str | None = None,
) -> Texts:
    """The features of texts, each once, which rank 0 passes. A collective: the ranks share the encoding.

    Every rank calls encode_text equally often, since with FSDP2 each call of CLIP's text tower is a collective.
    skip_bad: texts without tokens get zeros. kept: on rank 0, features to be used again; those that are missing are
    added, a piece at a time, and where none is, encode_text is not called. title: of a bar on stderr; None for no bar.

    Raises DataError when no text has tokens; what encode_text raises; each also when it is raised on another rank.
    """
    texts = of_first(list(texts or ()))
    parts = of_first(kept.find(texts) if kept else [])
    if not skip_bad:  # of those without tokens the encoder says what is wrong
        parts = [_with_tokens(*part) for part in parts]
    known = {i for positions, _ in parts for i in positions}
    missing = [i for i in range(len(texts)) if i not in known]
    hidden = title is None or not rank.is_first or not missing
    with bar(desc=title or "", total=len(texts), initial=len(known), unit="text", disable=hidden) as shown:
        for piece in cut(len(missing), _PIECE):
            positions = missing[piece.start : piece.stop]
            several = [texts[i] for i in positions]
            parts.append((positions, _encoded(several, encode_text, rank, skip_bad, shown.update)))
            if kept and parts[-1][1].shape[1]:
                kept.add(several, parts[-1][1])

    dims = {vectors.shape[1] for _, vectors in parts} - {0}
    if len(dims) > 1:  # those that were kept are not of this model
        return encode_texts(texts, encode_text, rank, skip_bad, None, title)

    def check() -> None:
        if texts and not dims:
            raise DataError(f"no caption can be used; the first: {texts[0]!r} has no tokens")

    together(check, only_first=True)
    found = torch.zeros(len(texts), max(dims, default=0))
    while parts:  # each is freed
        positions, vectors = parts.pop()
        if vectors.shape[1]:
            found[positions] = vectors
    return Texts(texts, found)


def _with_tokens(positions: list[int], vectors: Tensor) -> tuple[list[int], Tensor]:
    usable = vectors.any(dim=1)
    return list(compress(positions, usable.tolist())), vectors[usable]


def _encoded(
    texts: list[str], encode_text: EncodeText, rank: Rank, skip_bad: bool, update: Callable[[int], object]
) -> Tensor:
    """The features of texts, on every rank: float32 [n, dim], [n, 0] when none has tokens. update: is given the numbers
    of texts that are done."""
    chunks = [[texts[i] for i in chunk] for chunk in cut(len(texts), _CHUNK)]
    own = mine(chunks, rank)

    def encode() -> list[Tensor]:
        done = []
        for i in range(rounds(len(chunks), rank)):
            done.append(_chunk(own[i] if i < len(own) else chunks[0], encode_text, skip_bad))
            update(sum(map(len, chunks[i * rank.world : (i + 1) * rank.world])))
        return done[: len(own)]

    return torch.cat(_widened(in_order(together(encode))))


def _chunk(texts: list[str], encode_text: EncodeText, skip_bad: bool) -> Tensor:
    try:
        return encode_text(texts)
    except EncoderError as error:
        # Those of text.encoder.NoTokens, which lies outside of what this package may import.
        empty = getattr(error, "captions", None)
        if empty is None or not skip_bad:
            raise
    without = set(empty)
    usable = [i for i in range(len(texts)) if i not in without]
    if not usable:
        return torch.zeros(len(texts), 0)
    encoded = encode_text([texts[i] for i in usable])
    vectors = encoded.new_zeros(len(texts), encoded.shape[1])
    vectors[usable] = encoded
    return vectors


def _widened(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts [n, dim], and in place of those [n, 0] zeros of that dim."""
    dim = max(part.shape[1] for part in parts)
    return [part if part.shape[1] else part.new_zeros(len(part), dim) for part in parts]

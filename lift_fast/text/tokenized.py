"""CLIP's text side in training: row numbers -> the captions of a data set -> tokens for the text tower."""

from collections.abc import Sequence
from hashlib import blake2b

from torch import Tensor

from ..cache.manifest import digest_of
from ..data.samples import BadText, Collection
from .tokenizer import ClipTokenizer, has_tokens


class TokenizedText:
    """The captions of a Collection as tokens, read and tokenized when a batch asks for them.

    field: the caption to use: txt, an entry of the .json, or a column. context: tokens a caption. skip_bad: whether
    samples without a usable caption are left out, and those without a usable key as well: the same ones as LIFT leaves
    out, whose text is found by its key. left_out: row number -> what is wrong with it; no batch may ask for these.
    digests: a hash of the captions of each data set, hex.

    Every caption is read once. Raises BadText for the first that cannot be used, unless skip_bad.
    """

    def __init__(self, data: Collection, field: str, context: int, skip_bad: bool = False):
        self.data, self.field = data, field
        hashes = [blake2b(digest_size=16) for _ in data.sets]

        def read(number: int, captions: Sequence[str | BadText]) -> None:
            hashes[number].update(digest_of([None if isinstance(c, BadText) else c for c in captions]).encode())

        self.left_out = data.bad_captions(field, has_tokens, read)
        self.digests = [found.hexdigest() for found in hashes]
        if skip_bad:
            self.left_out = dict(sorted((data.bad_keys() | self.left_out).items()))
        elif self.left_out:
            raise next(iter(self.left_out.values()))
        self.tokenizer = ClipTokenizer(context)

    def rows(self, rows: Tensor) -> Tensor:
        """rows int64 [batch] on the CPU -> the tokens of their captions, int64 [batch, context]."""
        return self.tokenizer([self.data.caption(row, self.field) for row in rows.tolist()])

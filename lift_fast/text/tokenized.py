"""CLIP's text side in training: row numbers -> the captions of a data set -> tokens for the text tower."""

from torch import Tensor

from ..data.samples import Collection
from .tokenizer import ClipTokenizer


class TokenizedText:
    """The captions of a Collection as tokens, read and tokenized when a batch asks for them.

    field: the caption to use: txt, an entry of the .json, or a column. context: tokens a caption.

    Raises DataError naming the first sample that has no such caption: every caption is read once to find it.
    """

    def __init__(self, data: Collection, field: str, context: int):
        data.check_captions(field)
        self.data, self.field = data, field
        self.tokenizer = ClipTokenizer(context)

    def rows(self, rows: Tensor) -> Tensor:
        """rows int64 [batch] on the CPU -> the tokens of their captions, int64 [batch, context]."""
        return self.tokenizer([self.data.caption(row, self.field) for row in rows.tolist()])

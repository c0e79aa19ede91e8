"""CLIP's byte-pair tokenizer (49 408 tokens), from instant-clip-tokenizer."""

from collections.abc import Sequence

import instant_clip_tokenizer
import numpy as np
import torch
from torch import Tensor


class ClipTokenizer:
    """Captions -> token ids int64 [captions, context]: start of text, the caption, end of text, zeros.

    context: length of a row, in tokens. A longer caption is truncated and still ends with end of text, as in CLIP.
    """

    def __init__(self, context: int = 77):
        self.context = context
        self._tokenizer = instant_clip_tokenizer.Tokenizer()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        tokens = self._tokenizer.tokenize_batch(list(captions), context_length=self.context)
        return torch.from_numpy(tokens.astype(np.int64))

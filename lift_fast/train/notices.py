"""What somebody who starts a run should know of the texts before the first step: missing and repeated ones."""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from ..data.samples import Collection
from ..ops.rows.quantized import QuantizedRows
from ..text.cached import CachedText
from ..text.tokenized import TokenizedText

Text = CachedText | TokenizedText
_LOOKED_AT = 1024  # samples whose texts are compared, and at least one batch
_MANY = 0.05  # share of a batch that repeats, from which it is worth a line


def left_out(text: Text) -> dict[str, int]:
    """How many samples have no usable text, by cause."""
    return dict(Counter(error.cause for error in text.left_out.values()).most_common())


def repeats(text: Text, samples: int, batch_size: int, seed: int) -> tuple[float, bool]:
    """(the expected share of a batch whose text another sample of the batch has, too; whether all texts are the same).

    samples: the number of all. Counted in random batches, as many as hold 1 024 samples: reading every text of a large
    set would take long. Texts are the same where the model gets the same: the same tokens, or the same cached vector.
    """
    random = np.random.default_rng(seed)
    shares, seen = [], set()
    for _ in range(max(1, _LOOKED_AT // batch_size)):
        rows = np.sort(random.choice(samples, min(batch_size, samples), replace=False, shuffle=False))
        rows = rows[[row not in text.left_out for row in rows.tolist()]]
        if len(rows):
            counts = Counter(_as_bytes(text.rows(torch.from_numpy(rows))))
            shares.append(sum(count for count in counts.values() if count > 1) / len(rows))
            seen |= set(counts)
    return sum(shares) / max(1, len(shares)), len(seen) == 1 and samples - len(text.left_out) > 1


def lines(data: Collection, text: Text, batch_size: int, seed: int, negatives: bool) -> list[str]:
    """What to say of the texts: how many samples have none, whose captions were not compared, and how many repeat.

    negatives: whether the loss takes the other texts of a batch for negatives.
    """
    said = []
    if text.left_out:
        causes = ", ".join(f"{count} {cause}" for cause, count in left_out(text).items())
        first = next(iter(text.left_out.values()))
        said.append(f"{len(text.left_out)} of {len(data)} samples are left out ({causes}); the first: {first.reason}")
    if isinstance(text, CachedText) and text.not_compared:
        said.append(
            f"the captions of {text.not_compared} shards were not compared, only their keys: the cache has no digest "
            "of the captions that it was made from, as one of import-parquet"
        )
    share, all_same = repeats(text, len(data), batch_size, seed)
    if all_same:
        said.append("all texts that were looked at are the same: with one text there is nothing to learn")
    elif negatives and share >= _MANY:
        said.append(
            f"{share:.0%} of the samples of a batch have the text of another one in it, and the contrastive loss takes "
            "equal texts for negatives of each other; smaller batches and more varied captions have fewer"
        )
    return said


def _as_bytes(rows: Tensor | QuantizedRows) -> list[bytes]:
    """What the model gets of each row, as bytes."""
    if isinstance(rows, Tensor):
        return [row.tobytes() for row in rows.numpy()]
    codes = rows.codes.view(torch.uint8).numpy()
    scales = np.empty((len(codes), 0), np.uint8) if rows.scales is None else rows.scales.view(-1, 1).numpy()
    return [code.tobytes() + scale.tobytes() for code, scale in zip(codes, scales, strict=True)]

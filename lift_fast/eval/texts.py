"""The texts of a held-out set: captions, foils and class prompts, and their features."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.samples import BadText, Samples
from ..data.skipped import in_words
from ..errors import DataError, EncoderError
from ..ranks import Rank, of_first, together
from ..run_folder import EncodeText
from .composition import captions_and_foils, has_foils
from .images import ImageFeatures
from .shares import cut, in_order, mine, rounds
from .zero_shot import labels_of, prompts

_CHUNK = 128  # texts that are encoded at once


@dataclass(frozen=True)
class Captions:
    """Samples of a set that have a usable caption, in order, with their captions and metadata.

    left_out: sample -> cause, for the others that were asked for.
    """

    samples: list[int]
    captions: list[str]
    metas: list[dict[str, Any]]
    left_out: dict[int, str]

    def texts(self) -> list[str]:
        """Every text that scoring any of the samples takes, each once."""
        found = dict.fromkeys(self.captions)
        for meta in self.metas if has_foils(self.metas) else []:
            for pair in meta["composition"].values():
                found |= dict.fromkeys((pair["caption"], pair["foil"]))
        labels = labels_of(self.metas)
        return list(found | dict.fromkeys(text for label in labels if len(labels) > 1 for text in prompts(label)))


def read_captions(data: Samples, samples: Sequence[int], field: str, skip_bad: bool) -> Captions:
    """Reads the captions and metadata of samples.

    Raises BadText for the first that cannot be used, unless skip_bad; DataError when none can be used, or when a sample
    of a set with foils lacks one.
    """
    found = Captions([], [], [], {})
    first: BadText | None = None
    for sample in samples:
        try:
            caption, meta = data.caption(sample, field), data.meta(sample)
        except BadText as error:
            if not skip_bad:
                raise
            first = first or error
            found.left_out[sample] = error.cause
            continue
        found.samples.append(sample)
        found.captions.append(caption)
        found.metas.append(meta)
    if not found.samples and first is not None:
        raise DataError(f"{data.folder}: no caption can be used; the first: {first.reason}")
    if has_foils(found.metas):
        captions_and_foils(found.metas)
    return found


class Texts:
    """The features of distinct texts: texts(list of some of them) -> float32 [len(list), dim] on the CPU.

    vectors: float32 [texts, dim], of unit length, or zeros for a text without tokens. empty: these texts.
    """

    def __init__(self, texts: Sequence[str], vectors: Tensor):
        self.vectors = vectors
        self.numbers = {text: i for i, text in enumerate(texts)}
        self.empty = {texts[i] for i in (~vectors.any(dim=1)).nonzero().flatten().tolist()}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.vectors[[self.numbers[text] for text in texts]]


def encode_texts(captions: Captions | None, encode_text: EncodeText, rank: Rank, skip_bad: bool) -> Texts:
    """The features of all texts of `captions`, which rank 0 passes. A collective: the ranks share the encoding.

    Every rank calls encode_text equally often, since with FSDP2 each call of CLIP's text tower is a collective.
    skip_bad: texts without tokens get zeros. Raises what encode_text raises.
    """
    texts = of_first(captions.texts() if captions else [])
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


def matched(images: ImageFeatures, captions: Captions, texts: Texts) -> tuple[Tensor, Captions, dict[str, int]]:
    """The features [n, dim] and captions of the n samples that have both, and how many samples do not, by cause.

    captions: of the images' samples at least. Raises DataError when no sample has both.
    """
    row = {sample: i for i, sample in enumerate(captions.samples)}
    kept: list[tuple[int, int]] = []  # rows of images.features, rows of captions
    causes = Counter(images.causes)
    for i, sample in enumerate(images.samples):
        if sample in captions.left_out:
            causes[captions.left_out[sample]] += 1
        elif captions.captions[row[sample]] in texts.empty:
            causes["no tokens"] += 1
        else:
            kept.append((i, row[sample]))
    if not kept:
        raise DataError(f"no caption can be used: {in_words(causes)}")
    chosen = Captions(
        [captions.samples[k] for _, k in kept],
        [captions.captions[k] for _, k in kept],
        [captions.metas[k] for _, k in kept],
        captions.left_out,
    )
    by_cause = sorted(causes.items(), key=lambda item: (-item[1], item[0]))  # whatever rank met them first
    return images.features[[i for i, _ in kept]], chosen, dict(by_cause)

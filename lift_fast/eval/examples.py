"""Examples for the report: what the model finds for some images and captions, and its worst mistakes."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.images import decode, read_header
from ..data.samples import Samples

_SHOWN = 3  # images for a caption
_LARGE = 1 << 15  # bytes of an image; a larger one is shown smaller, with sides of at most _SIDE pixels
_SIDE = 224


def examples(
    data: Samples,
    samples: Sequence[int],
    image: Tensor,
    captions: Sequence[Sequence[str]],
    texts: Sequence[str],
    text: Tensor,
    ranks: Tensor,
    count: int,
) -> dict[str, list[dict[str, Any]]]:
    """Examples of retrieval in a set.

    samples, image, captions: the sample numbers, features [n, dim] and captions of the images that have captions.
    texts, text: the distinct captions and their features [texts, dim]. ranks: of each image's best right caption, int64
    [n]. count: how many of each kind.

    Returns lists of at most `count`:
        images   the first images: "image" (a data URI), "caption" (its first), "first" (the caption that ranks first),
                 "right" (whether that is one of its captions)
        texts    the first captions: "caption", and its best images, best first: "images" (data URIs), "right" (of each)
        worst    the images whose right captions rank lowest, worst first: "image", "caption", "first", "rank"
                 (from 0, as counted by retrieval.ranks)
    """

    def first(rows: Sequence[int]) -> list[str]:
        """The caption that ranks first for each of some images."""
        if not rows:
            return []
        return [texts[i] for i in (image[list(rows)].float() @ text.float().T).argmax(dim=1).tolist()]

    def shown(row: int) -> str:
        return data_uri(data.image_bytes(samples[row]))

    some = range(min(count, len(samples)))
    images = [
        {"image": shown(row), "caption": captions[row][0], "first": found, "right": found in captions[row]}
        for row, found in zip(some, first(some), strict=True)
    ]
    number = {caption: i for i, caption in enumerate(texts)}
    asked = list(dict.fromkeys(captions[row][0] for row in range(len(samples))))[:count]
    queries = text[[number[caption] for caption in asked]].float()
    best = (queries @ image.float().T).topk(min(_SHOWN, len(samples)), dim=1).indices.tolist()
    found_for = [
        {
            "caption": caption,
            "images": [shown(row) for row in rows],
            "right": [caption in captions[row] for row in rows],
        }
        for caption, rows in zip(asked, best, strict=True)
    ]
    lowest = [row for row in ranks.argsort(descending=True, stable=True)[:count].tolist() if ranks[row] > 0]
    worst = [
        {"image": shown(row), "caption": captions[row][0], "first": wrong, "rank": int(ranks[row])}
        for row, wrong in zip(lowest, first(lowest), strict=True)
    ]
    return {"images": images, "texts": found_for, "worst": worst}


def data_uri(image: bytes) -> str:
    """An encoded image as an address that a page can hold, with its media type: "data:image/jpeg;base64,…". A large
    image is made smaller."""
    header = read_header(image)
    kind = header.format
    if len(image) > _LARGE:
        small = Image.fromarray(decode(image, header))
        small.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=85)
        image, kind = file.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

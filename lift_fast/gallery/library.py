"""What the gallery shows: images of held-out sets, their captions, and how each model scores them.

Features of all images and captions are computed once, when a Library is made, and kept in memory. All later work of the
models is done by one thread, one query after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from .. import progress
from ..data.captions import halved
from ..data.images import read_header
from ..data.samples import BadSample, Samples
from ..data.skipped import in_words
from ..errors import DataError
from ..inference import Model
from ..inference.features import encode_images
from ..text.encoder import NoTokens

IMAGES = 30  # that a query finds, at most, of each model
CAPTIONS = 8
_EXAMPLES = 6  # captions that the page offers as queries
_AT_ONCE = 256  # captions between two updates of the progress
Answer = dict[str, Any]  # as JSON
T = TypeVar("T")


class Item(NamedTuple):
    """An image of the gallery: the name of its set, its sample there, and its caption, "" where it has none."""

    set: str
    sample: int
    caption: str


class Library:
    """The images of `sets` as the `models` see them. An image's number is its place in `items`.

    models: name -> model. sets: name -> data set, opened with skip_bad. fields: name of a set -> caption to read.
    left_out: name of a set -> cause -> how many of its images cannot be read or decoded, and are not shown.

    Raises DataError when no image can be shown or there are no such captions; what Model.encode_image and encode_text
    raise.
    """

    def __init__(self, models: Mapping[str, Model], sets: Mapping[str, Samples], fields: Mapping[str, str]):
        self.models, self.sets = dict(models), dict(sets)
        items = [item for name, samples in sets.items() for item in _items(name, samples, fields[name])]
        bad: dict[int, str] = {}
        images = {name: self._encoded(name, items, bad) for name in models}
        good = [number for number in range(len(items)) if number not in bad]
        if not good:
            folders = ", ".join(str(samples.folder) for samples in sets.values())
            raise DataError(f"{folders}: no image decodes ({in_words(Counter(bad.values()))})")
        self.left_out = {name: Counter(bad[i] for i in bad if items[i].set == name) for name in sets}
        self._images = {name: features[good] for name, features in images.items()}
        texts = list(dict.fromkeys(items[number].caption for number in good if items[number].caption))
        empty: set[int] = set()
        captions = {name: self._encoded_captions(name, texts, empty) for name in models}
        used = [number for number in range(len(texts)) if number not in empty]
        self._captions = {name: features[used] for name, features in captions.items()}
        self.captions = [texts[number] for number in used]
        unused = {texts[number] for number in empty}
        self.items = [items[i]._replace(caption="") if items[i].caption in unused else items[i] for i in good]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")

    def __len__(self) -> int:
        return len(self.items)

    def close(self) -> None:
        """Waits for what is being computed. Other queries raise CancelledError from then on."""
        self._worker.shutdown(cancel_futures=True)

    def description(self) -> Answer:
        """The models, the sets, how many images, and some images and captions to begin with."""
        return {
            "models": [{"name": name, "about": _about(model)} for name, model in self.models.items()],
            "sets": [
                {
                    "name": name,
                    "images": sum(item.set == name for item in self.items),
                    "left_out": self.left_out[name].total(),
                }
                for name in self.sets
            ],
            "images": len(self),
            "captions": len(self.captions),
            "some": [{"number": i, "caption": self.items[i].caption} for i in _spread(len(self), IMAGES)],
            "examples": [self.captions[i] for i in _spread(len(self.captions), _EXAMPLES)],
        }

    def search_text(self, text: str, image: int | None = None) -> Answer:
        """Of each model the images with the highest cosines for a text, and the cosine and rank (from 1) of `image`.

        Raises EncoderError for a text that the encoder makes no tokens of.
        """

        def search() -> Answer:
            found = []
            for name, model in self.models.items():
                scores = self._scores(name, model.encode_text(text))
                answer: Answer = {"images": self._best(scores)}
                if image is not None:
                    rank = int((scores > scores[image]).sum()) + 1
                    answer["image"] = {"score": scores[image].item(), "rank": rank}
                found.append(answer)
            return {"models": found}

        return self._compute(search)

    def search_image(self, data: bytes) -> Answer:
        """Of each model the images and the captions with the highest cosines for an encoded image.

        Raises DataError when it does not decode.
        """

        def search() -> Answer:
            found = []
            for name, model in self.models.items():
                feature = model.encode_image(data)
                answer: Answer = {"images": self._best(self._scores(name, feature)), "captions": []}
                if self.captions:
                    scores, numbers = _top(model.similarity(feature, self._captions[name])[0], CAPTIONS)
                    answer["captions"] = [
                        {"text": self.captions[number], "score": score}
                        for score, number in zip(scores, numbers, strict=True)
                    ]
                found.append(answer)
            return {"models": found}

        return self._compute(search)

    def sample(self, number: int) -> Answer:
        """An image's caption, and for each task of composition its caption and foil, with each model's cosines.

        A model prefers the caption when its cosine is the larger one; a tie is a preference for the foil, as in
        evaluation.
        """
        item = self.items[number]
        foils = foils_of(self._meta(item))
        sides = [text for foil in foils for text in (foil["caption"], foil["foil"])]
        texts = list(dict.fromkeys([*([item.caption] if item.caption else []), *sides]))

        def score() -> list[dict[str, float]]:
            return [
                dict(zip(texts, self._texts_of(name, number, texts), strict=True)) if texts else {}
                for name in self.models
            ]

        by_model = self._compute(score)
        for foil in foils:
            pairs = [(scores[foil["caption"]], scores[foil["foil"]]) for scores in by_model]
            foil["scores"] = [
                {"caption": caption, "foil": other, "prefers": "caption" if caption > other else "foil"}
                for caption, other in pairs
            ]
        scores = [scores[item.caption] for scores in by_model] if item.caption else []
        return {**item._asdict(), "number": number, "scores": scores, "foils": foils}

    def image(self, number: int) -> tuple[bytes, str]:
        """The encoded image and its media type. Raises BadSample when it can no longer be read."""
        item = self.items[number]
        data = self.sets[item.set].image_bytes(item.sample)
        return data, f"image/{read_header(data).format}"

    def _meta(self, item: Item) -> Mapping[str, Any]:
        """The metadata of an image; {} where they do not parse."""
        try:
            return self.sets[item.set].meta(item.sample)
        except BadSample:
            return {}

    def _compute(self, work: Callable[[], T]) -> T:
        """What `work` returns, on the models' thread: OpenMP keeps its threads from one query to the next."""
        try:
            waiting = self._worker.submit(work)
        except RuntimeError as error:
            raise CancelledError from error
        return waiting.result()

    def _scores(self, name: str, feature: Tensor) -> Tensor:
        """The cosines of a feature [1, dim] and all images, of a model: float32 [images] on the CPU."""
        return self.models[name].similarity(feature, self._images[name])[0].cpu()

    def _texts_of(self, name: str, number: int, texts: Sequence[str]) -> list[float]:
        """The cosines of texts and an image, of a model."""
        model = self.models[name]
        return model.similarity(self._images[name][number : number + 1], model.encode_text(texts))[0].tolist()

    def _best(self, scores: Tensor) -> list[Answer]:
        values, numbers = _top(scores, IMAGES)
        return [
            {"number": number, "score": score, "caption": self.items[number].caption}
            for score, number in zip(values, numbers, strict=True)
        ]

    def _encoded(self, name: str, items: Sequence[Item], bad: dict[int, str]) -> Tensor:
        """The features of a model for all items; zeros for those in `bad`, number -> cause, to which it adds."""

        def image_bytes(number: int) -> bytes:
            return self.sets[items[number].set].image_bytes(items[number].sample)

        model = self.models[name]
        features = model.encode_image([])
        features = features.new_zeros(len(items), features.shape[1])
        wanted = [number for number in range(len(items)) if number not in bad]
        with progress.bar(desc=f"images, {name}", total=len(wanted), unit="image") as bar:
            for batch in encode_images(model, image_bytes, wanted):
                features[batch.numbers] = batch.features
                bad.update({number: error.cause for number, error in batch.bad.items()})
                bar.update(len(batch.numbers) + len(batch.bad))
        return features

    def _encoded_captions(self, name: str, captions: Sequence[str], empty: set[int]) -> Tensor:
        """The features of a model for all captions; zeros for those that its tokenizer makes nothing of, whose numbers
        it adds to `empty`."""
        features = self._images[name].new_zeros(len(captions), self._images[name].shape[1])
        with progress.bar(desc=f"captions, {name}", total=len(captions), unit="caption") as bar:
            for start in range(0, len(captions), _AT_ONCE):
                numbers = list(range(start, min(start + _AT_ONCE, len(captions))))
                try:
                    features[numbers] = self.models[name].encode_text([captions[i] for i in numbers])
                except NoTokens as error:
                    empty.update(numbers[i] for i in error.captions)
                    if numbers := [i for i in numbers if i not in empty]:
                        features[numbers] = self.models[name].encode_text([captions[i] for i in numbers])
                bar.update(min(_AT_ONCE, len(captions) - start))
        return features


def foils_of(meta: Mapping[str, Any]) -> list[Answer]:
    """[{"task", "caption", "foil"}, …] of a sample's metadata, whose "composition" is {task: {"caption", "foil"}}; []
    where there is none, and without what is no text."""
    tasks = meta.get("composition")
    return [
        {"task": task, "caption": texts["caption"], "foil": texts["foil"]}
        for task, texts in (tasks.items() if isinstance(tasks, dict) else ())
        if isinstance(texts, dict) and all(_is_text(texts.get(side)) for side in ("caption", "foil"))
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not halved(value)


def _items(name: str, samples: Samples, field: str) -> list[Item]:
    """All samples of a set, by name, with their captions."""
    captions = [caption for number in range(len(samples.names)) for caption in samples.captions(number, field)]
    return [Item(name, i, caption if isinstance(caption, str) else "") for i, caption in enumerate(captions)]


def _spread(count: int, most: int) -> list[int]:
    """Numbers below `count`, at most `most` and evenly spaced."""
    return sorted({(2 * i + 1) * count // (2 * most) for i in range(most)}) if count else []


def _about(model: Model) -> str:
    """What to know of a model, in a few words: its kind, and what encodes its texts."""
    kind = model.description.get("model", "")
    if encoder := model.description.get("encoder"):
        conditioned = ", conditioned" if model.description.get("conditioning") else ""
        return f"{kind.upper()}, text by {encoder['name']}{conditioned}"
    return f"{kind.upper()}, its own text tower" if kind else str(model.source)


def _top(scores: Tensor, most: int) -> tuple[list[float], list[int]]:
    """The highest scores and their numbers, in descending order; of equal ones the first first."""
    values, numbers = scores.sort(descending=True, stable=True)
    return values[:most].tolist(), numbers[:most].tolist()

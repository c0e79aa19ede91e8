"""Evaluates a model on held-out sets: retrieval, composition and zero-shot classification, as each set asks for."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.skipped import in_words
from ..errors import DataError, TrainingError
from ..ranks import Rank, together
from ..scores import FORMAT, TASKS
from .composition import Rows, composition
from .examples import examples as examples_of
from .held_out_set import HeldOutSet
from .images import ImageFeatures, Images, image_features
from .kept import Kept
from .questions import Classes, Questions
from .retrieval import ranks, retrieval
from .subject import Subject
from .texts import Texts, encode_texts
from .zero_shot import zero_shot


def evaluate(
    subject: Subject,
    sets: Mapping[str, HeldOutSet],
    *,
    loader: str = "auto",
    examples: int = 8,
    skip_bad: bool = False,
    rank: Rank | None = None,
    batch_size: int = 64,
    features: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a model on held-out sets: name -> set.

    loader: what decodes the images: auto, host or dali, as in TrainConfig. skip_bad: leave out texts of which the
    encoder's tokenizer makes nothing. rank: this process among those that share the work, in one process group and
    each on its own device; all of them return the same. batch_size: images that go through the tower at once.
    features: a folder to keep features in, which are used again where nothing that makes them has changed (kept.py);
    None keeps none. progress: whether to show bars on stderr.

    Returns the content of eval.json:
        format         FORMAT
        retrieval      {set: scores}, see retrieval.retrieval
        first_caption  {set: the same with the first caption of each image alone}, for sets with several
        composition    {set: scores}, see composition.composition
        zero_shot      {set: scores}, see zero_shot.zero_shot
        benchmarks     {set: the name of the published benchmark that it is, or None}
        skipped        {set: number of samples left out}: images that do not decode, texts that cannot be used; these
                       count in no score
        skipped_causes {set: the same by cause}
        problems       {set: what opening it found that belongs to no sample}
        notes          {set: what to know of its scores, in sentences}
        examples       {set: see examples.examples, `examples` of each kind}, for sets with retrieval

    Raises DataError when no image of a set decodes, or when nothing that it asks can be used; TrainingError when
    features are not finite; BackendError for loader dali when it is not installed; ConfigError for a batch_size below
    1; what the text encoder raises; each also when it is raised on another rank.
    """
    rank = rank or Rank()
    result: dict[str, Any] = {"format": FORMAT} | {task: {} for task in TASKS}
    result |= {key: {} for key in ("benchmarks", "skipped", "skipped_causes", "problems", "notes", "examples")}
    kept: Kept | None = None

    def identify() -> None:
        nonlocal kept
        if features is not None:
            kept = Kept(features, subject.image_identity(), subject.text_identity())

    together(identify, only_first=True)
    for name, held_out in sets.items():
        images = Images(held_out.data, subject.pixels, subject.device, loader, rank, batch_size)
        scores = _evaluate_set(subject, held_out, images, examples, skip_bad, kept, name if progress else None)
        for task in (*TASKS, "examples"):
            if scores[task] is not None:
                result[task][name] = scores[task]
        result["benchmarks"][name] = held_out.benchmark
        result["skipped"][name] = sum(scores["skipped_causes"].values())
        result["skipped_causes"][name] = scores["skipped_causes"]
        result["problems"][name] = [problem._asdict() for problem in held_out.data.problems]
        result["notes"][name] = [*held_out.questions.notes, *scores["notes"]]
    return result


def _evaluate_set(
    subject: Subject,
    held_out: HeldOutSet,
    images: Images,
    examples: int,
    skip_bad: bool,
    kept: Kept | None,
    title: str | None,
) -> dict[str, Any]:
    """The scores of one set, as score_set returns them, and its examples. title: of bars; None for no bars."""
    questions, rank = held_out.questions, images.rank
    bars = [None if title is None else f"{title}: {what}" for what in ("texts", "images")]
    # Texts first: what is wrong with the encoder shows before the images have taken their time.
    texts = encode_texts(
        questions.texts(), subject.encode_text, rank, skip_bad, kept.texts() if kept else None, bars[0]
    )
    features = image_features(subject.encode_image, images, kept, bars[1])

    def score() -> dict[str, Any]:
        found, asked = _scored(features, questions, texts)
        shown = None
        if asked is not None:
            shown = examples_of(
                held_out.data,
                asked.samples,
                asked.image,
                asked.captions,
                asked.texts,
                asked.text,
                asked.ranks,
                examples,
            )
        return found | {"examples": shown}

    return together(score, only_first=True)


def score_set(features: ImageFeatures, questions: Questions, texts: Texts) -> dict[str, Any]:
    """The scores of one set: for each of TASKS a dict, None where the set does not ask for it; and

        skipped_causes  how many samples count in no score, by cause
        notes           what to know of the scores, in sentences

    Raises DataError when nothing that the set asks can be used, TrainingError when a feature is not finite.
    """
    return _scored(features, questions, texts)[0]


class _Asked(NamedTuple):
    """The retrieval of a set. samples, image, captions: of the images that have captions; texts, text: their distinct
    captions; ranks: of the images' best right captions."""

    samples: list[int]
    image: Tensor
    captions: list[list[str]]
    texts: list[str]
    text: Tensor
    ranks: Tensor


def _scored(features: ImageFeatures, questions: Questions, texts: Texts) -> tuple[dict[str, Any], _Asked | None]:
    if not (features.features.isfinite().all() and texts.vectors.isfinite().all()):
        raise TrainingError("the model's features are not finite: its weights have diverged; take earlier ones")
    causes = Counter(features.causes)
    rows = {sample: row for row, sample in enumerate(features.samples)}
    captions = {}
    for sample in features.samples:
        usable = [caption for caption in questions.captions.get(sample, ()) if caption not in texts.empty]
        if sample in questions.left_out:
            causes[questions.left_out[sample]] += 1
            del rows[sample]
        elif usable:
            captions[sample] = usable
        elif sample in questions.captions:
            causes["no tokens"] += 1
            del rows[sample]
    scores: dict[str, Any] = dict.fromkeys(TASKS)
    asked = None
    if captions:
        scores["retrieval"], asked = _retrieval(features.features, rows, captions, texts)
        if any(len(several) > 1 for several in captions.values()):
            first = {sample: several[:1] for sample, several in captions.items()}
            scores["first_caption"] = _retrieval(features.features, rows, first, texts)[0]
    choices = [
        Rows(
            choice.task,
            rows[choice.sample],
            tuple(texts.numbers[caption] for caption in choice.captions),
            texts.numbers[choice.foil],
        )
        for choice in questions.choices
        if choice.sample in rows and texts.empty.isdisjoint((*choice.captions, choice.foil))
    ]
    if choices:
        scores["composition"] = composition(features.features, texts.vectors, choices)
    if questions.classes:
        labels = {rows[sample]: label for sample, label in questions.classes.labels.items() if sample in rows}
        if labels:
            scores["zero_shot"] = _zero_shot(features.features, labels, questions.classes, texts)
    if not any(scores.values()):
        raise DataError(f"no caption can be used: {in_words(causes) or 'the set asks for nothing'}")
    notes = []
    if lost := len(questions.choices) - len(choices):
        notes.append(f"{lost} of {len(questions.choices)} choices are left out: their image or a text cannot be used")
    if asked is not None and (repeats := scores["retrieval"]["repeats"]):
        notes.append(
            f"{repeats} of {scores['retrieval']['captions']} captions repeat an earlier one; all images of a caption, "
            "and all captions of such an image, count as right answers"
        )
    by_cause = sorted(causes.items(), key=lambda item: (-item[1], item[0]))  # whatever rank met them first
    return scores | {"skipped_causes": dict(by_cause), "notes": notes}, asked


def _zero_shot(image: Tensor, labels: Mapping[int, int], classes: Classes, texts: Texts) -> dict[str, Any]:
    """The scores of zero-shot classification. labels: row of image -> number of its class.

    Also "alone", the one template, and "prompts", the SHA-256 of its prompts in the order of the classes, a line each:
    by it a published figure is known to be of the same prompts.
    """
    prompts = classes.prompts([classes.alone])
    in_templates = texts(classes.prompts()).view(len(classes.names), len(classes.templates), -1)
    alone = None if classes.templates == [classes.alone] else texts(prompts)
    own = torch.tensor(list(labels.values()))
    return zero_shot(image[list(labels)], in_templates, own, classes.names, alone) | {
        "alone": classes.alone,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }


def _retrieval(
    image: Tensor, rows: Mapping[int, int], captions: Mapping[int, Sequence[str]], texts: Texts
) -> tuple[dict[str, Any], _Asked]:
    """The scores of retrieval. rows: sample -> row of image; captions: sample -> its captions, at least one."""
    distinct = list(dict.fromkeys(caption for several in captions.values() for caption in several))
    number = {caption: i for i, caption in enumerate(distinct)}
    image_of = torch.tensor([row for row, several in enumerate(captions.values()) for _ in several])
    text_of = torch.tensor([number[caption] for several in captions.values() for caption in several])
    chosen, text = image[[rows[sample] for sample in captions]], texts(distinct)
    found = ranks(chosen, text, image_of, text_of)
    scores = retrieval(chosen, text, image_of, text_of, found)
    return scores, _Asked(list(captions), chosen, list(map(list, captions.values())), distinct, text, found[0])

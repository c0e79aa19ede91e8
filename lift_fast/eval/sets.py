"""Opens held-out sets and reads what they ask."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import foreign
from ..data.captions import checked_caption
from ..data.open import open_data
from ..data.options import NOT_RECORDED, DataOptions
from ..data.samples import BadText, Samples, SeveralCaptions
from ..data.tables import TableSamples
from ..errors import ConfigError, DataError
from ..sugarcrepe import TASKS
from .held_out_set import HeldOutSet
from .labels import LABELS, check_classes, classes_of
from .layouts import open_benchmark
from .questions import Choice, Questions
from .templates import ClassNames, read_classnames, read_templates

_TRIED = 8  # samples that are asked for a caption, to see whether a set has the field


def open_set(
    path: str | Path,
    images: str | Path | None = None,
    *,
    options: DataOptions | None = None,
    fields: Sequence[str] = (),
    wanted: str = "txt",
    skip_bad: bool | None = None,
    templates: Sequence[str] | None = None,
    classnames: ClassNames | None = None,
) -> HeldOutSet:
    """Opens a held-out set of any layout of layouts.open_benchmark or data.open.open_data.

    images, options: as of open_data. fields: the captions to read, several for several captions of an image. Default:
    `wanted`, or "txt" in a set that does not have it. skip_bad: leave out and count captions that cannot be used;
    default: as the options say. templates, classnames: for zero-shot classification, as of labels.classes_of.

    Raises DataError and ConfigError as open_benchmark, open_data and read_questions.
    """
    options = options or DataOptions()
    skip_bad = options.skip_bad if skip_bad is None else skip_bad
    found = open_benchmark(
        Path(path),
        None if images is None else Path(images),
        options=replace(options, skip_bad=skip_bad),
        templates=templates,
        classnames=classnames,
        fields=fields,
        wanted=wanted,
    )
    if found is not None:
        if fields:
            found.questions.notes.append("--field was not used: this layout has its own captions")
        return found
    data = open_data(path, images, options)
    questions = read_questions(
        data, fields, wanted=wanted, skip_bad=skip_bad, templates=templates, classnames=classnames
    )
    return HeldOutSet(data, questions)


def open_sets(
    paths: Mapping[str, Path],
    images: Sequence[Path] = (),
    *,
    options: DataOptions,
    fields: Sequence[str] = (),
    wanted: str = "txt",
    skip_bad: bool | None = None,
    templates: Path | None = None,
    classnames: Path | None = None,
) -> dict[str, HeldOutSet]:
    """Opens named held-out sets, as `lift-fast eval --data` names them. images: the folder of the image files of each,
    or none at all. templates, classnames: files. Other arguments and errors as of open_set, read_templates and
    read_classnames."""
    prompts = read_templates(templates) if templates else None
    names = read_classnames(classnames) if classnames else None
    return {
        name: open_set(
            path,
            folder,
            options=options,
            fields=fields,
            wanted=wanted,
            skip_bad=skip_bad,
            templates=prompts,
            classnames=names,
        )
        for (name, path), folder in zip(paths.items(), images or len(paths) * (None,), strict=True)
    }


def options_of(run: Mapping[str, Any], given: DataOptions) -> DataOptions:
    """How the held-out sets of a run are read: as given; where that has the default, as the run's own data was."""
    known = {*DataOptions.__dataclass_fields__}.difference(NOT_RECORDED)
    recorded = {name: value for name, value in run.get("read", {}).items() if name in known}
    try:
        foreign.check(recorded, DataOptions)
    except ValueError as error:
        raise ConfigError(f"this model's description: read: {error}") from error
    return replace(given, **recorded | given.recorded())


def field_of(data: Samples, wanted: str) -> str:
    """The caption field `wanted` if the first samples have it, else "txt"."""
    for sample in range(min(_TRIED, len(data))):
        try:
            data.caption(sample, wanted)
            return wanted
        except SeveralCaptions:
            return wanted
        except DataError:
            continue
    return "txt"


def read_questions(
    data: Samples,
    fields: Sequence[str] = (),
    *,
    wanted: str = "txt",
    skip_bad: bool = False,
    templates: Sequence[str] | None = None,
    classnames: ClassNames | None = None,
) -> Questions:
    """What the captions and the metadata of all samples ask: retrieval; composition where every sample has foils,
    {"composition": {task: {"caption", "foil"}}}; zero-shot classification where labels.classes_of finds classes.

    Arguments as of open_set. A caption may be a list, for several captions. A table without captions is asked for
    classes alone. skip_bad: leave out and count samples without a usable caption.

    Raises BadText for the first caption that cannot be used, unless skip_bad; DataError when none can be used, when a
    sample of a set with foils lacks one, and for a table without captions and classes.
    """
    names = list(fields) or _fields_of(data, wanted)
    captions: dict[int, list[str]] = {}
    metas: dict[int, dict[str, Any]] = {}
    left_out: dict[int, str] = {}
    first: BadText | None = None
    for sample in range(len(data)):
        try:
            several = [caption for name in names for caption in captions_of(data, sample, name)]
            metas[sample] = data.meta(sample)
            if names:
                captions[sample] = list(dict.fromkeys(several))
        except BadText as error:
            if not skip_bad:
                raise
            first = first or error
            left_out[sample] = error.cause
    if not metas and first is not None:
        raise DataError(f"{data.folder}: no caption can be used; the first: {first.reason}")
    labelled = classes_of(data, metas, skip_bad=skip_bad, templates=templates, classnames=classnames)
    if not names:
        check_classes(data, labelled)
    notes = list(labelled.notes)
    if not fields and names and names != [wanted]:
        notes.append(f"the run was trained on the captions {wanted!r}, which it does not have; {names[0]!r} was read")
    return Questions(captions, _choices(metas), labelled.classes, left_out | labelled.left_out, notes)


def _fields_of(data: Samples, wanted: str) -> list[str]:
    """The caption field to read; [] for a table without captions, but with labels."""
    field = field_of(data, wanted)
    try:
        data.caption_field(field)
    except DataError:
        if not isinstance(data, TableSamples) or not set(LABELS) & set(data.columns):
            raise
        return []
    return [field]


def captions_of(data: Samples, sample: int, field: str) -> list[str]:
    """The captions of a sample in a field, which may hold one or a list. Raises BadText."""
    try:
        return [data.caption(sample, field)]
    except SeveralCaptions as several:
        return [checked_caption(caption, field, lambda: data.where(sample)) for caption in several.captions]


def _choices(metas: Mapping[int, Mapping[str, Any]]) -> list[Choice]:
    """The choices between captions and foils, task after task, where every sample has them. Raises DataError."""
    if not all("composition" in meta for meta in metas.values()):
        return []
    return [_choice(task, sample, meta["composition"]) for task in TASKS for sample, meta in metas.items()]


def _choice(task: str, sample: int, tasks: Any) -> Choice:
    """The choice of one task. tasks: the entry "composition" of a sample's metadata. Raises DataError."""
    pair = tasks.get(task, {}) if isinstance(tasks, dict) else {}
    try:
        for name in ("caption", "foil"):
            checked_caption(pair[name], name, lambda: f"sample {sample}, composition task {task!r}")
    except (LookupError, TypeError) as error:
        raise DataError(f"sample {sample} has no caption and foil for the composition task {task!r}") from error
    return Choice(task, sample, (pair["caption"],), pair["foil"])

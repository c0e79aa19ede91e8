"""What a held-out set asks of a model: captions to be retrieved, choices between captions, classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """A choice between captions of one image, as SugarCrepe asks it (Hsieh et al., 2023, arXiv:2306.14610).

    task: the kind of difference. sample: the number of the image's sample. captions: true of the image; one, or the
    two of SugarCrepe++ (Dumpala et al., 2024, arXiv:2406.11171). foil: not true of it.
    """

    task: str
    sample: int
    captions: tuple[str, ...]
    foil: str


@dataclass(frozen=True)
class Classes:
    """Classes for zero-shot classification. names: as they stand in a prompt; classes of one name count as one.
    templates: texts in which {} stands for the name. labels: sample -> number of its class. one_template: a template
    that is also scored alone; default: the first."""

    names: list[str]
    templates: list[str]
    labels: dict[int, int]
    one_template: str = ""

    @property
    def alone(self) -> str:
        """The template that is scored alone."""
        return self.one_template or self.templates[0]

    def prompts(self, templates: Sequence[str] | None = None) -> list[str]:
        """The names in every template, or in those given: first those of the first class, then of the second, …"""
        chosen = self.templates if templates is None else templates
        return [template.replace("{}", name) for name in self.names for template in chosen]


@dataclass(frozen=True)
class Questions:
    """What a held-out set asks of a model.

    captions: sample -> its captions, for retrieval. choices: for composition. classes: for zero-shot classification.
    left_out: sample -> cause, for samples of which something cannot be used: they count in no score. notes: what to
    know of the scores, in sentences.
    """

    captions: dict[int, list[str]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    classes: Classes | None = None
    left_out: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Every text that the questions take, each once."""
        found = dict.fromkeys(caption for captions in self.captions.values() for caption in captions)
        for choice in self.choices:
            found |= dict.fromkeys((*choice.captions, choice.foil))
        if self.classes:
            found |= dict.fromkeys([*self.classes.prompts(), *self.classes.prompts([self.classes.alone])])
        return list(found)

"""The inverse effect of captions, measured: does a text encoder put a caption of like syntax and another meaning nearer
than a paraphrase?

Contrastive training on synthetic captions shows an inverse effect: short ones make better models than the whole ones
(Liu et al., 2024, arXiv:2411.16828). LIFT's authors attribute it to the syntax that such captions share, which a text
tower trained from scratch encodes in place of the meaning (Yang et al., 2025, arXiv:2506.04209).

A triple has an anchor; a paraphrase, which states the same facts in another syntax; and a foil, which states others in
the anchor's. But for the kind things, all three have the same nouns, and where the foil exchanges, the anchor's words.

    kind        what the foil changes                              what the paraphrase changes
    things      speaks of other things, in their own colours       predicates for adjectives, the order
    attributes  exchanges the colours of two things                predicates for adjectives, the order
    roles       exchanges who does it to whom                      active, passive, relative clause
    positions   exchanges what is left of, or above, what          right of for left of, below for above, the order
    colour      replaces a colour                                  predicate for adjective, the order
    number      replaces a number                                  "a group of", "the number of", the order
    negation    exchanges what is there and what is missing        "no", "missing", "lacks", the order

A short caption is one sentence. A long one has four in one syntax, each about other things, and one about background
and time; its foil changes all four (of the kind things also the fifth), its paraphrase also reverses their order.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, TrainingError
from ..run_folder import EncodeText

KINDS = ("things", "attributes", "roles", "positions", "colour", "number", "negation")
LENGTHS = ("short", "long")
MOST = 14_000  # triples; of every kind there are more

Fact = tuple[str, ...]
_SENTENCES = 4  # of one syntax in a long caption

_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "brown", "grey")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
_THINGS = (
    "car", "boat", "bench", "lamp", "chair", "bag", "cup", "vase", "book", "clock", "ball", "box", "bottle", "hat",
    "kite", "bowl", "basket", "umbrella", "apple", "guitar", "candle", "mirror", "plant", "phone",
)  # fmt: skip
_BEINGS = (
    "dog", "cat", "horse", "monkey", "robot", "man", "woman", "boy", "girl", "clown", "nurse", "farmer", "sailor",
    "knight", "bear", "lion",
)  # fmt: skip
_VERBS = {
    "chasing": "chased", "watching": "watched", "following": "followed", "pushing": "pushed", "pulling": "pulled",
    "carrying": "carried", "leading": "led", "lifting": "lifted", "washing": "washed", "guarding": "guarded",
}  # fmt: skip
_PLACES = (
    "on the beach", "in the garden", "in the kitchen", "on the balcony", "in the street", "in the park",
    "on the platform", "in the garage", "in the hallway", "on the roof", "on the lawn", "in the yard",
)  # fmt: skip
_HOLDERS = ("table", "shelf", "desk", "counter", "tray", "windowsill", "cart", "rug", "stage", "ledge")
_RELATIONS = {"left": ("to the left of", "to the right of"), "above": ("above", "below")}
_BACKGROUNDS = ("a forest", "a city", "a harbour", "a hill", "a castle", "a river", "a fence", "a field")
_TIMES = ("dawn", "morning", "noon", "dusk", "evening", "night")


@dataclass(frozen=True)
class Triple:
    """Three captions. kind: of KINDS, length: of LENGTHS. meaning: the facts that anchor and paraphrase state,
    foil_meaning: those that the foil states; equal facts are written alike, whatever the syntax of the caption."""

    kind: str
    length: str
    anchor: str
    paraphrase: str
    foil: str
    meaning: frozenset[Fact]
    foil_meaning: frozenset[Fact]


def triples(n: int, seed: int = 0) -> list[Triple]:
    """n triples, no anchor twice, of all kinds and both lengths in turn: a function of n and seed, and the first ones
    of a larger n. Raises ConfigError for less than 1 or more than MOST."""
    if not 1 <= n <= MOST:
        raise ConfigError(f"{n} triples: there must be from 1 to {MOST}")
    rng = random.Random(seed)
    cells = [(kind, length) for length in LENGTHS for kind in KINDS]
    found: dict[str, Triple] = {}  # by their anchors
    while len(found) < n:
        triple = _triple(*cells[len(found) % len(cells)], rng)
        found.setdefault(triple.anchor, triple)
    return list(found.values())


def inverse_effect(encode_text: EncodeText, triples: Sequence[Triple]) -> dict[str, Any]:
    """How often a text encoder prefers like syntax to like meaning.

    encode_text: captions -> float [captions, dim] of unit length; called once, with each caption once.

    Returns
        rate     the fraction of triples in which the cosine of anchor and foil is at least that of anchor and
                 paraphrase: 0 for an encoder of the meaning alone, 1 for one of the syntax alone, and for one that
                 gives all captions one vector
        ties     how many of them are equal
        cosine   {"paraphrase": its mean, "foil": its mean}
        n        the number of triples
        lengths  {length: the same four}
        kinds    {kind: the same four and lengths}

    Raises TrainingError when a vector is not finite, ValueError without triples.
    """
    if not triples:
        raise ValueError("there are no triples")
    number: dict[str, int] = {}
    rows = [
        [number.setdefault(text, len(number)) for text in (one.anchor, one.paraphrase, one.foil)] for one in triples
    ]
    vectors = encode_text(list(number)).double()
    if not vectors.isfinite().all():
        raise TrainingError("the model's features are not finite: its weights have diverged; take earlier ones")
    anchor, paraphrase, foil = vectors[torch.tensor(rows)].unbind(dim=1)
    # Products summed row by row: equal captions have equal cosines, which a matrix product does not promise.
    near, far = (anchor * paraphrase).sum(dim=1), (anchor * foil).sum(dim=1)

    def scores(of: list[int]) -> dict[str, Any]:
        return {
            "rate": (far[of] >= near[of]).double().mean().item(),
            "ties": int((far[of] == near[of]).sum()),
            "cosine": {"paraphrase": near[of].mean().item(), "foil": far[of].mean().item()},
            "n": len(of),
        }

    def by_length(of: list[int]) -> dict[str, Any]:
        parts = {length: [i for i in of if triples[i].length == length] for length in LENGTHS}
        return scores(of) | {"lengths": {length: scores(part) for length, part in parts.items() if part}}

    kinds = {kind: [i for i, one in enumerate(triples) if one.kind == kind] for kind in KINDS}
    return by_length(list(range(len(triples)))) | {"kinds": {kind: by_length(of) for kind, of in kinds.items() if of}}


# ---- captions: what a sentence states, and the syntaxes that state it


@dataclass(frozen=True)
class _Core:
    """What one sentence states, as the words that fill its syntaxes."""

    kind: str
    words: tuple[str, ...]

    def facts(self) -> frozenset[Fact]:
        a, b, *more = self.words
        if self.kind in ("things", "attributes"):
            return frozenset({("colour", a, more[0]), ("colour", b, more[1]), ("next to", *sorted((a, b)))})
        if self.kind == "roles":
            return frozenset({("does", a, more[0], b)})
        if self.kind == "positions":
            return frozenset({(more[0], a, b)})
        if self.kind == "negation":
            return frozenset({("has", more[0], a), ("lacks", more[0], b)})
        return frozenset({(self.kind, a, b), ("where", a, more[0])})

    def changed(self, rng: random.Random) -> "_Core":
        """What the foil states in its place, but for the kind things."""
        a, b, *more = self.words
        if self.kind in ("colour", "number"):
            return _Core(self.kind, (a, _another(_COLOURS if self.kind == "colour" else _NUMBERS, b, rng), *more))
        if self.kind == "attributes":
            return _Core(self.kind, (a, b, more[1], more[0]))
        return _Core(self.kind, (b, a, *more))


def _drawn(kind: str, count: int, rng: random.Random) -> list[_Core]:
    """`count` statements of a kind, of which no two speak of one thing or one place."""
    things = rng.sample(_BEINGS if kind == "roles" else _THINGS, 2 * count)
    pairs = list(zip(things[::2], things[1::2], strict=True))
    if kind in ("things", "attributes"):
        more = [tuple(rng.sample(_COLOURS, 2)) for _ in pairs]
    elif kind == "roles":
        more = [(verb,) for verb in rng.sample(list(_VERBS), count)]
    elif kind == "positions":
        more = [(rng.choice(list(_RELATIONS)),)] * count  # one, as the sentences have one syntax
    elif kind == "negation":
        more = [(holder,) for holder in rng.sample(_HOLDERS, count)]
    else:
        more = [(place,) for place in rng.sample(_PLACES, count)]
        values = rng.sample(_COLOURS if kind == "colour" else _NUMBERS, count)
        pairs = [(thing, value) for (thing, _), value in zip(pairs, values, strict=True)]
    return [_Core(kind, (*pair, *words)) for pair, words in zip(pairs, more, strict=True)]


def _attributes(a: str, b: str, of_a: str, of_b: str) -> tuple[str, ...]:
    return (
        f"{_a(of_a)} {a} is next to {_a(of_b)} {b}",
        f"the {a} is {of_a}, and the {b} next to it is {of_b}",
        f"next to {_a(b)} that is {of_b} there is {_a(a)} that is {of_a}",
    )


def _roles(a: str, b: str, verb: str) -> tuple[str, ...]:
    return (
        f"{_a(a)} is {verb} {_a(b)}",
        f"{_a(b)} is being {_VERBS[verb]} by {_a(a)}",
        f"there is {_a(b)} that {_a(a)} is {verb}",
    )


def _positions(a: str, b: str, relation: str) -> tuple[str, ...]:
    of, converse = _RELATIONS[relation]
    return (
        f"{_a(a)} is {of} {_a(b)}",
        f"{_a(b)} is {converse} {_a(a)}",
        f"{of} {_a(b)} there is {_a(a)}",
        f"{converse} {_a(a)} there is {_a(b)}",
    )


def _colour(a: str, colour: str, where: str) -> tuple[str, ...]:
    return (
        f"{_a(colour)} {a} is {where}",
        f"the {a} {where} is {colour}",
        f"{where} there is {_a(a)} that is {colour}",
    )


def _number(a: str, number: str, where: str) -> tuple[str, ...]:
    return (
        f"{number} {_many(a)} are {where}",
        f"{where} there is a group of {number} {_many(a)}",
        f"the number of {_many(a)} {where} is {number}",
    )


def _negation(a: str, b: str, holder: str) -> tuple[str, ...]:
    return (
        f"there is {_a(a)} but no {b} on the {holder}",
        f"on the {holder} {_a(b)} is missing, but {_a(a)} is there",
        f"the {holder} has {_a(a)} on it but lacks {_a(b)}",
    )


_SYNTAXES: dict[str, Callable[..., tuple[str, ...]]] = {
    "things": _attributes,
    "attributes": _attributes,
    "roles": _roles,
    "positions": _positions,
    "colour": _colour,
    "number": _number,
    "negation": _negation,
}


def _triple(kind: str, length: str, rng: random.Random) -> Triple:
    count = 1 if length == "short" else _SENTENCES
    around = foil_around = None if length == "short" else (rng.choice(_BACKGROUNDS), rng.choice(_TIMES))
    if kind == "things":
        drawn = _drawn(kind, 2 * count, rng)
        cores, changed = drawn[:count], drawn[count:]
        if around is not None:
            background, time = around
            foil_around = _another(_BACKGROUNDS, background, rng), _another(_TIMES, time, rng)
    else:
        cores = _drawn(kind, count, rng)
        changed = [core.changed(rng) for core in cores]
    one, other = rng.sample(range(len(_SYNTAXES[kind](*cores[0].words))), 2)
    first = rng.random() < 0.5  # whether background and time come first in the anchor
    return Triple(
        kind,
        length,
        _caption(cores, one, around, first),
        _caption(cores[::-1], other, around, not first),
        _caption(changed, one, foil_around, first),
        _meaning(cores, around),
        _meaning(changed, foil_around),
    )


def _caption(cores: Sequence[_Core], syntax: int, around: tuple[str, str] | None, first: bool) -> str:
    sentences = [_SYNTAXES[core.kind](*core.words)[syntax] for core in cores]
    if around is not None:
        background, time = around
        if first:
            sentences.insert(0, f"it is {time}, with {background} in the background")
        else:
            sentences.append(f"the background shows {background}, and it is {time}")
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _meaning(cores: Sequence[_Core], around: tuple[str, str] | None) -> frozenset[Fact]:
    facts = frozenset[Fact]().union(*(core.facts() for core in cores))
    return facts if around is None else facts | {("background", around[0]), ("time", around[1])}


def _another(words: Sequence[str], word: str, rng: random.Random) -> str:
    return rng.choice([one for one in words if one != word])


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _many(noun: str) -> str:
    return noun + ("es" if noun.endswith(("x", "ch")) else "s")

"""Scenes: seeded images of coloured shapes with short and long captions and a foil for each task of SugarCrepe.

A scene has two or three entities along one axis; an entity is one to three copies of a shape, with a colour and a size.
Sample (seed, index) is a pure function of these two numbers.

Why the text alone does not show which side is the foil
    A scene is a uniform draw of a relation r (left of, right of, above, below) and of a list of things with distinct
    colours and distinct shapes, where each thing is r of the next. A foil belongs to a counterfactual scene S', drawn
    from a symmetric kernel K(S -> S'): replace a value by another one, drawn uniformly; exchange two things, or values
    of two things; replace r by another relation. The same template function makes the caption from S and the foil from
    S', so (caption, foil) and (foil, caption) are equally likely: a scorer that sees only the two texts, however it was
    trained, is right half of the time. The only rejection (the caption must be false of S' and the foil false of S) is
    symmetric, too.

    SugarCrepe (Hsieh et al., 2023, arXiv:2306.14610) makes the foil of an add task by adding to the caption, so the
    foil is the longer text, which a scorer without the image can exploit. Here both texts add to a common base: the
    caption an object or attribute that is in the image, the foil one that is not. The base is stored with them.

Truth is checked, not assumed: each text comes with the claims it makes, and `holds` tests a claim against the geometry
of the scene that is drawn.
"""

import io
import math
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..data.shards import ShardWriter
from ..sugarcrepe import TASKS

COLOURS = {
    "red": "#d91e1e",
    "orange": "#ff8a00",
    "yellow": "#f5d000",
    "green": "#159a3c",
    "blue": "#1d4fe0",
    "purple": "#7a1fa8",
    "pink": "#ff7fbf",
    "black": "#141414",
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
SIZES = {"small": 0.15, "large": 0.26}  # width and height of a shape; the canvas is 1 wide and 1 high
COUNTS = (1, 2, 3)
BACKGROUNDS = ("#ffffff", "#f7f7f2", "#f1f4f7", "#f6f1f1")

_PITCH = {"small": 0.19, "large": 0.29}  # between the copies of one entity, stacked across the axis
_CLEAR = 0.03  # the smallest gap between two entities: two pixels of 72
_SLOTS = {2: (0.27, 0.73), 3: (1 / 6, 1 / 2, 5 / 6)}
_ALONG = {2: 0.05, 3: 0.01}  # the largest jitter along the axis …
_ACROSS = 0.04  # … and across it
_LEVEL = 0.1  # "left of" requires that the centres differ in height by less than this
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

LONG_TOKENS = (101, 128)  # range for a long caption, special tokens included, by BERT's and by CLIP's tokenizer


@dataclass(frozen=True)
class Entity:
    """Copies of one shape close together. at: the centre (x, y) of each copy, y downwards."""

    colour: str
    size: str
    shape: str
    at: tuple[tuple[float, float], ...]

    @property
    def count(self) -> int:
        return len(self.at)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom of all copies."""
        half = SIZES[self.size] / 2
        xs, ys = zip(*self.at, strict=True)
        return min(xs) - half, min(ys) - half, max(xs) + half, max(ys) + half


@dataclass(frozen=True)
class Scene:
    """Two or three entities that do not touch, on a plain light background."""

    entities: tuple[Entity, ...]
    background: str = BACKGROUNDS[0]


def relation(a: Entity, b: Entity) -> str | None:
    """Where a lies as seen from b: "left", "right", "above" or "below"; None where none or several of these hold."""
    al, at, ar, ab = a.box
    bl, bt, br, bb = b.box
    level = min(ab, bb) > max(at, bt) and abs(at + ab - bt - bb) / 2 < _LEVEL
    aligned = min(ar, br) > max(al, bl) and abs(al + ar - bl - br) / 2 < _LEVEL
    if level and not aligned:
        return "left" if ar + _CLEAR <= bl else "right" if br + _CLEAR <= al else None
    if aligned and not level:
        return "above" if ab + _CLEAR <= bt else "below" if bb + _CLEAR <= at else None
    return None


# ---- claims: what a text states of a scene, and whether it is true


@dataclass(frozen=True)
class Noun:
    """ "two small red circles": a shape, its exact count, size and colour; 0 or "" for what the text leaves out."""

    shape: str
    count: int = 0
    size: str = ""
    colour: str = ""

    def matches(self, entity: Entity) -> bool:
        return (
            self.shape == entity.shape
            and self.count in (0, entity.count)
            and self.size in ("", entity.size)
            and self.colour in ("", entity.colour)
        )

    def among(self, scene: Scene) -> list[Entity]:
        """The entities of a scene that it describes."""
        return [entity for entity in scene.entities if self.matches(entity)]


@dataclass(frozen=True)
class Exists:
    """There is {noun}."""

    noun: Noun

    def true_of(self, scene: Scene) -> bool:
        return bool(self.noun.among(scene))


@dataclass(frozen=True)
class Related:
    """{subject} is {where} ("left", "right", "above", "below") of {other}."""

    subject: Noun
    where: str
    other: Noun

    def true_of(self, scene: Scene) -> bool:
        pairs = ((a, b) for a in self.subject.among(scene) for b in self.other.among(scene) if a is not b)
        return any(relation(a, b) == self.where for a, b in pairs)


@dataclass(frozen=True)
class Placed:
    """{noun} is at one end of the image ("left", "right", "above", "below") or in its "middle"."""

    noun: Noun
    where: str

    def true_of(self, scene: Scene) -> bool:
        for a in self.noun.among(scene):
            seen = {relation(a, b) for b in scene.entities if b is not a}
            middle = seen in ({"left", "right"}, {"above", "below"})
            if middle if self.where == "middle" else seen == {self.where}:
                return True
        return False


@dataclass(frozen=True)
class Totals:
    """There are {kinds} entities, {shapes} shapes in all."""

    kinds: int
    shapes: int

    def true_of(self, scene: Scene) -> bool:
        return (self.kinds, self.shapes) == (len(scene.entities), sum(e.count for e in scene.entities))


@dataclass(frozen=True)
class Lined:
    """The entities lie in a "row" or a "column"; with a noun, the copies of that entity."""

    line: str
    noun: Noun | None = None

    def true_of(self, scene: Scene) -> bool:
        if self.noun is None:
            allowed = ("left", "right") if self.line == "row" else ("above", "below")
            return all(relation(a, b) in allowed for a, b in combinations(scene.entities, 2))
        fixed = 1 if self.line == "row" else 0
        return any(e.count > 1 and len({xy[fixed] for xy in e.at}) == 1 for e in self.noun.among(scene))


@dataclass(frozen=True)
class Compared:
    """{more} exceeds {less} (or, with `equal`, equals it) in "size" or in "count"."""

    what: str
    more: Noun
    less: Noun
    equal: bool = False

    def true_of(self, scene: Scene) -> bool:
        def value(entity: Entity) -> float:
            return SIZES[entity.size] if self.what == "size" else entity.count

        pairs = ((value(a), value(b)) for a in self.more.among(scene) for b in self.less.among(scene))
        return any(a == b if self.equal else a > b for a, b in pairs)


@dataclass(frozen=True)
class Absent:
    """No entity has this colour, and none has this shape."""

    colour: str
    shape: str

    def true_of(self, scene: Scene) -> bool:
        return not any(e.colour == self.colour or e.shape == self.shape for e in scene.entities)


@dataclass(frozen=True)
class OnlyColours:
    """The entities have exactly these colours."""

    colours: frozenset[str]

    def true_of(self, scene: Scene) -> bool:
        return {e.colour for e in scene.entities} == self.colours


@dataclass(frozen=True)
class Apart:
    """No shape touches another."""

    def true_of(self, scene: Scene) -> bool:
        copies = [(x, y, SIZES[e.size] / 2) for e in scene.entities for x, y in e.at]
        return all(max(abs(x - u), abs(y - v)) > h + k for (x, y, h), (u, v, k) in combinations(copies, 2))


Claim = Exists | Related | Placed | Totals | Lined | Compared | Absent | OnlyColours | Apart


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the geometry of the scene makes the claim true."""
    return claim.true_of(scene)


# ---- words


@dataclass(frozen=True)
class _Words:
    """The words for one relation. opposite: its inverse, the relation of b to a."""

    opposite: str
    phrases: tuple[str, str]
    side: str  # at this end of the image
    next_to: str  # on this side of the thing just named
    order: str  # starting at this end


WORDS = {
    "left": _Words("right", ("to the left of", "left of"), "on the left", "on the left", "from left to right"),
    "right": _Words("left", ("to the right of", "right of"), "on the right", "on the right", "from right to left"),
    "above": _Words("below", ("above", "over"), "at the top", "above", "from top to bottom"),
    "below": _Words("above", ("below", "under"), "at the bottom", "below", "from bottom to top"),
}
RELATIONS = tuple(WORDS)

# (template, the pairs of things that it relates, by position)
_CHAIN = ((0, 1), (1, 2))
_SHORT = {
    2: tuple(
        (text, ((0, 1),))
        for text in (
            "{a} {rel} {b}",
            "{a} {a_is} {rel} {b}",
            "there {a_is} {a} {rel} {b}",
            "a picture of {a} {rel} {b}",
            "{rel} {b} there {a_is} {a}",
            "{b} with {a} {next_to}",
            "{order}, {a} and {b}",
            "{a} {side} and {b} {far_side}",
        )
    ),
    3: (
        ("{a} {rel} {b} and {c}", ((0, 1), (0, 2))),
        ("there {a_is} {a} {rel} {b} and {c}", ((0, 1), (0, 2))),
        ("{a} {rel} {b}, which {b_is} {rel} {c}", _CHAIN),
        ("{order}, {a}, {b} and {c}", _CHAIN),
        ("a picture of {a}, then {b}, then {c}, {order}", _CHAIN),
        ("{a} {side}, {b} in the middle and {c} {far_side}", _CHAIN),
        ("{b} between {a} {side} and {c} {far_side}", _CHAIN),
        ("{b} with {a} {next_to} and {c} {far_next_to}", _CHAIN),
    ),
}
# (base, the base with an object {z} added)
_ADD_OBJECT = {
    2: (
        ("{a}", "{a} and {z}"),
        ("a picture of {a}", "a picture of {a} and {z}"),
        ("there {a_is} {a}", "there {a_is} {a} and also {z}"),
    ),
    3: (
        ("{a} {a_is} {rel} {b}", "{a} {a_is} {rel} {b}, and there {z_is} also {z}"),
        ("there {a_is} {a} {rel} {b}", "there {a_is} {a} {rel} {b}, and also {z}"),
        ("a picture in which {a} {a_is} {rel} {b}", "a picture with {z}, in which {a} {a_is} {rel} {b}"),
    ),
}


def plural(shape: str) -> str:
    """ "stars" of "star", "crosses" of "cross"."""
    return shape + ("es" if shape == "cross" else "s")


def _indefinite(noun: Noun, one: str) -> str:
    """ "a large red circle", "two blue stars". one: the article, "one" or "a" (which becomes "an" as needed)."""
    shape = noun.shape if noun.count == 1 else plural(noun.shape)
    words = [word for word in (noun.size, noun.colour, shape) if word]
    article = ("an" if words[0][0] in "aeiou" else "a") if one == "a" else one
    return " ".join([article if noun.count == 1 else NUMBERS[noun.count], *words])


def _definite(noun: Noun) -> str:
    return f"the {noun.colour} {noun.shape if noun.count == 1 else plural(noun.shape)}"


def is_or_are(noun: Noun) -> str:
    """The verb that agrees with the noun's count."""
    return "is" if noun.count == 1 else "are"


@dataclass(frozen=True)
class _Plan:
    """The choices of wording, drawn independently of the scene: template, phrase of the relation, "a" or "one"."""

    template: int
    phrase: int
    one: str


@dataclass(frozen=True)
class _State:
    """A scene before its layout: each thing is `where` of the next; for "left" the leftmost thing comes first."""

    where: str
    things: tuple[Noun, ...]

    def with_thing(self, i: int, **values: Any) -> "_State":
        things = list(self.things)
        things[i] = replace(things[i], **values)
        return replace(self, things=tuple(things))

    def exchange(self, i: int, j: int, *values: str) -> "_State":
        """Things i and j exchange these values; without any named, their places."""
        names = values or ("shape", "count", "size", "colour")
        a, b = self.things[i], self.things[j]
        mine, theirs = ({name: getattr(noun, name) for name in names} for noun in (a, b))
        return self.with_thing(i, **theirs).with_thing(j, **mine)


def _fill(text: str, where: str, nouns: Sequence[Noun], plan: _Plan, added: Noun | None = None) -> str:
    """Fills the template `text` with the things and the words for the relation `where`."""
    words, opposite = WORDS[where], WORDS[WORDS[where].opposite]
    fields = {
        "rel": words.phrases[plan.phrase],
        "order": words.order,
        "side": words.side,
        "far_side": opposite.side,
        "next_to": words.next_to,
        "far_next_to": opposite.next_to,
    }
    for name, noun in [*zip("abc", nouns, strict=False), *([("z", added)] if added else [])]:
        fields[name], fields[f"{name}_is"] = _indefinite(noun, plan.one), is_or_are(noun)
    return text.format(**fields)


# ---- captions, foils


@dataclass(frozen=True)
class Text:
    """A text and the claims it makes; it is true of a scene when all of them are."""

    text: str
    claims: tuple[Claim, ...]

    def true_of(self, scene: Scene) -> bool:
        return all(holds(claim, scene) for claim in self.claims)


_Say = Callable[[_State], tuple[Text, Text | None]]  # a text, and the base it adds to


@dataclass(frozen=True)
class Foil:
    """A caption that is true of the image, and a foil that is false of it but true of the scene `other`.

    base: the text that both extend in the add tasks, true of both scenes; None in the other tasks.
    """

    caption: str
    foil: str
    base: str | None
    claims: tuple[Claim, ...]
    foil_claims: tuple[Claim, ...]
    base_claims: tuple[Claim, ...]
    other: Scene


@dataclass(frozen=True)
class Sample:
    """A scene, its two captions with their claims, and a Foil for each of sugarcrepe.TASKS."""

    scene: Scene
    short: str
    long: str
    claims: tuple[Claim, ...]
    long_claims: tuple[Claim, ...]
    foils: dict[str, Foil]


def generate(seed: int, index: int) -> Sample:
    """Generates sample `index` of `seed`: the same on every machine, and independent of other indices."""
    rng = random.Random(f"scenes-{seed}-{index}")
    n = rng.choice((2, 3))
    colours, shapes = rng.sample(tuple(COLOURS), n), rng.sample(SHAPES, n)
    things = tuple(
        Noun(shape, rng.choice(COUNTS), rng.choice(tuple(SIZES)), colour)
        for shape, colour in zip(shapes, colours, strict=True)
    )
    state = _State(rng.choice(RELATIONS), things)
    plan = _Plan(rng.randrange(len(_SHORT[n])), rng.randrange(2), rng.choice(("a", "a", "a", "one")))
    jitter = tuple((rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(n))
    background = rng.choice(BACKGROUNDS)

    def lay_out(state: _State) -> Scene:
        return _lay_out(state, jitter, background)

    scene, short = lay_out(state), _short(state, plan)
    long = _long(state, rng)
    foils = {task: _foil(task, state, plan, rng, lay_out) for task in TASKS}
    return Sample(scene, short.text, long.text, short.claims, long.claims, foils)


def _lay_out(state: _State, jitter: Sequence[tuple[float, float]], background: str) -> Scene:
    """Places the things in slots along the axis, and the copies of each across it. jitter: (along, across) of each
    thing, in [-1, 1]."""
    n = len(state.things)
    slots = _SLOTS[n] if state.where in ("left", "above") else _SLOTS[n][::-1]
    entities = []
    for noun, slot, (dx, dy) in zip(state.things, slots, jitter, strict=True):
        along = slot + dx * _ALONG[n]
        pitch = _PITCH[noun.size]
        first = 0.5 + dy * _ACROSS - (noun.count - 1) / 2 * pitch
        row = state.where in ("left", "right")
        spots = [(round(along, 4), round(first + k * pitch, 4)) for k in range(noun.count)]
        at = tuple((u, v) if row else (v, u) for u, v in spots)
        entities.append(Entity(noun.colour, noun.size, noun.shape, at))
    return Scene(tuple(entities), background)


def _short(state: _State, plan: _Plan) -> Text:
    text, pairs = _SHORT[len(state.things)][plan.template]
    claims = tuple(Related(state.things[i], state.where, state.things[j]) for i, j in pairs)
    return Text(_fill(text, state.where, state.things, plan), claims)


def _foil(task: str, state: _State, plan: _Plan, rng: random.Random, lay_out: Callable[[_State], Scene]) -> Foil:
    """Draws counterfactuals of `state` until the foil is false of this scene and the caption of the other."""
    scene = lay_out(state)
    while True:
        other_state, say = _counterfactual(task, state, plan, rng)
        (caption, base), (foil, _), other = say(state), say(other_state), lay_out(other_state)
        if not foil.true_of(scene) and not caption.true_of(other):
            break
    return Foil(
        caption.text,
        foil.text,
        base.text if base else None,
        caption.claims,
        foil.claims,
        base.claims if base else (),
        other,
    )


def _counterfactual(task: str, state: _State, plan: _Plan, rng: random.Random) -> tuple[_State, _Say]:
    """Draws another state from a symmetric kernel; returns it with the function that makes the text of either state."""
    things = state.things
    i, j = rng.sample(range(len(things)), 2)
    if task == "add_obj":
        return _add_object(i, state, plan, rng)
    if task == "add_att":
        return _add_attribute(i, j, state, plan, rng)
    if task == "replace_rel":
        other = replace(state, where=rng.choice([where for where in RELATIONS if where != state.where]))
    elif task == "replace_obj":
        other = state.with_thing(i, shape=rng.choice(_unused("shape", things)))
    elif task == "swap_obj":  # whole things, or only their shapes: colours, sizes and counts stay
        other = state.exchange(i, j, *rng.choice(((), ("shape",))))
    else:
        if task == "replace_att":
            kind = rng.choice(("colour", "size", "count"))
            other = _replace_attribute(kind, i, state, rng)
        else:
            assert task == "swap_att", task
            differ = [k for k in ("colour", "size", "count") if getattr(things[i], k) != getattr(things[j], k)]
            kind = rng.choice(differ)
            other = state.exchange(i, j, kind)
        if kind == "count":  # "a star" may be said of two stars; "one star" may not
            plan = replace(plan, one="one")
    return other, lambda state: (_short(state, plan), None)


def _unused(kind: str, things: Sequence[Noun]) -> list[str]:
    """The colours or shapes that no thing has."""
    values = COLOURS if kind == "colour" else SHAPES
    return [value for value in values if all(getattr(noun, kind) != value for noun in things)]


def _replace_attribute(kind: str, i: int, state: _State, rng: random.Random) -> _State:
    """Gives thing i another size or count, or a colour that no thing has, drawn uniformly."""
    values: Sequence[str | int] = tuple(SIZES) if kind == "size" else COUNTS
    if kind == "colour":
        values = _unused(kind, state.things)
    now = getattr(state.things[i], kind)
    return state.with_thing(i, **{kind: rng.choice([value for value in values if value != now])})


def _add_attribute(i: int, j: int, state: _State, plan: _Plan, rng: random.Random) -> tuple[_State, _Say]:
    """The text names the colour (or the size) of thing i only; in the other state thing i has a new one, or j's."""
    kind = rng.choice(("colour", "size"))
    if kind == "colour" and rng.random() < 0.5:
        other = state.exchange(i, j, kind)
    else:
        other = _replace_attribute(kind, i, state, rng)

    def say(state: _State) -> tuple[Text, Text]:
        bare = state
        for k in range(len(state.things)):
            bare = bare.with_thing(k, **{kind: ""})
        added = bare.with_thing(i, **{kind: getattr(state.things[i], kind)})
        return _short(added, plan), _short(bare, plan)

    return other, say


def _add_object(i: int, state: _State, plan: _Plan, rng: random.Random) -> tuple[_State, _Say]:
    """The text names thing i last, as the addition; the other state has a thing of another shape in its place."""
    things = state.things
    colour = rng.choice([*_unused("colour", things), things[i].colour])
    shape, size = rng.choice(_unused("shape", things)), rng.choice(tuple(SIZES))
    other = state.with_thing(i, shape=shape, count=rng.choice(COUNTS), size=size, colour=colour)
    base_template, template = rng.choice(_ADD_OBJECT[len(things)])

    def say(state: _State) -> tuple[Text, Text]:
        added, rest = state.things[i], [noun for k, noun in enumerate(state.things) if k != i]
        claim = Exists(rest[0]) if len(rest) == 1 else Related(rest[0], state.where, rest[1])
        base = _fill(base_template, state.where, rest, plan)
        text = _fill(template, state.where, rest, plan, added)
        return Text(text, (claim, Exists(added))), Text(base, (claim,))

    return other, say


def _long(state: _State, rng: random.Random) -> Text:
    """An overview, each thing, each pair of neighbours, then details until the length is in LONG_TOKENS."""
    where, things = state.where, state.things
    words, opposite = WORDS[where], WORDS[WORDS[where].opposite]
    row = where in ("left", "right")
    line, stack = ("row", "column") if row else ("column", "row")
    kinds, total = len(things), sum(noun.count for noun in things)
    overview = rng.choice(
        (
            "this picture shows {kinds} kinds of shapes on a plain light background, {total} shapes in all, "
            "arranged in a {line} {order}",
            "on a plain light background there are {total} shapes of {kinds} kinds, arranged in a {line} {order}",
            "a simple picture of {total} shapes, of {kinds} different kinds, which stand in a {line} {order} "
            "on a light background",
        )
    ).format(kinds=NUMBERS[kinds], total=NUMBERS[total], line=line, order=words.order)
    texts: list[Text] = [Text(overview, (Totals(kinds, total), Lined(line)))]
    places = [(words.side, where), (opposite.side, words.opposite)]
    places[1:1] = [("in the middle", "middle")] * (kinds - 2)
    for noun, (place, name) in zip(things, places, strict=True):
        text = rng.choice((f"{place} there {is_or_are(noun)} {{}}", f"{{}} {is_or_are(noun)} {place}"))
        texts.append(Text(text.format(_indefinite(noun, "one")), (Placed(noun, name),)))
    details: list[Text] = []
    for i, j in combinations(range(kinds), 2):
        a, b = things[i], things[j]
        ahead = f"{_definite(a)} {is_or_are(a)} {words.phrases[0]} {_definite(b)}"
        behind = f"{_definite(b)} {is_or_are(b)} {opposite.phrases[0]} {_definite(a)}"
        ways = [Text(ahead, (Related(a, where, b),)), Text(behind, (Related(b, words.opposite, a),))]
        rng.shuffle(ways)
        if j == i + 1:
            texts.append(ways.pop())
        details += ways
        details.append(_compare_sizes(a, b))
        details.append(_compare_counts(a, b))
    for noun in things:
        if noun.count > 1:
            text = f"the {NUMBERS[noun.count]} {plural(noun.shape)} stand close together in a {stack}"
            details.append(Text(text, (Lined(stack, Noun(noun.shape, noun.count)),)))
    colours = rng.sample([c for c in COLOURS if all(noun.colour != c for noun in things)], 2)
    shapes = rng.sample([s for s in SHAPES if all(noun.shape != s for noun in things)], 2)
    text = f"there is no {colours[0]} shape and no {shapes[0]} anywhere in the picture"
    details.append(Text(text, (Absent(colours[0], shapes[0]),)))
    text = f"nothing is {colours[1]} and there are no {plural(shapes[1])}"
    details.append(Text(text, (Absent(colours[1], shapes[1]),)))
    *head, last = (noun.colour for noun in things)
    text = f"the only colours of the shapes are {', '.join(head)} and {last}"
    details.append(Text(text, (OnlyColours(frozenset((*head, last))),)))
    details.append(Text("no shape touches or covers another", (Apart(),)))
    rng.shuffle(details)
    # Every scene has enough details, and the last one fits: it has fewer than the 18 tokens reserved for it.
    low, high = LONG_TOKENS
    enough = rng.randint(low, high - 18)
    for detail in details:
        if _tokens(texts)[0] >= enough:
            break
        if _tokens([*texts, detail])[1] <= high:
            texts.append(detail)
    return Text(_prose(texts), tuple(claim for text in texts for claim in text.claims))


def _compare_sizes(a: Noun, b: Noun) -> Text:
    if a.size == b.size:
        return Text(f"{_definite(a)} and {_definite(b)} have the same size", (Compared("size", a, b, True),))
    more, less = (a, b) if a.size == "large" else (b, a)
    return Text(f"{_definite(more)} {is_or_are(more)} larger than {_definite(less)}", (Compared("size", more, less),))


def _compare_counts(a: Noun, b: Noun) -> Text:
    if a.count == b.count:
        text = f"there are as many {a.colour} {plural(a.shape)} as {b.colour} {plural(b.shape)}"
        return Text(text, (Compared("count", a, b, True),))
    more, less = (a, b) if a.count > b.count else (b, a)
    text = f"there are more {more.colour} {plural(more.shape)} than {less.colour} {plural(less.shape)}"
    return Text(text, (Compared("count", more, less),))


def _prose(texts: Sequence[Text]) -> str:
    return " ".join(text.text[0].upper() + text.text[1:] + "." for text in texts)


def _tokens(texts: Sequence[Text]) -> tuple[int, int]:
    """The smaller and the larger token count of the prose by the two tokenizers, with two special tokens.

    Every word used here is one token for both, except "triangles", which CLIP's tokenizer splits in two.
    """
    words = re.findall(r"\w+|[^\w\s]", _prose(texts).lower())
    return len(words) + 2, len(words) + 2 + words.count("triangles")


# ---- images, files


def _outlines() -> dict[str, list[tuple[float, float]]]:
    """The polygon of each shape in the square [-1/2, 1/2]², y downwards."""

    def turn(radii: Sequence[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
        step = 2 * math.pi / len(radii)
        return [(r * math.cos(start + k * step), r * math.sin(start + k * step)) for k, r in enumerate(radii)]

    def stretch(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        xs, ys = zip(*points, strict=True)
        left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
        return [((x - left) / width - 0.5, (y - top) / height - 0.5) for x, y in points]

    cos, heart = math.cos, []
    for t in (2 * math.pi * k / 40 for k in range(40)):
        heart.append((16 * math.sin(t) ** 3, 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t) - 13 * cos(t)))
    w = 0.17  # half the width of the cross's arms
    return {
        "circle": turn([0.46] * 40),
        "ring": turn([0.5] * 40),
        "square": [(-0.47, -0.47), (0.47, -0.47), (0.47, 0.47), (-0.47, 0.47)],
        "triangle": [(0, -0.48), (0.5, 0.44), (-0.5, 0.44)],
        "star": stretch(turn([0.5, 0.21] * 5)),
        "heart": stretch(heart),
        "cross": [
            *((-w, -0.5), (w, -0.5), (w, -w), (0.5, -w), (0.5, w), (w, w)),
            *((w, 0.5), (-w, 0.5), (-w, w), (-0.5, w), (-0.5, -w), (-w, -w)),
        ],
        "diamond": [(0, -0.5), (0.36, 0), (0, 0.5), (-0.36, 0)],
    }


_OUTLINES = _outlines()
_RING_HOLE = 0.56
_OVERSAMPLING = 4


def render(scene: Scene, px: int = 72) -> bytes:
    """Draws the scene as an RGB PNG of px x px pixels; the same bytes for the same scene."""
    full = px * _OVERSAMPLING
    image = Image.new("RGB", (full, full), scene.background)
    draw = ImageDraw.Draw(image)
    for entity in scene.entities:
        outline = _OUTLINES[entity.shape]
        layers = [(SIZES[entity.size], COLOURS[entity.colour])]
        if entity.shape == "ring":
            layers.append((SIZES[entity.size] * _RING_HOLE, scene.background))
        for x, y in entity.at:
            for side, fill in layers:
                draw.polygon([((x + side * u) * full, (y + side * v) * full) for u, v in outline], fill)
    file = io.BytesIO()
    image.reduce(_OVERSAMPLING).save(file, "PNG")
    return file.getvalue()


def write(
    folder: str | Path,
    count: int,
    seed: int,
    first_index: int = 0,
    px: int = 72,
    exclude_captions: Collection[str] = frozenset(),
    samples_per_shard: int = 1000,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Writes `count` samples as tar shards into `folder`; returns their short captions, in order.

    Keys are "scenes-SEED-INDEX"; indices start at first_index. px: width and height of an image. An index whose short
    caption is in `exclude_captions`, or was written before, is skipped: with the captions of the training split the
    held-out split shares none of them. progress: called after each sample with the number of samples written.

    .json: {"long", "composition": {task: {"caption", "foil", and "base" in the add tasks}}, "entities"}.

    Raises DataError when `folder` exists.
    """
    captions: list[str] = []
    excluded, index = set(exclude_captions), first_index
    with ShardWriter(folder, samples_per_shard) as writer:
        while len(captions) < count:
            sample = generate(seed, index)
            if sample.short not in excluded:
                excluded.add(sample.short)
                captions.append(sample.short)
                writer.write(f"scenes-{seed}-{index:06d}", render(sample.scene, px), sample.short, _meta(sample))
                if progress:
                    progress(len(captions))
            index += 1
    return captions


def _meta(sample: Sample) -> dict:
    composition = {
        task: {"caption": foil.caption, "foil": foil.foil} | ({"base": foil.base} if foil.base else {})
        for task, foil in sample.foils.items()
    }
    entities = [
        {"count": e.count, "size": e.size, "colour": e.colour, "shape": e.shape, "at": e.at}
        for e in sample.scene.entities
    ]
    return {"long": sample.long, "composition": composition, "entities": entities}

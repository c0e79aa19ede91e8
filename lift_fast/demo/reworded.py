"""The scenes' captions in other words: the same claims in another grammar than scenes.py's.

The names of shapes, colours, sizes and numbers are the same. Everything else differs: attributes stand after the noun
("a single star, large and red"), relations are comparatives ("higher up than") that are said from either side, and the
order of the clauses is another. A text is made from claims alone, by one function for captions and foils, so what
scenes.py says of foils holds for these too: the texts alone do not show which one is the foil.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from ..data.open import open_data
from ..data.shards import ShardWriter
from .scenes import NUMBERS, WORDS, Claim, Exists, Noun, Related, generate, is_or_are, plural

_COMPARED = {"left": "further left", "right": "further right", "above": "higher up", "below": "lower down"}
# {a} and {b}: the things; {than}: where a is as seen from b; {back}: where b is as seen from a.
_FIRST = (
    "look for {a}, {than} than {b}",
    "compared with {b}, {a} {a_is} {than}",
    "{b} can be seen {back} than {a}",
    "{than} than {b}, one finds {a}",
    "{a} and, {back}, {b}",
    "next to {b}, but {than}, {a_is} {a}",
)
# {that}: b again
_MORE = (
    "; {that}, in turn, {b_is} {than} than {c}",
    ", while {c} {c_is} {back} still",
    "; {back} again, {c}",
)
# … where a is `than` as seen from c, too
_BOTH = (
    "; {back}, too, {c_is} {c}",
    ", and {c} can be seen {back} as well",
    "; {c}, too, {c_is} {back}",
)
_ADDED = (", and one finds {z} as well", "; look also for {z}", " – besides, one finds {z}")
_ALONE = ("look for {a}", "one finds {a}", "{a} can be seen")


def reworded(claims: Sequence[Claim], key: str) -> str:
    """The text that makes the claims of a short caption or of a foil; key: decides the wording.

    Raises ValueError for claims of another kind: one or two Related, one Exists, or one of either and an Exists.
    """
    rng = random.Random(key)
    style, first, more, both, added, alone = (
        rng.randrange(n) for n in (3, *map(len, (_FIRST, _MORE, _BOTH, _ADDED, _ALONE)))
    )

    def fill(text: str, where: str = "left", **things: Noun) -> str:
        fields = {"than": _COMPARED[where], "back": _COMPARED[WORDS[where].opposite]}
        for name, noun in things.items():
            fields[name], fields[f"{name}_is"] = _thing(noun, style), is_or_are(noun)
        if "b" in things:
            fields["that"] = f"the {_shape(things['b'])}"
        return re.sub(r",(?=[,;]|$)", "", text.format(**fields))

    match claims:
        case (Exists(a),):
            return fill(_ALONE[alone], a=a)
        case (Exists(a), Exists(z)):
            return fill(_ALONE[alone], a=a) + fill(_ADDED[added], z=z)
        case (Related(a, where, b), *rest):
            text = fill(_FIRST[first], where, a=a, b=b)
            match rest:
                case []:
                    return text
                case [Related(x, again, c)] if again == where and x == b:
                    return text + fill(_MORE[more], where, b=b, c=c)
                case [Related(x, again, c)] if again == where and x == a:
                    return text + fill(_BOTH[both], where, a=a, c=c)
                case [Exists(z)]:
                    return text + fill(_ADDED[added], z=z)
    raise ValueError(f"no words for {claims}")


def _thing(noun: Noun, style: int) -> str:
    """ "a single star, large and red", "two stars that are large and red", "two stars (red, large)"."""
    words = [word for word in (noun.size, noun.colour) if word]
    thing = f"{'a single' if noun.count == 1 else NUMBERS[noun.count]} {_shape(noun)}"
    if not words:
        return thing
    if style == 0:
        return f"{thing} that {is_or_are(noun)} {' and '.join(words)}"
    return f"{thing}, {' and '.join(words)}," if style == 1 else f"{thing} ({', '.join(words[::-1])})"


def _shape(noun: Noun) -> str:
    return noun.shape if noun.count == 1 else plural(noun.shape)


def write(source: str | Path, folder: str | Path) -> None:
    """Writes the scenes of the data set `source` to `folder`, with captions, foils and bases in other words.

    Raises DataError when `folder` exists.
    """
    data = open_data(Path(source))
    keys = [key for number in range(len(data.shard_sizes)) for key in data.shard_keys(number)]
    with ShardWriter(folder) as writer:
        for i, key in enumerate(keys):
            _, seed, index = key.split("-")
            sample = generate(int(seed), int(index))
            meta = data.meta(i)
            meta["composition"] = {
                task: {
                    "caption": reworded(foil.claims, key),
                    "foil": reworded(foil.foil_claims, key),
                }
                | ({"base": reworded(foil.base_claims, key)} if foil.base else {})
                for task, foil in sample.foils.items()
            }
            writer.write(key, data.image_bytes(i), reworded(sample.claims, key), meta)

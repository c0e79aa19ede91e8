"""The triples of the inverse effect, read by a grammar of their own; the rate of encoders of known preference."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from lift_fast.errors import ConfigError, TrainingError
from lift_fast.eval.inverse_effect import KINDS, LENGTHS, MOST, Triple, inverse_effect, triples
from lift_fast.text.tokenizer import ClipTokenizer

# Written out again, so that a word in the wrong form is found.
DONE_TO = {
    "chased": "chasing", "watched": "watching", "followed": "following", "pushed": "pushing", "pulled": "pulling",
    "carried": "carrying", "led": "leading", "lifted": "lifting", "washed": "washing", "guarded": "guarding",
}  # fmt: skip
COLOURS = "red orange yellow green blue purple pink black white brown grey".split()
NUMBERS = "two three four five six seven eight nine".split()
A, N = r"(?:a|an)", r"([a-z]+)"
PLACE = r"((?:in|on) the [a-z]+)"


def near(a, colour_a, b, colour_b):
    return {("colour", a, colour_a), ("colour", b, colour_b), ("next to", *sorted((a, b)))}


def single(noun):
    assert noun.endswith("s")
    return noun[:-2] if noun.endswith(("xes", "ches")) else noun[:-1]


# Each sentence matches exactly one of these: pattern -> the facts that it states.
GRAMMAR = [
    (rf"{A} {N} {N} is next to {A} {N} {N}", lambda ca, a, cb, b: near(a, ca, b, cb)),
    (rf"the {N} is {N}, and the {N} next to it is {N}", near),
    (rf"next to {A} {N} that is {N} there is {A} {N} that is {N}", lambda b, cb, a, ca: near(a, ca, b, cb)),
    (rf"{A} {N} is ([a-z]+ing) {A} {N}", lambda a, verb, b: {("does", a, verb, b)}),
    (rf"{A} {N} is being {N} by {A} {N}", lambda b, done, a: {("does", a, DONE_TO[done], b)}),
    (rf"there is {A} {N} that {A} {N} is ([a-z]+ing)", lambda b, a, verb: {("does", a, verb, b)}),
    (rf"{A} {N} is to the left of {A} {N}", lambda a, b: {("left", a, b)}),
    (rf"{A} {N} is to the right of {A} {N}", lambda b, a: {("left", a, b)}),
    (rf"{A} {N} is above {A} {N}", lambda a, b: {("above", a, b)}),
    (rf"{A} {N} is below {A} {N}", lambda b, a: {("above", a, b)}),
    (rf"to the left of {A} {N} there is {A} {N}", lambda b, a: {("left", a, b)}),
    (rf"to the right of {A} {N} there is {A} {N}", lambda a, b: {("left", a, b)}),
    (rf"above {A} {N} there is {A} {N}", lambda b, a: {("above", a, b)}),
    (rf"below {A} {N} there is {A} {N}", lambda a, b: {("above", a, b)}),
    (rf"{A} {N} {N} is {PLACE}", lambda c, a, place: {("colour", a, c), ("where", a, place)}),
    (rf"the {N} {PLACE} is {N}", lambda a, place, c: {("colour", a, c), ("where", a, place)}),
    (rf"{PLACE} there is {A} {N} that is {N}", lambda place, a, c: {("colour", a, c), ("where", a, place)}),
    (rf"{N} {N} are {PLACE}", lambda n, a, place: {("number", single(a), n), ("where", single(a), place)}),
    (
        rf"{PLACE} there is a group of {N} {N}",
        lambda place, n, a: {("number", single(a), n), ("where", single(a), place)},
    ),
    (
        rf"the number of {N} {PLACE} is {N}",
        lambda a, place, n: {("number", single(a), n), ("where", single(a), place)},
    ),
    (rf"there is {A} {N} but no {N} on the {N}", lambda a, b, on: {("has", on, a), ("lacks", on, b)}),
    (rf"on the {N} {A} {N} is missing, but {A} {N} is there", lambda on, b, a: {("has", on, a), ("lacks", on, b)}),
    (rf"the {N} has {A} {N} on it but lacks {A} {N}", lambda on, a, b: {("has", on, a), ("lacks", on, b)}),
    (
        r"it is ([a-z ]+), with (an? [a-z]+) in the background",
        lambda time, place: {("time", time), ("background", place)},
    ),
    (
        r"the background shows (an? [a-z]+), and it is ([a-z ]+)",
        lambda place, time: {("time", time), ("background", place)},
    ),
]


def read(caption):
    """The facts that a caption states, and the numbers of the patterns of its sentences."""
    assert caption.endswith(".") and "  " not in caption
    facts, syntax = [], []
    for sentence in caption[:-1].split(". "):
        assert sentence[0].isupper() and sentence[1:] == sentence[1:].lower()
        sentence = sentence.lower()
        for noun in re.findall(r"\ba ([a-z]+)", sentence):
            assert noun[0] not in "aeiou", sentence
        for noun in re.findall(r"\ban ([a-z]+)", sentence):
            assert noun[0] in "aeiou", sentence
        found = [(i, match) for i, (pattern, _) in enumerate(GRAMMAR) if (match := re.fullmatch(pattern, sentence))]
        assert len(found) == 1, (sentence, found)
        [(number, match)] = found
        stated = GRAMMAR[number][1](*match.groups())
        assert all(fact[-1] in {"colour": COLOURS, "number": NUMBERS}.get(fact[0], fact) for fact in stated), sentence
        facts += stated
        syntax.append(number)
    assert len(facts) == len(set(facts)), caption
    return frozenset(facts), syntax


MANY = triples(2800, seed=5)


def test_paraphrases_mean_the_same_and_foils_do_not():
    for one in MANY:
        (meaning, syntax), (same, other), (foil, like) = map(read, (one.anchor, one.paraphrase, one.foil))
        assert meaning == same == one.meaning and foil == one.foil_meaning != meaning
        assert like == syntax and not set(other) & set(syntax), one
        assert len(syntax) == (1 if one.length == "short" else 5)
        assert len(set(syntax)) == len(syntax) - 3 * (one.length == "long")  # four sentences in one syntax
        if one.length == "long":  # the order is the other way round too
            assert (other[0] == 23) == (syntax[0] != 23)
        assert len(one.foil.split()) == len(one.anchor.split())


def test_a_foil_changes_what_its_kind_says_and_nothing_else():
    for one in MANY:
        gone, come = one.meaning - one.foil_meaning, one.foil_meaning - one.meaning
        sentences = 4 if one.length == "long" else 1
        names = Counter(fact[0] for fact in gone)
        assert names == Counter(fact[0] for fact in come) or one.kind == "positions"
        words, foil_words = (Counter(re.findall("[a-z]+", text.lower())) for text in (one.anchor, one.foil))
        for articles in ("a", "an"):
            words.pop(articles, None), foil_words.pop(articles, None)
        if one.kind == "things":
            assert names == {"colour": 2 * sentences, "next to": sentences} | (
                {"time": 1, "background": 1} if one.length == "long" else {}
            )
            nouns, others = ({fact[1] for fact in side if fact[0] == "colour"} for side in (gone, come))
            assert len(nouns) == len(others) == 2 * sentences and not nouns & others
        elif one.kind in ("colour", "number"):
            assert names == {one.kind: sentences}
            assert sum((words - foil_words).values()) <= sentences and words != foil_words or one.length == "long"
            assert {fact[1] for fact in gone} == {fact[1] for fact in come}
        else:
            expected = {
                "attributes": {"colour": 2 * sentences},
                "roles": {"does": sentences},
                "negation": {"has": sentences, "lacks": sentences},
            }
            assert words == foil_words
            if one.kind == "positions":
                assert sorted(gone) == sorted((relation, b, a) for relation, a, b in come) and len(gone) == sentences
            else:
                assert names == expected[one.kind]


def test_no_anchor_twice_and_all_kinds_alike():
    assert len({one.anchor for one in MANY}) == len(MANY)
    assert all(len({one.anchor, one.paraphrase, one.foil}) == 3 for one in MANY)
    assert Counter((one.kind, one.length) for one in MANY) == {
        (kind, length): 200 for kind in KINDS for length in LENGTHS
    }
    few = triples(17, seed=5)
    counts = Counter((one.kind, one.length) for one in few)
    assert len(counts) == 14 and max(counts.values()) == 2


def test_every_syntax_of_a_kind_is_anchor_and_paraphrase_alike():
    """An encoder that likes one syntax gains nothing by it."""
    for kind in KINDS:
        anchors, paraphrases = (
            Counter(read(text)[1][0] for text in texts)
            for texts in zip(
                *((one.anchor, one.paraphrase) for one in MANY if (one.kind, one.length) == (kind, "short")),
                strict=True,
            )
        )
        assert anchors.keys() == paraphrases.keys() and len(anchors) == (8 if kind == "positions" else 3)
        assert min([*anchors.values(), *paraphrases.values()]) > 200 / len(anchors) / 3


def test_triples_are_a_function_of_their_number_and_seed():
    assert triples(60, seed=3) == triples(60, seed=3) == triples(300, seed=3)[:60]
    assert not {one.anchor for one in triples(60, seed=3)} & {one.anchor for one in triples(60, seed=4)}
    assert triples(1)[0].anchor == ("The bottle is white, and the hat next to it is black."), (
        "another order of random numbers: figures that were published before no longer compare"
    )


def test_most_can_be_made_and_fit_clip():
    every = triples(MOST, seed=9)
    assert len({one.anchor for one in every}) == MOST
    longest = max((text for one in every for text in (one.anchor, one.paraphrase, one.foil)), key=len)
    tokens = ClipTokenizer(200)(
        [text for one in every[::5] for text in (one.anchor, one.paraphrase, one.foil, longest)]
    )
    assert int((tokens != 0).sum(dim=1).max()) <= 77
    for n in (0, -1, MOST + 1):
        with pytest.raises(ConfigError, match=f"{n} triples: there must be from 1 to {MOST}"):
            triples(n)


# ---- the rate


def of(keys, dim=64, seed=0):
    """Random unit vectors, one for each different key."""
    rng = np.random.default_rng(seed)
    vectors = {key: rng.standard_normal(dim) for key in dict.fromkeys(keys)}
    rows = np.stack([vectors[key] / np.linalg.norm(vectors[key]) for key in keys])
    return torch.from_numpy(rows.astype(np.float32))


def by_meaning(captions):
    return of([read(caption)[0] for caption in captions])


def by_syntax(captions):
    return of([tuple(read(caption)[1]) for caption in captions])


def by_words(captions):
    """Counts of words, but for a and an."""
    bags = [Counter(re.findall("[a-z]+", caption.lower())) for caption in captions]
    known = sorted({word for bag in bags for word in bag} - {"a", "an"})
    rows = torch.tensor([[float(bag[word]) for word in known] for bag in bags])
    return rows / rows.norm(dim=1, keepdim=True)


def parts(found):
    yield found
    for kind in found["kinds"].values():
        yield kind
        yield from kind["lengths"].values()
    yield from found["lengths"].values()


@pytest.mark.parametrize(
    ("encode", "rate", "ties"),
    [(by_meaning, 0, 0), (by_syntax, 1, 0), (lambda captions: of([0] * len(captions)), 1, 1)],
)
def test_encoders_of_known_preference(encode, rate, ties):
    found = inverse_effect(encode, MANY[:140])
    for part in parts(found):
        assert part["rate"] == rate and part["ties"] == ties * part["n"]
    if ties:
        assert found["cosine"] == {"paraphrase": pytest.approx(1), "foil": pytest.approx(1)}


def test_chance_and_words():
    def by_chance(captions):
        return of(captions, dim=8)

    found = inverse_effect(by_chance, MANY)
    assert abs(found["rate"] - 0.5) < 4 * 0.5 / math.sqrt(len(MANY)) and found["ties"] == 0
    found = inverse_effect(by_words, MANY[:420])
    for kind in ("attributes", "roles", "negation"):  # the foil has the anchor's words
        assert found["kinds"][kind]["rate"] == 1 and found["kinds"][kind]["cosine"]["foil"] == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 13, 61])
def test_equal_to_a_loop_in_float64(n):
    chosen = [MANY[i] for i in np.random.default_rng(n).integers(0, len(MANY), n)]  # some twice

    def encode(captions):
        assert len(set(captions)) == len(captions)
        return of(captions, dim=5, seed=n)

    found = inverse_effect(encode, chosen)
    captions = dict.fromkeys(text for one in chosen for text in (one.anchor, one.paraphrase, one.foil))
    vectors = dict(zip(captions, encode(list(captions)).double().numpy(), strict=True))

    def expected(some):
        near, far = (
            np.array([vectors[one.anchor] @ vectors[text] for one, text in zip(some, texts, strict=True)])
            for texts in ([one.paraphrase for one in some], [one.foil for one in some])
        )
        return {
            "rate": float(np.mean(far >= near)),
            "ties": int(np.sum(far == near)),
            "cosine": {"paraphrase": pytest.approx(near.mean()), "foil": pytest.approx(far.mean())},
            "n": len(some),
        }

    def with_lengths(some):
        lengths = {size: [one for one in some if one.length == size] for size in LENGTHS}
        return expected(some) | {"lengths": {size: expected(part) for size, part in lengths.items() if part}}

    kinds = {kind: [one for one in chosen if one.kind == kind] for kind in KINDS}
    assert found == with_lengths(chosen) | {"kinds": {kind: with_lengths(some) for kind, some in kinds.items() if some}}


def test_a_tie_counts_against_the_encoder_and_is_counted_apart():
    one = Triple("roles", "short", "a", "b", "c", frozenset(), frozenset())

    def encode(captions):
        given = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.6, -0.8]}
        return torch.tensor([given[caption] for caption in captions])

    found = inverse_effect(encode, [one])
    assert (found["rate"], found["ties"], found["n"]) == (1.0, 1, 1)
    assert found["cosine"] == {"paraphrase": pytest.approx(0.6), "foil": pytest.approx(0.6)}


def test_what_is_refused():
    with pytest.raises(TrainingError, match="features are not finite"):
        inverse_effect(lambda captions: of(captions) * (float("nan") if len(captions) > 4 else 1), MANY[:2])
    with pytest.raises(ValueError, match="there are no triples"):
        inverse_effect(of, [])

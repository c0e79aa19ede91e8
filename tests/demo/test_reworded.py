"""The scenes' captions in another grammar."""

import re

import pytest

from lift_fast.data.open import open_data
from lift_fast.demo import reworded, scenes
from lift_fast.demo.scenes import Apart, Exists, Noun, Related

SEED = 7


def test_no_foil_shows_in_the_text():
    """A caption and its foil are the same function of their claims, so exchanging the claims exchanges the texts; and a
    foil never is the caption, although their wordings are drawn anew for each sample."""
    for index in range(150):
        for task, foil in scenes.generate(SEED, index).foils.items():
            key = f"{index}-{task}"
            caption, other = reworded.reworded(foil.claims, key), reworded.reworded(foil.foil_claims, key)
            assert caption != other
            # The same wording: what differs are words for values alone.
            assert shape_of(caption) == shape_of(other), (caption, other)


def shape_of(text):
    """A text without the words that depend on a thing's values and on the relation."""
    values = "|".join([*scenes.COLOURS, *scenes.SIZES, *(s + "(?:es|s)?" for s in scenes.SHAPES)])
    text = re.sub(rf"\b({values})\b", "V", text)
    text = re.sub(r"further left|further right|higher up|lower down", "R", text)
    return re.sub(r"\b(a single|two|three)\b", "N", re.sub(r"\b(is|are)\b", "B", text))


@pytest.mark.parametrize("where", scenes.RELATIONS)
def test_relations_keep_their_direction(where):
    """In every wording, "a R than b" and "b R' than a" name the relation that is claimed."""
    a, b = Noun("star", 1, "large", "red"), Noun("ring", 2, "small", "blue")
    than = reworded._COMPARED[where]
    back = reworded._COMPARED[scenes.WORDS[where].opposite]
    seen = set()
    for key in range(300):
        text = reworded.reworded((Related(a, where, b),), str(key))
        star, ring = text.index("star"), text.index("ring")
        forwards = than in text
        assert forwards != (back in text)
        seen.add((star < ring, forwards))
        # Said of the star, the relation is the claimed one; said of the ring, its opposite.
        said_of_star = {
            "look for": True, "compared": True, "next to": True, than.split()[0]: True,
        }.get(text.split()[0] if text.split()[0] not in ("look", "next") else " ".join(text.split()[:2]))  # fmt: skip
        if said_of_star:
            assert forwards
        elif text.startswith("two rings"):
            assert not forwards
        else:
            assert text.startswith("a single star") and not forwards  # "a star and, R', two rings"
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_what_is_left_out_is_not_said():
    """A text names the sizes and colours that its claims name, and no others."""
    bare = Noun("cross", 3), Noun("heart", 1, "", "pink")
    for key in range(50):
        text = reworded.reworded((Related(bare[0], "left", bare[1]), Exists(Noun("ring", 1, "small"))), str(key))
        words = set(re.findall(r"\w+", text))
        assert words & {*scenes.COLOURS, *scenes.SIZES} == {"pink", "small"}
        assert {"crosses", "heart", "ring"} <= words and ",," not in text and not text.endswith(",")


def test_other_claims_are_refused():
    with pytest.raises(ValueError, match="no words for"):
        reworded.reworded((Apart(),), "0")
    a, b = Noun("star", 1), Noun("ring", 2)
    with pytest.raises(ValueError, match="no words for"):
        reworded.reworded((Related(a, "left", b), Related(a, "above", b)), "0")


def test_a_set_is_reworded(tmp_path):
    """The same images and keys; other captions, foils and bases, which all differ from the usual ones."""
    scenes.write(tmp_path / "usual", 30, SEED)
    reworded.write(tmp_path / "usual", tmp_path / "other")
    usual, other = open_data(tmp_path / "usual"), open_data(tmp_path / "other")
    assert usual.shard_keys(0) == other.shard_keys(0)
    for i in range(30):
        assert usual.image_bytes(i) == other.image_bytes(i)
        sample = scenes.generate(SEED, int(other.shard_keys(0)[i].split("-")[2]))
        assert other.caption(i) == reworded.reworded(sample.claims, other.shard_keys(0)[i]) != usual.caption(i)
        before, after = usual.meta(i), other.meta(i)
        for task, foil in before.pop("composition").items():
            assert set(after["composition"][task]) == set(foil)
            assert not set(after["composition"][task].values()) & set(foil.values())
        del after["composition"]
        assert before == after

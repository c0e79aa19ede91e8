"""Evaluation shared by ranks: chunks of images and texts, and what is left out, in this process and on several."""

import random

import pytest
import torch
from support.ranks import SMALL, in_group, on_ranks
from support.tiny_sets import make_set, png

from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadText
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import DataError, EncoderError
from lift_fast.eval import images as images_module
from lift_fast.eval.images import Images, Pixels, image_features
from lift_fast.eval.questions import Questions
from lift_fast.eval.run import score_set
from lift_fast.eval.sets import read_questions
from lift_fast.eval.shares import cut, mine, rounds
from lift_fast.eval.texts import encode_texts
from lift_fast.nn import Lift
from lift_fast.ranks import Rank
from lift_fast.sugarcrepe import TASKS
from lift_fast.text.encoder import NoTokens

CPU = torch.device("cpu")
SIZE = Pixels.of_size(16)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_every_chunk_once(count, world):
    chunks = cut(count, 64)
    assert [i for chunk in chunks for i in chunk] == list(range(count)) and max(map(len, chunks)) <= 64
    shares = [mine(chunks, Rank(number, world)) for number in range(world)]
    assert max(map(len, shares)) == rounds(len(chunks), Rank(0, world))
    assert sorted(chunk.start for share in shares for chunk in share) == [chunk.start for chunk in chunks]


def features(rank: Rank, folder):
    """The features of a set's images and texts, and the sizes of the batches of this rank."""
    torch.manual_seed(0)
    model, seen = Lift(SMALL).eval(), []
    data = open_data(folder)

    def encode(pixels):
        seen.append(len(pixels))
        return model.encode_image(pixels)

    found = image_features(encode, Images(data, SIZE, CPU, rank=rank))
    wanted = [f"caption {i}" for i in found.samples] if rank.is_first else None
    asked = []

    def encode_text(texts):
        asked.append(len(texts))
        generator = torch.Generator().manual_seed(len(texts[0]))
        return torch.nn.functional.normalize(torch.randn(len(texts), 24, generator=generator), dim=1)

    texts = encode_texts(wanted, encode_text, rank, False)
    return found, texts.vectors, list(texts.numbers), seen, asked


def test_features_do_not_depend_on_the_number_of_ranks(tmp_path):
    """No image of the second of seven chunks decodes; every rank calls the towers equally often."""
    make_set(tmp_path / "set", 400, 100, broken={3, *range(64, 128), 399})
    want, want_texts, texts, seen, asked = features(Rank(), tmp_path / "set")
    assert seen == [63, 1, 64, 64, 64, 64, 15] and asked == [128, 128, 78]
    assert want.samples == sorted({*range(400)} - {3, *range(64, 128), 399}) and want.causes == {"not a picture": 66}
    assert texts == [f"caption {i}" for i in want.samples]
    results = on_ranks(2, in_group, features, tmp_path / "set")
    for number, (found, vectors, names, seen, asked) in enumerate(results):
        assert torch.equal(found.features, want.features) and found[1:] == want[1:]
        assert torch.equal(vectors, want_texts) and names == texts
        assert seen == [[63, 64, 64, 15], [1, 64, 64, 1]][number] and asked == [[128, 78], [128, 128]][number]


def test_few_images_are_decoded_at_once(tmp_path, monkeypatch):
    make_set(tmp_path / "set", 200, 100, broken={100})
    model = Lift(SMALL).eval()
    want = image_features(model.encode_image, Images(open_data(tmp_path / "set"), SIZE, CPU))
    monkeypatch.setattr(images_module, "_BYTES", 1)
    decoded = []
    load_images = images_module.host.load_images
    monkeypatch.setattr(
        images_module.host, "load_images", lambda part, *sizes: decoded.append(len(part)) or load_images(part, *sizes)
    )
    found = image_features(model.encode_image, Images(open_data(tmp_path / "set"), SIZE, CPU))
    assert torch.equal(found.features, want.features) and found[1:] == want[1:]
    assert decoded == [65, 65, 65, 9]  # each with one more, that decodes


def test_a_set_without_images(tmp_path):
    images = Images(make_set(tmp_path / "set", 70, broken=set(range(70))), SIZE, CPU)
    for failing in (images.check, lambda: image_features(Lift(SMALL).encode_image, images)):
        with pytest.raises(DataError, match=r"no image decodes \(70 not a picture\)"):
            failing()


def hostile(folder):
    """Samples without a caption, with metadata that do not parse, and with one that has no tokens."""
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(random.Random(i)))
        (folder / f"{i}.txt").write_text("" if i == 1 else "..." if i == 4 else f"caption {i}")
        (folder / f"{i}.json").write_text("{" if i == 2 else "{}")
    return open_data(folder, options=DataOptions(skip_bad=True))


def encode_text(texts):
    if empty := [i for i, text in enumerate(texts) if not text.strip(".")]:
        raise NoTokens(empty, f"no tokens in {texts[empty[0]]!r}")
    return torch.eye(8)[: len(texts)]


def test_samples_without_usable_texts_are_left_out_and_counted(tmp_path):
    data = hostile(tmp_path / "data")
    with pytest.raises(BadText, match="has no caption"):
        read_questions(data)
    questions = read_questions(data, skip_bad=True)
    assert list(questions.captions) == [0, 3, 4, 5] and questions.left_out == {1: "no caption", 2: "does not parse"}
    with pytest.raises(EncoderError, match="no tokens"):
        encode_texts(questions.texts(), encode_text, Rank(), False)
    texts = encode_texts(questions.texts(), encode_text, Rank(), True)
    assert texts.empty == {"..."}
    found = image_features(lambda pixels: torch.randn(len(pixels), 8), Images(data, SIZE, CPU))
    scores = score_set(found, questions, texts)
    assert scores["skipped_causes"] == {"does not parse": 1, "no caption": 1, "no tokens": 1}
    assert scores["retrieval"]["n"] == scores["retrieval"]["captions"] == 3
    only = Questions({4: ["..."]}, left_out=dict.fromkeys((0, 1, 2, 3, 5), "no caption"))
    with pytest.raises(DataError, match=r"no caption can be used: 5 no caption, 1 no tokens"):
        score_set(found, only, texts)
    with pytest.raises(DataError, match="no caption can be used"):
        encode_texts(only.texts(), encode_text, Rank(), True)


def test_every_text_that_scoring_takes(tmp_path):
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(4):
            foils = {task: {"caption": f"caption {i}", "foil": f"foil {i % 2}"} for task in TASKS}
            writer.write(f"{i}", png(random.Random(i)), f"caption {i}", {"composition": foils, "label": "ab"[i % 2]})
    texts = read_questions(open_data(tmp_path / "data")).texts()
    assert texts[:6] == ["caption 0", "caption 1", "caption 2", "caption 3", "foil 0", "foil 1"] and len(texts) == 14

"""eval/retrieval.py against a sort of all scores, which are sums without rounding, in plain Python and NumPy."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.bench_conditioning import Memory
from lift_fast.eval import retrieval as module
from lift_fast.eval.retrieval import ranks, retrieval

KS = (1, 5, 10)
RANDOM = np.random.default_rng()  # other inputs with each run; a failure prints its seed


@pytest.fixture(params=range(6))
def rng(request):
    seed = int(RANDOM.integers(1 << 32))
    print("seed", seed)
    return np.random.default_rng(seed)


def sizes(rng, most=30):
    """images, texts, captions and dim; sometimes 1."""
    return (int(rng.choice([1, 2, int(rng.integers(3, most))])) for _ in range(4))


def asked(rng, images, texts, captions):
    """Captions of any images and of any texts: some images have none, some pairs occur twice."""
    return rng.integers(0, images, captions), rng.integers(0, texts, captions)


def exact_scores(image, text):
    """The products, each rounded once. image, text: float64, of values that float32 has."""
    return np.array([[math.fsum(np.multiply(x, y).tolist()) for y in text.tolist()] for x in image.tolist()])


def sorted_out(scores, image_of, text_of):
    """The ranks of the images and of the captions: the place of the first right answer among all captions (or images),
    sorted, a right one after those that it ties with."""

    def first(of_answers, right):
        order = np.lexsort((right, -of_answers))
        return int(np.argmax(right[order])) if right.any() else -1

    related = np.zeros(scores.shape, bool)
    related[image_of, text_of] = True
    of_images = [first(scores[i, text_of], related[i, text_of]) for i in range(len(scores))]
    of_captions = [first(scores[:, t], related[:, t]) for t in text_of]
    return np.array(of_images), np.array(of_captions)


def check_ranks(found, want):
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == torch.int64
        ours = ours.cpu().numpy()
        np.testing.assert_array_equal(np.minimum(ours, 10), np.minimum(theirs, 10))
        assert (ours >= theirs).all()


def expected(scores, image_of, text_of):
    """What retrieval returns, but chance: each query's answers sorted, and the first k of them looked at."""
    of_images, of_captions = sorted_out(scores, image_of, text_of)
    queries = [rank for rank in of_images.tolist() if rank >= 0]
    return {
        "i2t": {f"r{k}": pytest.approx(np.mean([rank < k for rank in queries])) for k in KS},
        "t2i": {f"r{k}": pytest.approx(np.mean(of_captions < k)) for k in KS},
        "n": len(set(image_of.tolist())),
        "captions": len(image_of),
        "repeats": sum(t in text_of[:c].tolist() for c, t in enumerate(text_of.tolist())),
    }


def scored(*arguments):
    result = retrieval(*arguments)
    assert list(result.pop("chance")) == ["i2t", "t2i"]
    return result


@pytest.fixture(params=[1, 3, 8, 1024])
def tile(request, monkeypatch):
    monkeypatch.setattr(module, "_TILE", request.param)
    return request.param


def test_integers_with_many_ties(rng, tile):
    images, texts, captions, dim = sizes(rng)
    scale = 2.0 ** int(rng.integers(-20, 20))
    image, text = (rng.integers(-2, 3, (n, dim)) * scale for n in (images, texts))
    image_of, text_of = asked(rng, images, texts, captions)
    scores = image @ text.T
    arguments = torch.tensor(image).float(), torch.tensor(text).float(), image_of, torch.tensor(text_of)
    check_ranks(ranks(*arguments), sorted_out(scores, image_of, text_of))
    assert scored(*arguments) == expected(scores, image_of, text_of)


def test_vectors_that_occur_twice(rng, tile):
    """Of random numbers, whose products float32 rounds: equal vectors tie all the same."""
    images, texts, captions, dim = sizes(rng, 20)
    image, text = (
        F.normalize(torch.tensor(rng.normal(size=(1 + n // 2, dim)), dtype=torch.float32), dim=1)
        for n in (images, texts)
    )
    image, text = image[rng.integers(0, len(image), images)], text[rng.integers(0, len(text), texts)]
    image_of, text_of = asked(rng, images, texts, captions)
    scores = exact_scores(image.double().numpy(), text.double().numpy())
    check_ranks(ranks(image, text, image_of.tolist(), text_of.tolist()), sorted_out(scores, image_of, text_of))
    assert scored(image, text, image_of, text_of) == expected(scores, image_of, text_of)


def test_scores_that_float32_cannot_tell_apart(rng, tile):
    """All features near one point: many products differ by less than the rounding of a sum in float32."""
    images, texts, captions, dim = *(int(n) for n in rng.integers(5, 25, 3)), int(rng.integers(30, 200))
    one = rng.normal(size=dim)
    image, text = (
        torch.tensor(one + 10.0 ** rng.integers(-8, -3) * rng.normal(size=(n, dim))).float() for n in (images, texts)
    )
    image_of, text_of = asked(rng, images, texts, captions)
    scores = exact_scores(image.double().numpy(), text.double().numpy())
    check_ranks(ranks(image, text, image_of, text_of), sorted_out(scores, image_of, text_of))


def test_extreme_norms(rng, tile):
    """Norms of one side differ by many orders of magnitude; products that float32 does not have."""
    images, texts, captions, dim = (int(n) for n in rng.integers(2, 20, 4))
    center, spread = rng.integers(-25, 26, 2), int(rng.integers(0, 13))
    image, text = (
        torch.tensor(rng.normal(size=(n, dim)) * 10.0 ** (c + rng.integers(-spread, spread + 1, (n, 1)))).float()
        for n, c in zip((images, texts), center, strict=True)
    )
    image_of, text_of = asked(rng, images, texts, captions)
    scores = exact_scores(image.double().numpy(), text.double().numpy())
    check_ranks(ranks(image, text, image_of, text_of), sorted_out(scores, image_of, text_of))


@pytest.mark.parametrize("value", [3e38, 1e-45])
def test_the_ends_of_float32(value):
    x = torch.eye(3) * value
    assert retrieval(x, x, [0, 1, 2])["i2t"]["r1"] == 1
    assert retrieval(x.expand(3, 3), x[[0, 0, 0]], [0, 1, 2])["i2t"]["r1"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_with_as_float32(rng, dtype):
    image, text = (torch.tensor(rng.normal(size=(n, 9))).to(dtype) for n in (13, 17))
    image_of, text_of = asked(rng, 13, 17, 21)
    scores = exact_scores(*(x.float().double().numpy() for x in (image, text)))
    check_ranks(ranks(image, text, image_of, text_of), sorted_out(scores, image_of, text_of))


def test_features_that_are_not_contiguous(rng):
    base = torch.tensor(rng.normal(size=(20, 2 * 7))).float()
    image, text = base[::2, ::2], base.T[1:8].T[1::2].clone().T.contiguous().T
    assert not image.is_contiguous() and not text.is_contiguous()
    got = ranks(image, text, range(10))
    want = ranks(image.contiguous(), text.contiguous(), range(10))
    assert all(map(torch.equal, got, want))
    check_ranks(
        got, sorted_out(exact_scores(image.double().numpy(), text.double().numpy()), np.arange(10), np.arange(10))
    )


def test_larger_than_a_tile(rng):
    """Of the usual size, with mistakes of every rank; 64-bit integers are exact."""
    images, dim = 1500, 24
    image = rng.integers(-9, 10, (images, dim))
    image_of = rng.permutation(np.repeat(np.arange(images), 2))
    text = image[image_of] + rng.integers(-9, 10, (2 * images, dim))
    text_of = rng.integers(0, len(text), len(text))
    text_of[:images] = np.arange(images)
    scores = image @ text.T
    arguments = torch.tensor(image).float(), torch.tensor(text).float(), image_of, text_of
    result = scored(*arguments)
    assert result == expected(scores, image_of, text_of)
    check_ranks(ranks(*arguments), sorted_out(scores, image_of, text_of))
    assert 0 < result["i2t"]["r1"] < result["i2t"]["r5"] < result["i2t"]["r10"] < 1


def test_any_order_of_the_captions(rng, tile):
    image, text = (torch.tensor(rng.integers(-2, 3, (n, 4))).float() for n in (19, 23))
    image_of, text_of = map(torch.tensor, asked(rng, 19, 23, 40))
    order = torch.tensor(rng.permutation(40))
    of_images, of_captions = ranks(image, text, image_of, text_of)
    shuffled = ranks(image, text, image_of[order], text_of[order])
    assert torch.equal(shuffled[0], of_images) and torch.equal(shuffled[1], of_captions[order])
    assert scored(image, text, image_of, text_of) == scored(image, text, image_of[order], text_of[order])


def test_known_ranks_give_the_same():
    image, text = torch.randn(9, 4), torch.randn(12, 4)
    image_of = [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 0, 0]
    assert retrieval(image, text, image_of, None, ranks(image, text, image_of)) == retrieval(image, text, image_of)
    nothing_right = torch.full((9,), 99), torch.full((12,), 99)
    assert retrieval(image, text, image_of, found=nothing_right)["t2i"]["r10"] == 0


def test_by_hand():
    """Texts 0 and 1 of image 0, 1 of image 1 as well, 2 three times of image 2; image 3 has no caption."""
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [5, 0, 0]])
    text = torch.tensor([[1.0, 0, 0], [0.5, 0.4, 0], [2, 3, 0.1]])
    image_of, text_of = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 2]
    of_images, of_captions = ranks(image, text, image_of, text_of)
    assert of_images.tolist() == [3, 3, 0, -1]  # text 2 is ahead three times
    assert of_captions.tolist() == [1, 1, 1, 3, 3, 3]  # image 3 is ahead of all; text 2 prefers all other images
    result = retrieval(image, text, image_of, text_of)
    assert (result["n"], result["captions"], result["repeats"]) == (3, 6, 3)
    assert result["i2t"] == {"r1": pytest.approx(1 / 3), "r5": 1, "r10": 1}
    assert result["t2i"] == {"r1": 0, "r5": 1, "r10": 1}


def test_a_perfect_model_scores_all(rng, tile):
    """Captions repeat in groups of any size, images have any number of them."""
    images, texts, captions, _ = sizes(rng, 60)
    image_of, text_of = asked(rng, images, texts, captions)
    image = torch.zeros(images, texts)
    image[image_of, text_of] = 1
    assert_all(retrieval(image, torch.eye(texts), image_of, text_of), 1)


def assert_all(result, value):
    assert result["i2t"] == result["t2i"] == {"r1": value, "r5": value, "r10": value}


def test_a_perfect_model_of_groups():
    """One vector for all that share a caption, of a few dims: they tie with each other alone."""
    group = torch.cat([torch.full((size,), i) for i, size in enumerate([1, 2, 3, 5, 10, 11, 40])])
    vectors = F.normalize(torch.randn(7, 5), dim=1)
    result = retrieval(vectors[group], vectors, range(len(group)), group)
    assert_all(result, 1)
    assert (result["n"], result["captions"], result["repeats"]) == (72, 72, 65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_features_score_nothing(dtype, tile):
    same = F.normalize(torch.randn(1, 77), dim=1).to(dtype)
    image_of = torch.arange(40).repeat_interleave(3)
    of_images, of_captions = ranks(same.expand(40, 77), same.expand(120, 77), image_of)
    assert of_images.tolist() == [117] * 40 and of_captions.tolist() == [39] * 120
    assert_all(retrieval(same.expand(40, 77), same.expand(120, 77), image_of), 0)
    assert_all(retrieval(torch.zeros(40, 77), torch.zeros(120, 77), image_of), 0)


def test_the_only_image():
    result = retrieval(torch.randn(1, 3), torch.randn(2, 3), [0, 0])
    assert_all(result, 1)
    assert_all(result["chance"], 1)
    assert (result["n"], result["captions"], result["repeats"]) == (1, 2, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_are_refused(value, side):
    features = [torch.randn(5, 3), torch.randn(5, 3)]
    features[side][4, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        retrieval(*features, range(5))


def test_no_captions():
    with pytest.raises(ValueError, match="no captions"):
        retrieval(torch.randn(5, 3), torch.randn(5, 3), [])


def test_chance_is_that_of_all_orders():
    """Of five captions in every order, and of four images."""
    image_of, text_of = [0, 1, 1, 2, 2], [0, 0, 1, 2, 3]
    right = [{0, 1}, {0, 1, 2}, {3, 4}]  # the captions that are right for images 0, 1 and 2; image 3 has none
    right_images = [{0, 1}, {0, 1}, {1}, {2}, {2}]

    def recall(answers, right, k):
        orders = list(itertools.permutations(range(answers)))
        return Fraction(sum(any(a in right for a in order[:k]) for order in orders), len(orders))

    chance = retrieval(torch.randn(4, 3), torch.randn(4, 3), image_of, text_of)["chance"]
    for k in KS:
        assert chance["i2t"][f"r{k}"] == pytest.approx(float(sum(recall(5, r, k) for r in right) / 3), abs=1e-15)
        assert chance["t2i"][f"r{k}"] == pytest.approx(float(sum(recall(4, r, k) for r in right_images) / 5), abs=1e-15)


def test_chance_is_the_formula(rng):
    """1 - C(N - r, k) / C(N, k)."""
    images, texts, captions = 50, 30, 120
    image_of, text_of = asked(rng, images, texts, captions)
    pairs = set(zip(image_of.tolist(), text_of.tolist(), strict=True))
    of_image = [sum((i, t) in pairs for t in text_of) for i in sorted(set(image_of.tolist()))]
    of_caption = [sum((i, t) in pairs for i in range(images)) for t in text_of]
    chance = retrieval(torch.randn(images, 3), torch.randn(texts, 3), image_of, text_of)["chance"]
    for way, right, answers in (("i2t", of_image, captions), ("t2i", of_caption, images)):
        for k in KS:
            want = [1 - Fraction(math.comb(answers - r, k), math.comb(answers, k)) for r in right]
            assert chance[way][f"r{k}"] == pytest.approx(float(sum(want) / len(want)), rel=1e-12)


def test_chance_is_what_random_features_score():
    generator = np.random.default_rng(0)
    image_of = generator.integers(0, 40, 90)
    draws = []
    for _ in range(200):
        image, text = (torch.tensor(generator.normal(size=(n, 64))).float() for n in (40, 90))
        result = retrieval(image, text, image_of)
        draws.append([result[way][f"r{k}"] for way in ("i2t", "t2i") for k in KS])
    chance = [result["chance"][way][f"r{k}"] for way in ("i2t", "t2i") for k in KS]
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / len(draws) ** 0.5
    assert (abs(mean - chance) < 4 * error).all() and error.max() < 0.01


def test_memory_and_products():
    """1.2 * 10^8 scores take 480 MB in float32; the tiles take 8 MiB. Each is the result of one product."""
    images, texts = 4096, 30_000
    image, text = torch.randn(images, 8), torch.randn(texts, 8)
    image_of = torch.randint(0, images, (texts,))
    products = []
    mm = torch.mm

    def counting(x, y, **more):
        products.append((len(x), y.shape[1]))
        return mm(x, y, **more)

    ranks(image[:10], text, image_of % 10)
    with Memory() as before:
        pass
    with pytest.MonkeyPatch.context() as patch, Memory() as memory:
        patch.setattr(torch, "mm", counting)
        ranks(image, text, image_of)
    assert sum(rows * columns for rows, columns in products) == images * texts
    assert max(rows * columns for rows, columns in products) <= 1 << 20
    assert memory.resident - before.resident < 100e6


def test_settings_of_the_process_change_nothing(rng):
    """Products with fewer bits, where this CPU has them; autocast; gradients."""
    one = rng.normal(size=300)
    image, text = (torch.tensor(one + 1e-5 * rng.normal(size=(n, 300))).float() for n in (40, 60))
    image_of = rng.integers(0, 40, 60)
    want = sorted_out(exact_scores(image.double().numpy(), text.double().numpy()), image_of, np.arange(60))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check_ranks(ranks(image, text, image_of), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        check_ranks(ranks(image.requires_grad_(), text.requires_grad_(), image_of), want)


@pytest.mark.gpu
def test_on_a_gpu(rng, tile):
    images, texts, captions, dim = sizes(rng)
    image, text = (torch.tensor(rng.integers(-2, 3, (n, dim)), dtype=torch.float32) for n in (images, texts))
    image_of, text_of = asked(rng, images, texts, captions)
    found = ranks(image.cuda(), text.cuda(), image_of, text_of)
    check_ranks(found, sorted_out((image @ text.T).numpy(), image_of, text_of))

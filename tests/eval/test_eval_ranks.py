"""An evaluation's figures are the same for any number of ranks, batch size and loader, and with features that were
kept; an error of one rank is an error of all."""

from itertools import product

import pytest
import torch
from support.counted import Counted, asking_set, figures
from support.ranks import in_group, on_ranks

from lift_fast.data import dali
from lift_fast.data.open import open_data
from lift_fast.errors import BackendError, DataError, EncoderError
from lift_fast.eval import images as images_module
from lift_fast.eval import kept as kept_module
from lift_fast.eval import texts as texts_module
from lift_fast.eval.images import Images, Pixels, image_features
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set
from lift_fast.ranks import Rank

SIZES = (1, 64, 100)
LOADERS = ("host", "dali") if dali.installed() else ("host",)
BROKEN = {0, 5, *range(64, 128), 220}


def evaluated(rank: Rank, folder, features=None):
    """(loader, batch size) -> the figures, the features, and the batches and texts that this rank encoded."""
    sets = {"set": open_set(folder, fields=("txt", "long"))}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "_PIECE", 90)
        patch.setattr(texts_module, "_PIECE", 256)
        patch.setattr(texts_module, "_CHUNK", 64)
        for loader, size in product(LOADERS, SIZES):
            model = Counted()
            options = {"loader": loader, "batch_size": size, "rank": rank}
            result = evaluate(model.subject, sets, features=features, **options)
            seen = list(model.seen)
            images = Images(sets["set"].data, Pixels.of_size(16), torch.device("cpu"), **options)
            found[loader, size] = figures(result), image_features(model.encode_image, images), seen, model.asked
    return found


def test_figures_do_not_depend_on_ranks_batch_size_loader_and_what_is_kept(tmp_path):
    folder = asking_set(tmp_path / "set", 221, broken=BROKEN)
    [alone] = on_ranks(1, in_group, evaluated, folder)  # with one thread, as the others
    figure, features, *_ = alone["host", 64]
    assert figure.count('"r1"') == 8 and '"composition": {"set"' in figure and '"zero_shot": {"set"' in figure
    assert '"ties": {"add_att": 0' in figure
    assert features.samples == sorted({*range(221)} - BROKEN) and sum(features.causes.values()) == len(BROKEN)
    for world in (2, 4):
        for found in on_ranks(world, in_group, evaluated, folder, tmp_path / f"kept-{world}"):
            for (loader, size), (other, others, seen, _) in found.items():
                assert other == alone[loader, size][0] == figure, (world, loader, size)
                assert others[1:] == features[1:] and torch.equal(others[0], alone[loader, size][1][0])
                assert (others[0] - features[0]).abs().max() < 1e-6
                calls = len(alone[loader, size][2])
                assert calls / world <= len(seen) <= calls / world + 4  # at most one more for each piece
    for found in on_ranks(2, in_group, evaluated, folder, tmp_path / "kept-4"):
        for (loader, size), (other, _, seen, asked) in found.items():
            assert other == figure and not seen and not asked, (loader, size)


def failing_images(rank: Rank, folder):
    images_module._PIECE = 64
    model, load = Counted(), images_module.host.load_images
    images = Images(open_data(folder), Pixels.of_size(16), torch.device("cpu"), "host", rank, 8)

    def load_images(part, *sizes):
        if rank.number == 1 and 79 in part.samples:
            raise BackendError("no decoder")
        return load(part, *sizes)

    images_module.host.load_images = load_images
    with pytest.raises(BackendError, match="no decoder"):
        image_features(model.encode_image, images)
    return len(model.seen)


def test_an_error_while_decoding_on_one_rank_is_raised_on_all_after_equally_many_calls_of_the_tower(tmp_path):
    """With FSDP2 each call is a collective: a rank that left early would let the others wait."""
    asking_set(tmp_path / "set", 100)
    assert on_ranks(3, in_group, failing_images, tmp_path / "set") == [3 + 2] * 3


def failing_texts(rank: Rank):
    texts_module._CHUNK = 4
    with pytest.raises(EncoderError, match="no tokens in '...'"):
        texts_module.encode_texts([f"{i}" if i != 6 else "..." for i in range(20)], Counted().encode_text, rank, False)
    with pytest.raises(DataError, match=r"no caption can be used; the first: '\.' has no tokens"):
        texts_module.encode_texts(["." * i for i in range(1, 20)], Counted().encode_text, rank, True)
    return True


def failing_stamps(rank: Rank, folder):
    """Rank 0 alone looks at what is kept."""
    data = open_data(folder)

    def shard_hashes(number):
        raise DataError("the shard has changed")

    data.shard_hashes = shard_hashes
    data.image_file = lambda i: folder / "x"
    kept = kept_module.Kept(folder / "kept", "image", "text") if rank.is_first else None
    with pytest.raises(DataError, match="the shard has changed"):
        image_features(Counted().encode_image, Images(data, Pixels.of_size(16), torch.device("cpu"), rank=rank), kept)
    return True


def test_other_errors_on_one_rank_are_raised_on_all(tmp_path):
    asking_set(tmp_path / "set", 3)
    assert on_ranks(2, in_group, failing_texts) == [True, True]
    assert on_ranks(2, in_group, failing_stamps, tmp_path / "set") == [True, True]

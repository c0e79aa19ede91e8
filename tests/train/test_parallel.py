"""Steps on several ranks: DDP, FSDP2 and one process take the same steps, in one piece and in micro-batches."""

import pytest
import torch
from support.ranks import SMALL, in_group, on_ranks

from lift_fast.losses import ClipLoss, CosineLoss
from lift_fast.nn import Clip, Lift
from lift_fast.ops.rows.quantized import QuantizedRows
from lift_fast.ranks import Rank
from lift_fast.train.config import TrainConfig
from lift_fast.train.optimizer import make_optimizer
from lift_fast.train.parallel import spread, whole
from lift_fast.train.step import Step

ROWS, STEPS = 12, 5


def batch(kind: str, seed: int, rank: Rank):
    """This rank's part of a global batch of ROWS samples."""
    generator = torch.Generator().manual_seed(seed)
    part = slice(rank.number * ROWS // rank.world, (rank.number + 1) * ROWS // rank.world)
    pixels = torch.randint(256, (ROWS, 16, 16, 3), dtype=torch.uint8, generator=generator)[part]
    if kind == "clip":
        return pixels, torch.randint(60, (ROWS, 77), generator=generator)[part]
    codes = torch.randint(-127, 128, (ROWS, 24), dtype=torch.int8, generator=generator)
    return pixels, QuantizedRows(codes, torch.ones(ROWS), "int8", 24)[torch.arange(ROWS)[part]]


def steps(rank: Rank, kind: str, how: str, loss: str, micro_batch: int | None, spiked: bool):
    """The stats of a few steps, and the weights after them."""
    torch.manual_seed(0)
    model = Lift(SMALL) if kind == "lift" else Clip(SMALL)
    config = TrainConfig(kind, (), out="", preset="small", clip_grad=0.3, layer_decay=0.8, parallel=how)
    model.logit_scale.requires_grad_(loss != "cosine")
    towers = spread(model, how, rank, torch.device("cpu"))
    optimizer = make_optimizer(model, config)
    loss_of = (
        CosineLoss()
        if loss == "cosine"
        else ClipLoss(normalize=True, gather_with_grad=True, rank=rank.number, world_size=rank.world)
    )
    step = Step(model, loss_of, optimizer, towers=towers, rank=rank, clip_grad=0.3, micro_batch=micro_batch)
    stats = []
    for number in range(STEPS):
        limit = 0.0 if spiked and number == 2 else torch.inf
        stats.append(step(*batch(kind, number, rank), 1e-3 / (number + 1), None, limit).tolist())
    return stats, {name: tensor.clone() for name, tensor in whole(model.state_dict()).items()}


CASES = [
    ("lift", "ddp", "contrastive", None, False),
    ("lift", "fsdp", "contrastive", None, False),
    ("clip", "ddp", "contrastive", None, False),
    ("clip", "fsdp", "contrastive", None, False),
    ("lift", "ddp", "cosine", None, False),
    ("clip", "ddp", "contrastive", 2, False),
    ("clip", "fsdp", "contrastive", 2, False),
    ("lift", "ddp", "contrastive", 5, True),
    ("lift", "fsdp", "contrastive", None, True),
]


def all_cases(rank: Rank):
    return [steps(rank, *case) for case in CASES]


@pytest.fixture(scope="module")
def by_ranks():
    return {world: on_ranks(world, in_group, all_cases) for world in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_ranks_take_the_steps_of_one_process(by_ranks, world, number):
    kind, _, loss, _, spiked = CASES[number]
    alone = steps(Rank(), kind, "ddp", loss, None, spiked)
    for found in by_ranks[world]:
        stats, weights = found[number]
        torch.testing.assert_close(torch.tensor(stats), torch.tensor(alone[0]), rtol=2e-5, atol=1e-6)
        for name, value in alone[1].items():
            if name.endswith("qkv.bias"):  # of which the keys' part has a gradient that is rounding alone
                continue
            torch.testing.assert_close(
                weights[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_ranks_agree_bit_for_bit(by_ranks):
    for world in (2, 3):
        for number in range(len(CASES)):
            first, *others = (found[number] for found in by_ranks[world])
            for other in others:
                assert other[0] == first[0]
                assert all(torch.equal(other[1][name], value) for name, value in first[1].items())


def test_a_spike_changes_no_weights():
    stats, _ = steps(Rank(), "lift", "ddp", "contrastive", None, True)
    plain, _ = steps(Rank(), "lift", "ddp", "contrastive", None, False)
    assert stats[:3] != plain[:3] and stats[2][0] == plain[2][0]  # the scale after the step differs, the loss does not
    torch.manual_seed(0)
    model = Lift(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainConfig("lift", (), out="", cache=(), preset="small")
    step = Step(model, ClipLoss(normalize=True), make_optimizer(model, config))
    pixels, text = batch("lift", 0, Rank())
    step(pixels, text, 1e-3, None, limit=0.0)
    bad = torch.full((ROWS, 3, 16, 16), torch.nan)
    assert torch.isnan(step(bad, text, 1e-3)[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

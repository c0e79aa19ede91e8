"""Runs of 50 steps on 1, 2 and 4 ranks, with DDP and FSDP2: the same losses at one global batch.

The data, the order, the crops and the patches that are left out are the same. These operations differ, and with them
the rounding of a loss: the sums over the samples in the gradients of weights, which each rank makes of its own samples
and the all-reduce (DDP) or reduce-scatter (FSDP2) adds; the sums over the images in a text's part of the loss and of
the gradient, likewise; the norm of the gradient, which FSDP2 makes of the norms of shards.
"""

from dataclasses import replace

import pytest
from support import complete  # noqa: F401
from support.ranks import in_group, on_ranks, trained
from support.tiny_caches import cache_of
from support.tiny_sets import make_set

from lift_fast.train.config import TrainConfig

STEPS, BATCH = 50, 24
EVERYTHING = {
    "ema": 0.9,
    "patch_dropout": 0.5,
    "patch_dropout_steps": 30,
    "micro_batch": 5,
    "layer_decay": 0.8,
    "flip": 0.5,
    "colour": 0.2,
    "shuffle_buffer": 16,
    "save_every": 17,
}
RUNS = {
    "lift": ("lift", {}),
    "clip": ("clip", {}),
    "lift with everything": ("lift", EVERYTHING),
    "clip with everything": ("clip", EVERYTHING),
    "lift with the cosine loss": ("lift", {"loss": "cosine"}),
}
SHORT = ["lift", "clip with everything"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """{name: TrainConfig} of RUNS, over 131 samples of which 7 have no image."""
    folder = tmp_path_factory.mktemp("agree")
    data = make_set(folder / "data", 131, per_shard=20, broken={3, 4, 40, 77, 78, 79, 130})
    cache = cache_of(folder / "cache", data)
    shared = {"preset": "small", "steps": STEPS, "batch_size": BATCH, "precision": "fp32", "warmup": 5}
    return {
        name: TrainConfig(
            model,
            (data.folder,),
            folder / name,
            **({"cache": (cache,)} if model == "lift" else {"context": 12}),
            **shared,
            **changes,
        )
        for name, (model, changes) in RUNS.items()
    }


def in_turn(rank, configs):
    """The content of run.json of several runs."""
    return [trained(config) for config in configs]


def losses_of(configs, names, world, parallel):
    """{name: losses} of runs on `world` ranks, the same on each of them."""
    runs = [replace(configs[name], parallel=parallel, out=configs[name].out / f"{parallel} {world}") for name in names]
    for run in runs:
        run.out.parent.mkdir(exist_ok=True)
    first, *others = on_ranks(world, in_group, in_turn, runs)
    for found in (first, *others):
        if isinstance(found, BaseException):
            raise found
    assert all(run["skipped_pictures"] == 7 and len(run["loss"]) == STEPS for run in first)
    for other in others:
        assert [run["loss"] for run in other] == [run["loss"] for run in first]
    return {name: run["loss"] for name, run in zip(names, first, strict=True)}


def check(configs, names, alone, cases):
    """Compares runs with those of one process; prints the largest relative differences."""
    for world, parallel in cases:
        for name, losses in losses_of(configs, names, world, parallel).items():
            # The cosine loss passes zero; it is a mean of numbers up to 1.
            whole = 1.0 if configs[name].loss == "cosine" else 0.0
            worst = max(abs(a - b) / max(abs(b), whole) for a, b in zip(losses, alone[name], strict=True))
            print(f"{name}, {parallel}, {world} ranks: {worst:.1e}")
            assert worst < 1e-5, (name, parallel, world)
            assert losses[0] != losses[-1]


def test_two_ranks(configs):
    check(configs, SHORT, losses_of(configs, SHORT, 1, "ddp"), [(2, "ddp"), (2, "fsdp")])


@pytest.mark.soak
def test_any_number_of_ranks(configs):
    alone = losses_of(configs, [*RUNS], 1, "ddp")
    check(configs, [*RUNS], alone, [(1, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])

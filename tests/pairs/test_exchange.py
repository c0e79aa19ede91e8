"""The losses over several processes (gloo): every option against open_clip's formula and one process; bytes sent.

The processes of a world run all cases once and save their results, which the tests then read.
"""

import itertools
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lift_fast.cache import encode
from lift_fast.losses import ClipLoss, SigLipLoss, cached_step
from lift_fast.ops import tuned
from lift_fast.ops.pairs.contrastive import contrastive
from lift_fast.ops.pairs.sigmoid import sigmoid

ROWS, DIM, WIDE = 12, 20, 4096
BIAS = -0.3
WORLDS = [2, 4]
OPTIONS = list(itertools.product([False, True], [False, True]))  # local_loss, gather_with_grad
TEXTS = ["trained", "ring", "frozen", "whole", "int8", "int8 ring", "int8 whole"]
DTYPES = [torch.float64, torch.float32]


def data(dtype, dim=DIM):
    """All ranks' rows, the same on each rank."""
    generator = torch.Generator().manual_seed(dim)
    image, text = (torch.randn(ROWS, dim, generator=generator) for _ in range(2))
    text += image
    image[3], text[5] = image[7], 0  # a duplicate, and a row of zeros
    return image.to(dtype), text.to(dtype)


def share(rows, rank, world):
    size = len(rows) // world
    return rows[rank * size : (rank + 1) * size]


def text_for(kind, text, rank, world):
    if kind.startswith("int8"):
        text = encode(text.float(), "int8")
    if kind.endswith("whole"):
        return text
    text = share(text, rank, world)
    return text.clone().requires_grad_() if kind in ("trained", "ring") else text


def run_case(op, kind, dtype, rank, world, **options):
    image, text = data(dtype)
    image, text = share(image, rank, world).clone().requires_grad_(), text_for(kind, text, rank, world)
    scale, bias = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (5.0, BIAS))
    with tuned.using("pairs", "gather", 0 if kind.endswith("ring") else 1 << 30):
        loss = op(image, text, scale, bias, normalize=True, group=dist.group.WORLD, **options)
    loss.backward()
    trained = isinstance(text, torch.Tensor) and text.requires_grad
    return [loss.detach(), image.grad, text.grad if trained else None, scale.grad, bias.grad]


class Traffic:
    """Counts the bytes that this rank sends in the collectives of exchange.py, by each one's usual algorithm."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        share = lambda world: (world - 1) / world  # noqa: E731
        for name, sent in {
            "all_gather_single": lambda world, out, one: share(world) * out.nbytes,
            "all_reduce": lambda world, one, *_: 2 * share(world) * one.nbytes,
            "all_to_all_single": lambda world, out, one: share(world) * one.nbytes,
            "batch_isend_irecv": lambda world, ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend),
        }.items():
            function = getattr(dist, name, None) or dist.all_gather_into_tensor  # its name until torch 2.12
            monkeypatch.setattr(dist, name, self._counting(function, sent), raising=False)

    def _counting(self, function, sent):
        def call(*args, **kwargs):
            self.bytes += sent(dist.get_world_size(), *args)
            return function(*args, **kwargs)

        return call


def traffic_of(kind, rank, world):
    image, text = data(torch.float32, WIDE)
    image, text = share(image, rank, world).clone().requires_grad_(), text_for(kind, text, rank, world)
    gather = 0 if kind.endswith("ring") else 1 << 30
    with pytest.MonkeyPatch.context() as monkeypatch, tuned.using("pairs", "gather", gather):
        traffic = Traffic(monkeypatch)
        contrastive(image, text, 5.0, group=dist.group.WORLD, local_loss=True, gather_with_grad=True).backward()
    return traffic.bytes


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.0), nn.GELU(), nn.Linear(DIM, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.layer(x), self.logit_scale.exp()


def run_ddp(rank, world, pieces):
    """Gradients of a tower over all ranks; `pieces` micro-batches a rank."""
    image, text = data(torch.float32)
    image, text = share(image, rank, world), encode(share(text, rank, world), "int8")
    model = Tower()
    if world > 1:
        model = DistributedDataParallel(model)
    loss_of = ClipLoss(True, True, rank=rank, world_size=world, normalize=True)
    for _ in range(2):  # DDP reports in the second step a parameter that got no gradient in the first
        model.zero_grad()
        if pieces == 1:
            features, scale = model(image)
            loss = loss_of(features, text, scale)
            loss.backward()
        else:
            loss = cached_step(
                model, image.tensor_split(pieces), lambda features, scale: loss_of(features, text, scale)
            )
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def refusals(rank, world):
    """The message of each error, or None."""
    image, text = torch.randn(3 + rank, DIM), torch.randn(3 + rank, DIM)
    whole = torch.randn(3 * world, DIM).requires_grad_()
    cases = {
        "uneven": lambda: contrastive(image, text, 1.0, group=dist.group.WORLD),
        "uneven sigmoid": lambda: sigmoid(image, text, 1.0, group=dist.group.WORLD),
        "trained whole": lambda: contrastive(image[:3], whole, 1.0, group=dist.group.WORLD),
        "neither": lambda: contrastive(image[:3], text[:2], 1.0, group=dist.group.WORLD),
        "no rows on one": lambda: contrastive(image[: 3 * rank], text[: 3 * rank], 1.0, group=dist.group.WORLD),
        "one trained": lambda: contrastive(image[:3], text[:3].requires_grad_(rank == 0), 1.0, group=dist.group.WORLD),
        "two dtypes": lambda: sigmoid(
            image[:3].to(torch.bfloat16 if rank else torch.float64),
            text[:3].to(torch.bfloat16 if rank else torch.float64),
            1.0,
            group=dist.group.WORLD,
        ),
        "rank": lambda: ClipLoss(rank=world, world_size=world)(image[:3], text[:3], 1.0),
    }
    return {name: message_of(case) for name, case in cases.items()}


def message_of(case):
    try:
        case()
    except ValueError as error:
        return str(error)
    return None


def run_compiled(rank, world):
    image, text = (share(rows, rank, world) for rows in data(torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(image, text):
        return contrastive(2 * image, text, 3.0, group=dist.group.WORLD)

    got, want = image.clone().requires_grad_(), image.clone().requires_grad_()
    step(got, text).backward()
    contrastive(2 * want, text, 3.0, group=dist.group.WORLD).backward()
    return torch.equal(got.grad, want.grad)


def work(rank, folder):
    """Runs this rank in every world that has it, so that Python starts once for all of them."""
    torch.set_num_threads(1)
    for world in sorted(WORLDS, reverse=True):  # no rank waits for a world it does not belong to
        if rank < world:
            work_in(world, rank, folder)


def work_in(world, rank, folder):
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/store-{world}", timeout, world, rank)
    found = {}
    for dtype, kind in itertools.product(DTYPES, TEXTS):
        for local, gathered in OPTIONS:
            options = {"local_loss": local, "gather_with_grad": gathered}
            found["contrastive", dtype, kind, local, gathered] = run_case(
                contrastive, kind, dtype, rank, world, **options
            )
        found["sigmoid", dtype, kind] = run_case(sigmoid, kind, dtype, rank, world)
    for kind in TEXTS:
        found["traffic", kind] = traffic_of(kind, rank, world)
    for pieces in (1, 3):
        found["ddp", pieces] = run_ddp(rank, world, pieces)
    for module in (ClipLoss, SigLipLoss):
        image, text = (share(rows, rank, world) for rows in data(torch.float32))
        found[module.__name__] = module(rank=rank, world_size=world)(image, text, 1.0, BIAS, output_dict=True)
    found["refusals"] = refusals(rank, world)
    if world == 2:
        found["compiled"] = run_compiled(rank, world)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """World -> the results of each of its ranks."""
    folder = tmp_path_factory.mktemp("worlds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        mp.spawn(work, (str(folder),), nprocs=max(WORLDS))
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
        for world in WORLDS
    }


@pytest.fixture(params=WORLDS)
def ranks(request, worlds):
    """The results of each rank of a world."""
    return worlds[request.param]


def leaves(kind, world, dtype=torch.float64):
    image, text = data(torch.float64)
    if kind.startswith("int8"):
        rows = encode(text.float(), "int8")
        text = rows.codes.double() * rows.scales.double()[:, None]
    images, texts = (
        [share(rows, r, world).to(dtype).clone().requires_grad_() for r in range(world)] for rows in (image, text)
    )
    scales, biases = (
        [torch.tensor(value, dtype=dtype, requires_grad=True) for _ in range(world)] for value in (5.0, BIAS)
    )
    return images, texts, scales, biases


def open_clip_loss(rank, images, texts, scale, bias, local, gathered):
    """open_clip's ClipLoss on one rank; gathered features of other ranks have a gradient if `gathered`."""
    world = len(images)
    images, texts = ([F.normalize(part, dim=1) for part in parts] for parts in (images, texts))
    x, t = images[rank], texts[rank]
    if not gathered:
        images, texts = ([part.detach() for part in parts] for parts in (images, texts))
        if not local:
            images[rank], texts[rank] = x, t
    all_x, all_t = torch.cat(images), torch.cat(texts)
    if not local:
        x, t = all_x, all_t
    labels = torch.arange(len(x)) + (rank * len(x) if local and world > 1 else 0)
    per_image, per_text = scale * x @ all_t.T + bias, scale * t @ all_x.T + bias
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def siglip_loss(rank, images, texts, scale, bias):
    """open_clip's SigLipLoss on one rank; texts of other ranks have a gradient."""
    images, texts = ([F.normalize(part, dim=1) for part in parts] for parts in (images, texts))
    labels = torch.cat([2.0 * torch.eye(len(t)) * (r == rank) - 1 for r, t in enumerate(texts)], dim=1)
    z = scale * images[rank] @ torch.cat(texts).T + bias
    return -F.logsigmoid(labels * z).sum() / len(images[rank])


def check_against(ranks, found, loss_of, kind, dtype, bound):
    world = len(ranks)
    images, texts, scales, biases = leaves(kind, world)
    losses = [loss_of(rank, images, texts, scales[rank], biases[rank]) for rank in range(world)]
    sum(losses).backward()
    for rank in range(world):
        loss, d_image, d_text, d_scale, d_bias = found[rank]
        assert abs(loss - losses[rank]) <= bound * abs(losses[rank])
        assert (d_text is None) != (kind in ("trained", "ring"))
        pairs = [(d_image, images[rank].grad), (d_scale, scales[rank].grad), (d_bias, biases[rank].grad)]
        if d_text is not None:
            # A row of zeros has a gradient of 1e12; it is compared separately.
            want = texts[rank].grad
            zero = want.norm(dim=1) > 1e6
            pairs += [(d_text[~zero], want[~zero]), (d_text[zero], want[zero])]
        for got, want in pairs:
            assert got.dtype == dtype
            assert (got.double() - want).norm() <= bound * want.norm() + 1e-3 * bound


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(("local", "gathered"), OPTIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_contrastive_is_open_clips(ranks, kind, local, gathered, dtype, bound):
    found = [rank["contrastive", dtype, kind, local, gathered] for rank in ranks]
    check_against(ranks, found, lambda *args: open_clip_loss(*args, local, gathered), kind, dtype, bound)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_sigmoid_is_open_clips(ranks, kind, dtype, bound):
    check_against(ranks, [rank["sigmoid", dtype, kind] for rank in ranks], siglip_loss, kind, dtype, bound)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(("local", "gathered"), [option for option in OPTIONS if option != (True, False)])
def test_many_processes_equal_one(ranks, kind, local, gathered):
    """In float32. With local_loss alone the gradients are not those of any loss of one process."""
    world = len(ranks)
    image, text = data(torch.float32)
    image = image.requires_grad_()
    if kind in ("trained", "ring"):
        text = text.requires_grad_()
    elif kind.startswith("int8"):
        text = encode(text, "int8")
    loss = contrastive(image, text, 5.0, BIAS, normalize=True)
    loss.backward()
    found = [rank["contrastive", torch.float32, kind, local, gathered] for rank in ranks]
    mean = sum(one[0] for one in found) / world
    assert abs(mean - loss) <= 1e-6 * loss
    factor = world if gathered else 1
    # A row of zeros has a gradient of 1e12.
    for got, want in ((1, image.grad), (2, getattr(text, "grad", None))):
        if want is not None:
            want = factor * want
            got = torch.cat([one[got] for one in found])
            rest = want.norm(dim=1) < 1e6
            assert (got - want)[rest].norm() <= 1e-6 * want[rest].norm()
            assert (got - want)[~rest].norm() <= 1e-6 * want[~rest].norm()


@pytest.mark.parametrize(
    ("kind", "most"),
    [("int8", 0.07), ("int8 whole", 0.005), ("whole", 0.005), ("frozen", 0.26), ("trained", 0.51), ("ring", 0.76)],
)
def test_bytes_that_travel(ranks, kind, most):
    """Against open_clip's local_loss + gather_with_grad on float32 features: two gathers, two reduce-scatters."""
    world = len(ranks)
    theirs = 2 * 2 * (world - 1) * (ROWS // world) * WIDE * 4
    limit = most * theirs
    if kind == "ring":  # after the last turn the gradients return to their owner
        limit *= world / (world - 1)
    for rank in ranks:
        assert 0 < rank["traffic", kind] <= limit


def test_ddp_and_cached_step_equal_one_process(ranks):
    loss, want = run_ddp(0, 1, 1)
    for pieces in (1, 3):
        assert sum(rank["ddp", pieces][0].item() for rank in ranks) / len(ranks) == pytest.approx(loss.item(), rel=1e-6)
        for rank in ranks:
            for got, right in zip(rank["ddp", pieces][1], want, strict=True):
                assert (got - right).norm() <= 2e-6 * right.norm() + 1e-8


def test_modules_find_the_default_group(ranks):
    image, text = data(torch.float32)
    together = contrastive(image, text, 1.0, BIAS).item()
    for rank in ranks:
        assert rank["ClipLoss"]["contrastive_loss"].item() == pytest.approx(together, rel=1e-5)
    mean = sum(rank["SigLipLoss"]["contrastive_loss"].item() for rank in ranks) / len(ranks)
    assert mean == pytest.approx(sigmoid(image, text, 1.0, BIAS).item(), rel=1e-5)


def test_every_rank_refuses(ranks):
    world = len(ranks)
    for rank in ranks:
        errors = rank["refusals"]
        assert "the same number of rows" in errors["uneven"] and "the same number of rows" in errors["uneven sigmoid"]
        assert "the same number of rows" in errors["no rows on one"]
        assert "of the same kind" in errors["one trained"] and "of the same kind" in errors["two dtypes"]
        assert "cannot have a gradient" in errors["trained whole"]
        assert errors["neither"] == f"{world} ranks of 3 images need 3 or {3 * world} texts on each, not 2"
        assert f"rank {world} of {world} was passed" in errors["rank"]


def test_compiled_with_a_group(ranks):
    if len(ranks) == 2:
        assert all(rank["compiled"] for rank in ranks)


def test_a_group_that_is_not_there():
    with pytest.raises(ValueError, match="no process group yet"):
        ClipLoss(world_size=2)(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)

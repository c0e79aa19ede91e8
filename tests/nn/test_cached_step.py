"""losses.cached_step with the towers: patch dropout, trained texts, several ranks; each equal to one piece."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lift_fast.losses import ClipLoss, cached_step
from lift_fast.nn import Clip, Lift, Preset, TextConfig, VitConfig
from lift_fast.train.patches import patches_kept

SMALL = Preset(VitConfig(24, 8, 64, 3, 2, patch_dropout=0.5), TextConfig(9, 60, 32, 2, 2), embed_dim=24, text_dim=40)
ROWS = 12


class Towers(nn.Module):
    """What DDP and FSDP2 wrap: every use of a parameter is in this forward. A Clip's text features stand beside those
    of the images, so that each piece takes its own captions through the text tower."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels, kept=None, tokens=None):
        features = self.model.encode_image(pixels, kept)
        if tokens is not None:
            features = torch.cat([features, self.model.encode_text(tokens)], dim=1)
        return features, self.model.logit_scale.exp()


def make(kind, level="none"):
    torch.manual_seed(0)
    model = kind(SMALL)
    model.set_checkpointing(level)
    return model


def batch(rows=ROWS):
    """Pixels, kept patches, tokens, fixed texts."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(rows, 3, 24, 24, generator=generator)
    tokens = torch.randint(60, (rows, 9), generator=generator)
    return pixels, patches_kept(0, 3, range(rows), 9, 0.5), tokens, torch.randn(rows, 40, generator=generator)


def loss_with(loss, text):
    """A function of Towers' outputs. text: fixed texts; None: the features have the texts' in their second half."""

    def of(features, scale):
        image, other = features.chunk(2, dim=1) if text is None else (features, text)
        return loss(image, other, scale)

    return of


def near(got, want, bound):
    """Asserts that gradients agree in relative norm, each of them and all together."""
    pairs = list(zip(got, want, strict=True))
    for g, w in pairs:
        assert (g - w).norm() <= 3 * bound * w.norm()
    together = [torch.cat([t.flatten() for t in each]) for each in (got, want)]
    assert (together[0] - together[1]).norm() <= bound * together[1].norm()


def gradients(model):
    found = [p.grad for p in model.parameters()]
    return [(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in found]


@pytest.mark.parametrize("level", ["none", "block"])
@pytest.mark.parametrize("drawn", [False, True], ids=["kept", "drawn"])
@pytest.mark.parametrize("kind", [Lift, Clip])
@pytest.mark.parametrize("sizes", [[5, 5, 3], [1, 12], [13]], ids=str)
def test_patch_dropout_in_pieces_is_that_of_the_whole_batch(kind, drawn, level, sizes):
    """To 1e-6 in float32. drawn: the patches come from torch's generator, on a CPU one stream of numbers."""
    model = make(kind, level)
    pixels, kept, tokens, fixed = batch(13)
    tokens = tokens if kind is Clip else None
    towers, loss = Towers(model), loss_with(ClipLoss(normalize=True), fixed if kind is Lift else None)
    torch.manual_seed(2)
    whole = loss(*towers(pixels, None if drawn else kept, tokens))
    whole.backward()
    want, after = gradients(model), torch.rand(1)
    model.zero_grad()

    torch.manual_seed(2)
    parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in (pixels, None if drawn else kept, tokens)]
    pieces = cached_step(lambda piece: towers(*piece), list(zip(*parts, strict=True)), loss)
    assert torch.equal(torch.rand(1), after)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    near(gradients(model), want, 1e-6)


@pytest.mark.parametrize("level", ["none", "mlp", "branches"])
def test_texts_of_the_whole_batch_get_their_gradients_too(level):
    """The text tower in one piece, inside the loss."""
    model = make(Clip, level)
    pixels, kept, tokens, _ = batch(13)
    loss = ClipLoss(normalize=True)
    whole = loss(model.encode_image(pixels, kept), model.encode_text(tokens), model.logit_scale.exp())
    whole.backward()
    want = gradients(model)
    model.zero_grad()
    pieces = cached_step(
        lambda piece: model.encode_image(*piece),
        list(zip(pixels.split(4), kept.split(4), strict=True)),
        lambda image: loss(image, model.encode_text(tokens), model.logit_scale.exp()),
    )
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    near(gradients(model), want, 1e-6)


def test_other_patches_give_other_gradients():
    """The comparisons above can fail."""
    model = make(Lift)
    pixels, kept, _, fixed = batch()
    found = []
    for patches in (kept, patches_kept(0, 4, range(ROWS), 9, 0.5)):
        model.zero_grad()
        loss_with(ClipLoss(normalize=True), fixed)(*Towers(model)(pixels, patches)).backward()
        found.append(gradients(model))
    with pytest.raises(AssertionError):
        near(*found, 1e-3)


class Encode:
    """cached_step's encode of a tuple; no_sync is that of the wrapped module, if it has one."""

    def __init__(self, towers):
        self.towers = towers
        if hasattr(towers, "no_sync"):
            self.no_sync = towers.no_sync

    def __call__(self, piece):
        return self.towers(*piece)


def run(kind, how, sizes, rank=0, world=1):
    """The loss and gradients of a second step, and for DDP the bytes reduced in both. sizes: of a rank's pieces, None
    for one forward and backward."""
    model, reduced = make(kind), [0]
    towers = Towers(model)
    if how == "ddp":
        towers = DistributedDataParallel(towers)
        towers.register_comm_hook(reduced, counted)
    elif how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for tower in (model.visual, *([model.text] if kind is Clip else [])):
            for block in tower.transformer.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(towers, mesh=mesh, ignored_params={model.logit_scale})
    pixels, kept, tokens, fixed = (t.chunk(world)[rank] for t in batch())
    of = loss_with(ClipLoss(True, True, rank=rank, world_size=world, normalize=True), fixed if kind is Lift else None)
    inputs = pixels, kept, tokens if kind is Clip else None
    for _ in range(2):  # DDP reports in the second step a parameter that got no gradient in the first
        model.zero_grad()
        if sizes is None:
            loss = of(*towers(*inputs))
            loss.backward()
        else:
            parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in inputs]
            loss = cached_step(Encode(towers), list(zip(*parts, strict=True)), of)
        if how == "fsdp":
            dist.all_reduce(model.logit_scale.grad)
            model.logit_scale.grad /= world
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    return total / world, gradients(model), reduced[0]


def counted(reduced, bucket):
    reduced[0] += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)


CASES = [(kind, how, sizes) for kind in (Lift, Clip) for how in ("ddp", "fsdp") for sizes in (None, [1, 3, 2])]


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([run(*case, rank, world) for case in CASES], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_in_pieces_equal_one_process(tmp_path):
    """Two ranks of three pieces each, in DDP and FSDP2: gradients are reduced once, those of the text tower too."""
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        for (kind, how, _), (loss, got, reduced) in zip(CASES, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            want_loss, want, _ = run(kind, "", None)
            assert reduced == (2 * sum(g.nbytes for g in want) if how == "ddp" else 0)
            assert loss.item() == pytest.approx(want_loss.item(), rel=2e-6)
            near(got, want, 2e-6)

"""train/ema.py: the average of the weights, in one process and under FSDP2."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lift_fast.nn import Lift, Preset, TextConfig, VitConfig
from lift_fast.nn.models import MAX_LOGIT_SCALE
from lift_fast.train.config import TrainConfig
from lift_fast.train.ema import Ema
from lift_fast.train.optimizer import lock, make_optimizer, set_lr

SMALL = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(9, 60, 16, 2, 2), embed_dim=12, text_dim=24)
DECAY = 0.75
STEPS = 3
LOCKS = [None, 0, 1]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, turn):
    generator = torch.Generator().manual_seed(turn)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def test_the_average_is_the_definition():
    model = Lift(SMALL)
    ema, want = Ema(model, DECAY), {name: w.double() for name, w in weights(model).items()}
    for turn in range(STEPS):
        changed(model, turn)
        ema.update()
        want = {name: DECAY * w + (1 - DECAY) * model.get_parameter(name).double() for name, w in want.items()}
    assert ema.state().keys() == model.state_dict().keys()
    for name, average in ema.state().items():
        torch.testing.assert_close(average.double(), want[name], rtol=1e-6, atol=1e-6)


def test_the_model_has_the_averages_for_a_while():
    model, pixels = Lift(SMALL), torch.randn(2, 3, 16, 16)
    ema = Ema(model, DECAY)
    changed(model, 0)
    ema.update()
    before, averages = weights(model), {name: t.clone() for name, t in ema.state().items()}
    other = copy.deepcopy(model)
    other.load_state_dict(averages)
    for error in (None, KeyError):
        try:
            with torch.no_grad(), ema.swapped():
                assert torch.equal(model.encode_image(pixels), other.encode_image(pixels))
                assert all(torch.equal(t, averages[name]) for name, t in model.state_dict().items())
                if error:
                    raise error
        except KeyError:
            pass
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(torch.equal(t, averages[name]) for name, t in ema.state().items())


def test_a_run_goes_on_with_a_loaded_average():
    model, other = Lift(SMALL), Lift(SMALL)
    ema = Ema(model, DECAY)
    changed(model, 0)
    ema.update()
    other.load_state_dict(model.state_dict())
    again = Ema(other, DECAY)
    for name, tensor in again.state().items():
        tensor.copy_(ema.state()[name])
    for one, average in ((model, ema), (other, again)):
        changed(one, 1)
        average.update()
    assert all(torch.equal(t, again.state()[name]) for name, t in ema.state().items())


def test_locked_weights_are_not_averaged_and_the_scale_stays_in_its_bounds():
    model = Lift(SMALL)
    model.visual.requires_grad_(False)
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOGIT_SCALE)
    ema = Ema(model, 0.999)
    assert {name.partition(".")[0] for name in ema.state()} == {"head", "logit_scale"}
    for _ in range(100):
        ema.update()
    assert ema.state()["logit_scale"].item() == torch.tensor(MAX_LOGIT_SCALE).item()
    for value in (1.0, MAX_LOGIT_SCALE):
        model.logit_scale.data.fill_(value)
        for _ in range(100):
            ema.update()
            assert 0 <= ema.state()["logit_scale"].item() <= torch.tensor(MAX_LOGIT_SCALE).item()


class Root(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.encode_image(pixels), self.model.logit_scale.exp()


def train(sharded, unlocked=None, rank=0, world=1):
    """Evaluations with and without the average, and at the end weights and averages, whole. unlocked: last blocks of a
    locked tower that are trained; None: no lock."""
    torch.manual_seed(0)
    model = Lift(SMALL)
    # A large eps, since the gradient of the keys' bias is nothing but rounding errors.
    config = TrainConfig("lift", (), None, lr=0.01, layer_decay=0.7, eps=1e-3)
    if unlocked is not None:
        config = replace(config, lock="tower", unlocked_blocks=unlocked)
    lock(model, config)
    root = Root(model)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in model.visual.transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(root, mesh=mesh, ignored_params={model.logit_scale}, reshard_after_forward=True)
    optimizer, ema = make_optimizer(model, config), Ema(model, DECAY)
    generator, found = torch.Generator().manual_seed(1), []
    for turn in range(STEPS):
        pixels = torch.randn(4, 3, 16, 16, generator=generator).chunk(world)[rank]
        set_lr(optimizer, 0.01 / (1 + turn))
        features, scale = root(pixels)
        loss = scale * features.square().mean()
        loss.backward()
        if sharded:
            dist.all_reduce(model.logit_scale.grad)
            model.logit_scale.grad /= world
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        with torch.no_grad():
            plain = root(pixels)[0]
            with ema.swapped():
                averaged = root(pixels)[0]
            assert torch.equal(root(pixels)[0], plain) and not torch.equal(averaged, plain)
        found += [plain, averaged]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (*model.parameters(), *ema.state().values())]
    return found + [t.detach().clone() for t in whole]


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view tensor")
        torch.save([train(True, unlocked, rank, world) for unlocked in LOCKS], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_train_and_average_as_one_process_does(tmp_path):
    """FSDP2 sees a call of each block, and none of its outputs is a view."""
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
    for number, unlocked in enumerate(LOCKS):
        want = train(False, unlocked)
        for rank in range(2):
            for got, right in zip(torch.load(tmp_path / f"{rank}.pt")[number], want, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-4, atol=2e-6)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_device():
    model = Lift(SMALL).cuda()
    ema = Ema(model, DECAY)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update()
        with ema.swapped():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")

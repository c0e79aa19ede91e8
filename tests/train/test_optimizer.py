"""train/optimizer.py: learning rates and decay of each parameter, and locked towers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lift_fast.errors import ConfigError
from lift_fast.nn import Clip, Lift, Preset, TextConfig, VitConfig
from lift_fast.train.config import TrainConfig
from lift_fast.train.optimizer import lock, make_optimizer, set_lr

SMALL = Preset(VitConfig(16, 8, 32, 3, 2), TextConfig(9, 60, 16, 2, 2), embed_dim=12, text_dim=24)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def config(**settings):
    return TrainConfig("clip", (Path("data"),), Path("out"), **settings)


def make(kind):
    torch.manual_seed(0)
    return Lift(SMALL) if kind == "lift" else Clip(SMALL)


def groups_of(model, optimizer):
    """Name of each parameter -> its group."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}


def losses_of(model):
    generator = torch.Generator().manual_seed(1)
    image = model.encode_image(torch.randn(5, 3, 16, 16, generator=generator))
    loss = image.square().mean() * model.logit_scale.exp()
    if isinstance(model, Clip):
        loss = loss + model.encode_text(torch.randint(60, (5, 9), generator=generator)).square().mean()
    return loss


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_the_defaults_are_torch_s_adamw_with_two_groups(kind):
    model, other, run = make(kind), make(kind), config()
    optimizer = make_optimizer(model, run)
    parameters = list(other.parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": run.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=run.lr,
        betas=(run.beta1, run.beta2),
        eps=run.eps,
        fused=True,
    )
    for lr in (1e-3, 3e-4, 2e-3):
        set_lr(optimizer, lr)
        for group in plain.param_groups:
            group["lr"] = lr
        for one, chosen in ((model, optimizer), (other, plain)):
            losses_of(one).backward()
            chosen.step()
            chosen.zero_grad()
    for p, q in zip(model.parameters(), parameters, strict=True):
        assert torch.equal(p, q)
    assert len(optimizer.param_groups) == 3
    assert [len(g["params"]) for g in optimizer.param_groups if g["params"][0] is model.logit_scale] == [1]


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_each_layer_has_its_learning_rate(kind):
    """A tower of L blocks: the embeddings have decay ** (L + 1), block i has decay ** (L - i), all else 1."""
    model = make(kind)
    optimizer = make_optimizer(model, config(layer_decay=0.5, lr=0.1))
    want = {"visual.": (3, ("patch_embed", "class_embedding", "positional_embedding", "ln_pre"))}
    want |= {"text.": (2, ("token_embedding", "positional_embedding"))}
    seen = groups_of(model, optimizer)
    assert seen.keys() == {name for name, _ in model.named_parameters()}
    for _ in range(2):
        for name, group in seen.items():
            scale = 1.0
            for tower, (blocks, embeddings) in want.items():
                if name.startswith(tuple(tower + part for part in embeddings)):
                    scale = 0.5 ** (blocks + 1)
                for i in range(blocks):
                    if name.startswith(f"{tower}transformer.blocks.{i}."):
                        scale = 0.5 ** (blocks - i)
            assert group["lr_scale"] == scale, name
            assert group["lr"] == pytest.approx(0.1 * scale)
            assert group["weight_decay"] == (0.2 if model.get_parameter(name).dim() >= 2 else 0)
        set_lr(optimizer, 0.1)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_learning_rates_on_the_device(device):
    """What --graph needs: each group has a tensor of its own, which set_lr fills."""
    model = make("lift").to(device)
    optimizer = make_optimizer(model, replace(config(layer_decay=0.5, lr=0.1), graph=True))
    before = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(lr, torch.Tensor) and lr.device.type == device for lr in before)
    set_lr(optimizer, 0.3)
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] is lr
        assert lr.item() == pytest.approx(0.3 * group["lr_scale"])


def test_an_optimizer_without_scales():
    optimizer = torch.optim.AdamW(make("lift").parameters(), lr=1.0)
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("kind", ["lift", "clip"])
@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_a_locked_tower_stays_as_it_is(kind, unlocked):
    model, run = make(kind), config(lock="tower", unlocked_blocks=unlocked)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lock(model, run)
    optimizer = make_optimizer(model, run)
    losses_of(model).backward()
    optimizer.step()
    trained = tuple(f"visual.transformer.blocks.{i}." for i in range(3 - unlocked, 3))
    trained += ("visual.ln_post.",) if unlocked else ()
    for name, p in model.named_parameters():
        locked = name.startswith("visual.") and not name.startswith(trained)
        assert p.requires_grad != locked, name
        assert (p.grad is None) == locked, name
        assert torch.equal(p, before[name]) == locked, name
    assert groups_of(model, optimizer).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_not_locked():
    model = make("lift")
    lock(model, config())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="--unlocked-blocks 4: the image tower of tiny has 3 blocks"):
        lock(model, config(lock="tower", unlocked_blocks=4))
    assert all(p.requires_grad for p in model.parameters())

import math

import pytest
import torch

from lift_fast.errors import ConfigError
from lift_fast.nn import Clip, Head, Lift, TextConfig, TextTransformer, Vit, VitConfig, preset
from lift_fast.nn.config import Preset

SMALL = Preset(VitConfig(24, 8, 32, 2, 4), TextConfig(9, 60, 16, 2, 2), embed_dim=12, text_dim=20)


def test_paper_sizes():
    """open_clip's ViT-B-16: 86.2 M image parameters (projection included), 63.4 M text parameters."""
    with torch.device("meta"):
        model = Clip(preset("vit-b16"))
    image = sum(p.numel() for p in model.visual.parameters()) + model.visual_projection.weight.numel()
    text = sum(p.numel() for p in model.text.parameters()) + model.text_projection.weight.numel()
    assert image == 86_192_640
    assert text == 63_428_096


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(batch):
    torch.manual_seed(batch)
    pixels = torch.randn(batch, 3, 24, 24)
    assert Vit(SMALL.vit)(pixels).shape == (batch, 32)
    assert Lift(SMALL).encode_image(pixels).shape == (batch, 20)
    assert Lift(SMALL, 7).encode_image(pixels).shape == (batch, 7)
    assert Clip(SMALL).encode_text(torch.randint(60, (batch, 9))).shape == (batch, 12)


def test_attention_is_the_formula():
    torch.manual_seed(0)
    block = Vit(SMALL.vit).double().transformer.blocks[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    q, k, v = block.qkv(block.ln_1(x)).chunk(3, dim=-1)
    heads = [t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v)]
    weights = torch.softmax(heads[0] @ heads[1].mT / math.sqrt(8), dim=-1)
    y = x + block.proj((weights @ heads[2]).transpose(1, 2).flatten(2))
    y = y + block.fc_2(torch.nn.functional.gelu(block.fc_1(block.ln_2(y))))
    torch.testing.assert_close(block(x), y)


def test_pooling_averages_patches_without_the_class_token():
    vit = Vit(SMALL.vit)
    seen = {}
    vit.ln_post.register_forward_hook(lambda module, args, out: seen.update(pooled=args[0]))
    vit.transformer.register_forward_hook(lambda module, args, out: seen.update(tokens=out))
    vit(torch.randn(2, 3, 24, 24))
    assert seen["tokens"].shape == (2, 10, 32)
    torch.testing.assert_close(seen["pooled"], seen["tokens"][:, 1:].mean(dim=1))


def test_text_is_causal_and_read_at_end_of_text():
    torch.manual_seed(0)
    text = TextTransformer(SMALL.text).double()
    tokens = torch.tensor([[50, 3, 4, 59, 0, 0, 0, 0, 0]])
    after = tokens.clone()
    after[0, 4:] = torch.tensor([7, 8, 9, 10, 11])  # behind the end: must not matter
    before = tokens.clone()
    before[0, 1] = 5  # before the end: must
    torch.testing.assert_close(text(tokens), text(after))
    assert not torch.allclose(text(tokens), text(before))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = Clip(SMALL)
        model.set_checkpointing(enabled)
        image = model.encode_image(torch.ones(2, 3, 24, 24))
        text = model.encode_text(torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1)))
        (image * text).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_logit_scale_starts_at_clip_and_stays_in_bounds():
    model = Lift(SMALL)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for value, kept in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2.0))):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(kept)


def test_head_is_two_layers():
    head = Head(6, 10)
    x = torch.randn(4, 6)
    torch.testing.assert_close(head(x), head.fc_2(torch.nn.functional.gelu(head.fc_1(x))))


def test_sizes_that_cannot_work_are_told():
    with pytest.raises(ConfigError, match="patch_size"):
        VitConfig(image_size=70, patch_size=16)
    with pytest.raises(ConfigError, match="heads"):
        VitConfig(width=100, heads=12)
    with pytest.raises(ConfigError, match="vit-b16"):
        preset("vit-b17")

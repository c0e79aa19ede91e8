"""The towers, the head and the two models: sizes, formulas, pooling, other image sizes, checkpointing."""

import math
from dataclasses import replace

import pytest
import torch

from lift_fast.errors import ConfigError
from lift_fast.nn import Clip, Head, Lift, TextConfig, TextTransformer, Vit, VitConfig, preset
from lift_fast.nn.config import Preset
from lift_fast.nn.transformer import Transformer
from lift_fast.nn.vit import resized

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


def test_a_transformer_is_the_formula():
    """The formula of open_clip and of the paper: x + Attention(LN(x)), then x + MLP(LN(x))."""
    transformer = Transformer(32, 1, 4).double()
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    (block,) = transformer.blocks
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    q, k, v = block.qkv(block.ln_1(x)).chunk(3, dim=-1)
    heads = [t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v)]
    weights = torch.softmax(heads[0] @ heads[1].mT / math.sqrt(8), dim=-1)
    y = x + block.proj((weights @ heads[2]).transpose(1, 2).flatten(2))
    y = y + block.fc_2(torch.nn.functional.gelu(block.fc_1(block.ln_2(y))))
    torch.testing.assert_close(transformer(x), y)


def tower(**conventions):
    vit = Vit(replace(SMALL.vit, **conventions)).double()
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return vit


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("norm_after_pool", [False, True])
def test_pooling_and_the_last_norm(pool, norm_after_pool):
    """open_clip and LIFT's authors normalise, then pool; timm pools, then normalises."""
    vit = tower(pool=pool, norm_after_pool=norm_after_pool)
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    tokens = vit.tokens(pixels)
    assert tokens.shape == (2, 10, 32)
    norm = torch.nn.functional.layer_norm
    last = (32,), vit.ln_post.weight, vit.ln_post.bias

    def pooled(x):
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(dim=1)

    want = norm(pooled(tokens), *last) if norm_after_pool else pooled(norm(tokens, *last))
    torch.testing.assert_close(vit(pixels), want)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("patch_bias", [False, True])
def test_the_embedding(class_token, pre_norm, patch_bias):
    vit = tower(class_token=class_token, pre_norm=pre_norm, patch_bias=patch_bias)
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    x = torch.nn.functional.conv2d(pixels, vit.patch_embed.weight, vit.patch_embed.bias, stride=8)
    x = x.flatten(2).mT
    if class_token:
        x = torch.cat([vit.class_embedding.expand(2, 1, -1), x], dim=1)
    x = x + vit.positional_embedding
    if pre_norm:
        x = torch.nn.functional.layer_norm(x, (32,), vit.ln_pre.weight, vit.ln_pre.bias)
    torch.testing.assert_close(vit.tokens(pixels), vit.transformer(x))


def test_patch_dropout_leaves_out_patches_in_training_only():
    vit = tower(patch_dropout=0.7, pre_norm=False)
    seen = []
    vit.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    pixels = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    vit(pixels).sum().backward()
    whole = vit.eval()(pixels)
    few, all_tokens = seen
    assert few.shape == (3, 1 + 2, 32) and all_tokens.shape == (3, 10, 32)  # int(9 · 0.3) patches, and the class token
    for kept, tokens in zip(few, all_tokens, strict=True):
        torch.testing.assert_close(kept[0], tokens[0])
        positions = [int((tokens - token).norm(dim=1).argmin()) for token in kept[1:]]
        assert len(set(positions)) == 2 and 0 not in positions
        torch.testing.assert_close(kept[1:], tokens[positions])
    torch.testing.assert_close(whole, vit(pixels))
    assert vit.activation_bytes(3) > vit.train().activation_bytes(3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_kept_patches_are_those_that_are_named(class_token, training):
    """Each image alone with its patches, in any order, taken from what the tower computes before its blocks."""
    vit = tower(patch_dropout=0.7, class_token=class_token).train(training)
    seen = []
    vit.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    pixels = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    kept = torch.tensor([[8, 0, 3, 4], [1, 2, 7, 5], [0, 1, 2, 3]])
    got = vit(pixels, kept)
    vit.eval()(pixels)
    few, whole = seen
    first = int(class_token)
    for i in range(3):
        assert torch.equal(few[i], torch.cat([whole[i, :first], whole[i, first + kept[i]]]))
        torch.testing.assert_close(vit(pixels[i : i + 1], kept[i : i + 1])[0], got[i])
    torch.testing.assert_close(vit(pixels, kept.flip(1)), got)
    torch.testing.assert_close(vit(pixels, torch.arange(9).repeat(3, 1)), vit(pixels))
    for wrong in (kept[:2], kept[0], kept[None]):
        with pytest.raises(ValueError, match=r"kept must be \[3, n\]"):
            vit(pixels, wrong)


@pytest.mark.parametrize("kind", [Lift, Clip])
def test_kept_patches_reach_the_tower(kind):
    model = kind(SMALL)
    pixels, kept = torch.randn(2, 3, 24, 24), torch.tensor([[1], [4]])
    torch.testing.assert_close(model.encode_image(pixels, kept)[1:], model.encode_image(pixels[1:], kept[1:]))
    assert not torch.allclose(model.encode_image(pixels, kept), model.encode_image(pixels))


def test_a_block_is_called_as_a_module():
    """FSDP2 gathers a block's weights in hooks of its call, and warns of outputs that are views."""
    transformer = Transformer(32, 3, 4)
    outputs = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    transformer(torch.randn(2, 5, 32)).sum().backward()
    assert len(outputs) == 3
    assert all(t._base is None and t.shape == (2, 5, 32) for output in outputs for t in output)


def test_overwriting_what_the_backward_needs_is_an_error():
    for level in ("none", "mlp", "branches"):
        transformer = Transformer(32, 1, 4)
        transformer.checkpointing = level
        transformer.blocks[0].register_forward_hook(lambda module, args, output: output[0].add_(1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation|one of the variables needed"):
            transformer(torch.randn(2, 5, 32)).sum().backward()


def test_pictures_of_another_size():
    vit = tower()
    pixels = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    assert vit.tokens(pixels).shape == (2, 1 + 15, 32)
    grid = vit.positional_embedding[1:].view(3, 3, 32)
    flat = torch.ones(10, 32)
    torch.testing.assert_close(resized(flat, (3, 3), (5, 7)), torch.ones(36, 32))  # weights sum to one
    wide = resized(vit.positional_embedding, (3, 3), (6, 6))
    torch.testing.assert_close(wide[0], vit.positional_embedding[0])
    assert abs(wide[1:].view(6, 6, 32)[:3, :3].mean() - grid[:2, :2].mean()) < 0.3
    other = tower()
    other.load_state_dict(vit.state_dict())
    other.resize(48)
    square = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(other(square), vit(square))
    assert other.config.image_size == 48
    with pytest.raises(ValueError, match="multiples of 8"):
        vit(torch.zeros(1, 3, 25, 24, dtype=torch.float64))
    with pytest.raises(ConfigError, match="9 x 9 patches"):
        resized(flat, (9, 9), (3, 3))


@pytest.mark.parametrize(
    "name, millions",
    [("vit-ti16", 5.5), ("vit-s16", 21.7), ("vit-b32", 87.5), ("vit-l16", 303.3), ("vit-l14", 303.2),
     ("vit-h14", 630.8), ("vit-so400m14", 412.4)],
)  # fmt: skip
def test_the_usual_sizes(name, millions):
    """Parameters of the image towers, in millions; So400M without its pooling head."""
    with torch.device("meta"):
        vit = Vit(preset(name).vit)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def test_text_is_causal_and_read_at_end_of_text():
    torch.manual_seed(0)
    text = TextTransformer(SMALL.text).double()
    tokens = torch.tensor([[50, 3, 4, 59, 0, 0, 0, 0, 0]])
    after = tokens.clone()
    after[0, 4:] = torch.tensor([7, 8, 9, 10, 11])  # after end of text: must not matter
    before = tokens.clone()
    before[0, 1] = 5  # before end of text: must matter
    torch.testing.assert_close(text(tokens), text(after))
    assert not torch.allclose(text(tokens), text(before))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in ("none", "mlp", "branches", "block"):
        torch.manual_seed(0)
        model = Clip(SMALL)
        model.set_checkpointing(enabled)
        image = model.encode_image(torch.ones(2, 3, 24, 24))
        text = model.encode_text(torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1)))
        (image * text).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for again in gradients[1:]:
        for plain, recomputed in zip(gradients[0], again, strict=True):
            torch.testing.assert_close(plain, recomputed)


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
    for wrong, message in (
        ({"pool": "cls", "class_token": False}, "cls with a class token"),
        ({"activation": "relu"}, "no activation 'relu'"),
        ({"patch_dropout": 1.0}, "patch_dropout"),
    ):
        with pytest.raises(ConfigError, match=message):
            VitConfig(**wrong)
    with pytest.raises(ConfigError, match="vit-b16"):
        preset("vit-b17")

"""The loss modules with open_clip's signatures, and cached_step: a large batch in micro-batches."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lift_fast.cache import Rotation, encode
from lift_fast.losses import ClipLoss, CosineLoss, SigLipLoss, cached_step, contrastive, cosine, sigmoid
from lift_fast.ops.rows.codecs import CODECS


def features(rows=12, dim=16):
    torch.manual_seed(0)
    return [F.normalize(torch.randn(rows, dim), dim=1) for _ in range(2)]


@pytest.mark.parametrize(("module", "function"), [(ClipLoss(), contrastive), (SigLipLoss(), sigmoid)])
def test_modules_are_their_functions(module, function):
    image, text = features()
    for bias in (None, torch.tensor(-2.0)):
        want = function(image, text, 10.0, bias)
        assert torch.equal(module(image, text, 10.0, bias), want)
        assert torch.equal(module(image, text, 10.0, logit_bias=bias, output_dict=True)["contrastive_loss"], want)
    assert torch.equal(module(image_features=image, text_features=text, logit_scale=1.0), function(image, text, 1.0))


def test_arguments_reach_the_op():
    image, text = features()
    for module, function in ((ClipLoss, contrastive), (SigLipLoss, sigmoid)):
        got = module(normalize=True, budget=0, backend="torch")(3 * image, encode(text, "int8"), 10.0)
        want = function(3 * image, encode(text, "int8"), 10.0, normalize=True, budget=0, backend="torch")
        assert torch.equal(got, want)
    assert torch.equal(CosineLoss()(image, text, 3.0, output_dict=True)["contrastive_loss"], cosine(image, text))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_text_of_every_codec_is_its_widened_text(codec, autocast):
    image, text = features(rows=12, dim=20)
    rows = encode(text, codec, Rotation(20) if CODECS[codec].rotated else None)
    for loss_of in (ClipLoss(normalize=True), SigLipLoss(), CosineLoss()):
        results = []
        for given in (rows, rows.widen()):
            x = image.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = loss_of(x, given, torch.tensor(10.0))
            loss.backward()
            results += [loss.detach(), x.grad]
        for got, want in zip(results[:2], results[2:], strict=True):
            torch.testing.assert_close(
                got, want, atol=1e-6 if not autocast else 2e-3, rtol=1e-5 if not autocast else 2e-2
            )


def test_open_clips_constructors():
    ClipLoss(True, True, True, 0, 1, False)
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        SigLipLoss(True, 0, 1, dist_impl, 64)
    with pytest.raises(ValueError, match="'tree'; there are: bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="tree")
    with pytest.raises(ValueError, match="torchrun"):
        ClipLoss(use_horovod=True)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.3), nn.GELU(), nn.Linear(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels):
        return self.layers(pixels), self.logit_scale.exp()


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss_of", [ClipLoss(normalize=True), SigLipLoss(normalize=True), CosineLoss()])
def test_cached_step_is_the_whole_batch(loss_of, autocast):
    model = Tower().eval()
    other = copy.deepcopy(model)
    pixels, text = torch.randn(13, 8), encode(torch.randn(13, 16), "int8")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        whole = loss_of(model.layers(pixels), text, model.logit_scale.exp())
        whole.backward()
        pieces = cached_step(
            other.layers,
            pixels.split(5),
            lambda image: loss_of(image, text, other.logit_scale.exp()),
        )
    assert not pieces.requires_grad
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6 if not autocast else 1e-3)
    for got, want in zip(gradients(other), gradients(model), strict=True):
        if want is not None:
            assert (got - want).norm() <= (1e-5 if not autocast else 2e-2) * want.norm()


def test_cached_step_repeats_its_random_numbers():
    """Dropout is the same in both passes, and the generator ends in the state that a single pass leaves it in."""
    model, pixels, text = Tower(), torch.randn(12, 8), torch.randn(12, 16)
    torch.manual_seed(3)
    features = torch.cat([model.layers(part) for part in pixels.split(4)])
    contrastive(features, text, model.logit_scale.exp(), normalize=True).backward()
    want, after = gradients(model), torch.rand(1)

    model.zero_grad()
    torch.manual_seed(3)
    cached_step(model, pixels.split(4), lambda image, scale: contrastive(image, text, scale, normalize=True))
    assert torch.equal(torch.rand(1), after)
    for got, right in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(got, right)


def test_cached_step_scales_and_adds():
    """Trained texts get their gradient too; a scaler's factor applies to every gradient; gradients accumulate."""
    model, pixels = Tower().eval(), torch.randn(12, 8)
    text = torch.randn(12, 16, requires_grad=True)

    def loss_of(image, scale):
        return contrastive(image, text, scale, normalize=True)

    cached_step(model, [pixels], loss_of)
    want = [*gradients(model), text.grad]
    model.zero_grad()
    text.grad = None
    for factor in (1.0, 3.0):
        cached_step(model, pixels.split(7), loss_of, backward=lambda loss, factor=factor: (factor * loss).backward())
    for got, right in zip([*gradients(model), text.grad], want, strict=True):
        torch.testing.assert_close(got, 4 * right, rtol=1e-4, atol=1e-6)


def test_cached_step_says_what_is_missing():
    model = Tower()
    with pytest.raises(ValueError, match="at least one micro-batch"):
        cached_step(model, [], lambda image, scale: image.sum())
    with pytest.raises(ValueError, match="does not depend on the features"):
        cached_step(model, [torch.randn(2, 8)], lambda image, scale: scale * 2)


# A torch that was built without distributed: torch._C has no _c10d_init, nor what builds on it, and torch.distributed
# defines almost nothing. Official builds have a stand-in for ProcessGroup, which others lack.
WITHOUT_DISTRIBUTED = """
import importlib.machinery, sys

class Loader(importlib.machinery.ExtensionFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        for name in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
            vars(module).pop(name, None)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._C":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            spec.loader = Loader(name, spec.origin)
            return spec

sys.meta_path.insert(0, Finder())
import torch
assert not torch.distributed.is_available()
"""
ONE_PROCESS = """
import lift_fast.eval.run, lift_fast.nn, lift_fast.ops, lift_fast.train.step
from lift_fast.losses import ClipLoss, CosineLoss, SigLipLoss, cached_step, contrastive

torch.manual_seed(0)
image, text, tower = torch.randn(5, 8), torch.randn(5, 8), torch.nn.Linear(8, 8)
for loss in (ClipLoss(normalize=True), SigLipLoss(normalize=True), CosineLoss()):
    loss(tower(image), text, 10.0).backward()
    want = tower.weight.grad.clone()
    tower.zero_grad()
    cached_step(tower, image.split(2), lambda features: loss(features, text, 10.0))
    assert want.any() and torch.allclose(tower.weight.grad, want, atol=1e-5)
    tower.zero_grad()
for call in (
    lambda: ClipLoss(world_size=2)(image, text, 10.0),
    lambda: SigLipLoss(world_size=2, group="0")(image, text, 10.0),
    lambda: contrastive(image, text, 10.0, group="0"),
):
    try:
        call()
    except ValueError as error:
        assert "built without torch.distributed" in str(error), error
    else:
        raise AssertionError("no error")
print("fine")
"""


@pytest.mark.parametrize(
    "before", ["", "import torch._dynamo; del torch.distributed.ProcessGroup\n"], ids=["official", "no ProcessGroup"]
)
def test_losses_of_a_torch_without_distributed(before):
    code = WITHOUT_DISTRIBUTED + before + ONE_PROCESS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr[-2000:]

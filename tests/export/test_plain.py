"""export/plain.py computes what nn computes, for every configuration of the towers."""

import itertools

import pytest
import torch
from support.small_models import small_model
from torch.nn import functional as F

from lift_fast.export.plain import ImageEncoder, TextEncoder, programs

CONFIGURATIONS = [
    {"class_token": token, "pool": pool, "pre_norm": pre_norm, "norm_after_pool": after}
    for token, pool, pre_norm, after in itertools.product((True, False), ("avg", "cls"), (True, False), (True, False))
    if token or pool == "avg"
]
OTHERS = [
    {"activation": "quick_gelu"},
    {"activation": "gelu_tanh"},
    {"patch_bias": True},
    {"mlp_dim": 100, "norm_eps": 1e-2},
    {"patch_dropout": 0.5},
    {"image_size": 14, "heads": 1, "layers": 1},
]


@pytest.mark.parametrize("vit", CONFIGURATIONS + OTHERS, ids=lambda vit: ",".join(f"{k}={v}" for k, v in vit.items()))
def test_image_features(vit, tmp_path):
    model = small_model(tmp_path, "lift", **vit)
    pixels = torch.randn(3, 3, *2 * [model.preprocess.image_size])
    torch.testing.assert_close(ImageEncoder(model.module)(pixels), model.encode_image(pixels), rtol=1e-5, atol=1e-6)


def test_image_features_of_clip(tmp_path):
    model = small_model(tmp_path, "clip")
    pixels = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(ImageEncoder(model.module)(pixels), model.encode_image(pixels), rtol=1e-5, atol=1e-6)


def test_text_features(tmp_path):
    model = small_model(tmp_path, "clip").module
    tokens = torch.tensor([[49406, 5, 49407, 0, 0, 0, 0, 0, 0], [49406, 1, 2, 3, 4, 5, 6, 7, 49407]])
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(TextEncoder(model)(tokens), expected, rtol=1e-5, atol=1e-6)


def test_programs_name_no_op_of_ours_and_no_file(tmp_path):
    made = programs(small_model(tmp_path, "clip"))
    assert list(made) == ["image_encoder", "text_encoder"]
    for program in made.values():
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "aten.scaled_dot_product_attention.default" in called
        assert not any("lift_fast" in name for name in called)
        assert not any("stack_trace" in node.meta for node in program.graph.nodes)

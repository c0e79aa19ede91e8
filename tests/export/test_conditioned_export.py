"""Exports of runs whose text vectors are conditioned: each with that project's own code, and read back."""

import json
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import peers
from support.small_models import ENCODER, small_model
from support.without import run_without
from torch import Tensor
from torch.nn import functional as F

import lift_fast
from lift_fast import run_folder
from lift_fast.cache import Conditioning, Rotation
from lift_fast.cache.conditioning import CONDITIONING, Statistics, fit
from lift_fast.errors import CacheError
from lift_fast.export import TARGETS, conditioned, export, hf, open_clip, sentence_transformers, timm
from lift_fast.inference import Model, exports
from lift_fast.nn import Head
from lift_fast.text.encoder import Encoder
from lift_fast.text.spec import EncoderSpec

BACK = ["safetensors", "open_clip", "timm", "hf", "sentence-transformers"]  # targets that lift-fast loads again
# Codec of the run's cache -> the rotation that it has, and how its text vectors are conditioned.
RUNS = {"int8": (None, {"power": "auto"}), "int8r": (7, {"power": 0.5, "dim": 201})}
CAPTIONS = [
    f"a {size} {colour} {thing} {place}"
    for size, colour, thing, place in product(
        ("small", "huge"),
        ("red", "blue", "striped", "golden"),
        ("dog", "car", "violin", "cathedral", "bowl of soup", "old map", "fishing boat", "pair of shoes"),
        ("on a beach", "at night", "in the snow", "next to a man", "in a museum", "seen from above", "behind glass"),
    )
]
TEXTS = ["a dog", "a photo of two small red dogs in the park", "naïve café, 東京", "word " * 200]
NAMES = ["dog", "cathedral", "ein Fuß"]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (42, 42, 3), dtype=np.uint8)) for seed in range(3)
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(EncoderSpec())


@pytest.fixture(scope="module")
def vectors(encoder) -> Tensor:
    return encoder.encode(CAPTIONS)


def fitted(vectors: Tensor, **settings) -> Conditioning:
    statistics = Statistics(vectors.shape[1])
    statistics.add(vectors)
    return fit([statistics], **settings)


def run_in(folder: Path, conditioning: Conditioning, rotation: int | None = None, encoder: dict = ENCODER) -> Model:
    """The Model of a run in `folder`. rotation: the seed of its cache's."""
    model = small_model(folder, "lift", image_size=42)
    dim = conditioning.dim
    model.module.head = Head(model.module.visual.config.width, dim)
    run = model.description | {"text_dim": dim, "conditioning": conditioning.as_dict(), "encoder": encoder}
    run["rotation"] = None if rotation is None else Rotation(dim, rotation).as_dict()
    run_folder.save(folder, model.module, run, conditioning)
    return lift_fast.load(folder, device="cpu")


@pytest.fixture(scope="module", params=RUNS)
def model(request, vectors, tmp_path_factory) -> Model:
    rotation, settings = RUNS[request.param]
    return run_in(tmp_path_factory.mktemp(request.param) / "run", fitted(vectors, **settings), rotation)


@pytest.fixture(scope="module")
def folder_of(model, tmp_path_factory):
    """Target -> the folder of an export to it, which is made once, and what `export` returned."""
    root = tmp_path_factory.mktemp("exports")
    made: dict[str, tuple[Path, list[str]]] = {}

    def folder(to: str) -> tuple[Path, list[str]]:
        if to not in made:
            made[to] = root / to, export(model, to, root / to, names=NAMES)
        return made[to]

    return folder


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, 42, 42, generator=torch.Generator().manual_seed(1))


def rotation_of(model: Model) -> Rotation | None:
    entry = model.description["rotation"]
    return None if entry is None else Rotation.from_dict(entry, model.description["text_dim"])


def by_formula(model: Model, x: Tensor) -> Tensor:
    """The features of texts with the encoder's vectors x, in float64."""
    made = model.conditioning
    y = (F.normalize(x.double(), dim=1) - made.mean) @ made.axes.double().T
    kept = made.deviations[: made.dim]
    y = F.normalize(torch.where(kept > 0, y / kept**made.power, 0), dim=1)
    rotation = rotation_of(model)
    return y if rotation is None else y @ rotation.apply(torch.eye(made.dim, dtype=torch.float64))


def close(found, expected, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=atol, check_dtype=False)


def python_blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)


# ---- what every folder holds


def test_the_run(model, encoder):
    """The texts of the run that is exported are conditioned, not nearly those of the encoder."""
    close(model.encode_text(TEXTS), by_formula(model, encoder.encode(TEXTS)))
    assert model.conditioning.power > 0 and model.conditioning.dim in (201, 384)


@pytest.mark.parametrize("to", TARGETS)
def test_the_file_the_description_and_the_card(model, folder_of, to):
    folder, remarks = folder_of(to)
    made, run = model.conditioning, json.loads((folder / "lift_fast.json").read_text())["run"]
    assert (folder / CONDITIONING).read_bytes() == (Path(model.source) / CONDITIONING).read_bytes()
    assert run["conditioning"] == made.as_dict() == model.description["conditioning"]
    assert Conditioning.load(folder, run["conditioning"], run["text_dim"]).power == made.power
    assert conditioned.REMARK in remarks
    text = (folder / "README.md").read_text(encoding="utf-8")
    before, after = (made.about["mean_cosine"][when] for when in ("before", "after"))
    axes = f"principal axes, each divided by its deviation to the power {made.power:g}"
    for line in (
        f"- {conditioned.REMARK[0].upper()}{conditioned.REMARK[1:]}.",
        f"| conditioning | mean subtracted, {axes} |",
        f"| numbers before and after | 384, {made.dim} |",
        f"| fitted to | {len(CAPTIONS)} captions |",
        f"| mean cosine before and after | {before:.3f}, {after:.3f} |",
    ):
        assert f"\n{line}\n" in f"{text}\n", line
    assert before > 0.2 and abs(after) < 0.05
    rotated = model.description["rotation"] is not None and to != "sentence-transformers"
    assert f"must be conditioned{', and then rotated' * rotated}. lift-fast does it" in text
    for block in python_blocks(folder):
        compile(block, to, "exec")


@pytest.mark.parametrize("to", TARGETS)
def test_the_code_of_the_card_conditions_a_vector(model, folder_of, to, encoder, tmp_path):
    folder, _ = folder_of(to)
    (code,) = [block for block in python_blocks(folder) if "def conditioned" in block]
    np.savez(tmp_path / "x.npz", x=3 * encoder.encode(TEXTS).numpy())
    code = code.replace("FOLDER", str(folder)) + "\nimport sys\nx = np.load(sys.argv[1] + '/x.npz')['x']\n"
    run_without(["torch", "lift_fast"], code + "np.save(sys.argv[1] + '/y.npy', conditioned(x))", str(tmp_path))
    found, rotation = torch.from_numpy(np.load(tmp_path / "y.npy")), rotation_of(model)
    close(found if rotation is None else rotation.apply(found), model.encode_text(TEXTS))


def test_an_axis_without_variance_gives_zero(vectors, tmp_path):
    """Of 384 numbers that lie in 5 dimensions, with every power, by the code of the card."""
    flat = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 384, dtype=torch.float64)
    for power in (0.0, 0.5, 1.0):
        made = fitted(flat, power=power, dim=9)
        folder = tmp_path / str(power)
        folder.mkdir()
        (folder / CONDITIONING).write_bytes(made.to_bytes())
        names: dict = {}
        exec(conditioned.CODE.replace("FOLDER", str(folder)), names)
        with np.errstate(all="raise"):
            found = names["conditioned"](flat[:7].numpy())
        assert (found[:, 5:] == 0).all()
        close(found, made.apply(flat[:7]))


def test_a_run_that_is_not_conditioned(tmp_path):
    model = small_model(tmp_path / "run", "lift")
    remarks = export(model, "safetensors", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| conditioning of the vectors | none |" in text and "must be conditioned" not in text
    assert conditioned.REMARK not in remarks and not (tmp_path / "out" / CONDITIONING).exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["conditioning"] is None


def test_a_file_that_does_not_say_how_it_was_fitted(vectors, tmp_path):
    fit_of = fitted(vectors, power=1, dim=3)
    for number, about in enumerate([{}, {"rows": "many", "mean_cosine": [1]}, {"rows": [None], "mean_cosine": None}]):
        made = Conditioning(fit_of.mean, fit_of.axes, fit_of.deviations, 1.0, about)
        export(run_in(tmp_path / f"run{number}", made), "safetensors", tmp_path / f"out{number}")
        text = (tmp_path / f"out{number}" / "README.md").read_text()
        assert "| fitted to | not recorded |\n| mean cosine before and after | not recorded |" in text


def test_a_run_without_an_encoder(vectors, tmp_path):
    model = run_in(tmp_path / "run", fitted(vectors, power=0, dim=3))
    model.description["encoder"] = None
    export(model, "safetensors", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "were trained against" not in text and "whose vectors the model was trained against.\n\nEvery vector" in text


# ---- read back


@pytest.mark.parametrize("to", BACK)
def test_read_back(model, folder_of, pixels, to):
    folder, _ = folder_of(to)
    module, _ = exports.read(folder)
    state = model.module.state_dict()
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    loaded = lift_fast.load(folder, device="cpu")
    texts, images = loaded.encode_text(TEXTS), loaded.encode_image(pixels)
    close(texts, model.encode_text(TEXTS))
    close(images, model.encode_image(pixels))
    close(loaded.similarity(images, texts), model.similarity(model.encode_image(pixels), model.encode_text(TEXTS)))


def test_an_export_of_an_export(model, folder_of, tmp_path):
    folder, _ = folder_of("hf")
    export(lift_fast.load(folder, device="cpu"), "safetensors", tmp_path / "again")
    assert (tmp_path / "again" / CONDITIONING).read_bytes() == (folder / CONDITIONING).read_bytes()
    close(lift_fast.load(tmp_path / "again", device="cpu").encode_text(TEXTS), model.encode_text(TEXTS))


def other(folder: Path, vectors: Tensor) -> None:
    (folder / CONDITIONING).write_bytes(fitted(vectors[::2], power=0.5, dim=201).to_bytes())


def shorter(folder: Path, vectors: Tensor) -> None:
    (folder / CONDITIONING).write_bytes((folder / CONDITIONING).read_bytes()[:-1])


def missing(folder: Path, vectors: Tensor) -> None:
    (folder / CONDITIONING).unlink()


@pytest.mark.parametrize(
    ("damage", "message"), [(other, "another cache's"), (shorter, "damaged"), (missing, "cannot be read")]
)
@pytest.mark.parametrize("to", ["safetensors", "sentence-transformers"])
def test_a_file_that_is_missing_or_damaged(model, folder_of, vectors, pixels, to, damage, message, tmp_path):
    shutil.copytree(folder_of(to)[0], tmp_path / "out")
    damage(tmp_path / "out", vectors)
    loaded = lift_fast.load(tmp_path / "out", device="cpu")
    close(loaded.encode_image(pixels), model.encode_image(pixels))
    for _ in range(2):
        with pytest.raises(CacheError, match=f"{CONDITIONING} .*{message}"):
            loaded.encode_text("a dog")
    for target in TARGETS:
        with pytest.raises(CacheError, match=message):
            export(loaded, target, tmp_path / "again")
        assert not (tmp_path / "again").exists()


# ---- with each project's own code


def test_safetensors(model, folder_of):
    made, folder = model.conditioning, folder_of("safetensors")[0]
    entry = json.loads((folder / "config.json").read_text())["conditioning"]
    assert entry == {"file": CONDITIONING, "dim": made.dim, **made.as_dict()}


def sentence_transformer(folder: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def test_sentence_transformers(model, folder_of):
    folder, remarks = folder_of("sentence-transformers")
    theirs, rotation = sentence_transformer(folder), rotation_of(model)
    texts, images = model.encode_text(TEXTS), model.encode_image(IMAGES)
    undo = rotation.undo if rotation else lambda x: x
    for encode in (theirs.encode, theirs.encode_query, theirs.encode_document):
        close(encode(TEXTS), undo(texts))
    close(theirs.encode(TEXTS[0]), undo(texts)[0])
    close(theirs.encode(IMAGES), undo(images))
    close(theirs.similarity(theirs.encode(IMAGES), theirs.encode(TEXTS)), model.similarity(images, texts))
    assert theirs.get_embedding_dimension() == model.conditioning.dim
    assert any("licence, as conditioned" in remark for remark in remarks)
    assert any("rotation is undone" in remark for remark in remarks) == (rotation is not None)
    types = [*json.loads((folder / "router_config.json").read_text())["types"].values()]
    assert all(name.startswith("sentence_transformers.") for name in types)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".txt"} | {
        ".npz"
    }


def test_sentence_transformers_where_all_vectors_are_alike(tmp_path):
    """A prompt that is longer than the captions: the mean is far longer than what tells vectors apart."""
    spec = EncoderSpec(prompt="Represent this sentence, in which somebody says what an image shows, for retrieval: ")
    made = fitted(Encoder(spec).encode(CAPTIONS), power=0.75, dim=301)
    assert made.about["mean_cosine"]["before"] > 0.75 and made.deviations[300] > 0
    model = run_in(tmp_path / "run", made, encoder=spec.as_dict())
    export(model, "sentence-transformers", tmp_path / "out")
    close(
        sentence_transformer(tmp_path / "out").encode(CAPTIONS), model.encode_text(CAPTIONS), 1.5e-5
    )  # 2e-5: not centred


def test_sentence_transformers_with_an_encoder_in_half_precision(vectors, tmp_path):
    """Its vectors are computed in bfloat16 and conditioned in float32."""
    spec = EncoderSpec(dtype="bfloat16")
    model = run_in(tmp_path / "run", fitted(vectors, power=0.5, dim=33), 3, spec.as_dict())
    export(model, "sentence-transformers", tmp_path / "out")
    theirs, rotation = sentence_transformer(tmp_path / "out"), rotation_of(model)
    close(theirs.encode(IMAGES), rotation.undo(model.encode_image(IMAGES)))
    close(theirs.encode(TEXTS), rotation.undo(model.encode_text(TEXTS)), 0.01)


def test_sentence_transformers_with_an_encoder_of_another_length(vectors, tmp_path):
    model = run_in(tmp_path / "run", fitted(vectors[:, :383], power=0.5, dim=33), 3)
    remarks = export(model, "sentence-transformers", tmp_path / "out")
    assert any("have 384 numbers, and those that are conditioned 383" in remark for remark in remarks)
    assert any("rotation is undone" in remark for remark in remarks)
    theirs = sentence_transformer(tmp_path / "out")
    assert not theirs.supports("text")
    close(theirs.encode(IMAGES), rotation_of(model).undo(model.encode_image(IMAGES)))


OPEN_CLIP = """
import json
from safetensors.torch import load_file, save_file

given, folder = sys.argv[1:]
name = f"local-dir:{folder}"
model, _, _ = open_clip.create_model_and_transforms(name)
model.eval()
with torch.no_grad():
    image = model.encode_image(load_file(given)["pixels"], normalize=True)
    text = model.encode_text(open_clip.get_tokenizer(name)(["a dog", "a cat"]), normalize=True)
save_file({"image": image, "text": text}, given)
"""
TIMM = """
from safetensors.torch import load_file, save_file

given, folder = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    save_file({"features": model(load_file(given)["pixels"])}, given)
"""


def test_open_clip(model, folder_of, pixels, tmp_path):
    """Its images; of texts it says that it cannot condition them, and where they come from."""
    folder, remarks = folder_of("open_clip")
    save_file({"pixels": pixels}, tmp_path / "given")
    peers.run(OPEN_CLIP, tmp_path / "given", folder)
    found = load_file(tmp_path / "given")
    close(found["image"], model.encode_image(pixels))
    assert found["text"].isnan().all() and not list(folder.glob("tokenizer*"))
    assert any("open_clip cannot subtract the mean of conditioned vectors" in remark for remark in remarks)
    code = open_clip.use(model)
    assert "get_tokenizer" not in code and "lift_fast.load" in code


def test_open_clip_s_projection_cannot_subtract_a_mean():
    """What `encoder_of` relies on, in open_clip's own code: no bias, and a vector that is not scaled to unit length."""
    peers.run("""
from types import SimpleNamespace
from transformers import BertConfig

config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
for kind in ("linear", "mlp", None):
    text = open_clip.hf_model.HFTextEncoder("", 8, config, "mean_pooler", kind).eval()
    assert not [name for name, _ in text.proj.named_parameters() if name.endswith("bias")]
    pooled = []
    text.proj.register_forward_pre_hook(lambda module, given: pooled.append(given[0]))
    with torch.no_grad():
        text(torch.tensor([[1, 2, 3]]))
    assert (pooled[0].norm(dim=1) - 1).abs() > 0.1
""")


def test_timm(model, folder_of, pixels, tmp_path):
    folder, remarks = folder_of("timm")
    save_file({"pixels": pixels}, tmp_path / "given")
    peers.run(TIMM, tmp_path / "given", folder)
    code = timm.use(model)
    block = code[code.index("# LIFT's head") :]
    assert block.startswith("# LIFT's head: the features in the space of the conditioned text vectors.\n")
    names: dict = load_file(tmp_path / "given")
    exec(block.replace("FOLDER", str(folder)), names)
    close(names["features"], model.encode_image(pixels))
    assert any("maps them to the space of the conditioned text vectors" in remark for remark in remarks)


def test_transformers(model, folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    IMAGES[0].save("image.png")
    names: dict = {}
    exec(hf.use(model).replace("FOLDER", str(folder_of("hf")[0])).replace("image.jpg", "image.png"), names)
    close(names["features"], model.encode_image(IMAGES[:1]))


def test_onnx(model, folder_of, pixels, tmp_path):
    """The features, and the classifier of the card, without torch: its text vectors are classes.npz's."""
    import onnxruntime

    folder, _ = folder_of("onnx")
    session = onnxruntime.InferenceSession(folder / "image_encoder.onnx")
    (features,) = session.run(["features"], {"pixels": pixels.numpy()})
    close(features, model.encode_image(pixels), 1e-4)
    IMAGES[1].save(tmp_path / "image.png")
    (code,) = [block for block in python_blocks(folder) if "onnxruntime" in block]
    code = code.replace("FOLDER", str(folder)).replace("image.jpg", str(tmp_path / "image.png"))
    printed = run_without(["torch", "lift_fast"], code + "\nimport json\nprint(json.dumps(logits.tolist()))")
    expected = model.logit_scale * model.similarity(model.encode_image(IMAGES[1]), model.zero_shot(NAMES).weights)
    close(json.loads(printed.splitlines()[-1]), expected, 1e-4 * model.logit_scale)


def test_torch_export(model, folder_of, pixels):
    folder, _ = folder_of("torch-export")
    encode = torch.export.load(folder / "image_encoder.pt2").module()
    close(encode(pixels), model.encode_image(pixels))


@pytest.mark.parametrize("to", TARGETS)
def test_classes(model, folder_of, encoder, to):
    classes = np.load(folder_of(to)[0] / "classes.npz")
    close(classes["weights"], by_formula(model, encoder.encode([f"a photo of a {name}." for name in NAMES])))


def test_the_lines_of_sentence_transformers(model, folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    IMAGES[0].save("image.png")
    code = sentence_transformers.use(model).replace("image.jpg", "image.png")
    names: dict = {}
    exec(code.replace("FOLDER", str(folder_of("sentence-transformers")[0])), names)
    ours = model.encode_text(["a photo of a dog", "a photo of a cat"])
    close(names["images"] @ names["texts"].T, model.similarity(model.encode_image(IMAGES[0]), ours))

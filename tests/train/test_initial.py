"""train/initial.py: the weights that a run starts from, and those that it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lift_fast import run_folder
from lift_fast.errors import ConfigError
from lift_fast.nn import PRESETS, Clip, Head, Lift, Preset, TextConfig, Vit, VitConfig
from lift_fast.nn.models import MAX_LOGIT_SCALE
from lift_fast.nn.weights import save
from lift_fast.train.initial import conventions, init_from, weights_digest

pytestmark = pytest.mark.filterwarnings("ignore:these weights do not show whether their activation")

SMALL = Preset(VitConfig(24, 8, 64, 2, 1), TextConfig(width=16, layers=1, heads=2), embed_dim=12, text_dim=20)


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)
    monkeypatch.setitem(PRESETS, "deep", replace(SMALL, vit=replace(SMALL.vit, layers=3)))
    monkeypatch.setitem(PRESETS, "large images", replace(SMALL, vit=replace(SMALL.vit, image_size=40)))


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


def run_of(folder, kind, preset="small", text_dim=20, context=77):
    """A finished run with random weights, as training leaves it."""
    run = {"model": kind, "preset": preset}
    run |= {"context": context} if kind == "clip" else {"text_dim": text_dim, "encoder": {"name": "e5"}}
    model = randomised(run_folder.build(run))
    folder.mkdir()
    run_folder.save(folder, model, run)
    return model


def same(module, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())


def make(kind, preset="small", text_dim=20, context=77):
    run = {"model": kind, "preset": preset, "text_dim": text_dim, "context": context}
    return run_folder.build(run)


@pytest.mark.parametrize("kind", ["lift", "clip"])
@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_a_run_of_the_same_kind_gives_all_weights(tmp_path, kind, named):
    source = run_of(tmp_path / "run", kind)
    model = make(kind)
    said = init_from(model, tmp_path / "run" / named)
    assert same(model, source)
    assert said.startswith(f"Weights: all of the {kind.upper()} run {tmp_path / 'run'}")
    assert ("e5" in said) == (kind == "lift")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        (("clip",), ("lift",), "of another kind of model"),
        (("lift",), ("clip",), "of another kind of model"),
        (("lift", "small", 20), ("lift", "small", 24), "has other sizes"),
        (("clip", "small", 20, 77), ("clip", "small", 20, 32), "has other sizes"),
    ],
)
def test_other_runs_give_their_image_tower(tmp_path, source, target, why):
    theirs, model, before = run_of(tmp_path / "run", *source), make(*target), make(*target)
    before.load_state_dict(model.state_dict())
    said = init_from(model, tmp_path / "run")
    assert why in said and "the image tower of" in said
    assert same(model.visual, theirs.visual)
    for name, tensor in model.state_dict().items():
        assert name.startswith("visual.") or torch.equal(tensor, before.state_dict()[name]), name


def test_other_image_sizes_interpolate_the_positions(tmp_path):
    source = run_of(tmp_path / "run", "lift", "large images")
    model = make("lift")
    init_from(model, tmp_path / "run")
    assert model.visual.config == SMALL.vit
    source.visual.resize(24)
    assert same(model, source)


@pytest.fixture
def authors():
    """The parts of a LIFT of its authors."""
    return randomised(Vit(SMALL.vit)), randomised(Head(64, 20)), torch.tensor(2.0)


def test_the_authors_tower_and_head(tmp_path, authors):
    visual, head, scale = authors
    save_file(save(visual, "lift", head=head, logit_scale=scale), tmp_path / "lift.safetensors")
    model = make("lift")
    said = init_from(model, tmp_path / "lift.safetensors")
    assert said.endswith("(lift, pool avg, gelu), its head and logit scale")
    assert same(model.visual, visual) and same(model.head, head) and model.logit_scale == 2
    other = make("lift", text_dim=24)
    kept = make("lift", text_dim=24)
    kept.load_state_dict(other.state_dict())
    assert "without its head, which has other sizes" in init_from(other, tmp_path / "lift.safetensors")
    assert same(other.visual, visual) and same(other.head, kept.head) and other.logit_scale == kept.logit_scale
    clip = make("clip")
    init_from(clip, tmp_path / "lift.safetensors")
    assert same(clip.visual, visual)


def test_the_logit_scale_stays_in_its_bounds(tmp_path, authors):
    visual, head, _ = authors
    save_file(save(visual, "lift", head=head, logit_scale=torch.tensor(9.0)), tmp_path / "lift.safetensors")
    model = make("lift")
    init_from(model, tmp_path / "lift.safetensors")
    assert model.logit_scale.item() == torch.tensor(MAX_LOGIT_SCALE).item()
    save_file(save(visual, "lift", head=head), tmp_path / "without.safetensors")
    model = make("lift")
    assert init_from(model, tmp_path / "without.safetensors").endswith(", and its head")
    assert model.logit_scale == make("lift").logit_scale


def open_clip_folder(folder, visual, **vision):
    """A folder as open_clip writes it to the hub."""
    folder.mkdir()
    save_file(save(visual, "open_clip"), folder / "open_clip_model.safetensors")
    config = {"model_cfg": {"vision_cfg": {"width": visual.config.width, "head_width": 64, **vision}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_a_tower_of_open_clip(tmp_path, kind):
    visual = randomised(Vit(replace(SMALL.vit, image_size=40)))
    model = make(kind)
    said = init_from(model, open_clip_folder(tmp_path / "theirs", visual, pool_type="avg"))
    assert said == f"Weights: the image tower of {tmp_path / 'theirs'} (open_clip, pool avg, gelu)"
    visual.resize(24)
    assert same(model.visual, visual)


@pytest.mark.parametrize(
    ("config", "vision", "message"),
    [
        ({"patch_size": 4}, {"pool_type": "avg"}, "patch_size is 4, not 8"),
        ({"width": 128}, {"pool_type": "avg"}, "width is 128, not 64, heads is 2, not 1, mlp_dim is 512, not 256"),
        ({"layers": 3}, {"pool_type": "avg"}, "layers is 3, not 2"),
        ({"mlp_dim": 100}, {"pool_type": "avg"}, "mlp_dim is 100, not 256"),
        ({}, {"pool_type": "avg", "head_width": 32}, "heads is 2, not 1"),
        ({}, {"pool_type": "avg", "act_kwargs": {"approximate": "tanh"}}, "activation is 'gelu_tanh', not 'gelu'"),
        ({}, {"pool_type": "avg", "norm_kwargs": {"eps": 1e-6}}, "norm_eps is 1e-06, not 1e-05"),
        ({}, {"pool_type": "avg", "final_ln_after_pool": True}, "norm_after_pool is True, not False"),
        ({}, {"pool_type": "tok"}, "pool is 'cls', not 'avg'"),
        ({"pre_norm": False}, {"pool_type": "avg"}, "pre_norm is False, not True"),
    ],
)
def test_other_towers_are_refused(tmp_path, config, vision, message):
    visual = randomised(Vit(replace(SMALL.vit, **config)))
    folder = open_clip_folder(tmp_path / "theirs", visual, **vision)
    model, before = make("lift"), make("lift")
    before.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError) as error:
        init_from(model, folder)
    assert str(error.value) == f"--init-from {folder}: its image tower is not the one of this run: {message}"
    assert same(model, before)


def test_runs_of_other_sizes_are_refused(tmp_path):
    run_of(tmp_path / "run", "lift", "deep")
    with pytest.raises(ConfigError, match="not the one of this run: layers is 3, not 2"):
        init_from(make("lift"), tmp_path / "run")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        init_from(make("lift"), tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no such file"):
        weights_digest(tmp_path / "nothing")
    run_of(tmp_path / "run", "lift")
    content = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(ConfigError, match="does not fit its run.json"):
        init_from(make("lift"), tmp_path / "run")
    torch.save({"state_dict": {"x": print}}, tmp_path / "pickle.pt")
    with pytest.raises(ConfigError, match="a pickle of more than tensors"):
        init_from(make("lift"), tmp_path / "pickle.pt")


def test_the_digest_is_that_of_the_weights(tmp_path):
    run_of(tmp_path / "run", "lift")
    digest = weights_digest(tmp_path / "run")
    assert digest == weights_digest(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert digest == weights_digest(tmp_path / "moved")
    file = tmp_path / "moved" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert digest != weights_digest(tmp_path / "moved")


def test_models_take_the_weights_where_they_are(tmp_path):
    """The parameters stay the tensors that they were, so that an optimizer may hold them already."""
    source = run_of(tmp_path / "run", "clip")
    model = make("clip")
    before = [id(p) for p in model.parameters()]
    init_from(model, tmp_path / "run")
    assert [id(p) for p in model.parameters()] == before
    assert isinstance(model, Clip) and not isinstance(model, Lift)
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(model.encode_image(pixels), source.encode_image(pixels))


@pytest.mark.parametrize("layout", ["open_clip", "timm", "hf_vit", "hf_clip", "lift", "run"])
def test_a_model_with_the_conventions_of_the_weights(tmp_path, layout):
    """Towers of every project train and are built again from run.json; features are those of the weights."""
    theirs = {"pool": "avg" if layout in ("lift", "run") else "cls"}
    theirs |= {"timm": {"patch_bias": True, "pre_norm": False, "norm_eps": 1e-6}}.get(layout, {})
    theirs |= {"hf_vit": {"patch_bias": True, "pre_norm": False, "norm_eps": 1e-12}}.get(layout, {})
    theirs |= {"hf_clip": {"activation": "quick_gelu"}}.get(layout, {})
    visual = randomised(Vit(replace(SMALL.vit, **theirs)))
    path = tmp_path / "theirs.safetensors"
    if layout == "run":
        path = tmp_path / "run"
        visual = run_of(path, "lift").visual
    else:
        save_file(save(visual, layout, head=randomised(Head(64, 20)) if layout == "lift" else None), path)
    found = conventions(path, SMALL.vit)
    assert found == {name: value for name, value in theirs.items() if value != getattr(SMALL.vit, name)}
    run = {"model": "lift", "preset": "small", "text_dim": 20, "vit": found}
    model = run_folder.build(run)
    init_from(model, path)
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(model.visual(pixels), visual(pixels))
    (tmp_path / "out").mkdir()
    run_folder.save(tmp_path / "out", model, run)
    assert torch.equal(run_folder.load(tmp_path / "out")[0].visual(pixels), visual(pixels))


def test_a_changed_configuration_changes_the_digest(tmp_path):
    folder = open_clip_folder(tmp_path / "theirs", randomised(Vit(SMALL.vit)), pool_type="avg")
    digest = weights_digest(folder)
    file = folder / "open_clip_config.json"
    file.write_text(file.read_text().replace("avg", "tok"))
    assert weights_digest(folder) != digest
    assert conventions(folder, SMALL.vit) == {"pool": "cls"}

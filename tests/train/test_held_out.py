"""train/held_out.py: the scores of `lift-fast eval` while a run trains, on one rank and on several."""

import json
import random
import shutil
from contextlib import nullcontext
from uuid import uuid4

import pytest
import torch
from support.evaluated import evaluated
from support.ranks import SMALL, in_group, on_ranks
from support.tiny_benchmarks import choice, coco, write_json
from support.tiny_sets import make_set, png
from support.tiny_text import TinyEncoder

import lift_fast
from lift_fast import run_folder
from lift_fast.data.options import DataOptions
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import ConfigError, DataError, TrainingError
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set
from lift_fast.eval.templates import read_classnames, read_templates
from lift_fast.inference.subject import subject_of
from lift_fast.losses import ClipLoss
from lift_fast.nn import PRESETS
from lift_fast.ranks import Rank
from lift_fast.sugarcrepe import TASKS
from lift_fast.text.spec import EncoderSpec
from lift_fast.train import held_out
from lift_fast.train.config import TrainConfig
from lift_fast.train.ema import Ema
from lift_fast.train.held_out import HeldOut
from lift_fast.train.parallel import spread, whole

CPU = torch.device("cpu")
RUNS = {
    "lift": {"text_dim": 384, "encoder": EncoderSpec().as_dict(), "rotation": None},
    "clip": {"context": 12},
}


def foils(i):
    return {task: {"caption": f"a {task} {i}", "foil": f"no {task} {i % 5}"} for task in TASKS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of both models, and held-out sets: with damaged images, with foils and classes, twice."""
    PRESETS["small"] = SMALL
    root = tmp_path_factory.mktemp("held_out")
    make_set(root / "plain", 150, 70, broken={0, *range(64, 128), 149})  # no image of the second chunk decodes
    for seed, name in enumerate(("one", "two")):
        rng = random.Random(seed)
        with ShardWriter(root / name, 9) as writer:
            for i in range(20 + seed):
                meta = {"composition": foils(i), "label": ["cat", "dog", "horse"][i % 3]}
                writer.write(f"{name}-{i}", png(rng), f"caption {i // 2}", meta)
    for name, rest in RUNS.items():
        torch.manual_seed(1)
        run = {"model": name, "preset": "small", **rest}
        model = run_folder.build(run)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
        (root / name).mkdir()
        run_folder.save(root / name, model, run)
    return root


def config(root, *sets, **changes):
    changes = {"eval_data": {name: root / name for name in sets}, "eval_every": 1} | changes
    return TrainConfig("clip", (root / "plain",), root / f"out-{uuid4().hex}", **changes)


def opened(root, name, *sets, rank=None, **changes):
    """A model, and its held-out sets."""
    model, run = run_folder.load(root / name)
    return model, HeldOut(config(root, *sets, **changes), run, CPU, rank or Rank())


_text_encoder = run_folder.text_encoder


def quick_encoder(model, run, device, trust_remote_code=False, conditioning=None):
    """run_folder.text_encoder with an encoder that takes no time."""
    if run["model"] == "clip":
        return _text_encoder(model, run, device)
    return quick_frozen(run, device)


def quick_frozen(run, device, trust_remote_code=False, conditioning=None, download=True):
    """run_folder.frozen_encoder with an encoder that takes no time."""
    encoder = TinyEncoder(mixed=False, dim=run["text_dim"])
    return lambda captions: torch.nn.functional.normalize(encoder.encode(captions), dim=1)


@pytest.mark.parametrize("name", RUNS)
def test_the_scores_are_those_of_eval(root, name, monkeypatch):
    """Also where several sets have foils and classes."""
    monkeypatch.setattr(run_folder, "text_encoder", quick_encoder)
    monkeypatch.setattr(run_folder, "frozen_encoder", quick_frozen)
    model, held = opened(root, name, "plain", "one", "two")
    scores = held.scores(model)
    assert json.loads(json.dumps(scores)) == scores
    want = evaluated(root / name, {data: root / data for data in ("plain", "one", "two")})
    for data in ("plain", "one", "two"):
        assert scores[data]["t2i_r1"] == want["retrieval"][data]["t2i"]["r1"]
        assert scores[data]["i2t_r1"] == want["retrieval"][data]["i2t"]["r1"]
        assert (scores[data]["n"], scores[data]["left_out"]) == (want["retrieval"][data]["n"], want["skipped"][data])
        if data == "plain":
            assert set(scores[data]) == {"t2i_r1", "i2t_r1", "n", "left_out"} and scores[data]["n"] == 84
        else:
            assert scores[data]["composition"] == want["composition"][data]["mean"]
            assert scores[data]["zero_shot_top1"] == want["zero_shot"][data]["top1"]
    assert held.scores(model) == scores


def test_lift_s_encoder_encodes_once(root, monkeypatch):
    asked = []
    vectors = torch.nn.functional.normalize(torch.randn(400, 384), dim=1)

    def text_encoder(model, run, device, conditioning):
        assert all(parameter.is_meta for parameter in model.parameters())
        return lambda captions: asked.append(list(captions)) or vectors[: len(captions)]

    monkeypatch.setattr(run_folder, "text_encoder", text_encoder)
    before = torch.get_rng_state()
    model, run = run_folder.load(root / "lift")
    torch.set_rng_state(before)
    settings = config(root, "one")
    held = HeldOut(settings, run, CPU, Rank())
    first = held.scores(model)
    held.scores(model)
    texts = [text for captions in asked for text in captions]
    assert len(asked) == 2 and len(set(texts)) == len(texts) == 10 + 7 * (20 + 5) + 3 * 4
    assert torch.equal(torch.get_rng_state(), before)
    asked.clear()
    monkeypatch.setattr(run_folder, "text_encoder", None)  # a run that goes on does not load it
    again = HeldOut(settings, run, CPU, Rank())
    assert torch.equal(again.texts["one"].vectors, held.texts["one"].vectors) and again.scores(model) == first


def test_the_model_is_left_as_it_was(root):
    model, held = opened(root, "clip", "plain")
    model.train()
    model.visual.eval()  # locked
    model.visual.transformer.fp8 = True
    modes = [module.training for module in model.modules()]
    seen = []
    forward = type(model.visual).forward
    model.visual.forward = lambda *args: (
        seen.append((model.training, model.visual.transformer.fp8, torch.is_grad_enabled()))
        or forward(model.visual, *args)
    )
    before = torch.get_rng_state()
    held.scores(model)
    assert set(seen) == {(False, False, False)}
    assert [module.training for module in model.modules()] == modes and model.visual.transformer.fp8
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kept", [0, 1 << 29])
def test_pixels_are_kept_where_they_are_few(root, monkeypatch, kept):
    monkeypatch.setattr(held_out, "_KEPT", kept)
    decoded = []
    load_images = held_out.Images._decoded
    monkeypatch.setattr(held_out.Images, "_decoded", lambda *arguments: decoded.append(1) or load_images(*arguments))
    model, held = opened(root, "clip", "plain")
    opening = len(decoded)
    scores = [held.scores(model) for _ in range(3)]
    assert scores[0] == scores[1] == scores[2] and len(decoded) - opening == (0 if kept else 3)


def test_bad_samples_are_left_out(root, tmp_path):
    lines = ["file_name,caption"]
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(png(random.Random(i)) if i != 4 else b"no picture")
        lines.append(f"{i}.png,{'' if i in (2, 4) else chr(0x200B) if i == 5 else f'caption {i}'}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    for name, left_out in (("lift", 3), ("clip", 2)):  # CLIP encodes a caption without tokens as such
        model, held = opened(root, name, eval_data={tmp_path.stem: tmp_path})
        scores = held.scores(model)[tmp_path.stem]
        assert scores["n"] + scores["left_out"] == 9
        assert scores["left_out"] == left_out
        want = evaluated(root / name, {"set": tmp_path}, options=DataOptions(skip_bad=True))
        assert want["skipped"]["set"] == left_out and want["retrieval"]["set"]["t2i"]["r1"] == scores["t2i_r1"]


def test_benchmarks_and_sets_of_one_s_own(root, tmp_path):
    """What eval takes: files of captions and of choices with their images elsewhere, class folders, several captions,
    names and prompts of classes. The scores are those of eval."""
    names = [f"{i:04d}.jpg" for i in range(12)]
    rng = random.Random(4)
    for folder in ("images", "more images"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(png(rng))
    captions = {name: [f"{word} {i // 2}" for word in ("short", "long")[: 1 + i % 2]] for i, name in enumerate(names)}
    write_json(tmp_path / "coco.json", coco(captions))
    for task in TASKS:
        entries = {str(i): choice(name, f"a {task} {i}", f"no {task} {i % 3}") for i, name in enumerate(names)}
        write_json(tmp_path / "sugarcrepe" / f"{task}.json", entries)
    for i in range(9):
        path = tmp_path / "classes" / ["n01", "n02", "n03"][i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(rng))
    (tmp_path / "templates.txt").write_text("a photo of {}\n{} in the wild\n")
    (tmp_path / "names.txt").write_text("n01\ttench\nn02\tgoldfish\nn03\tshark\n")

    def both(sets, images=(), fields=(), prompts=()):
        """The scores while training, and those of eval."""
        templates, classnames = (tmp_path / name for name in prompts) if prompts else (None, None)
        changes = {"eval_data": sets, "eval_pictures": images, "eval_field": fields}
        changes |= {"eval_templates": templates, "eval_classnames": classnames}
        model, held = opened(root, "clip", **changes)
        more = {"templates": read_templates(templates), "classnames": read_classnames(classnames)} if prompts else {}
        asked = {
            name: open_set(path, *images[i : i + 1], fields=fields, **more)
            for i, (name, path) in enumerate(sets.items())
        }
        return held.scores(model), evaluate(subject_of(lift_fast.load(root / "clip", device="cpu")), asked)

    files = {"coco": tmp_path / "coco.json", "sugarcrepe": tmp_path / "sugarcrepe"}
    scores, want = both(files, (tmp_path / "images", tmp_path / "more images"))
    r1 = {f"{way}_r1": want["retrieval"]["coco"][way]["r1"] for way in ("t2i", "i2t")}
    assert scores["coco"] == {"n": 12, "left_out": 0, **r1}
    assert scores["sugarcrepe"] == {"n": 12, "left_out": 0, "composition": want["composition"]["sugarcrepe"]["mean"]}
    # One image of a set has other pixels than that of the other, so they were not mixed up.
    assert scores != both(files, (tmp_path / "more images", tmp_path / "images"))[0]

    scores, want = both({"classes": tmp_path / "classes"}, prompts=("templates.txt", "names.txt"))
    top1 = want["zero_shot"]["classes"]["top1"]
    assert scores["classes"] == {"n": 9, "left_out": 0, "zero_shot_top1": top1}
    model, held = opened(
        root,
        "clip",
        eval_data={"classes": tmp_path / "classes"},
        eval_templates=tmp_path / "templates.txt",
        eval_classnames=tmp_path / "names.txt",
    )
    assert "goldfish in the wild" in held.questions["classes"].texts() and held.best_by.of == "classes/zero_shot_top1"

    scores, want = both({"plain": root / "plain"}, fields=("txt", "long"))
    assert want["retrieval"]["plain"]["captions"] == 2 * 84 == 2 * scores["plain"]["n"]
    assert scores["plain"]["i2t_r1"] == want["retrieval"]["plain"]["i2t"]["r1"]


def test_entries_that_cannot_be_used_are_listed(root, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(random.Random(i)))
    content = {"0": choice("0.png"), "1": choice("1.png", caption=7), "2": choice("2.png")}
    write_json(tmp_path / "replace_obj.json", content)
    model, held = opened(root, "clip", eval_data={"foils": tmp_path})
    [notice] = [notice for notice in held.notices if "foils: " in notice and "replace_obj.json" in notice]
    assert held.scores(model)["foils"]["n"] == 2, notice


def test_the_captions_are_those_that_the_run_was_trained_on(root):
    """A set without them is read as eval does, and said so."""
    model, run = run_folder.load(root / "clip")
    held = HeldOut(config(root, "plain", "one"), run | {"field": "long"}, CPU, Rank())
    assert held.questions["plain"].captions[1] == ["long caption 1"]
    assert [held.questions["one"].captions[i] for i in range(3)] == [["caption 0"], ["caption 0"], ["caption 1"]]
    assert held.notices == ["one: the run was trained on the captions 'long', which it does not have; 'txt' was read"]


def test_what_cannot_be_evaluated_is_an_error_at_the_start(root, tmp_path):
    model, run = run_folder.load(root / "clip")

    def error(kind, run, *sets, **changes):
        with pytest.raises(kind) as caught:
            HeldOut(config(root, *sets, **changes), run, CPU, Rank())
        return str(caught.value)

    assert "no data set at" in error(DataError, run, "nothing")
    make_set(tmp_path / "broken", 3, broken={0, 1, 2})
    assert "no image decodes (3 not a picture)" in error(DataError, run, eval_data={"broken": tmp_path / "broken"})
    lift = {"model": "lift", "preset": "small", **RUNS["lift"]}
    lift["encoder"] = lift["encoder"] | {"trust_remote_code": True}
    assert "--eval-data cannot encode captions" in error(ConfigError, lift, "plain")


def test_features_that_are_not_finite(root):
    model, held = opened(root, "clip", "plain")
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="its weights have diverged"):
        held.scores(model)


def features_of(held, model, towers):
    """The scores, and the features of the images that they are computed from, on rank 0."""
    seen = []
    score_set = held_out.score_set
    held_out.score_set = lambda images, *rest: seen.append(images.features) or score_set(images, *rest)
    try:
        return held.scores(model, towers), seen
    finally:
        held_out.score_set = score_set


def weights_of(model):
    return {name: tensor.clone() for name, tensor in whole(dict(model.state_dict())).items()}


def train(rank, root, name, how, evaluated):
    """Trains for three steps: the losses, the weights and their average at the end, and the scores and features of
    both in between. evaluated: whether to evaluate."""
    model, held = opened(root, name, "plain", "one", rank=rank)
    model.train()
    towers = spread(model, how, rank, CPU)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.dim()], lr=0.1)
    ema = Ema(model, 0.5)
    loss_of = ClipLoss(gather_with_grad=True, rank=rank.number, world_size=rank.world, normalize=True)
    generator = torch.Generator().manual_seed(0)
    losses, found = [], []
    for _ in range(3):
        pixels, text = torch.randn(6, 3, 16, 16, generator=generator), torch.randn(6, 384, generator=generator)
        tokens = torch.randint(1, 1000, (6, 12), generator=generator)
        pixels, text, tokens = (part.chunk(rank.world)[rank.number] for part in (pixels, text, tokens))
        for averaged in (True, False) if evaluated else ():
            with ema.swapped() if averaged else nullcontext():
                found.append((*features_of(held, model, towers), weights_of(model)))
        features, scale = towers(pixels, None, tokens if name == "clip" else None)
        image, text = features.chunk(2, dim=1) if name == "clip" else (features, text)
        loss = loss_of(image, text, scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        losses.append(loss.item())
    return losses, weights_of(model), found


def train_both(rank, root, name, how):
    run_folder.text_encoder = quick_encoder
    return train(rank, root, name, how, False), train(rank, root, name, how, True)


@pytest.mark.parametrize(("name", "world", "how"), [
    ("lift", 1, "ddp"),
    ("clip", 2, "fsdp"),
    pytest.param("lift", 3, "ddp", marks=pytest.mark.soak),
    pytest.param("lift", 2, "fsdp", marks=pytest.mark.soak),
])  # fmt: skip
def test_on_ranks_while_a_run_trains(root, name, world, how, monkeypatch):
    """The training is the same, bit for bit, as without evaluation; the scores are those of the weights of the moment,
    the averaged ones too."""
    monkeypatch.setattr(run_folder, "text_encoder", quick_encoder)
    if world == 1:
        results = [train_both(Rank(), root, name, how)]
    else:
        results = on_ranks(world, in_group, train_both, root, name, how)
    for result in results:
        if isinstance(result, BaseException):
            raise result
        (losses, weights, _), (evaluated_losses, evaluated_weights, found) = result
        assert losses == evaluated_losses and len(found) == 6
        assert all(torch.equal(weights[key], evaluated_weights[key]) for key in weights)
        assert [scores for scores, *_ in found] == [scores for scores, *_ in results[0][1][2]]
    model, held = opened(root, name, "plain", "one")
    features = []
    for scores, images, state in results[0][1][2]:
        model.load_state_dict(state)
        want, want_images = features_of(held, model, None)
        assert scores == want
        for image, want_image in zip(images, want_images, strict=True):
            assert torch.equal(image, want_image)
        features.append(images[0])
    assert not any(torch.equal(one, other) for one, other in zip(features[1:], features[2:], strict=False))


def set_up(rank, root, gone):
    if rank.number == 1:
        shutil.rmtree(gone)
    torch.distributed.barrier()
    try:
        opened(root, "clip", "one", eval_data={"gone": gone}, rank=rank)
    except DataError as error:
        return str(error), error.reported
    return None


def test_an_error_ends_all_ranks_and_is_said_once(root, tmp_path):
    make_set(tmp_path / "gone", 3)
    found = on_ranks(2, in_group, set_up, root, tmp_path / "gone")
    assert all("no data set at" in message for message, _ in found)
    assert [reported for _, reported in found] == [False, True]

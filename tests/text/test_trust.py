"""What a folder of weights, or a run from elsewhere, may make this machine do: no code of it runs unless the user
allows it, nothing is loaded from the hub that the user has not named, and no file outside of the folder is read."""

import ast
import io
import json
import os
import random
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.judged import judged
from support.small_models import small_model
from support.tiny_sets import make_set, png
from support.tiny_text import keep_code_in

import lift_fast
from lift_fast.cli.main import main
from lift_fast.errors import ConfigError, DataError, EncoderError, LiftFastError
from lift_fast.run_folder import read_description
from lift_fast.text.encoder import Encoder
from lift_fast.text.repository import check_files, confined, declared_pooling, locate
from lift_fast.text.spec import EncoderSpec

WIDTH = 384  # of the encoder: what the head of small_model gives
CODE = """
from pathlib import Path

Path({marker!r}).touch()
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


class Config(BertConfig):
    model_type = "own"


class Model(BertModel):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass


def generate(model, **options):
    pass
"""
MAPS = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
MAPS |= {"AutoModelForTextEncoding": "evil.Model", "AutoProcessor": "evil.Model", "AutoImageProcessor": "evil.Model"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a tiny BERT with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trust") / "bert"
    words = ["[PAD]", "[UNK]", *"a photo of two small red dogs in the park dog cat".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=40, **sizes)).save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    write(folder / "1_Pooling/config.json", {"pooling_mode": "mean"})
    return folder


def write(file: Path, content) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def change(file: Path, **values) -> None:
    write(file, (json.loads(file.read_text()) if file.exists() else {}) | values)


def kernel(folder: Path) -> None:
    """Attention by a kernel of the hub, which transformers would download and run."""
    change(folder / "config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    change(folder / "config.json", _attn_implementation_internal="evil/kernel", use_kernels=True)


def nested(folder: Path) -> None:
    """A model in a model, of a type that has no class of transformers alone: it is asked for at the terminal."""
    inner = {"model_type": "align_text_model", "auto_map": MAPS, "name_or_path": str(folder)}
    both = {"text_config": inner, "vision_config": {"model_type": "vit", "attn_implementation": "evil/kernel"}}
    change(folder / "config.json", model_type="vision-text-dual-encoder", architectures=None, **both)


def adapter(folder: Path) -> None:
    write(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "evil/base"})


def generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate/generate.py")
    write(folder / "generation_config.json", {"custom_generate": "evil/generate", "auto_map": MAPS})


def template(folder: Path) -> None:
    hostile = "{{ cycler.__init__.__globals__.os.system('touch marker') }}"
    change(folder / "tokenizer_config.json", chat_template=hostile)


HOSTILE = {
    "configuration": lambda folder: change(folder / "config.json", model_type="own", auto_map=MAPS),
    "model": lambda folder: change(folder / "config.json", auto_map=MAPS),
    "model without a class": lambda folder: change(
        folder / "config.json", model_type="align_text_model", auto_map=MAPS, architectures=["Model"]
    ),
    "model of another repository": lambda folder: change(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "evil/code--evil.Config"}
    ),
    "model in a model": nested,
    "tokenizer": lambda folder: change(folder / "tokenizer_config.json", auto_map=MAPS, tokenizer_class="Tokenizer"),
    "tokenizer, old form": lambda folder: change(
        folder / "tokenizer_config.json", auto_map=["evil.Tokenizer", None], tokenizer_class=None
    ),
    "processor": lambda folder: write(folder / "processor_config.json", {"auto_map": MAPS, "processor_class": "Own"}),
    "preprocessor": lambda folder: write(folder / "preprocessor_config.json", {"auto_map": MAPS}),
    "generation": generation,
    "chat template": template,
    "kernel": kernel,
    "experts": lambda folder: change(folder / "config.json", experts_implementation="evil/kernel"),
    "adapter": adapter,
    "backbone": lambda folder: change(
        folder / "config.json", model_type="timm_wrapper", architecture="hf-hub:evil/model", use_pretrained_backbone=1
    ),
    "quantized": lambda folder: change(folder / "config.json", quantization_config={"quant_method": "mxfp4"}),
    "module": lambda folder: write(folder / "modules.json", [{"idx": 0, "path": "", "type": "evil.Module"}]),
}


@pytest.fixture
def no_network(monkeypatch):
    def request(*_, **__):
        raise AssertionError("a request")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, request)
    monkeypatch.setattr(socket.socket, "connect", request)


@pytest.fixture
def given_yes(monkeypatch, tmp_path, no_network):
    """Somebody answers y to every question. Fails where a question was asked, or code ran."""
    keep_code_in(tmp_path / "modules", monkeypatch)
    monkeypatch.chdir(tmp_path)
    answers = io.StringIO("y\n" * 100)
    monkeypatch.setattr("sys.stdin", answers)
    yield
    assert answers.tell() == 0, "a question was asked"
    assert not (tmp_path / "marker").exists(), "code ran"


def hostile(kind: str, plain: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(plain, tmp_path / "encoder")
    (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    HOSTILE[kind](folder)
    return folder


def run_with(folder: Path, encoder: Path | str, **settings) -> Path:
    """An untrained run that names this encoder."""
    small_model(folder, "lift")
    run = read_description(folder)
    write(folder / "run.json", run | {"encoder": EncoderSpec(str(encoder), "mean", **settings).as_dict()})
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_code_of_an_encoder_runs(kind, plain, tmp_path, given_yes):
    """It loads without the code, or is refused; its pooling likewise."""
    folder = hostile(kind, plain, tmp_path)
    for pooling in ("mean", "own"):
        try:
            vectors = Encoder(EncoderSpec(str(folder), pooling, max_length=12)).encode(["a dog", "two small cats"])
        except EncoderError as error:
            assert kind not in ("model", "chat template", "processor", "preprocessor", "kernel", "generation") and (
                len(str(error)) > 20
            )
        else:
            assert vectors.shape == (2, WIDTH)


def test_the_code_is_code(plain, tmp_path, monkeypatch):
    """What the tests above must not run does run when it is allowed."""
    keep_code_in(tmp_path / "modules", monkeypatch)
    folder = hostile("configuration", plain, tmp_path)
    assert Encoder(EncoderSpec(str(folder), "mean", max_length=12, trust_remote_code=True)).dim == WIDTH
    assert (tmp_path / "marker").exists()


def test_a_kernel_that_a_configuration_names_is_not_used(plain, tmp_path, given_yes):
    ours = Encoder(EncoderSpec(str(plain), "mean", max_length=12))
    theirs = Encoder(EncoderSpec(str(hostile("kernel", plain, tmp_path)), "mean", max_length=12))
    assert theirs.model.config._attn_implementation == ours.model.config._attn_implementation in ("sdpa", "eager")
    assert torch.equal(theirs.encode(["a dog", "a cat"]), ours.encode(["a dog", "a cat"]))


def commands(folder: Path, data: Path, run: Path, clip: Path):
    """Name -> arguments of each command that takes a folder of weights or an encoder."""
    text = ["--pooling", "mean", "--max-length", "12"]
    return {
        "embed": ["embed", "--data", data, "--encoder", folder, "--out", "cache", *text],
        "inverse of an encoder": ["inverse", folder, "--triples", "14", *text],
        "inverse of a run": ["inverse", run, "--triples", "14"],
        "eval of a run": ["eval", "--run", run, "--data", "set", data],
        "eval with an encoder": ["eval", "--run", run, "--encoder", folder, "--data", "set", data],
        "search": ["search", run, "a dog", "--data", data],
        "classify": ["classify", run, "image.png", "--names", "dog", "cat"],
        "export": ["export", run, "--to", "sentence-transformers", "--out", "exported"],
        "export of a text tower": ["export", run, "--to", "open_clip", "--out", "exported"],
        "weights of another project": ["search", clip, "a dog", "--data", data],
        "embed-images": ["embed-images", clip, "--data", data, "--out", "f.npy"],
        "training": ["train", "--model", "clip", "--data", data, "--init-from", clip, "--steps", "1", "--out", "t",
                     "--batch-size", "2", "--preset", "tiny"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["configuration", "tokenizer", "model in a model"])
def test_no_code_runs_in_a_command(kind, plain, tmp_path, given_yes, capsys):
    """Of an encoder, of one that a run from elsewhere names, and of another project's weights."""
    folder = hostile(kind, plain, tmp_path)
    data = make_set(tmp_path / "data", 3).folder
    (tmp_path / "image.png").write_bytes(png(random.Random(0)))
    run = run_with(tmp_path / "run", folder, max_length=12)
    clip = shutil.copytree(folder, tmp_path / "clip")
    if kind == "model in a model":
        change(clip / "config.json", model_type="clip")
    ended = {}
    for name, arguments in commands(folder, data, run, clip).items():
        try:
            main([str(argument) for argument in arguments])
            ended[name] = 0
        except SystemExit as stop:
            ended[name] = stop.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err, printed.err
    assert set(ended.values()) <= {0, 2} and ended["weights of another project"] == 2, ended
    assert ended["eval of a run"] == ended["embed"] == (0 if kind == "tokenizer" else 2), ended


def test_code_that_an_export_names_is_left_out(plain, tmp_path, given_yes):
    """The folder of an export has no auto_map: no other program would be asked to run code for it."""
    folder = hostile("model", plain, tmp_path)
    change(folder / "tokenizer_config.json", auto_map=MAPS)
    encoder = Encoder(EncoderSpec(str(folder), "mean", max_length=12))
    encoder.model.save_pretrained(tmp_path / "saved")
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (tmp_path / "saved" / file).read_text()


# A name on the hub.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and what was asked of the hub."""
    asked = []

    def none(api, name, *args, **kwargs):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", none)
    return asked


def in_cache(folder: Path, encoder: Path) -> None:
    """Puts an encoder into the hub cache, as owner/model."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(encoder, folder / "models--owner--model/snapshots" / commit)
    (folder / "models--owner--model/refs").mkdir()
    (folder / "models--owner--model/refs/main").write_text(commit)
    (folder / "models--owner--model/blobs").mkdir()
    for file in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = folder / "models--owner--model/blobs" / str(abs(hash(str(file))))
        shutil.move(file, blob)
        file.symlink_to(blob)


def test_a_name_in_a_run_is_downloaded_only_if_the_user_names_it_too(plain, tmp_path, hub, no_network, capsys):
    run = run_with(tmp_path / "run", "owner/model", revision="v1")
    model = lift_fast.load(run, device="cpu")
    with pytest.raises(EncoderError, match="owner/model' is not in .* run: hf download owner/model --revision v1, or"):
        model.encode_text("a dog")
    data = make_set(tmp_path / "data", 3).folder
    for line in (["eval", "--run", run, "--data", "set", data], ["search", run, "a dog", "--data", data],
                 ["inverse", run, "--triples", "14"], ["export", run, "--to", "sentence-transformers", "--out", "o"],
                 ["classify", run, data, "--names", "a", "b"]):  # fmt: skip
        with pytest.raises(SystemExit):
            main([str(word) for word in line])
        error = capsys.readouterr().err
        assert "with --encoder owner/model" in error or line[0] == "classify", error
    assert hub == []
    with pytest.raises(EncoderError, match="the hub cannot be reached"):
        lift_fast.load(run, device="cpu", encoder="owner/model").encode_text("a dog")
    assert hub == ["owner/model"]


def test_a_name_in_a_run_that_is_in_the_cache_needs_no_flag(plain, tmp_path, hub, no_network):
    """So that a run can be evaluated where its text was embedded."""
    in_cache(tmp_path / "hub", plain)
    found = [
        lift_fast.load(run_with(tmp_path / f"run{i}", name, max_length=12), device="cpu").encode_text(
            ["a dog", "a cat"]
        )
        for i, name in enumerate(["owner/model", plain])
    ]
    assert torch.equal(*found) and hub == []


def test_a_name_that_the_user_gives_keeps_the_commit_of_the_run(plain, tmp_path, hub, no_network):
    in_cache(tmp_path / "hub", plain)
    run = run_with(tmp_path / "run", "owner/model", revision="main", max_length=12)
    named = lift_fast.load(run, device="cpu", encoder="owner/model")
    assert named.description["encoder"] == read_description(run)["encoder"] and hub == []


def test_a_cache_that_names_a_model_on_the_hub(hub):
    with pytest.raises(EncoderError, match="is not in the local hub cache, and a model or cache that names it"):
        Encoder(EncoderSpec("owner/model"), download=False)
    with pytest.raises(EncoderError, match="the hub cannot be reached"):
        Encoder(EncoderSpec("owner/model"))
    assert hub == ["owner/model"]


# Files outside of the folder.


@pytest.fixture
def copied(plain, tmp_path):
    """A copy of the encoder, and next to it a folder with what it might read."""
    (tmp_path / "outside").mkdir()
    write(tmp_path / "outside/config.json", {"pooling_mode": "a secret"})
    shutil.copy(plain / "model.safetensors", tmp_path / "outside")
    shutil.copy(plain / "tokenizer.json", tmp_path / "outside/tokenizer.1.0.json")
    (tmp_path / "outside/vocab.txt").write_text("a\nsecret\n")
    return shutil.copytree(plain, tmp_path / "copied")


def refused(copied: Path, pooling="own") -> str:
    with pytest.raises(EncoderError) as error:
        Encoder(EncoderSpec(str(copied), pooling, max_length=12))
    assert "secret" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("place", ["../outside", "1_Pooling/../../outside", "ABSOLUTE", "link", "..\\outside", "C:\\x"])
def test_the_pooling_lies_in_the_folder(place, copied):
    (copied / "link").symlink_to(copied.parent / "outside")
    place = place.replace("ABSOLUTE", str(copied.parent / "outside"))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    write(copied / "modules.json", [*modules, {"path": place, "type": "sentence_transformers.models.Pooling"}])
    assert "which is outside of the encoder's folder" in refused(copied)


def test_a_link_that_leads_outside(copied):
    (copied / "1_Pooling/config.json").unlink()
    (copied / "1_Pooling/config.json").symlink_to(copied.parent / "outside/config.json")
    assert "which is outside of the encoder's folder" in refused(copied)


@pytest.mark.parametrize("inside", ["models--a--b/blobs/0", "blobs/00/0"])
def test_the_links_of_the_hub_s_cache(inside, copied, tmp_path):
    """Of one that has blobs of its own for each model, and of one that shares them."""
    blob = tmp_path / "hub" / inside
    blob.parent.mkdir(parents=True)
    shutil.move(copied / "1_Pooling/config.json", blob)
    (copied / "1_Pooling/config.json").symlink_to(blob)
    assert declared_pooling(EncoderSpec(str(copied)), str(copied)) == "mean"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "../outside/model.safetensors"}}),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": "OUTSIDE/model.safetensors"}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../outside/tokenizer.1.0.json"]}),
        ("tokenizer_config.json", {"vocab_file": "OUTSIDE/vocab.txt"}),
        ("tokenizer_config.json", {"tokenizer_file": "../outside/tokenizer.1.0.json"}),
    ],
)
def test_other_files_lie_in_the_folder(file, content, copied):
    change(copied / file, **json.loads(json.dumps(content).replace("OUTSIDE", str(copied.parent / "outside"))))
    assert "which is outside of the encoder's folder" in refused(copied, "mean")


def test_a_path_that_another_machine_has_left(copied):
    change(copied / "tokenizer_config.json", tokenizer_file="/nonexistent/tokenizer.json", name_or_path="/nonexistent")
    assert Encoder(EncoderSpec(str(copied), "mean", max_length=12)).dim == WIDTH


# Damaged configurations.

DAMAGE = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 5000 + "1" + "}" * 5000,
    "a bit too deep": '{"model_type": ' + "[" * 70 + "]" * 70 + "}",
    "list": "[]",
    "number": "5",
    "NaN": "NaN",
    "null": "null",
    "half": '{"model_type": "be',
    "not UTF-8": b"\xff\xfe{\x00}\x00",
    "wrong types": '{"model_type": ["bert"], "auto_map": 5, "weight_map": 5, "vocab_file": [], "pooling_mode": {"a": 1}'
    "}",
    "NaN sizes": '{"model_type": "bert", "hidden_size": NaN, "vocab_size": Infinity, "max_position_embeddings": "x"}',
    "half a character": '{"model_type": "\\ud800", "pooling_mode": "\\ud800"}',
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json")
FILES += ("model.safetensors.index.json", "special_tokens_map.json", "generation_config.json")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_one_error(file, copied, no_network, recwarn):
    """Or the file is not needed. A folder in its place is one as well."""
    kept = (copied / file).read_bytes() if (copied / file).exists() else None
    for name, text in DAMAGE.items():
        (copied / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            assert Encoder(EncoderSpec(str(copied), "own", max_length=12)).dim == WIDTH
            assert file not in ("config.json", "tokenizer.json", "1_Pooling/config.json"), name
        except EncoderError as error:
            assert 20 < len(str(error)) < 2000, name
    (copied / file).unlink()
    (copied / file).mkdir()
    try:
        Encoder(EncoderSpec(str(copied), "own", max_length=12))
    except EncoderError:
        pass
    assert kept or file not in ("config.json", "tokenizer.json")


@pytest.mark.parametrize(
    "values",
    [
        {"max_position_embeddings": "forty"},
        {"max_position_embeddings": -5},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"pad_token_id": 10**9},
        {"architectures": 5},
        {"architectures": [5]},
        {"dtype": "os"},
        {"torch_dtype": "system"},
        {"hidden_act": "exec"},
        {"is_encoder_decoder": "yes"},
        {"quantization_config": 5},
        {"model_type": "siglip_text_model", "max_position_embeddings": "x"},
    ],
)
def test_odd_values_in_a_configuration(values, copied, no_network):
    """A typed error, or an encoder whose vectors are finite."""
    change(copied / "config.json", **values)
    try:
        vectors = Encoder(EncoderSpec(str(copied), "mean", max_length=12)).encode(["a dog", "two cats"])
    except LiftFastError as error:
        assert 20 < len(str(error)) < 2000
    else:
        assert vectors.isfinite().all()


@pytest.mark.parametrize("where", [(), ("text_config",)])
def test_more_layers_than_can_be_made(where, copied):
    values = {"num_hidden_layers": 10**9}
    change(copied / "config.json", **(values if not where else {where[0]: values}))
    assert "num_hidden_layers is 1000000000, more than any model has" in refused(copied)


def test_two_threads_load_encoders(monkeypatch):
    """After both, the hub can be reached again."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    within, ended, found = threading.Event(), threading.Event(), []

    def load():
        with confined():
            within.set()
            ended.wait()
            found.append(constants.HF_HUB_OFFLINE)

    other = threading.Thread(target=load)
    with confined():
        other.start()
        within.wait(0.2)
    ended.set()
    other.join()
    assert found == [True] and not constants.HF_HUB_OFFLINE


def test_sizes_that_are_no_numbers_of_layers(copied):
    """Of Gemma 3n."""
    change(copied / "config.json", text_config={"vocab_size_per_layer_input": 262144})
    check_files(str(copied))


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt", "model-00001-of-00001.safetensors", "special"])
def test_a_pipe_in_a_folder(file, copied):
    """transformers would wait for somebody to write to it."""
    (copied / file).unlink(missing_ok=True)
    os.mkfifo(copied / file)
    write(copied / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    assert f"{file} is neither a file nor a folder" in refused(copied)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(4))
def test_values_in_a_configuration(part, copied, tally):
    """Each setting of a model with odd values: the vectors that it should give, others for a setting that says so, or
    a typed error, within limits of time and memory."""
    settings = json.loads((copied / "config.json").read_text())
    odd = [10**9, -1, 0, "384", None, True, 1e300, float("nan"), [], {}, "x" * 1000, 2**70, [[1]], "\ud800"]

    def encode():
        return Encoder(EncoderSpec(str(copied), "mean", max_length=12)).encode(["a dog", "two small cats"]).numpy()

    usual, others = encode(), {"is_decoder", "num_hidden_layers"}
    for key in list(settings)[part::4]:
        for value in odd:
            write(copied / "config.json", settings | {key: value})
            found = judged(encode)
            tally("weights", found.outcome)
            if found.outcome == "right answer" and key not in others:
                assert np.abs(found.value - usual).max() < 1e-4, (key, value)


# Halves of characters.


def test_half_a_character(plain):
    encoder = Encoder(EncoderSpec(str(plain), "mean", max_length=12))
    for text in ("a \ud800 dog", "\udcff"):
        with pytest.raises(DataError, match=r"the caption .*\\ud.* holds half a Unicode character"):
            encoder.encode(["a cat", text])
    for field in ("prompt", "end_token"):
        with pytest.raises(ConfigError, match=rf"{field} '\\udcff' holds half a Unicode character"):
            EncoderSpec(**{field: "\udcff"})
    with pytest.raises(EncoderError, match="no text encoder"):
        locate(EncoderSpec("\udcff"))
    with pytest.raises(ConfigError, match=r"prompt '\\ud800' holds half|this model's description: encoder.prompt"):
        EncoderSpec.of_dict({"name": "x", "prompt": "\ud800"})


@pytest.mark.parametrize(
    "line",
    [
        ["search", "RUN", "a \udcff dog", "--data", "DATA"],
        ["classify", "RUN", "IMAGE", "--names", "\udcff", "cat"],
        ["classify", "RUN", "IMAGE", "--names", "dog", "cat", "--templates", "\udcff {}"],
        ["embed", "--data", "DATA", "--encoder", "PLAIN", "--prompt", "\udcff", "--out", "cache"],
        ["embed", "--data", "DATA", "--encoder", "\udcff", "--out", "cache"],
        ["search", "\udcff", "a dog", "--data", "DATA"],
        ["eval", "--run", "RUN", "--data", "set", "\udcff"],
        ["cache", "info", "\udcff"],
    ],
)
def test_half_a_character_in_an_argument(line, plain, tmp_path, monkeypatch, capsys):
    """Python makes them of arguments that are not UTF-8."""
    monkeypatch.chdir(tmp_path)
    data = make_set(tmp_path / "data", 2).folder
    run = run_with(tmp_path / "run", plain, max_length=12)
    Path("image.png").write_bytes(png(random.Random(0)))
    places = {"RUN": str(run), "DATA": str(data), "PLAIN": str(plain), "IMAGE": "image.png"}
    with pytest.raises(SystemExit) as stop:
        main([places.get(word, word) for word in line])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("lift-fast: error: ") == 1 and "\\udcff" in error, error


# Every call says whether code may run.

CALLS = ("from_pretrained", "from_config", "pipeline", "SentenceTransformer", "CrossEncoder")


def calls(text: str, name: str):
    """The calls of a source text that load a model by its files, with the line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            hub = isinstance(node.func, ast.Attribute) and ast.unparse(node.func).startswith("torch.hub.")
            if hub or (called in CALLS and not any(keyword.arg == "modules" for keyword in node.keywords)):
                yield f"{name}:{node.lineno}", node


def test_every_call_says_whether_code_may_run():
    """In the package, the kernels and the benchmarks: trust_remote_code, in the call or in the options that it
    unpacks; and in what exports and the docs have users copy, wherever the name of a class does not decide."""
    root, found = Path(__file__).parents[2], []
    sources = [file for folder in ("lift_fast", "kernels", "benchmarks") for file in root.glob(f"{folder}/**/*.py")]
    for file in sources:
        text = file.read_text()
        for where, node in calls(text, str(file.relative_to(root))):
            named = {keyword.arg for keyword in node.keywords}
            unpacked = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
            told = any(f'{name}: dict[str, Any] = {{"trust_remote_code": ' in text for name in unpacked)
            if not (told or "trust_remote_code" in named or "data_peers" in where):  # a pipeline of another library
                found.append(where)
    copied = re.compile(r"\b(Auto\w+\.from_pretrained|SentenceTransformer|torch\.hub\.load)\(([^)]*)\)")
    for file in [*root.glob("lift_fast/export/*.py"), *root.glob("docs/*.md"), root / "README.md"]:
        for match in copied.finditer(file.read_text()):
            if "trust_remote_code" not in match[2] and not match[2].lstrip().startswith("modules="):
                found.append(f"{file.relative_to(root)}: {match[0]}")
    assert len(sources) > 200 and found == []

"""nn/weights/files.py and torchscript.py: prefixes, shards, TorchScript archives, our own runs, and what is refused."""

import io
import json
import os
import pickle
import shutil
import struct
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lift_fast import run_folder
from lift_fast.errors import ConfigError
from lift_fast.nn import Clip, Head, Lift, TextConfig, Vit, VitConfig
from lift_fast.nn.config import PRESETS, Preset
from lift_fast.nn.weights import load, read, save
from lift_fast.nn.weights.files import files_of

CONFIG = VitConfig(12, 4, 128, 2, heads=2, mlp_dim=200, pool="cls")


def tower(**changes) -> Vit:
    vit = Vit(replace(CONFIG, **changes))
    with torch.no_grad():
        for p in vit.parameters():
            p.normal_(std=0.3)
    return vit


def open_clip_state() -> dict[str, Tensor]:
    """The state dict of a CLIP of open_clip: tower, projection, some of the text, and the logit scale."""
    state = save(tower(), "open_clip", projection=torch.randn(20, 128), logit_scale=torch.tensor(3.0))
    return state | {"text_projection": torch.randn(16, 20), "ln_final.weight": torch.randn(16)}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


# Prefixes of wrappers.

PREFIXES = [
    lambda key: f"_orig_mod.module.{key}",
    lambda key: f"module._orig_mod.{key}",
    lambda key: f"module.module.{key}",
    lambda key: f"_orig_mod._orig_mod.{key}",
    lambda key: f"module._orig_mod.module.{key}",
    lambda key: key.replace("visual.", "visual._orig_mod."),
    lambda key: "module." + key.replace("visual.transformer.", "visual._orig_mod.transformer._orig_mod."),
    lambda key: key.replace("resblocks.1.", "resblocks.1._orig_mod."),
]


@pytest.mark.parametrize("number", range(len(PREFIXES)))
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_of_wrappers(number, suffix, tmp_path):
    state, path = open_clip_state(), tmp_path / f"weights.{suffix}"
    wrapped = {PREFIXES[number](key): tensor for key, tensor in state.items()}
    assert wrapped.keys() != state.keys()
    save_file(wrapped, path) if suffix == "safetensors" else torch.save({"state_dict": wrapped, "epoch": 3}, path)
    same_bits(read(path), state)
    assert load(path, activation="gelu").visual.config == CONFIG


def test_only_whole_parts_of_a_key_are_prefixes(tmp_path):
    state = {"my_orig_mod.weight": torch.ones(2), "module.x": torch.ones(1), "_orig_module.x": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    same_bits(read(tmp_path / "x.pt"), state)


def test_keys_that_would_become_one(tmp_path):
    torch.save({"a._orig_mod.b": torch.ones(1), "a.b": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="differ in _orig_mod only"):
        read(tmp_path / "x.pt")


# Shards.


def sharded(folder: Path, state: dict[str, Tensor], name: str = "model.safetensors", parts: int = 3) -> Path:
    """Writes a state dict as shards and their index, as transformers does. Returns the index."""
    stem, suffix = name.split(".")
    places, keys = {}, list(state)
    for part in range(parts):
        file = f"{stem}-{part + 1:05d}-of-{parts:05d}.{suffix}"
        shard = {key: state[key] for key in keys[part::parts]}
        (save_file if suffix == "safetensors" else torch.save)(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"])
def test_shards(name, tmp_path):
    state = open_clip_state()
    index = sharded(tmp_path, state, name)
    same_bits(read(tmp_path), state)
    same_bits(read(index), state)
    assert [file.name for file in files_of(tmp_path)][0] == index.name and len(files_of(tmp_path)) == 4
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 128}}})
    )
    if name.startswith("open_clip"):
        assert load(tmp_path).visual.config == replace(CONFIG, activation="quick_gelu")
        assert len(files_of(tmp_path)) == 5


def test_transformers_shards(tmp_path):
    """As save_pretrained writes them."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(**sizes, patch_size=8, image_size=24, projection_dim=20)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").exists()
    loaded, pixels = load(tmp_path), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = model(pixels).image_embeds
        torch.testing.assert_close(loaded.visual(pixels) @ loaded.projection.T, theirs, rtol=1e-5, atol=1e-5)


def test_a_missing_shard(tmp_path):
    index = sharded(tmp_path, open_clip_state())
    gone = tmp_path / "model-00002-of-00003.safetensors"
    gone.unlink()
    for path in (tmp_path, index):
        with pytest.raises(ConfigError, match=f"the shard {gone.name} is missing"):
            load(path)


@pytest.mark.parametrize(
    "place", ["../outside.pt", "{absolute}", "inner/../../outside.pt", "inner/x.pt", "..\\x.pt", ".."]
)
def test_a_shard_outside_of_the_folder(place, tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    torch.save({"a": torch.ones(1)}, tmp_path / "outside.pt")
    torch.save({"a": torch.ones(1)}, folder / "inner" / "x.pt")
    place = place.format(absolute=tmp_path / "outside.pt")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(ConfigError, match="not the name of a file in this folder"):
        read(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 3}}',
        b"\xff",
    ],
)
def test_a_damaged_index(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ConfigError, match="not a complete index of shards"):
        read(tmp_path)


def test_an_index_of_other_shards(tmp_path):
    """A tensor that only the shard has, or only the index."""
    for more in ("shard", "index"):
        index = sharded(tmp_path, {"a": torch.ones(1), "b": torch.ones(2)}, parts=1)
        entries = json.loads(index.read_text())
        if more == "shard":
            del entries["weight_map"]["b"]
        else:
            entries["weight_map"]["c"] = entries["weight_map"]["a"]
        index.write_text(json.dumps(entries))
        with pytest.raises(ConfigError, match=r"lists other tensors in .* \((b|c)\); copy the folder"):
            read(index)


def test_a_damaged_shard(tmp_path):
    sharded(tmp_path, open_clip_state())
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{shard.name}: not a complete safetensors file"):
        read(tmp_path)


def test_whole_files_come_first(tmp_path):
    sharded(tmp_path, {"a": torch.zeros(1)}, parts=1)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read(tmp_path)["a"] == 1


# TorchScript archives.


def as_module(state: dict[str, Tensor]) -> nn.Module:
    """A module with this state dict."""
    root = Scripted()
    for key, tensor in state.items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if tensor.is_floating_point():
            module.register_parameter(name, nn.Parameter(tensor.clone()))
        else:
            module.register_buffer(name, tensor.clone())
    return root


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes, self.rates, self.names, self.nothing = [1, 2], [0.5], {"a": 1}, None

    def forward(self, x: Tensor) -> Tensor:
        return x


OPENAI = {name: torch.tensor(12) for name in ("input_resolution", "context_length", "vocab_size")}


@pytest.fixture
def archive(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """An archive as OpenAI's: float16, with three numbers."""
    state = {key: tensor.half() for key, tensor in open_clip_state().items()} | OPENAI
    path = tmp_path / "ViT-B-32.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(as_module(state)).save(str(path))
    return path, state


def test_an_archive(archive):
    path, state = archive
    same_bits(read(path), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its activation is known
        loaded = load(path)
    assert loaded.visual.config == replace(CONFIG, activation="quick_gelu") and loaded.layout == "open_clip"
    assert loaded.projection.shape == (20, 128) and loaded.logit_scale == 3
    assert load(path, activation="gelu").visual.config.activation == "gelu"
    state = {key: tensor.float() for key, tensor in state.items() if key.startswith("visual.")}
    same_bits(save(loaded.visual, "open_clip", projection=loaded.projection), state)


def test_a_traced_archive_with_shared_storages(tmp_path):
    """Tensors that are views of one storage, of no elements, and of every dtype."""
    base = torch.arange(24.0).view(4, 6)
    state = {"a": base, "b": base.T, "inner.c": base[1:3, 2], "inner.d": torch.empty(0, 3)}
    module = as_module(state)
    for name, tensor in (("a", base), ("b", base.T)):
        getattr(module, name).data = tensor
    module.inner.c.data = base[1:3, 2]
    dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    for dtype in dtypes:
        module.register_buffer(f"of_{str(dtype)[6:]}", (torch.arange(5) % 2).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.ones(1)).save(str(tmp_path / "x.pt"))
        theirs = torch.jit.load(str(tmp_path / "x.pt")).state_dict()
    assert len(theirs) == 4 + len(dtypes)
    same_bits(read(tmp_path / "x.pt"), dict(theirs))


def test_the_code_of_an_archive_is_not_read(archive, tmp_path):
    path, state = archive
    code = [name for name in zipfile.ZipFile(path).namelist() if "/code/" in name]
    assert code
    same_bits(read(altered(path, tmp_path / "other.pt", dict.fromkeys(code, b"no code at all"))), state)


def test_the_code_of_an_archive_is_compressed(tmp_path):
    """Unpacked it may have more bytes than all of the file."""
    module = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(40)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.ones(1, 4)).save(str(tmp_path / "x.pt"))
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > (tmp_path / "x.pt").stat().st_size
    same_bits(read(tmp_path / "x.pt"), dict(module.state_dict()))


def altered(path: Path, to: Path, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a zip with other contents of some of its files."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w", compression) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, changes.get(entry.filename, source.read(entry)))
    return to


class Calls:
    """Unpickling it calls `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(made: Path) -> dict[str, object]:
    """What creates the file `made` when it is unpickled."""
    return {
        "os.system": Calls(os.system, f"touch {made}"),
        "eval": Calls(eval, f"open({str(made)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(made)!r}, 'w')"),
        "Path.touch": Calls(Path.touch, made),
        "open": Calls(open, str(made), "w"),
    }


KINDS = ["os.system", "eval", "exec", "Path.touch", "open"]


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["alone", "in the state dict", "in the optimizer", "legacy"])
def test_hostile_pickles_are_refused_and_not_run(kind, place, tmp_path, tally):
    made, path = tmp_path / "made", tmp_path / "checkpoint.pt"
    bad = hostile(made)[kind]
    state = {f"module.{key}": tensor for key, tensor in open_clip_state().items()}
    if place == "alone":
        path.write_bytes(pickle.dumps(bad, protocol=2))
    elif place == "in the optimizer":
        torch.save({"state_dict": state, "optimizer": {"state": {0: {"exp_avg": bad}}}, "epoch": 3}, path)
    else:
        content = {"state_dict": state | {"module.x": bad}, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(ConfigError, match="could run code"):
        load(path)
    assert not made.exists()
    with pytest.raises(Exception):  # noqa: B017  it is hostile: plain unpickling runs it
        torch.load(path, weights_only=False)["x"]
    assert made.exists()
    tally("weights", "error")


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_archives_are_refused_and_not_run(kind, protocol, archive, tmp_path, tally):
    made, path = tmp_path / "made", tmp_path / "bad.pt"
    data = pickle.dumps(hostile(made)[kind], protocol)
    altered(archive[0], path, {"ViT-B-32/data.pkl": data})
    with pytest.raises(ConfigError, match="could run code"):
        read(path)
    # The same after a good module, which the unpickler has made by then.
    good = zipfile.ZipFile(archive[0]).read("ViT-B-32/data.pkl")
    altered(archive[0], path, {"ViT-B-32/data.pkl": good[:-1] + data})
    with pytest.raises(ConfigError, match="could run code"):
        read(path)
    assert not made.exists()
    tally("weights", "error", 2)


# Pickles by hand, in opcodes of protocol 2: a module is NEWOBJ of its class and (), then BUILD with its attributes.
MODULE = b"c__torch__\nM\n)\x81"


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",  # eval
        b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        b"ctorch.jit._pickle\nbuild_tensor_from_id\n.",
        b"ctorch._utils\n_rebuild_tensor\n.",
        b"ctorch\nload\n.",
        b"c__torch__x\nM\n)\x81.",  # not of the archive
        b"ctorch\nFloatStorage\n.",  # no module
        b"N.",
        b"(lp0\n0g0\n.",
        MODULE + b"}X\x01\x00\x00\x00ac__torch__\nN\n)\x81sb",  # no end
        b"c__torch__\nM\n.",  # a class and no object
        MODULE + b"}X\x01\x00\x00\x00a(X\x07\x00\x00\x00modulesctorch\nFloatStorage\nX\x01\x00\x00\x000NK\x01tQsb.",
        MODULE + b"}X\x01\x00\x00\x00aX\x01\x00\x00\x000Qsb.",  # a name that is no storage's
    ],
)
def test_other_pickles_in_archives(data, archive, tmp_path):
    altered(archive[0], tmp_path / "bad.pt", {"ViT-B-32/data.pkl": data})
    with pytest.raises(ConfigError, match="could run code"):
        read(tmp_path / "bad.pt")


def test_an_archive_cannot_change_its_reader(archive, tmp_path):
    """BUILD sets attributes of anything: of a class of the archive, and of the function that makes tensors."""
    text = b"X\x09\x00\x00\x00__slots__X\x01\x00\x00\x00x"
    for target in (b"c__torch__\nM\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.jit._pickle\nbuild_intlist\n"):
        data = target + b"(N}" + text + b"stb0" + MODULE + b"."
        altered(archive[0], tmp_path / "bad.pt", {"ViT-B-32/data.pkl": data})
        assert read(tmp_path / "bad.pt") == {}
        same_bits(read(archive[0]), archive[1])


def test_modules_in_a_circle(archive, tmp_path):
    """A module that holds itself, and fifty levels of modules that hold the next one twice."""
    data = MODULE + b"q\x00}X\x01\x00\x00\x00ah\x00sb."
    assert read(altered(archive[0], tmp_path / "x.pt", {"ViT-B-32/data.pkl": data})) == {}
    data = MODULE + b"q\x00"
    for _ in range(50):
        data = data + b"0" + MODULE + b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00"
    assert read(altered(archive[0], tmp_path / "y.pt", {"ViT-B-32/data.pkl": data + b"."})) == {}


def tensor_of(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickled module with one tensor in storage 0, which has `count` float16 numbers."""

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    storage += number(count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride)
    return MODULE + b"}X\x01\x00\x00\x00a" + tensor + b"\x89NtRsb."


def test_tensors_outside_of_their_storage(archive, tmp_path):
    with zipfile.ZipFile(archive[0]) as source:
        count = source.getinfo("ViT-B-32/data/0").file_size // 2
    path = tmp_path / "x.pt"

    def tried(*arguments):
        return read(altered(archive[0], path, {"ViT-B-32/data.pkl": tensor_of(*arguments)}))

    assert tried(count, 1, (count - 1,), (1,))["a"].shape == (count - 1,)
    for arguments in (
        (count, 1, (count,), (1,)),
        (count, 0, (2,), (count,)),
        (count, -1, (1,), (1,)),
        (count, 0, (2,), (-1,)),
        (count, 0, (1 << 30, 1 << 30), (0, 0)),
        (count, 0, (count + 1,), (0,)),
        (count + 1, 0, (1,), (1,)),
        (count - 1, 0, (1,), (1,)),
        (-count, 0, (1,), (1,)),
    ):
        with pytest.raises(ConfigError, match=path.name):
            tried(*arguments)


def test_archives_that_unpack_to_more(archive, tmp_path):
    """Storages are never compressed, so that an archive needs no more memory than its size."""
    altered(archive[0], tmp_path / "bad.pt", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match="is compressed, as torch writes none"):
        read(tmp_path / "bad.pt")


def test_archives_cut_short(archive, tmp_path):
    whole, path = archive[0].read_bytes(), tmp_path / "cut.pt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="cut.pt"):
            read(path)
    for name in ("ViT-B-32/data.pkl", "ViT-B-32/data/0"):
        content = zipfile.ZipFile(archive[0]).read(name)
        altered(archive[0], path, {name: content[:-1]})
        with pytest.raises(ConfigError, match="cut.pt"):
            read(path)


def test_a_flipped_byte_of_an_archive(archive, tmp_path):
    """zip has a checksum of each file."""
    whole = bytearray(archive[0].read_bytes())
    at = whole.index(zipfile.ZipFile(io.BytesIO(bytes(whole))).read("ViT-B-32/data/0"))
    whole[at] ^= 1
    (tmp_path / "x.pt").write_bytes(whole)
    with pytest.raises(ConfigError, match="CRC"):
        read(tmp_path / "x.pt")


# The activation.


def warned(path, **arguments) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(path, **arguments)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("layout", "taken", "other"), [("open_clip", "gelu", "quick_gelu"), ("hf_clip", "quick_gelu", "gelu")]
)
def test_an_activation_that_is_not_known(layout, taken, other, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(save(tower(), layout), path)
    for source in (path, tmp_path, read(path)):
        [message] = warned(source)
        assert f"is {taken} or {other}; {taken} is taken" in message
        assert f'activation="{taken}" or activation="{other}"' in message
        for name in (taken, other):
            assert warned(source, activation=name) == []
        assert warned(source, config=replace(CONFIG, activation=other)) == []


def test_an_activation_of_a_folder(tmp_path):
    save_file(save(tower(), "open_clip"), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {"width": 128}}}))
    assert warned(tmp_path) == [] and len(warned(tmp_path / "open_clip_model.safetensors")) == 1


@pytest.mark.parametrize("layout", ["lift", "timm", "lift_fast", "clipa"])
def test_activations_of_which_there_is_one(layout):
    if layout == "clipa":  # open_clip without ln_pre
        state = save(tower(pre_norm=False, pool="avg", norm_after_pool=True), "open_clip")
    else:
        state = save(tower(), layout, head=Head(128, 24) if "lift" in layout else None)
    assert warned(state) == []


# Our own runs.

SMALL = Preset(CONFIG, TextConfig(width=16, layers=1, heads=2), embed_dim=12, text_dim=20)


@pytest.fixture(params=["lift", "clip"])
def run(request, tmp_path, monkeypatch) -> tuple[Path, Lift | Clip]:
    """A run whose tower has none of the layout's default conventions."""
    monkeypatch.setitem(PRESETS, "small", SMALL)
    folder = tmp_path / "run"
    folder.mkdir()
    vit = {"norm_eps": 0.01, "activation": "quick_gelu", "heads": 4, "pool": "avg", "norm_after_pool": True}
    run = {"model": request.param, "preset": "small", "text_dim": 20, "context": 9, "vit": vit}
    model = run_folder.build(run)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    run_folder.save(folder, model, run)
    return folder, model


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_a_run(run, named):
    folder, model = run
    loaded = load(folder / named)
    assert loaded.layout == "lift_fast" and loaded.visual.config == model.visual.config
    same_bits(dict(loaded.visual.state_dict()), dict(model.visual.state_dict()))
    assert loaded.logit_scale == model.logit_scale
    if isinstance(model, Lift):
        assert loaded.projection is None and loaded.left_out == ()
        same_bits(dict(loaded.head.state_dict()), dict(model.head.state_dict()))
    else:
        assert loaded.head is None and torch.equal(loaded.projection, model.visual_projection.weight)
        assert loaded.left_out and all(key.startswith("text") for key in loaded.left_out)
    assert load(folder / named, norm_eps=0.5).visual.config.norm_eps == 0.5


def test_a_run_and_back(run):
    folder, model = run
    loaded, state = load(folder), dict(model.state_dict())
    extras = {"projection": loaded.projection, "head": loaded.head, "logit_scale": loaded.logit_scale}
    same_bits(save(loaded.visual, "lift_fast", into=state, **extras), state)
    alone = save(loaded.visual, "lift_fast", **extras)
    same_bits(alone, {key: tensor for key, tensor in state.items() if not key.startswith("text")})
    same_bits(dict(load(dict(model.visual.state_dict())).visual.state_dict()), dict(model.visual.state_dict()))


def test_the_weights_of_a_run_alone(run, tmp_path):
    """Without run.json the conventions are those of the layout."""
    folder, model = run
    shutil.copy(folder / "model.safetensors", tmp_path / "model.safetensors")
    config = load(tmp_path / "model.safetensors").visual.config
    assert config == replace(CONFIG, pool="avg", heads=2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"preset": "none"}', '{"preset": "small", "vit": {"pool": "x"}}'])
def test_a_damaged_run(run, text):
    folder, _ = run
    (folder / "run.json").write_text(text)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ConfigError, match="run.json: not the configuration of a ViT"):
            load(path)


def test_the_files_of_a_run(run):
    """Its run.json changes with every run, and does not count for the digest of its weights."""
    folder, _ = run
    assert files_of(folder) == files_of(folder / "model.safetensors") == [folder / "model.safetensors"]


@pytest.mark.parametrize("others", [(), ("x/constants.pkl",)])
def test_a_compressed_pickle_is_refused(others, tmp_path):
    """Torch writes none. This one, of 20 kB, is a list of 20 million None."""
    file = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02(" + 20_000_000 * b"N" + b"l.")
        for name in ("x/version", *others):
            archive.writestr(name, b"3")
    before = time.process_time()
    with pytest.raises(ConfigError, match=r"refused.*data.pkl is compressed"):
        read(file)
    assert time.process_time() - before < 1

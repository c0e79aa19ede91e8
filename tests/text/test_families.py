"""Families of models that people take for text encoders: each works, or is one EncoderError that says what to do."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from support.tiny_text import keep_code_in
from test_presets import WORDS, save_tokenizer
from torch.nn import functional as F

from lift_fast.errors import EncoderError
from lift_fast.text.encoder import Encoder
from lift_fast.text.repository import code_notice
from lift_fast.text.spec import EncoderSpec

CLOSE = {"atol": 1e-5, "rtol": 0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}

# Sizes of tiny models, under the names that the families' configs have for them.
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "initializer_range": 0.5}  # fmt: skip
ROBERTA = {**BERT, "max_position_embeddings": 514}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
T5 = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
IMAGE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}  # fmt: skip
TEXT = {**BERT, "max_position_embeddings": 77}
PAIR = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 12}
AUDIO = {"patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 1], "hidden_size": 16,
         "num_hidden_layers": 2}  # fmt: skip

# Read from both sides: any pooling works.
BOTH_SIDES = {
    "Albert": {**BERT, "embedding_size": 8},
    "Bert": BERT,
    "BigBird": {**BERT, "attention_type": "original_full"},
    "Camembert": ROBERTA,
    "Data2VecText": ROBERTA,
    "Deberta": BERT,
    "DebertaV2": {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DistilBert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "initializer_range": 0.5},
    "Electra": {**BERT, "embedding_size": 8},
    "Ernie": BERT,
    "Longformer": {**ROBERTA, "attention_window": 8},
    "MPNet": ROBERTA,
    "ModernBert": {**BERT, "global_attn_every_n_layers": 2},
    "NomicBert": BERT,
    "RoFormer": {**BERT, "embedding_size": 16},
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "initializer_range": 0.5},
    # These attend to padding, whatever the mask says.
    "ConvBert": {**BERT, "embedding_size": 16, "head_ratio": 1},
    "FNet": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    "Funnel": {"d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 32},
    "Nystromformer": {**BERT, "segment_means_seq_len": 64},
}
# Read from left to right: the first token sees no other.
LEFT_TO_RIGHT = {
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5},
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5},
    "GPT2": GPT,
    "GPTNeoX": BERT,
    "Gemma": LLAMA,
    "Gemma2": LLAMA,
    "Gemma3Text": LLAMA,
    "Gemma3": {"text_config": LLAMA, "vision_config": IMAGE},
    "Llama": LLAMA,
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.5},
    "Mistral": LLAMA,
    "OPT": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 16, "init_std": 0.5},
    "Phi3": LLAMA,
    "Qwen3": LLAMA,
}  # fmt: skip
ENCODERS_OF = {"LongT5": T5, "MT5": T5, "T5": T5, "UMT5": T5}
# CLIP and its kin, with the length of their text features.
TOWERS = {
    "Align": ({"text_config": TEXT, "projection_dim": 16}, 16),
    "AltCLIP": ({**PAIR, "text_config": {**TEXT, "project_dim": 16}}, 12),
    "Blip": ({**PAIR, "text_config": {**TEXT, "encoder_hidden_size": 16}}, 12),
    "CLIP": (PAIR, 12),
    "CLIPSeg": (PAIR, 12),
    "CLIPText": (TEXT, 16),
    "ChineseCLIP": (PAIR, 12),
    "Clap": ({"text_config": TEXT, "audio_config": AUDIO, "projection_dim": 12}, 12),
    "MetaClip2": (PAIR, 12),
    "Owlv2": (PAIR, 12),
    "Siglip": (PAIR, 16),
    "Siglip2": ({**PAIR, "vision_config": {**IMAGE, "num_patches": 4}}, 16),
    "Siglip2Text": (TEXT, 16),
    "SiglipText": (TEXT, 16),
}
MODELS = BOTH_SIDES | LEFT_TO_RIGHT | ENCODERS_OF | {name: sizes for name, (sizes, _) in TOWERS.items()}


def captions(seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for length in (9, 5, 5, 3, 2, 1)]


def class_of(name):
    import transformers

    found = getattr(transformers, f"{name}{'EncoderModel' if name in ENCODERS_OF else 'Model'}", None)
    return found or pytest.skip(f"transformers {transformers.__version__} has no {name}")


def save(folder, name, sizes, template="[CLS] [BOS] $A [SEP]", model_class=None):
    """Saves a tiny random model of a family, and a tokenizer of whole words."""
    import transformers

    model_class = model_class or class_of(name)
    special = {**SPECIAL, "vocab_size": save_tokenizer(folder, template, eos="[SEP]", pad="<unk>")}
    if name == "MPNet":
        special["pad_token_id"] = 1  # its position embeddings assume so
    sizes = {**sizes, "text_config": {**sizes["text_config"], **special}} if "text_config" in sizes else sizes | special
    torch.manual_seed(0)
    model = model_class(getattr(transformers, f"{name}Config")(**sizes)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: name of a family -> the folder of its model."""
    root = tmp_path_factory.mktemp("families")

    def folder(name):
        if not (root / name).exists():
            save(root / name, name, MODELS[name])
        return root / name

    return folder


def encoder_of(folder, pooling="mean", **settings):
    return Encoder(EncoderSpec(str(folder), pooling, max_length=12, **settings))


def check(folder, pooling):
    """Checks that a caption has one vector, alone, in a batch and padded on either side, and returns the vectors."""
    right, left = (encoder_of(folder, pooling, padding=side) for side in ("right", "left"))
    alone = torch.cat([right.encode([text]) for text in captions()])
    for encoder in (right, left):
        torch.testing.assert_close(encoder.encode(captions()), alone, atol=1e-4, rtol=0)
    assert alone.shape == (len(captions()), right.dim)
    assert torch.pdist(alone).max() > 1e-3
    return alone


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("name", [*BOTH_SIDES, *ENCODERS_OF])
def test_a_caption_has_one_vector(saved, name, pooling):
    """Also where a model attends to padding (ConvBERT, FNet, Funnel, Nystromformer), whose batches have none."""
    check(saved(name), pooling)


@pytest.mark.parametrize("name", LEFT_TO_RIGHT)
def test_a_model_that_reads_from_left_to_right(saved, name):
    folder = saved(name)
    check(folder, "last")
    check(folder, "mean")
    with pytest.raises(EncoderError, match="gives different captions the same vector with the pooling cls; .*: last"):
        encoder_of(folder, "cls").encode(captions())
    assert encoder_of(folder, "cls").encode(captions()[:1]).shape == (1, 16)  # one caption shows nothing


@pytest.mark.parametrize("name", TOWERS)
def test_a_text_tower(saved, name):
    folder = saved(name)
    assert check(folder, "own").shape[1] == TOWERS[name][1]
    assert check(folder, "mean").shape[1] == 16


def features(model, tokenizer, texts, **options):
    """The text features as transformers computes them, from its tokenizer's batch."""
    with torch.no_grad():
        got = model.get_text_features(**tokenizer(texts, return_tensors="pt", **options))
    return F.normalize(got if isinstance(got, torch.Tensor) else got.pooler_output, dim=-1)


@pytest.mark.parametrize("name", ["CLIP", "ChineseCLIP", "Blip", "Clap", "Siglip", "Siglip2"])
def test_own_pooling_is_the_features_that_are_compared_with_images(saved, name):
    """SigLIP's as it was trained: padded to the longest text, and without a mask."""
    from transformers import AutoTokenizer

    folder, texts = saved(name), captions()
    model, tokenizer = class_of(name).from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids"] if "Siglip" in name else ["input_ids", "attention_mask"]
    options = {"padding": "max_length", "max_length": 77} if "Siglip" in name else {"padding": True}
    encoder = encoder_of(folder, "own")
    assert encoder.pooling == "own"
    torch.testing.assert_close(encoder.encode(texts), features(model, tokenizer, texts, **options), **CLOSE)


def test_a_text_tower_with_its_projection(tmp_path):
    import transformers

    model = save(
        tmp_path,
        "CLIPText",
        {**TEXT, "projection_dim": 12},
        "[CLS] [BOS] $A [SEP]",
        transformers.CLIPTextModelWithProjection,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        want = F.normalize(torch.cat([model(**tokenizer(t, return_tensors="pt")).text_embeds for t in captions()]))
    torch.testing.assert_close(encoder_of(tmp_path, "own").encode(captions()), want, **CLOSE)


@pytest.mark.parametrize("whole", [False, True])
def test_the_encoder_of_a_t5(tmp_path, whole):
    """From a repository with the encoder alone, or with the decoder too."""
    import transformers

    model = save(tmp_path, "T5", T5, "$A [SEP]", None if not whole else transformers.T5ForConditionalGeneration)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        states = [model.encoder(**tokenizer(t, return_tensors="pt")).last_hidden_state[0] for t in captions()]
    want = F.normalize(torch.stack([state.mean(dim=0) for state in states]))
    torch.testing.assert_close(encoder_of(tmp_path).encode(captions()), want, **CLOSE)


@pytest.mark.parametrize("name", ["Bart", "MBart", "Pegasus", "ProphetNet"])
def test_an_encoder_decoder_without_an_encoder_class(tmp_path, name):
    import transformers

    save_tokenizer(tmp_path, "$A", eos="</s>", pad="</s>")
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="is an encoder-decoder .* name an encoder, a decoder-only .* or a T5"):
        encoder_of(tmp_path)


@pytest.mark.parametrize(("name", "sizes"), [("ViT", IMAGE), ("CLIPVision", IMAGE)])
def test_a_model_of_images_is_no_text_encoder(tmp_path, name, sizes):
    import transformers

    save_tokenizer(tmp_path, "$A", eos="</s>", pad="</s>")
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="does not run on text alone: .*; name a text encoder"):
        encoder_of(tmp_path)


# ---- tokenizers


@pytest.mark.parametrize("name", ["Llama", "Bert", "CLIP"])
def test_a_tokenizer_without_padding_and_end_tokens(saved, tmp_path, name):
    folder = shutil.copytree(saved(name), tmp_path / "model")
    want = encoder_of(folder).encode(captions())
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for token in ("eos_token", "pad_token"):
        settings.pop(token)
    file.write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    for side in ("right", "left"):
        encoder = encoder_of(folder, padding=side)
        assert encoder.tokenizer.pad_token is None and encoder.tokenizer.eos_token is None
        torch.testing.assert_close(encoder.encode(captions()), want, **CLOSE)


def test_a_tokenizer_of_another_model(saved, tmp_path):
    folder = shutil.copytree(saved("Bert"), tmp_path / "model")
    words = list(WORDS)
    WORDS.extend(f"word{i}" for i in range(5))
    try:
        save_tokenizer(folder, "[CLS] [BOS] $A [SEP]", eos="[SEP]", pad="<unk>")
    finally:
        WORDS[:] = words
    with pytest.raises(EncoderError, match=r"has \d+ tokens, and the model has embeddings for \d+: they are of differ"):
        encoder_of(folder)


@pytest.mark.parametrize("token", ["<image>", "[PAD]"])
def test_a_token_that_was_added_and_has_no_embedding(saved, tmp_path, token):
    """It does no harm until a caption has it, not even as the token to pad with."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(saved("Bert"), tmp_path / "model")
    want = encoder_of(folder).encode(captions())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": token} if token == "[PAD]" else {"additional_special_tokens": [token]})
    tokenizer.save_pretrained(folder)
    encoder = encoder_of(folder)
    torch.testing.assert_close(encoder.encode(captions()), want, **CLOSE)
    with pytest.raises(
        EncoderError, match=rf"gives a caption the token '{re_escape(token)}', number \d+, and the model"
    ):
        encoder.encode(["a dog", f"a {token}"])


def re_escape(text):
    return text.replace("[", r"\[")


def test_a_prompt_that_fills_the_length(saved):
    """All captions would be cut off, and have one vector."""
    folder = saved("Bert")
    prompt = "a red circle "
    with pytest.raises(
        EncoderError, match="max_length 6 leaves nothing of any caption: .* are 6 tokens; set it higher"
    ):
        Encoder(EncoderSpec(str(folder), "mean", prompt, 6))
    assert len(set(Encoder(EncoderSpec(str(folder), "mean", prompt, 7)).encode(["old", "grey"])[:, 0].tolist())) == 2


def test_a_vector_of_zeros_is_told(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved("Llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match="returned a vector that is not finite, or zero, for caption 'a star'"):
        encoder_of(folder).encode(["a star"])


# ---- code that comes with a model


def with_code(folder):
    """Makes a folder's model one that needs its own Python code, as those of the hub with an auto_map do."""
    (folder / "modeling_own.py").write_text(
        "from transformers import BertModel\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    (folder / "configuration_own.py").write_text(
        "from transformers import BertConfig\nfrom .helpers import SIZE\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
    )
    (folder / "helpers.py").write_text("SIZE = 1\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig",
                                                 "AutoModel": "modeling_own.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    keep_code_in(tmp_path / "modules", monkeypatch)


def test_code_is_named_before_it_may_run(saved, tmp_path, own_modules):
    folder = with_code(shutil.copytree(saved("Bert"), tmp_path / "model"))
    files = rf"configuration_own\.py, helpers\.py, modeling_own\.py of {folder}"
    with pytest.raises(EncoderError, match=rf"needs code that comes with it.*: {files}; read it.*--trust-remote-code"):
        encoder_of(folder)
    assert not (tmp_path / "modules").exists()
    spec = EncoderSpec(str(folder), "mean", trust_remote_code=True)
    assert code_notice(spec) == [
        f"{folder} runs code that comes with it: configuration_own.py, helpers.py, modeling_own.py of {folder}"
    ]
    torch.testing.assert_close(
        encoder_of(folder, trust_remote_code=True).encode(captions()), encoder_of(saved("Bert")).encode(captions())
    )


def test_nothing_is_asked_at_the_terminal(saved, tmp_path, own_modules, monkeypatch):
    """transformers asks whether to run code unless it is told."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    with pytest.raises(EncoderError, match="needs code"):
        encoder_of(with_code(shutil.copytree(saved("Bert"), tmp_path / "model")))


def test_the_commit_that_code_comes_from_is_named(saved, tmp_path, own_modules, monkeypatch):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    with_code(shutil.copytree(saved("Bert"), snapshot))
    (snapshot / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["other/place--tokenization_own.Slow", None]}})
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(snapshot))
    notice = code_notice(EncoderSpec("a/b", "mean", revision="main", trust_remote_code=True))
    assert notice == [
        "a/b runs code that comes with it: configuration_own.py, helpers.py, modeling_own.py of a/b on the hub, commit "
        "0123abc",
        "a/b runs code that comes with it: tokenization_own.py and what it imports, of other/place on the hub (branch "
        "main)",
    ]


def test_a_model_without_code_has_no_notice(saved):
    assert code_notice(EncoderSpec(str(saved("Bert")), trust_remote_code=True)) == []
    assert code_notice(EncoderSpec("nobody/nothing")) == []  # not looked for without trust_remote_code


def command(line, capfd):
    """Runs a command: what it printed, and its exit status."""
    import shlex

    from lift_fast.cli.main import main

    capfd.readouterr()
    try:
        status = main(shlex.split(line)) or 0
    except SystemExit as stop:
        status = stop.code
    captured = capfd.readouterr()
    return captured.out + captured.err, status


def test_embed_names_the_code_and_its_place(saved, tmp_path, own_modules, capfd):
    pytest.importorskip("tyro")
    folder = with_code(shutil.copytree(saved("Bert"), tmp_path / "model"))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in captions()))
    line = f"embed --data {tmp_path}/t.jsonl --encoder {folder} --pooling mean --max-length 12 --out {tmp_path}/cache"
    code = f"configuration_own.py, helpers.py, modeling_own.py of {folder}"
    printed, status = command(line, capfd)
    assert status == 2 and f"comes with it, which runs only if you allow it: {code}; read it" in printed
    assert "Traceback" not in printed and not (tmp_path / "cache").exists()
    printed, status = command(f"{line} --trust-remote-code", capfd)
    assert status == 0 and f"{folder} runs code that comes with it: {code}\n" in printed
    # The manifest says that the encoder runs code. Whether it may is decided anew.
    encoder = EncoderSpec.of_dict(json.loads((tmp_path / "cache/manifest.json").read_text())["encoder"])
    assert code_notice(encoder) == [f"{folder} runs code that comes with it: {code}"]
    assert not code_notice(replace(encoder, trust_remote_code=False))


def test_embed_stops_where_all_captions_get_one_vector(saved, tmp_path, capfd):
    pytest.importorskip("tyro")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in captions()))
    line = f"embed --data {tmp_path}/t.jsonl --encoder {saved('GPT2')} --pooling cls --max-length 12 --out {tmp_path}/c"
    printed, status = command(line, capfd)
    assert status == 2 and "gives different captions the same vector with the pooling cls" in printed
    assert "Traceback" not in printed

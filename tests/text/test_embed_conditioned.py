"""Embedding with a conditioning: the vectors, the sample that it is fitted to, ranks, kills, and what is refused."""

import errno
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from support.tiny_caches import contents
from support.tiny_text import DIM, Spec, TinyEncoder, captions_of, start, work, work_until, write_lines
from test_families import TEXT, encoder_of, save
from test_presets import WORDS

from lift_fast.cache import Cache, Conditioning, encode
from lift_fast.cache.conditioning import CONDITIONING
from lift_fast.data.options import DataOptions
from lift_fast.data.sources import open_source
from lift_fast.errors import CacheError, CacheMismatch, ConfigError, DataError, EncoderError
from lift_fast.text import conditioning as fits
from lift_fast.text import embed as module
from lift_fast.text.conditioning import Request, conditioning_of, publish
from lift_fast.text.embed import embed_share, estimate

SHARDS, ROWS = 20, 30  # ROWS per shard; a group has 16 shards, so there are two
REQUEST = Request(0.5, 16, rows=150, seed=3)


class Cone(TinyEncoder):
    """Vectors that share a mean and have fewer and fewer in each direction, as those of real encoders."""

    def vector(self, caption):
        return np.float32(0.7) + super().vector(caption) * np.geomspace(1, 0.05, self.dim, dtype=np.float32)


class Killed(BaseException):
    """As if the process were killed: no `except Exception` catches it."""


def source_of(path, rows=ROWS, **options):
    return open_source(path, options=DataOptions(shard_rows=rows, **options))


def share(source, out, encoder=None, **options):
    return embed_share(source, out, encoder or Cone(mixed=False), progress=False, **options)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def fit_by_numpy(vectors):
    """Mean, axes as rows and deviations of unit vectors, the largest deviation first."""
    x = unit(vectors)
    variances, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    return x.mean(axis=0), axes.T[::-1], np.sqrt(np.clip(variances[::-1], 0, None))


def condition(vectors, mean, axes, deviations, power):
    y = (unit(vectors) - mean) @ axes.T * deviations ** -float(power)
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def expected(cache, sample, vectors, power, dim):
    """Conditioned vectors by numpy alone; only which of an axis's two directions is taken from the cache."""
    mean, axes, deviations = fit_by_numpy(sample)
    axes, found = axes[:dim], cache.conditioning.axes.double().numpy()
    signs = np.sign((axes * found).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(axes * signs, found, atol=1e-5)
    return condition(vectors, mean, axes * signs, deviations[:dim], power)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Captions, a third of them repeats."""
    return write_lines(tmp_path_factory.mktemp("lines") / "c.jsonl", captions_of(SHARDS * ROWS, 500))


@pytest.fixture(scope="module")
def whole(lines, tmp_path_factory):
    """The files of a cache that one process wrote, never killed."""
    out = tmp_path_factory.mktemp("whole") / "c"
    assert tiny(lines, out).missing == 0
    return contents(out)


def tiny(lines, out, rank=0, world=1, request=REQUEST):
    return work(lines, out, ROWS, rank, world, "int8", False, request)


# the vectors


@pytest.mark.parametrize("codec", ["f32", "bf16", "int8", "int8r", "fp8", "int4r"])
@pytest.mark.parametrize(("power", "dim"), [(0, None), (0.37, 17), (1, 1)])
def test_rows_are_the_formula(tmp_path, codec, power, dim):
    seed = random.SystemRandom().randrange(1 << 16)
    print("seed", seed)
    captions = [f"{seed} {caption}" for caption in captions_of(700, 450)]
    encoder, kept = Cone(mixed=False), dim or DIM
    source = source_of(write_lines(tmp_path / "c.jsonl", captions), 130)
    done = share(source, tmp_path / "c", encoder, codec=codec, conditioning=Request(power, dim))
    cache = Cache(tmp_path / "c")
    cache.verify()
    assert (cache.dim, len(cache), cache.manifest.conditioning["source_dim"]) == (kept, 700, DIM)
    vectors = encoder.encode(captions).numpy()
    truth = torch.from_numpy(expected(cache, vectors, vectors, power, kept))
    got = cache.vectors(torch.arange(700)).double()
    codes = encode(truth.float(), codec, cache.rotation)
    best = codes.widen() if cache.rotation is None else cache.rotation.undo(codes.widen())
    error, least = (torch.linalg.vector_norm(x.double() - truth, dim=1) for x in (got, best))
    assert (error <= 1.02 * least + 2e-5).all()
    assert codec != "f32" or error.max() < 2e-5
    # The figures that are printed: of the first shard's vectors to their codes, and of the sample's among themselves.
    firsts = list(dict.fromkeys(captions[:130]))
    rows = torch.tensor([captions.index(caption) for caption in firsts])
    want = torch.cosine_similarity(got[rows], truth[rows]).mean().item()
    assert done.cosine == pytest.approx(want, abs=1e-6)
    firsts = list(dict.fromkeys(captions))
    cosines = unit(encoder.encode(firsts)) @ unit(encoder.encode(firsts)).T
    assert done.spread == pytest.approx((cosines.sum() - len(firsts)) / (len(firsts) * (len(firsts) - 1)), abs=1e-6)


def test_the_sample_is_drawn_over_all_shards_and_repeats_count(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "_CHUNK", 32)
    captions = captions_of(400, 90)
    source, encoder = source_of(write_lines(tmp_path / "c.jsonl", captions), 70), Cone(mixed=False)
    known = []
    share(source, tmp_path / "c", encoder, codec="f32", conditioning=Request(0.6, 8, 101, 5), fitted=known.append)
    cache = Cache(tmp_path / "c")
    chosen = np.sort(np.random.default_rng(5).choice(400, 101, replace=False))
    sampled = [captions[i] for i in chosen]
    assert encoder.encoded[:101] == sampled and len(encoder.encoded) == 101 + len(set(captions))
    assert len(known) == 1 and known[0].to_bytes() == (tmp_path / "c" / CONDITIONING).read_bytes()
    sample, vectors = encoder.encode(sampled).numpy(), encoder.encode(captions).numpy()
    truth = expected(cache, sample, vectors, 0.6, 8)
    np.testing.assert_allclose(cache.vectors(torch.arange(400)).numpy(), truth, atol=1e-5)
    # What is reported, of the sample.
    mean, axes, deviations = fit_by_numpy(sample)
    found = cache.conditioning.report()
    after = condition(sample, mean, axes[:8], deviations[:8], 0.6)
    pairs = ~np.eye(101, dtype=bool)
    for name, x in (("before", unit(sample)), ("after", after)):
        assert found["mean_cosine"][name] == pytest.approx((x @ x.T)[pairs].mean(), abs=1e-6)
    for name, d in (("before", deviations**2), ("after", deviations[:8] ** 0.8)):
        shares = d / d.sum()
        assert found["effective_rank"][name] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert found["variance_kept"] == pytest.approx((deviations[:8] ** 2).sum() / (deviations**2).sum(), rel=1e-9)
    assert (found["rows"], found["power"], found["dim"]) == ([101], 0.6, {"before": DIM, "after": 8})


@pytest.mark.parametrize(("dim", "rows"), [(24, 1 << 14), (4096, 1 << 14), (5120, 20480)])
def test_the_default_sample(dim, rows):
    assert Request().sample_rows(dim) == rows and Request(rows=7).sample_rows(dim) == 7


def test_what_cannot_be_embedded_is_no_part_of_the_sample(tmp_path):
    captions = [*captions_of(200, 150), ".", "  ", "...", "of a key that another has", *captions_of(50, 40)]
    path = write_lines(tmp_path / "c.jsonl", captions)
    path.write_text(path.read_text().replace('"k203"', '"k181"'))
    encoder = Cone(mixed=False)
    done = share(source_of(path, 60, skip_bad=True), tmp_path / "c", encoder, codec="f32", conditioning=Request(0.5))
    cache = Cache(tmp_path / "c")
    good = [i for i in range(254) if i not in range(200, 204)]
    assert done.skipped == {"no tokens": 2, "no caption": 1, "repeated key": 1}
    assert cache.conditioning.about["rows"] == [250] and captions[203] not in encoder.encoded
    vectors = encoder.encode([captions[i] for i in good]).numpy()
    got = cache.vectors(torch.arange(254))
    np.testing.assert_allclose(got[good].numpy(), expected(cache, vectors, vectors, 0.5, DIM), atol=2e-5)
    assert not got[200:204].any()


@pytest.mark.parametrize(
    ("name", "model", "dim"), [("CLIPText", "CLIPTextModelWithProjection", 12), ("SiglipText", "SiglipTextModel", 16)]
)
def test_text_towers_of_clip_and_siglip(tmp_path, name, model, dim):
    import transformers

    sizes = {**TEXT, "projection_dim": 12} if name == "CLIPText" else TEXT
    save(tmp_path / "e", name, sizes, "[CLS] [BOS] $A [SEP]", getattr(transformers, model))
    encoder, rng = encoder_of(tmp_path / "e", "own"), random.Random(7)
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(90)]
    source = source_of(write_lines(tmp_path / "c.jsonl", captions), 40)
    share(source, tmp_path / "c", encoder, codec="f32", conditioning=Request(0.4, dim - 3))
    cache = Cache(tmp_path / "c")
    vectors = encoder.encode(captions).numpy()
    truth = expected(cache, vectors, vectors, 0.4, dim - 3)
    np.testing.assert_allclose(cache.vectors(torch.arange(90)).numpy(), truth, atol=1e-5)
    assert cache.manifest.conditioning["source_dim"] == dim


def test_the_conditioning_of_another_cache(tmp_path, lines):
    share(source_of(lines), tmp_path / "a", codec="f32", conditioning=Request("auto", 16))
    first = Cache(tmp_path / "a")
    encoder, captions = Cone(mixed=False), [f"another caption {i}" for i in range(40)]
    taken = conditioning_of(first, encoder.spec.as_dict(), DIM, "b")
    share(source_of(write_lines(tmp_path / "b.jsonl", captions)), tmp_path / "b", codec="int4r", conditioning=taken)
    second = Cache(tmp_path / "b")
    assert first.manifest.conditioning == second.manifest.conditioning is not None
    assert contents(tmp_path / "a")[CONDITIONING] == contents(tmp_path / "b")[CONDITIONING]
    c = first.conditioning
    truth = condition(encoder.encode(captions), c.mean.numpy(), c.axes.double().numpy(), c.deviations[:16].numpy(),
                      c.power)  # fmt: skip
    assert 0 < c.power <= 0.75
    cosines = (second.vectors(torch.arange(40)).double().numpy() * truth).sum(axis=1)
    assert (cosines > 0.98).all()


# ranks and kills


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_the_same_bytes(tmp_path, lines, whole, world):
    processes = [start(tiny, lines, tmp_path / "c", rank, world) for rank in range(world)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    assert contents(tmp_path / "c") == whole


def test_the_first_fit_stays(tmp_path, lines, whole):
    """Of two ranks whose fits differ in their last bits, the later one takes the first one's, and so its dim."""
    tiny(lines, tmp_path / "c")
    fit = Conditioning.load(tmp_path / "c")
    other = Conditioning(fit.mean + 1e-9, fit.axes, fit.deviations, fit.power, fit.about)
    assert other.to_bytes() != fit.to_bytes()
    folder = tmp_path / "d" / "e"
    assert publish(folder, other).to_bytes() == other.to_bytes()
    assert publish(folder, fit).to_bytes() == other.to_bytes()
    assert list(contents(folder)) == [CONDITIONING]
    tiny(lines, folder)
    assert contents(folder)[CONDITIONING] == other.to_bytes()
    cache = Cache(folder)
    cache.verify()
    assert cache.manifest.conditioning == other.as_dict()


def test_a_rank_that_fitted_later_uses_the_fit_of_the_first(tmp_path, lines, whole, monkeypatch):
    tiny(lines, tmp_path / "c")
    fit = Conditioning.load(tmp_path / "c")
    other = Conditioning(fit.mean + 1e-9, fit.axes, fit.deviations, fit.power, fit.about)

    def publish_later(folder, fitted):
        assert fitted.to_bytes() == fit.to_bytes()
        publish(folder, other)
        return publish(folder, fitted)

    monkeypatch.setattr(module, "publish", publish_later)
    tiny(lines, tmp_path / "d")
    cache = Cache(tmp_path / "d")
    cache.verify()
    assert cache.manifest.conditioning == other.as_dict()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(tmp_path, lines, whole, monkeypatch, error):
    def refuse(source, target):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    tiny(lines, tmp_path / "c")
    assert contents(tmp_path / "c") == whole
    fit = Conditioning.load(tmp_path / "c")
    other = Conditioning(fit.mean + 1e-9, fit.axes, fit.deviations, fit.power, fit.about)
    for given in (other, fit):
        assert publish(tmp_path / "d", given).to_bytes() == other.to_bytes()
    assert list(contents(tmp_path / "d")) == [CONDITIONING]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 20, 41, 42, 43])
def test_killed_around_a_rename(tmp_path, lines, whole, step):
    """That of partial.json, of shards, and of manifest.json; the fit is there before."""
    process = start(work_until, step, lines, tmp_path / "c", ROWS, 0, 1, "int8", False, REQUEST)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "c" / CONDITIONING).read_bytes() == whole[CONDITIONING]
    assert tiny(lines, tmp_path / "c").missing == 0
    assert contents(tmp_path / "c") == whole


def killed_at_the_link(before, lines, out):
    link = os.link

    def linked(source, target):
        if before:
            os.kill(os.getpid(), signal.SIGKILL)
        link(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.link = linked
    tiny(lines, out)


@pytest.mark.parametrize("before", [True, False])
def test_killed_while_the_fit_is_published(tmp_path, lines, whole, before):
    process = start(killed_at_the_link, before, lines, tmp_path / "c")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = list(contents(tmp_path / "c"))
    assert (CONDITIONING in names) != before and any(name.endswith(".part") for name in names)
    assert tiny(lines, tmp_path / "c").missing == 0
    assert contents(tmp_path / "c") == whole


def test_killed_while_the_sample_is_encoded(tmp_path, lines, whole, monkeypatch):
    monkeypatch.setattr(fits, "_CHUNK", 40)
    calls = []

    class Dying(TinyEncoder):
        def encode(self, *arguments):
            calls.append(None)
            if len(calls) == 3:
                raise Killed
            return super().encode(*arguments)

    with pytest.raises(Killed):
        share(source_of(lines), tmp_path / "c", Dying(), conditioning=REQUEST)
    assert not (tmp_path / "c").exists()
    monkeypatch.undo()
    tiny(lines, tmp_path / "c")
    assert contents(tmp_path / "c") == whole


def test_a_run_that_goes_on_does_not_fit_again(tmp_path, lines, whole, monkeypatch):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / CONDITIONING).write_bytes(whole[CONDITIONING])
    monkeypatch.setattr(module, "fit_to_source", None)
    tiny(lines, tmp_path / "c")
    assert contents(tmp_path / "c") == whole
    (tmp_path / "c" / "text-00007.safetensors").unlink()
    tiny(lines, tmp_path / "c")
    assert contents(tmp_path / "c") == whole
    done = tiny(lines, tmp_path / "c")
    assert (done.computed, done.written, done.missing) == (0, 0, 0)


# refused


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(0.25, 16, 150, 3), r"power is 0\.5, not 0\.25"),
        (Request("auto", 16, 150, 3), r"power is 0\.5, not 'auto'"),
        (Request(0.5, "auto", 150, 3), "dim is 16, not 'auto'"),
        (Request(0.5, 16, 150, 4), "seed is 3, not 4"),
        (Request(0.5, 16, None, 3), "rows is 150, not 16384"),
    ],
)
def test_another_request_is_refused(tmp_path, lines, whole, request_, words):
    """Whether the cache is finished, or there is only the fit of a run that was killed."""
    for names in ([CONDITIONING], list(whole)):
        out = tmp_path / str(len(names))
        out.mkdir()
        for name in names:
            (out / name).write_bytes(whole[name])
        with pytest.raises(CacheMismatch, match=rf"fitted for another command \({words}\); repeat that command's opt"):
            tiny(lines, out, request=request_)
        assert contents(out) == {name: whole[name] for name in names}


def test_the_fit_of_other_captions_or_another_encoder_is_refused(tmp_path, lines, whole):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / CONDITIONING).write_bytes(whole[CONDITIONING])
    fewer = write_lines(tmp_path / "c.jsonl", captions_of(200, 100))
    with pytest.raises(CacheMismatch, match="captions is 600, not 200"):
        tiny(fewer, tmp_path / "c")
    with pytest.raises(CacheMismatch, match="encoder name is 'tiny', not 'other'"):
        share(source_of(lines), tmp_path / "c", TinyEncoder(spec=Spec("other")), conditioning=REQUEST)
    with pytest.raises(CacheMismatch, match="is the conditioning of another cache, which is not begun"):
        tiny(lines, tmp_path / "c", request=None)
    fit = Conditioning.load(tmp_path / "c")
    other = Conditioning(fit.mean + 1e-9, fit.axes, fit.deviations, fit.power, fit.about)
    with pytest.raises(CacheMismatch, match="is the conditioning of another cache, which is not begun"):
        tiny(lines, tmp_path / "c", request=other)
    assert contents(tmp_path / "c") == {CONDITIONING: whole[CONDITIONING]}
    tiny(lines, tmp_path / "c", request=fit)
    assert contents(tmp_path / "c") == whole


def test_a_fit_that_says_nothing_of_its_command_is_refused(tmp_path, lines, whole):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / CONDITIONING).write_bytes(whole[CONDITIONING])
    fit = Conditioning.load(tmp_path / "whole")
    for number, about in enumerate([{}, {"asked": [1]}, {"asked": {"encoder": "tiny"}}, {"asked": {"encoder": [1]}}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        other = Conditioning(fit.mean, fit.axes, fit.deviations, fit.power, about)
        (folder / CONDITIONING).write_bytes(other.to_bytes())
        with pytest.raises(CacheMismatch, match="was fitted for another command"):
            tiny(lines, folder)


def test_the_path_of_the_encoder_s_folder_is_not_in_the_file(tmp_path, lines):
    """Runs and exports take the file to other machines. The encoders of two folders are told apart nevertheless."""
    for name, kept in [("/home/someone/models/mine", "mine"), ("tiny", "tiny"), ("org/model", "org/model")]:
        out = tmp_path / kept
        share(source_of(lines), out, Cone(mixed=False, spec=Spec(name)), conditioning=REQUEST)
        data = (out / CONDITIONING).read_bytes()
        assert b"someone" not in data and kept.encode() in data
        assert Cache(out).conditioning.about["asked"]["encoder"]["name"].startswith(kept)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "mine" / CONDITIONING, tmp_path / "other" / CONDITIONING)
    with pytest.raises(CacheMismatch, match="encoder name is 'mine .*', not 'mine .*'"):
        share(source_of(lines), tmp_path / "other", Cone(spec=Spec("/home/b/mine")), conditioning=REQUEST)


def test_plain_and_conditioned_caches_do_not_mix(tmp_path, lines, whole):
    tiny(lines, tmp_path / "plain", request=None)
    before = contents(tmp_path / "plain")
    with pytest.raises(CacheMismatch, match="holds a cache that is not conditioned; name another folder"):
        tiny(lines, tmp_path / "plain")
    assert contents(tmp_path / "plain") == before
    tiny(lines, tmp_path / "c")
    with pytest.raises(CacheMismatch, match="holds a cache of another kind"):
        tiny(lines, tmp_path / "c", request=None)
    assert contents(tmp_path / "c") == whole


def test_a_conditioning_that_does_not_fit_is_not_taken(tmp_path, lines):
    tiny(lines, tmp_path / "plain", request=None)
    with pytest.raises(ConfigError, match="plain is not conditioned; name a cache that is"):
        conditioning_of(Cache(tmp_path / "plain"), {"name": "tiny"}, DIM, "b")
    tiny(lines, tmp_path / "c")
    cache = Cache(tmp_path / "c")
    for encoder, dim, words in [
        ({"name": "tiny", "prompt": "query: "}, DIM, "encoder prompt is None, not 'query: '"),
        ({"name": "other"}, DIM, "encoder name is 'tiny', not 'other'"),
        ({"name": "tiny"}, 16, "its vectors have length 24, not 16"),
    ]:
        with pytest.raises(CacheMismatch, match=rf"was not made by the encoder of b \({words}\).* with the same set"):
            conditioning_of(cache, encoder, dim, "b")


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (24, {}, "24 captions do not determine 24 axes; keep fewer"),
        (600, {"rows": 16, "dim": 16}, "16 captions do not determine 16 axes"),
        (600, {"dim": 25}, "vectors of length 24 have 24 axes, not 25; keep fewer"),
    ],
)
def test_too_many_axes(tmp_path, count, options, words):
    path = write_lines(tmp_path / "c.jsonl", [f"caption {i}" for i in range(count)])
    encoder = Cone(mixed=False)
    for make in (share, lambda source, out, encoder, **more: estimate(source, out, encoder, **more)):
        with pytest.raises(ConfigError, match=words):
            make(source_of(path), tmp_path / "c", encoder, conditioning=Request(0.5, **options))
    assert not encoder.encoded and not (tmp_path / "c").exists()


def test_too_many_axes_among_auto_dims(tmp_path):
    """How many they are is known from the vectors alone."""
    path = write_lines(tmp_path / "c.jsonl", captions_of(20, 20))
    with pytest.raises(ConfigError, match="20 captions do not determine 24 axes"):
        share(source_of(path), tmp_path / "c", conditioning=Request(0.5, "auto"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"power": 1.5}, "from 0 to 1, or auto, not 1.5"),
        ({"power": float("nan")}, "from 0 to 1, or auto, not nan"),
        ({"dim": 0}, "at least 1 axis, or auto, not 0"),
        ({"rows": 1}, "at least 2 captions, not 1"),
        ({"seed": -1}, "0 or above, not -1"),
    ],
)
def test_settings_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        Request(**options)


def test_bad_data_and_a_full_disk_are_found_before_a_byte_is_written(tmp_path, lines, monkeypatch):
    bad = write_lines(tmp_path / "c.jsonl", [*captions_of(300, 300), " "])
    encoder = Cone()
    with pytest.raises(DataError, match="line 301, key 'k300' has no caption"):
        share(source_of(bad), tmp_path / "c", encoder, conditioning=REQUEST)
    assert not (tmp_path / "c").exists() and not encoder.encoded
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(CacheError, match="for 20 shards, and its disk has 100 bytes"):
        share(source_of(lines), tmp_path / "c", conditioning=REQUEST)
    assert not (tmp_path / "c").exists()


def test_a_fit_that_cannot_be_written(tmp_path, lines, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CacheError, match=r"cannot write .*conditioning.safetensors: the disk is full; remove the cau"):
        share(source_of(lines), tmp_path / "c", conditioning=REQUEST)
    assert not list((tmp_path / "c").iterdir())


def test_an_encoder_that_gives_one_vector_is_found_in_the_sample(tmp_path, lines):
    class Constant(TinyEncoder):
        def vector(self, caption):
            return np.full(self.dim, 0.5, dtype=np.float32) + 1e-5 * super().vector(caption)

    class Near(TinyEncoder):
        def vector(self, caption):
            return np.full(self.dim, 0.5, dtype=np.float32) + 0.1 * super().vector(caption)

    with pytest.raises(EncoderError, match="gives one vector for"):
        share(source_of(lines), tmp_path / "c", Constant(mixed=False), conditioning=REQUEST)
    assert not (tmp_path / "c").exists()
    warnings = []
    done = share(source_of(lines), tmp_path / "c", Near(mixed=False), conditioning=REQUEST, warn=warnings.append)
    assert len(warnings) == 1 and "nearly the same" in warnings[0] and done.spread > 0.95
    assert abs(Cache(tmp_path / "c").conditioning.report()["mean_cosine"]["after"]) < 0.05


# estimates


@pytest.mark.parametrize("codec", ["int8", "int2r", "f32"])
@pytest.mark.parametrize("power", [0.5, "auto"])
def test_the_estimate_s_size(tmp_path, lines, codec, power):
    """Exact where the fit is known, else a bound: to a few digits where the number of axes is given."""
    encoder, source = Cone(), source_of(lines)
    out, request = tmp_path / "c", Request(power, 15)
    before = estimate(source, out, encoder, codec=codec, conditioning=request, worlds=(1, 2))
    assert not out.exists() and (before.dim, before.rows, before.exact) == (15, 600, False)
    assert before.seconds[1] == pytest.approx((600 + 600) / before.captions_per_s)  # the sample, and then all
    assert before.seconds[2] == pytest.approx((600 + 480) / before.captions_per_s)
    share(source, out, codec=codec, conditioning=request)
    size = sum(map(len, contents(out).values()))
    assert size <= before.bytes < size + 100
    for known in (request, Cache(out).conditioning):
        again = estimate(source, out, encoder, codec=codec, conditioning=known)
        assert (again.dim, again.bytes, again.exact) == (15, size, True)
        assert again.seconds[1] == pytest.approx(600 / again.captions_per_s)
    with pytest.raises(CacheMismatch, match="fitted for another command"):
        estimate(source, out, encoder, codec=codec, conditioning=Request(0.1, 15))
    with pytest.raises(ConfigError, match="24 axes, not 25"):
        estimate(source, tmp_path / "d", encoder, conditioning=Request(0.1, 25))


def test_the_estimate_of_auto_dims_is_a_bound(tmp_path):
    class Flat(TinyEncoder):
        """Vectors of length 96, of which 40 numbers hold nearly all."""

        def vector(self, caption):
            return super().vector(caption) * np.where(np.arange(self.dim) < 40, 1, 1e-3).astype(np.float32)

    encoder = Flat(mixed=False, dim=96)
    source = source_of(write_lines(tmp_path / "c.jsonl", captions_of(500, 500)))
    found = estimate(source, tmp_path / "c", encoder, conditioning=Request(0.3, "auto"))
    share(source, tmp_path / "c", encoder, conditioning=Request(0.3, "auto"))
    assert (Cache(tmp_path / "c").dim, found.dim, found.exact) == (64, 96, False)
    assert sum(map(len, contents(tmp_path / "c").values())) < found.bytes

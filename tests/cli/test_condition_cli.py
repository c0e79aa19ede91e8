"""lift-fast embed --condition and lift-fast cache condition: what they write, print, resume and refuse."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from support.tiny_caches import ENCODER, contents, rotation_for, write
from support.tiny_text import captions_of, write_lines

from lift_fast.cache import Cache, CacheWriter, encode
from lift_fast.cache.conditioning import CONDITIONING
from lift_fast.cli.main import main
from lift_fast.text import conditioning as fits

DIM = 24
SIZES = [40, 0, 70, 33]


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def run(command: str) -> None:
    main(shlex.split(command))


def error_of(capfd, command: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("lift-fast: error: "))
    return line


def cone(rng, rows, dim=DIM, shift=0.7):
    """Vectors that share a mean and have fewer and fewer in each direction."""
    return torch.from_numpy(shift + rng.normal(size=(rows, dim)) * np.geomspace(1, 0.05, dim)).float()


def cache_of(folder, vectors, sizes=SIZES, codec="f32", encoder=ENCODER, skipped=()):
    """A cache of these vectors. skipped: rows of the first shard without a vector."""
    rotation = rotation_for(codec, vectors.shape[1])
    source = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(sizes)]
    writer = CacheWriter(folder, vectors.shape[1], codec, encoder, source, "txt", rotation)
    for number, part in enumerate(vectors.split(sizes)):
        left_out = list(skipped) if number == 0 else []
        part = part.clone()
        part[left_out] = 0
        writer.write_shard(number, encode(part, codec, rotation), list(range(len(part))), left_out)
    writer.finish()
    return folder


def fit_by_numpy(sets, weights):
    """Mean, axes as rows and deviations of sets of vectors, each counting as much as its weight."""
    shares = np.array(weights, float) / sum(weights)
    units = [unit(vectors) for vectors in sets]
    mean = sum(share * x.mean(axis=0) for share, x in zip(shares, units, strict=True))
    covariance = sum(share * (x - mean).T @ (x - mean) / len(x) for share, x in zip(shares, units, strict=True))
    variances, axes = np.linalg.eigh(covariance)
    return mean, axes.T[::-1], np.sqrt(np.clip(variances[::-1], 0, None))


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected(vectors, fit, power, found):
    """Conditioned vectors by numpy alone; only which of an axis's two directions is taken from `found`."""
    mean, axes, deviations = fit
    found = found.axes.double().numpy()
    axes, deviations = axes[: len(found)], deviations[: len(found)]
    np.testing.assert_allclose(axes * np.sign((axes * found).sum(axis=1, keepdims=True)), found, atol=1e-5)
    return unit((unit(vectors) - mean) @ (axes * np.sign((axes * found).sum(axis=1, keepdims=True))).T
                * deviations ** -float(power))  # fmt: skip


# cache condition


@pytest.mark.parametrize("codec", ["f32", "bf16", "int8", "int8r", "fp8", "int4r"])
def test_a_conditioned_cache_is_the_formula(rng, tmp_path, capfd, codec):
    vectors = cone(rng, 143)
    cache_of(tmp_path / "a", vectors, skipped=(3, 17))
    run(f"cache condition {tmp_path}/a {tmp_path}/b --power 0.6 --dim 17 --codec {codec}")
    shown = capfd.readouterr().out
    cache, good = Cache(tmp_path / "b"), [row for row in range(143) if row not in (3, 17)]
    cache.verify()
    assert (cache.dim, cache.manifest.codec, cache.manifest.skipped) == (17, codec, 2)
    truth = torch.from_numpy(expected(vectors[good], fit_by_numpy([vectors[good]], [1]), 0.6, cache.conditioning))
    got = cache.vectors(torch.arange(143)).double()
    codes = encode(truth.float(), codec, cache.rotation)
    best = codes.widen() if cache.rotation is None else cache.rotation.undo(codes.widen())
    error, least = (torch.linalg.vector_norm(x.double() - truth, dim=1) for x in (got[good], best))
    assert (error <= 1.02 * least + 2e-5).all() and not got[[3, 17]].any()
    report = cache.conditioning.report()
    cosines = unit(vectors[good]) @ unit(vectors[good]).T
    before = (cosines.sum() - 141) / (141 * 140)
    assert report["mean_cosine"]["before"] == pytest.approx(before, abs=1e-6)
    assert "conditioned with power 0.6, fitted to 141 captions, before -> after:" in shown
    assert f"mean cosine between captions  {before:.4f} -> {report['mean_cosine']['after']:.4f}" in shown
    ranks = report["effective_rank"]
    assert f"effective rank  {ranks['before']:.1f} -> {ranks['after']:.1f}" in shown
    assert f"dim  24 -> 17, which keeps {100 * report['variance_kept']:.2f} % of the variance" in shown
    assert f"143 rows of 17, {codec}, " in shown and "add up" not in shown


def test_the_errors_of_two_codecs_add_up(rng, tmp_path, capfd):
    cache_of(tmp_path / "a", cone(rng, 143), codec="int8")
    run(f"cache condition {tmp_path}/a {tmp_path}/b")
    shown = capfd.readouterr().out
    assert f"{tmp_path}/a holds int8, so the errors of int8 and of int8 add up" in shown
    assert Cache(tmp_path / "b").manifest.codec == "int8"


@pytest.mark.parametrize("weights", [None, (1, 1), (3, 0.5)])
def test_a_fit_to_several_caches(rng, tmp_path, weights):
    """Without weights each counts by its rows that have a vector."""
    one, two = cone(rng, 143), cone(rng, 60, shift=-0.2)
    good = torch.arange(30, 143)
    cache_of(tmp_path / "one", one, skipped=range(30))
    cache_of(tmp_path / "two", two, [60])
    given = f"--weights {weights[0]} {weights[1]}" if weights else ""
    run(f"cache condition {tmp_path}/one {tmp_path}/b --power 0.5 --fit {tmp_path}/one {tmp_path}/two {given}")
    cache = Cache(tmp_path / "b")
    truth = expected(one[good], fit_by_numpy([one[good], two], weights or (113, 60)), 0.5, cache.conditioning)
    np.testing.assert_allclose(cache.vectors(good).numpy(), truth, atol=2e-5)
    # The other cache with the same conditioning.
    run(f"cache condition {tmp_path}/two {tmp_path}/c --like {tmp_path}/b")
    other = Cache(tmp_path / "c")
    assert other.manifest.conditioning == cache.manifest.conditioning
    truth = expected(two, fit_by_numpy([one[good], two], weights or (113, 60)), 0.5, other.conditioning)
    np.testing.assert_allclose(other.vectors(torch.arange(60)).numpy(), truth, atol=2e-5)


def test_samples_count_by_the_rows_of_their_caches(rng, tmp_path):
    """Not by those of the samples, which are alike."""
    one, two = cone(rng, 143), cone(rng, 60, shift=-0.2)
    cache_of(tmp_path / "one", one)
    cache_of(tmp_path / "two", two, [60])
    run(f"cache condition {tmp_path}/two {tmp_path}/b --fit {tmp_path}/one {tmp_path}/two --rows 40 --seed 9 --power 0")
    found = Cache(tmp_path / "b").conditioning
    samples = [x[np.sort(np.random.default_rng(9).choice(len(x), 40, replace=False))] for x in (one, two)]
    mean, _, deviations = fit_by_numpy(samples, (143, 60))
    np.testing.assert_allclose(found.mean.numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(found.deviations.numpy(), deviations, atol=1e-9)


def test_it_goes_on_after_ctrl_c_without_another_fit(rng, tmp_path, capfd, monkeypatch):
    cache_of(tmp_path / "a", cone(rng, 143))
    command = f"cache condition {tmp_path}/a {tmp_path}/b --codec int4r --dim 8"
    run(command.replace("/b", "/whole"))
    write_shard = CacheWriter.write_shard

    def interrupted(writer, number, *arguments):
        if number == 2:
            raise KeyboardInterrupt
        write_shard(writer, number, *arguments)

    monkeypatch.setattr(CacheWriter, "write_shard", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 130
    assert f"the shards that are complete stay in {tmp_path}/b; run the same command again" in capfd.readouterr().err
    assert len(list((tmp_path / "b").glob("text-*"))) == 2
    monkeypatch.setattr(CacheWriter, "write_shard", write_shard)
    monkeypatch.setattr(fits, "fit_to_caches", None)
    run(command)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")
    run(command)  # it is complete
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_a_fit_to_other_caches_with_as_many_rows_is_not_taken(rng, tmp_path, capfd):
    for name in "abc":
        cache_of(tmp_path / name, cone(rng, 143))
    run(f"cache condition {tmp_path}/a {tmp_path}/out --fit {tmp_path}/a {tmp_path}/b")
    before = contents(tmp_path / "out")
    message = error_of(capfd, f"cache condition {tmp_path}/a {tmp_path}/out --fit {tmp_path}/a {tmp_path}/c")
    assert "was fitted for another command (caches is [" in message
    assert contents(tmp_path / "out") == before
    run(f"cache condition {tmp_path}/a {tmp_path}/out --fit {tmp_path}/a {tmp_path}/b")
    assert contents(tmp_path / "out") == before


def test_info_describes_the_conditioning(rng, tmp_path, capfd):
    cache_of(tmp_path / "a", cone(rng, 143))
    run(f"cache condition {tmp_path}/a {tmp_path}/b --power 0.6 --dim 9")
    capfd.readouterr()
    run(f"cache info {tmp_path}/b --json {tmp_path}/info.json")
    shown, found = capfd.readouterr().out, json.loads((tmp_path / "info.json").read_text())
    assert "conditioned with power 0.6, fitted to 143 captions" in shown and "dim  24 -> 9, which keeps" in shown
    cache = Cache(tmp_path / "b")
    assert found["conditioning"] == {**cache.manifest.conditioning, "report": cache.conditioning.report()}
    run(f"cache info {tmp_path}/a")
    assert "conditioned" not in capfd.readouterr().out


def test_what_cache_condition_refuses(rng, tmp_path, capfd):
    cache_of(tmp_path / "a", cone(rng, 143))
    cache_of(tmp_path / "other", cone(rng, 143), encoder={**ENCODER, "prompt": "query: "})
    cache_of(tmp_path / "short", cone(rng, 143, 12))
    cache_of(tmp_path / "empty", cone(rng, 0), [0])
    run(f"cache condition {tmp_path}/a {tmp_path}/b --power 0.5")
    before = contents(tmp_path / "b")
    for options, words in [
        ("/b {}/c", "/b is conditioned already; name the cache that it was made from"),
        ("/a {}/c --fit {}/a {}/b", "/b is conditioned already; name the cache that it was made from"),
        ("/other {}/c --like {}/b", "/b was not made by the encoder of"),
        ("/a {}/c --fit {}/a {}/other", "encoder prompt is 'query: ', not ''"),
        ("/short {}/c --like {}/b", "its vectors have length 24, not 12"),
        ("/a {}/c --fit {}/short", "its vectors have length 12, not 24"),
        ("/a {}/c --like {}/other", "/other is not conditioned; name a cache that is"),
        ("/a {}/c --like {}/b --power 0.5", "--like takes a conditioning as it is; leave out"),
        ("/a {}/c --like {}/b --fit {}/a", "--like takes a conditioning as it is; leave out"),
        ("/a {}/c --fit {}/a --weights 1 2", "--weights has 2 numbers for the 1 caches of --fit"),
        ("/a {}/c --weights 1", "--weights has 1 numbers for the 0 caches of --fit"),
        ("/a {}/c --fit {}/a --weights 0", "weights must be 1 numbers above 0"),
        ("/a {}/c --fit {}/empty", "a set has no vectors"),
        ("/a {}/c --power 1.01", "from 0 to 1, or auto, not 1.01"),
        ("/a {}/c --dim 0", "at least 1 axis"),
        ("/a {}/c --dim 25", "vectors of length 24 have 24 axes, not 25"),
        ("/a {}/c --rows 1", "at least 2 captions, not 1"),
        ("/a {}/c --rows 24", "24 captions do not determine 24 axes"),
        ("/a {}/c --seed -1", "0 or above, not -1"),
        ("/a {}/a", "holds a cache that is not conditioned; name another folder"),
        ("/a {}/b --power 0.4", "was fitted for another command (power is 0.5, not 0.4)"),
        ("/a {}/b --power 0.5 --codec int8", "holds a cache of another kind"),
    ]:
        command = f"cache condition {tmp_path}{options.replace('{}', str(tmp_path))}"
        assert words in error_of(capfd, command), options
        assert not (tmp_path / "c").exists(), options
    assert contents(tmp_path / "b") == before


def test_cache_condition_needs_space(rng, tmp_path, capfd, monkeypatch):
    cache_of(tmp_path / "a", cone(rng, 143))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    assert "its disk has 100 bytes" in error_of(capfd, f"cache condition {tmp_path}/a {tmp_path}/b")
    assert not (tmp_path / "b").exists()


# embed --condition


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("lines") / "c.jsonl", captions_of(60, 50))


def test_embed_conditions(tmp_path, capfd, lines):
    """And cache condition, of the encoder's vectors, does the same."""
    command = f"embed --data {lines} --out {tmp_path}/c --codec f32 --shard-rows 25 --quiet --condition 0.5 "
    command += "--condition-dim 16"
    run(f"{command} --dry-run")
    shown = capfd.readouterr().out
    assert "60 captions of dim 16 in f32: at most " in shown and not (tmp_path / "c").exists()
    run(command)
    shown, cache = capfd.readouterr().out, Cache(tmp_path / "c")
    report = cache.conditioning.report()
    assert "conditioned with power 0.5, fitted to 60 captions, before -> after:" in shown
    assert f"mean cosine between captions  {report['mean_cosine']['before']:.4f} -> " in shown
    assert f"60 captions, dim 16, in {tmp_path}/c" in shown and shown.count("mean cosine between captions") == 1
    run(f"{command} --dry-run")
    size = sum(map(len, contents(tmp_path / "c").values()))
    assert f" on disk ({size} bytes)" in capfd.readouterr().out

    run(f"embed --data {lines} --out {tmp_path}/plain --codec f32 --shard-rows 25 --quiet")
    assert "mean cosine between captions 0." in capfd.readouterr().out
    run(f"cache condition {tmp_path}/plain {tmp_path}/d --power 0.5 --dim 16")
    plain = Cache(tmp_path / "plain").vectors(torch.arange(60))
    want = expected(plain, fit_by_numpy([plain], [1]), 0.5, cache.conditioning)
    for folder in ("c", "d"):
        got = Cache(tmp_path / folder).vectors(torch.arange(60)).numpy()
        np.testing.assert_allclose(got, want, atol=1e-5)

    # Another cache takes the conditioning of the first.
    more = write_lines(tmp_path / "more.jsonl", ["a dog", "a cat", "two dogs"])
    run(f"embed --data {more} --out {tmp_path}/more --codec int8r --condition {tmp_path}/c --quiet")
    other = Cache(tmp_path / "more")
    assert (other.dim, other.manifest.conditioning) == (16, cache.manifest.conditioning)
    assert contents(tmp_path / "more")[CONDITIONING] == contents(tmp_path / "c")[CONDITIONING]

    for options, words in [
        (f"--out {tmp_path}/e --condition {tmp_path}/c --prompt query:", "encoder prompt is '', not 'query:'"),
        (f"--out {tmp_path}/e --condition {tmp_path}/plain", "/plain is not conditioned; name a cache that is"),
        (f"--out {tmp_path}/e --condition 0.5", "60 captions do not determine 384 axes"),
        (
            f"--out {tmp_path}/plain --shard-rows 25 --condition 0.5 --condition-dim 9",
            "a cache that is not conditioned",
        ),
        (f"--out {tmp_path}/c --shard-rows 25 --condition 0.4 --condition-dim 16", "power is 0.5, not 0.4"),
    ]:
        assert words in error_of(capfd, f"embed --data {lines} --quiet {options}"), options
        assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--condition atuo", "--condition is auto, a power from 0 to 1, or a conditioned cache; there is no atuo"),
        ("--condition 2", "from 0 to 1, or auto, not 2.0"),
        ("--condition nan", "from 0 to 1, or auto, not nan"),
        ("--condition auto --condition-dim 0", "at least 1 axis"),
        ("--condition 0 --condition-rows 1", "at least 2 captions, not 1"),
        ("--condition 1 --condition-seed -5", "0 or above, not -5"),
        ("--condition-dim 8", "--condition-dim, --condition-rows and --condition-seed are for --condition auto"),
        ("--condition . --condition-rows 100", "--condition-dim, --condition-rows and --condition-seed are for"),
        ("--condition .", "is not a text cache"),
    ],
)
def test_what_embed_refuses(tmp_path, capfd, lines, options, words):
    assert words in error_of(capfd, f"embed --data {lines} --out {tmp_path}/c {options}")
    assert not (tmp_path / "c").exists()


def test_embed_refuses_an_unfinished_cache(tmp_path, capfd, lines):
    write(tmp_path / "half", [3, 4], DIM, shards=[0], finish=False)
    message = error_of(capfd, f"embed --data {lines} --out {tmp_path}/c --condition {tmp_path}/half")
    assert "half is unfinished" in message

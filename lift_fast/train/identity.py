"""What makes a run the same run: its settings that change the mathematics, and fingerprints of its data and caches.

Everything here is JSON, so that what a run wrote when it started can be compared with a command that goes on with it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import zip_longest
from typing import Any, Literal, TypedDict

import numpy as np

from ..cache import Cache
from ..data.samples import BadSample, Collection, Samples
from ..foreign import Count
from .config import TrainConfig

# Every setting of TrainConfig is in exactly one of these two lists. Those of the first decide the weights of each step.
MATHEMATICS = frozenset(
    "model field steps batch_size seed preset text_dim context loss init_from lock unlocked_blocks patch_dropout "
    "patch_dropout_steps lr schedule warmup cooldown layer_decay weight_decay beta1 beta2 eps clip_grad ema "
    "min_crop_area flip colour shuffle_buffer precision fp8 options".split()
)
# These do not: where things lie (fingerprints compare their contents), how the work is done, what is kept of it, and
# what ends a run (one that a spike has stopped may go on with --on-spike skip).
FREE = frozenset(
    "data cache pictures out resume loader checked device checkpointing compile graph micro_batch parallel threads "
    "timeout save_minutes save_every keep_last keep_every save_weights eval_data eval_pictures eval_field "
    "eval_templates eval_classnames eval_every keep_best spike on_spike max_skipped".split()
)
_RESOLVED = {"precision", "text_dim", "init_from", "options"}
_WITHOUT_MEANING = {"lift": {"field", "context"}, "clip": {"text_dim"}}  # for LIFT the cache decides the field
_PROBES = 16  # images of a data set that are compared


class _OfEveryRun(TypedDict):
    model: Literal["lift", "clip"]
    init_from: str | None
    read: dict[str, Any]


class Mathematics(_OfEveryRun, total=False):
    """The types of what is used of `mathematics`, in a file."""

    preset: str
    text_dim: int
    context: int
    field: str


class _Data(TypedDict):
    samples: Count
    sizes: str
    captions: str | None
    images: list[str]


class _Conditioning(TypedDict):
    power: float


class _OfCache(TypedDict, total=False):
    conditioning: _Conditioning | None


class _LeftOut(TypedDict):
    samples: Count


class Fingerprints(TypedDict):
    """The same of `fingerprints`."""

    data: list[_Data]
    caches: list[_OfCache]
    left_out: _LeftOut


def mathematics(
    config: TrainConfig,
    *,
    precision: str,
    text_dim: int | None,
    read: dict[str, Any],
    init_from: str | None = None,
) -> dict[str, Any]:
    """The settings that change the mathematics, under the names of their options, as JSON values.

    The named arguments are what settings turned out to be. precision: "bf16" or "fp32". text_dim: LIFT: width of the
    head. read: the recorded options that the data sets were read with, see setup.open_training_sets. init_from: a
    digest of the weights that the run starts from, None for random ones.
    """
    settings = {name: getattr(config, name) for name in MATHEMATICS - _RESOLVED}
    settings |= {"precision": precision, "text_dim": text_dim, "init_from": init_from, "read": read}
    return {name: settings[name] for name in sorted(settings.keys() - _WITHOUT_MEANING[config.model])}


def fingerprints(
    data: Collection, caches: Sequence[Cache], captions: Sequence[str] = (), left_out: Iterable[int] = ()
) -> dict[str, Any]:
    """What tells data sets and caches from others, wherever they lie: {"data": […], "caches": […], "left_out": {…}},
    and "stamps", a text for each cache that changes when a shard of it is written to or copied.

    captions: CLIP: a digest of the captions of each data set. For LIFT the caches hold the keys, and were compared with
    the data's keys and captions when they were opened. left_out: row numbers that no batch has.

    Reads at most 16 images of each data set, spread over it, by which a copy with other images is known, and of a cache
    the manifest, which has a checksum of each shard: the time does not grow with the samples but with the shards.
    """
    rows = np.sort(np.fromiter(left_out, dtype="<i8"))
    return {
        "data": [_of_data(samples, digest) for samples, digest in zip_longest(data.sets, captions)],
        "caches": [_of_cache(cache) for cache in caches],
        "left_out": {"samples": len(rows), "rows": blake2b(rows.tobytes(), digest_size=16).hexdigest()},
        "stamps": [_stamps(cache) for cache in caches],  # not compared by `differences`: a copy has others
    }


def digest_of(value: Any) -> str:
    """128-bit hash, in hex, of a JSON value."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the settings `now` differ from `then`, those of a run that has begun: texts such as "--lr 0.001, now 0.01".

    Both are {"mathematics": mathematics(…), "fingerprints": fingerprints(…)}.
    """
    were, are = then["mathematics"], now["mathematics"]
    if were["model"] != are["model"]:  # the two have other settings
        return [f"--model {were['model']}, now {are['model']}"]
    weights = [{"init_from": "given" if one["init_from"] else None} for one in (were, are)]
    found = _changed(were | were["read"] | weights[0], are | are["read"] | weights[1], _option, {"read"})
    if weights[0] == weights[1] and were["init_from"] != are["init_from"]:
        found.append("other weights at --init-from")
    return found + _other_data(then["fingerprints"], now["fingerprints"])


def _of_data(samples: Samples, captions: str | None) -> dict[str, Any]:
    digests = []
    for i in sorted({i * len(samples) // _PROBES for i in range(_PROBES)}):
        try:
            digests.append(blake2b(samples.image_bytes(i), digest_size=16).hexdigest())
        except BadSample:
            digests.append("")  # not compared: it may be readable at another time
    return {
        "samples": len(samples),
        "shards": len(samples.shard_sizes),
        "sizes": digest_of(samples.shard_sizes),
        "captions": captions,
        "images": digests,
    }


def _of_cache(cache: Cache) -> dict[str, Any]:
    manifest = cache.manifest
    # Runs that began before there was conditioning have no such key.
    conditioned = {} if manifest.conditioning is None else {"conditioning": manifest.conditioning}
    return conditioned | {
        **{f"encoder {name}": value for name, value in manifest.encoder.items()},
        **{name: getattr(manifest, name) for name in ("field", "codec", "rotation", "dim", "read", "rows")},
        "shards": digest_of([shard.sha256 for shard in manifest.shards]),
    }


def _stamps(cache: Cache) -> str:
    """A digest of the sizes and times of last change of a cache's shards: another one, and they may have changed."""
    status = [(cache.folder / shard.name).stat() for shard in cache.manifest.shards]
    return digest_of([(one.st_size, one.st_mtime_ns) for one in status])


def _other_data(were: dict[str, Any], are: dict[str, Any]) -> list[str]:
    """The first difference of each data set and of each cache."""
    old, new = were["data"], are["data"]
    if len(old) != len(new):
        return [f"{len(old)} of --data, now {len(new)}"]
    found = []
    for number, (then, now) in enumerate(zip(old, new, strict=True), 1):
        if reason := _other_samples(then, now):
            found.append(f"another data set{_place(number, old)}: {reason}")
    if len(were["caches"]) != len(are["caches"]):
        return [f"{len(were['caches'])} of --cache, now {len(are['caches'])}"]
    for number, (then, now) in enumerate(zip(were["caches"], are["caches"], strict=True), 1):
        if then != now:
            found.append(f"another cache{_place(number, old)}: {_other_cache(then, now)}")
    if not found and were["left_out"] != are["left_out"]:
        counts = [one["left_out"]["samples"] for one in (were, are)]
        found.append(
            f"{counts[0]} samples left out for their text, now {counts[1]}{' others' * (counts[0] == counts[1])}"
        )
    return found


def _other_cache(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The first difference between two caches."""
    found = _changed(_in_words(then), _in_words(now), str, {"shards"})
    if then.get("conditioning") != now.get("conditioning"):
        found.append("a conditioning that was fitted to other captions")
    return [*found, "other keys or vectors"][0]


def _in_words(cache: dict[str, Any]) -> dict[str, Any]:
    """A cache whose conditioning is named by its power: the rest of the entry tells a reader nothing."""
    entry = cache.get("conditioning")
    return cache if entry is None else cache | {"conditioning": f"power {entry['power']:g}"}


def _other_samples(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The first difference between two data sets, "" without one."""
    if more := now["samples"] - then["samples"]:
        return f"{abs(more)} {'more' if more > 0 else 'fewer'} sample{'s' * (abs(more) > 1)}"
    if then["sizes"] != now["sizes"]:
        return "cut into other shards"
    if then["captions"] != now["captions"]:
        return "other captions"
    pairs = [pair for pair in zip(then["images"], now["images"], strict=False) if all(pair)]
    same = len(then["images"]) == len(now["images"]) and all(a == b for a, b in pairs)
    return "" if same else "other images"


def _changed(
    were: dict[str, Any], are: dict[str, Any], named: Callable[[str], str], but: Iterable[str] = ()
) -> list[str]:
    return [
        f"{named(name)} {_value(were.get(name))}, now {_value(are.get(name))}"
        for name in sorted({*were, *are}.difference(but))
        if were.get(name) != are.get(name)
    ]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(value: Any) -> str:
    if value is None:
        return "not given"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _place(number: int, several: Sequence[object]) -> str:
    return f" ({number} of {len(several)})" if len(several) > 1 else ""

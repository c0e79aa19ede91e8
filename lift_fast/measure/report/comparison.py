"""Which model is ahead on which measure: numbers in, measures, each with its judgement, and two sentences out.

A Measure judges by itself (`ahead`), once, and the page, the table and the sentences all ask it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..formatting import HARD, amount, integer, joined, points, saving
from .fields import MODELS, both, either, finite, get, models_of, sets_of

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
PAID_ONCE = "LIFT’s embedding is paid once per caption and encoder, whatever the number of epochs and runs."
CLOSE = "too close to call"

_LISTED = 3  # scores that the first sentence names on each side


@dataclass(frozen=True)
class Measure:
    """A quantity that the two models are compared by; None for a model that lacks it, or that the report is not about.

    kind: "flops", "bytes", "ms" or "s" (costs: less is better), or "share" (a score: more is better). noise: the
    difference below which it is too close to call: of a cost the larger of the two interquartile ranges, of a share
    1.96 standard errors of the difference. chance: of a share, what guessing scores.
    """

    name: str
    kind: str
    lift: float | None
    clip: float | None
    noise: float = 0.0
    chance: float | None = None

    @property
    def ahead(self) -> str | None:
        """ "lift", "clip", "close", or None where one of the two is missing.

        Costs are also close within 0.05 % of the larger one. This is a guide and no test: both models answer for the
        same images, and each was trained with one seed.
        """
        if self.lift is None or self.clip is None:
            return None
        noise = self.noise if self.kind == "share" else max(5e-4 * max(self.lift, self.clip), self.noise)
        if self.lift == self.clip or abs(self.lift - self.clip) < noise:
            return "close"
        return "lift" if (self.lift > self.clip) == (self.kind == "share") else "clip"

    @property
    def difference(self) -> str | None:
        """LIFT against CLIP: "22.3 % less" for a cost, "+4.1 points" for a share, or that it is too close to call;
        None where one of the two is missing."""
        if self.lift is None or self.clip is None:
            return None
        if self.ahead == "close":
            return CLOSE
        if self.kind == "share":
            return f"{points(self.lift, self.clip)}{HARD}points"
        return saving(1 - self.lift / self.clip) if self.clip else "more"

    @property
    def known(self) -> bool:
        """Whether at least one model has it."""
        return not (self.lift is None and self.clip is None)


def share(name: str, values: tuple[float | None, float | None], n: int | None, chance: float | None = None) -> Measure:
    """A score. values: LIFT's and CLIP's. n: the number of answers that each was counted over."""
    lift, clip = values
    noise = 0.0
    if n and lift is not None and clip is not None:
        noise = 1.96 * math.sqrt(max(0.0, sum(p * (1 - p) for p in values if p is not None)) / n)
    return Measure(name, "share", lift, clip, noise, chance)


def mean(name: str, shares: Sequence[Measure], chance: float | None = None) -> Measure | None:
    """The mean of those scores that all models of the report have; None of no score."""
    if not shares:
        return None
    lift, clip = (
        None if None in (values := [getattr(each, model) for each in shares]) else sum(values) / len(values)
        for model, _ in MODELS
    )
    noise = math.sqrt(sum(each.noise**2 for each in shares)) / len(shares)
    return Measure(name, "share", lift, clip, noise, chance)


def costs(report: dict) -> list[Measure]:
    """The costs of training that are known. Last is text over the whole run, if the time that LIFT's embedding took is
    known."""
    rows = (
        ("training FLOPs a sample", "flops", "flops_per_sample"),
        (memory_name(report), "bytes", "peak_memory_bytes"),
        ("step time, whole step", "ms", "step_ms"),
        ("text time a step", "ms", "text_ms_per_step"),
    )
    found = []
    for name, kind, key in rows:
        spreads = [spread for spread in both(report, f"{key}_spread") if spread is not None]
        found.append(Measure(name, kind, *both(report, key), max(spreads, default=0.0)))
    if (embedding := embedding_s(report)) is not None:
        steps, clip = (text_steps_s(report, model) for model, _ in MODELS)
        lift = None if steps is None else embedding + steps
        found.append(Measure("text time over the whole run", "s", lift, clip))
    return [measure for measure in found if measure.known]


def memory_name(report: dict) -> str:
    """The name of the memory measure; "counted" marks bytes that come from fake tensors and were not measured."""
    models = models_of(report)
    counted = [name for model, name in models if get(report, model, "peak_memory_from") == "fake tensors"]
    if not counted:
        return "peak memory"
    return "peak memory, counted" + ("" if len(counted) == len(models) else f" for {counted[0]}")


def embedding_s(report: dict) -> float | None:
    """Seconds that embedding LIFT's captions took before the first step; None where the report lacks them."""
    captions, ms = (get(report, "lift", key) for key in ("captions", "embed_ms_per_caption"))
    return None if captions is None or ms is None else captions * ms / 1e3


def text_steps_s(report: dict, model: str) -> float | None:
    """Seconds that all steps of a run together spent on text."""
    losses, ms = (get(report, model, key) for key in ("loss", "text_ms_per_step"))
    return None if not losses or ms is None else len(losses) * ms / 1e3


def recall(report: dict, part: str, name: str, way: str, k: str) -> Measure:
    """A recall of a set. part: "retrieval" or "first_caption". way: a key of DIRECTIONS. k: "r1", "r5" or "r10"."""
    queries = "captions" if way == "t2i" else "n"
    n = either(report, part, name, queries) or either(report, part, name, "n")
    chance = either(report, part, name, "chance", way, k)
    title = f"{name} {DIRECTIONS[way]} R@{k[1:]}"
    return share(title, both(report, part, name, way, k), n, chance)


def retrieval(report: dict) -> list[Measure]:
    """R@1 of each set in both directions, among all captions."""
    return [recall(report, "retrieval", name, way, "r1") for name in sets_of(report, "retrieval") for way in DIRECTIONS]


def tasks(report: dict, name: str) -> dict[str, Measure]:
    """The scores of each composition task of a set, and last their "mean"."""
    counts = either(report, "composition", name, "counts") or {}
    chance = either(report, "composition", name, "chance") or {}
    found = {
        task: share(task, both(report, "composition", name, task), n, chance.get(task)) for task, n in counts.items()
    }
    total = mean(f"{name} composition", list(found.values()), chance.get("mean"))
    return found | ({"mean": total} if total else {})


def zero_shot(report: dict, name: str, *keys: str) -> Measure:
    """A zero-shot score of a set. keys: where it stands in the scores: "top1", or "one_template", "top1"."""
    n, chance = (either(report, "zero_shot", name, key) for key in ("n", "chance"))
    return share(f"{name} zero-shot", both(report, "zero_shot", name, *keys), n, chance if keys == ("top1",) else None)


def averages(report: dict) -> list[Measure]:
    """The scores that are one number a set: composition, as the mean of its tasks, and zero-shot classification."""
    composition = [tasks(report, name).get("mean") for name in sets_of(report, "composition")]
    classified = [zero_shot(report, name, "top1") for name in sets_of(report, "zero_shot")]
    return [measure for measure in (*composition, *classified) if measure is not None and measure.known]


def qualities(report: dict) -> list[Measure]:
    """All scores that models are compared by."""
    return [measure for measure in retrieval(report) if measure.known] + averages(report)


def verdict(report: dict) -> dict[str, list[Measure]]:
    """{"lift": the measures on which LIFT is ahead, "clip": ..., "close": ...}, without those that one model lacks."""
    sides: dict[str, list[Measure]] = {"lift": [], "clip": [], "close": []}
    for measure in costs(report) + qualities(report):
        if measure.ahead:
            sides[measure.ahead].append(measure)
    return sides


def lead(report: dict) -> str:
    """The report's first sentence, in plain text: what LIFT is, and what it saved and cost; of one run, what it took
    and what it scores."""
    report = finite(report)
    encoder = get(report, "lift", "encoder", "name")
    frozen = "a frozen text encoder" + (f" ({encoder})" if encoder else "")
    what = {
        "lift": f"LIFT trains only an image encoder, against vectors that {frozen} made once of every caption",
        "clip": "CLIP trains an image encoder and a text encoder together",
    }
    models = [model for model, _ in models_of(report)]
    if len(models) == 2:
        return f"{what['lift']}, where CLIP trains a text encoder along with it; in these runs LIFT {_balance(report)}."
    if not models:
        return f"{what['lift']}."
    return f"{what[models[0]]}; this run {_alone(report, models[0])}."


def _balance(report: dict) -> str:
    """What LIFT saved, paid, won and lost against CLIP."""
    sides = verdict(report)
    saved, dearer = ([each for each in sides[side] if each.kind != "share"] for side in ("lift", "clip"))
    higher, lower = ([each for each in sides[side] if each.kind == "share"] for side in ("lift", "clip"))
    took = [f"{each.difference} {_bracketed(each.name)}" for each in saved + dearer]
    if (embedding := embedding_s(report)) is not None:
        once = f"{amount(embedding, 's')} once to embed {integer(get(report, 'lift', 'captions'))} captions"
        whole = next((i for i, each in enumerate(saved + dearer) if each.kind == "s"), None)
        if whole is None:
            took.append(once)
        else:
            took[whole] += f" (in it {once})"
    parts = [f"took {joined(took)}"] if took else []
    for measures, how in ((higher, "higher"), (lower, "lower")):
        if measures:
            measures.sort(key=lambda each: -abs((each.lift or 0) - (each.clip or 0)))
            words = [
                f"{each.name} ({amount(each.lift, 'share')} against {amount(each.clip, 'share')})" for each in measures
            ]
            parts.append(f"scored {how} on {joined(_first(words))}")
    if close := [_bracketed(each.name) for each in sides["close"]]:
        parts.append(f"{joined(_first(close))} {'is' if len(close) == 1 else 'are'} {CLOSE}")
    return "; ".join(parts) or "was compared on no measure"


def _alone(report: dict, model: str) -> str:
    """What one run took, and what it scores."""
    seconds, seen = (get(report, model, key) for key in ("seconds", "samples_seen"))
    took = "took an unknown time" if seconds is None else f"took {amount(seconds, 's')}"
    words = [
        f"{amount(value, 'share')} on {each.name}"
        + ("" if each.chance is None else f" (chance {amount(each.chance, 'share')})")
        for each in qualities(report)
        if (value := getattr(each, model)) is not None
    ]
    scores = f" and scores {joined(_first(words))}" if words else ""
    return f"{took} for {integer(seen)} samples{scores}"


def _bracketed(name: str) -> str:
    """A name that may stand in a list of names: its comma becomes brackets."""
    first, comma, rest = name.partition(", ")
    return f"{first} ({rest})" if comma else name


def _first(words: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = len(words) - _LISTED
    return [*words[:_LISTED], f"{more} more"] if more > 1 else list(words)


def summary(report: dict) -> str:
    """One sentence of plain text: what was trained on, on which machine, and on how many measures each model is ahead.

    Empty where nothing of it is known.
    """
    report = finite(report)
    facts = [f"on {fact}" for fact in (_samples(report), _place(report)) if fact]
    trained = [f"trained {', '.join(facts)}"] if facts else []
    outcome = [_outcome(report)] if len(models_of(report)) == 2 else []
    sentence = ": ".join([*trained, *outcome])
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _samples(report: dict) -> str | None:
    models = models_of(report)
    seen = {name: get(report, model, "samples_seen") for model, name in models}
    if not any(seen.values()):
        return None
    if len(set(seen.values())) == 2:
        samples = " and ".join(f"{integer(n)} ({name})" for name, n in seen.items()) + " samples"
    else:
        samples = f"{integer(next(iter(seen.values()), None))} samples{' each' if len(models) == 2 else ''}"
    trained = {name: get(sizes, "train") for name, sizes in (report.get("data") or {}).items()}
    counts = {name: n for name, n in trained.items() if n is not None}
    sets, n = (get(report, "trained_on", key) for key in ("sets", "samples"))
    if counts and n in (None, sum(counts.values())):  # else other sets were counted than the run was trained on
        return f"{samples} of {joined([f'{integer(count)} {name}' for name, count in counts.items()])} images"
    return f"{samples} of the {integer(n)} in {joined(sets)}" if sets and n is not None else samples


def _place(report: dict) -> str | None:
    """The device of the runs; one device for each run where they differ."""
    if not (machine := report.get("machine")):
        return None
    cores = f"{integer(machine.get('cores'))} cores of {machine.get('cpu') or 'an unnamed CPU'}"
    devices = {name: get(report, model, "device") for model, name in models_of(report)}
    places = {name: cores if device == "cpu" else device for name, device in devices.items() if device}
    if len(set(places.values())) == 2:
        return joined([f"{place} ({name})" for name, place in places.items()])
    return next(iter(places.values()), machine.get("gpu") or cores)


def _outcome(report: dict) -> str:
    sides = verdict(report)
    total = sum(map(len, sides.values()))
    if not total:
        return "no measure was taken of both"
    outcome = (
        f"LIFT is ahead on {len(sides['lift']) or 'none'} of {total} measures, CLIP on {len(sides['clip']) or 'none'}"
    )
    return outcome + (
        f", and {len(sides['close'])} {'is' if len(sides['close']) == 1 else 'are'} {CLOSE}" if sides["close"] else ""
    )

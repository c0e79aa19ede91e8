"""Which model is ahead on which measure: numbers in, sorted measures and one sentence out."""

import math
from dataclasses import dataclass

from ..formatting import DASH, HARD, integer, joined, points, saving
from .fields import MODELS, both, finite, get

DIRECTIONS = {"i2t": "picture → text", "t2i": "text → picture"}
PAID_ONCE = "LIFT’s embedding is paid once per caption and encoder, whatever the number of epochs and runs."


@dataclass(frozen=True)
class Measure:
    """A quantity that the two models are compared by.

    kind: "flops", "bytes", "ms" or "s" (costs: less is better), or "share" (a score: more is better).
    """

    name: str
    kind: str
    lift: float | None
    clip: float | None
    saved: float | None = None  # of a cost: the fraction of CLIP's that LIFT saves
    n: int | None = None  # of a share: the number of answers that it was counted over
    spread: float | None = None  # of a cost: the larger of the two interquartile ranges, in the cost's unit

    @property
    def ahead(self) -> str | None:
        """ "lift", "clip", "close", or None where one of the two is missing.

        Shares are close within 1.96 standard errors of the difference of two independent counts, costs within
        0.05 % of the larger one or within their spread. This is a guide and no test: both models answer for the
        same images, and each was trained with one seed.
        """
        if self.lift is None or self.clip is None:
            return None
        if self.kind == "share":
            variance = sum(p * (1 - p) for p in (self.lift, self.clip))
            noise = 1.96 * math.sqrt(max(0.0, variance) / self.n) if self.n else 0.0
        else:
            noise = max(5e-4 * max(self.lift, self.clip), self.spread or 0.0)
        if self.lift == self.clip or abs(self.lift - self.clip) < noise:
            return "close"
        return "lift" if (self.lift > self.clip) == (self.kind == "share") else "clip"

    @property
    def difference(self) -> str:
        """LIFT against CLIP: "22.3 % less" for a cost, "+4.1 points" for a share."""
        if self.kind != "share":
            return saving(self.saved)
        difference = points(self.lift, self.clip)
        return difference if difference == DASH else f"{difference}{HARD}points"


def costs(report: dict) -> list[Measure]:
    """The costs of training. Last is text over the whole run, if the time that LIFT's embedding took is known."""
    rows = (
        ("training FLOPs a sample", "flops", "flops_per_sample", "flops"),
        (memory_name(report), "bytes", "peak_memory_bytes", "memory"),
        ("step time, whole step", "ms", "step_ms", "step_time"),
        ("text time a step", "ms", "text_ms_per_step", "text_time"),
    )
    found = []
    for name, kind, key, saving_key in rows:
        saved = get(report, "savings", saving_key)
        spreads = [spread for spread in both(report, f"{key}_spread") if spread is not None]
        found.append(Measure(name, kind, *both(report, key), saved, spread=max(spreads, default=None)))
    if (embedding := embedding_s(report)) is not None:
        steps, clip = (text_steps_s(report, model) for model, _ in MODELS)
        lift = None if steps is None else embedding + steps
        saved = 1 - lift / clip if lift is not None and clip else None
        found.append(Measure("text over the whole run", "s", lift, clip, saved))
    return found


def memory_name(report: dict) -> str:
    """The name of the memory measure; "counted" marks bytes that come from fake tensors and were not measured."""
    counted = [name for model, name in MODELS if get(report, model, "peak_memory_from") == "fake tensors"]
    if not counted:
        return "peak memory"
    return "peak memory, counted" + ("" if len(counted) == len(MODELS) else f" for {counted[0]}")


def embedding_s(report: dict) -> float | None:
    """Seconds that embedding LIFT's captions took before the first step; None where the report lacks them."""
    captions, ms = (get(report, "lift", key) for key in ("captions", "embed_ms_per_caption"))
    return None if captions is None or ms is None else captions * ms / 1e3


def text_steps_s(report: dict, model: str) -> float | None:
    """Seconds that all steps of a run together spent on text."""
    losses, ms = (get(report, model, key) for key in ("loss", "text_ms_per_step"))
    return None if not losses or ms is None else len(losses) * ms / 1e3


def qualities(report: dict) -> list[Measure]:
    """All scores."""
    return retrieval(report) + averages(report)


def retrieval(report: dict) -> list[Measure]:
    """R@1 of each set in both directions."""
    return [
        _share(report, f"{name} {arrow} R@1", get(report, "lift", "retrieval", name, "n"), "retrieval", name, key, "r1")
        for name in retrieval_sets(report)
        for key, arrow in DIRECTIONS.items()
    ]


def averages(report: dict) -> list[Measure]:
    """The scores that are one number each: composition, as the mean of its tasks, and zero-shot classification."""
    return [
        _share(report, "composition", get(report, "lift", "composition", "n"), "composition", "mean"),
        _share(report, "zero-shot", get(report, "lift", "zero_shot", "n"), "zero_shot", "top1"),
    ]


def retrieval_sets(report: dict) -> list[str]:
    """Names of the sets on which at least one of the models was scored, in the report's order."""
    return list(dict.fromkeys(name for scores in both(report, "retrieval") for name in scores or {}))


def _share(report: dict, name: str, n: int | None, *keys: str) -> Measure:
    return Measure(name, "share", *both(report, *keys), n=n)


def verdict(report: dict) -> dict[str, list[Measure]]:
    """{"lift": the measures on which LIFT is ahead, "clip": ..., "close": ...}, without those that one model lacks."""
    sides: dict[str, list[Measure]] = {"lift": [], "clip": [], "close": []}
    for measure in costs(report) + qualities(report):
        if measure.ahead:
            sides[measure.ahead].append(measure)
    return sides


def summary(report: dict) -> str:
    """One sentence of plain text: what was trained, on which machine, and which model is ahead on what."""
    report = finite(report)
    return f"Trained on {_samples(report)}, on {_place(report)}: {_outcome(report)}."


def _samples(report: dict) -> str:
    lift, clip = both(report, "samples_seen")
    if lift == clip:
        samples = f"{integer(lift)} samples each"
    else:
        samples = f"{integer(lift)} (LIFT) and {integer(clip)} (CLIP) samples"
    sources = [f"{integer(get(sizes, 'train'))} {name}" for name, sizes in (report.get("data") or {}).items()]
    return samples + (f" of {joined(sources)} pictures" if sources else "")


def _place(report: dict) -> str:
    """The device of both runs; one device for each run where they differ."""
    machine = report.get("machine") or {}
    cores = f"{integer(machine.get('cores'))} cores of {machine.get('cpu') or 'an unnamed CPU'}"
    devices = {name: get(report, model, "device") for model, name in MODELS}
    places = {name: cores if device == "cpu" else device for name, device in devices.items() if device}
    if len(set(places.values())) == 2:
        return joined([f"{place} ({name})" for name, place in places.items()])
    return next(iter(places.values()), machine.get("gpu") or cores)


def _outcome(report: dict) -> str:
    sides = verdict(report)
    total = sum(map(len, sides.values()))
    if not total:
        return "no measure was taken of both"
    named = {key: f" ({'; '.join(measure.name for measure in side)})" if side else "" for key, side in sides.items()}
    outcome = (
        f"LIFT is ahead on {len(sides['lift']) or 'none'} of {total} measures{named['lift']}, "
        f"CLIP on {len(sides['clip']) or 'none'}{named['clip']}"
    )
    return outcome + (f", and {len(sides['close'])} too close to call" if sides["close"] else "")

"""Settings of the ops as data, measured or reasoned: the order of backends, sizes of tiles and blocks, what is kept.

One JSON file per family of ops and device, FAMILY.DEVICE.json: `pairs.sm_90.json`, `pairs.cpu.json`. A file is

    {"extends": "sm_80" or null, "entries": [{"setting", "when", "value", "source", "why"}, ...]}

`when` lists the facts for which an entry holds: {"dim": [1, 1023], "kind": "wide"} is a dim of 1 to 1023 (null: no
bound) and a kind of "wide"; other facts do not matter. The first entry that holds applies; entries of the extended file
follow those of this one. `source` is "reasoned", or where the value was measured: {"commit", "device", "results"}, as
`python -m benchmarks tune` writes it. Devices are "cpu", and "sm_90" for compute capability 9.0. A GPU without a file
of its own uses the file of the highest capability below its own.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
_forced: dict[tuple[str, str], Any] = {}


def lookup(family: str, device: str, setting: str, **facts: int | str | bool) -> Any:
    """The value of a setting for these facts, as in the JSON file. Raises LookupError if no entry holds."""
    if (family, setting) in _forced:
        return _forced[family, setting]
    return _lookup(family, device, setting, **facts)


@functools.lru_cache(4096)
def _lookup(family: str, device: str, setting: str, **known: int | str | bool) -> Any:
    for entry in entries(family, device):
        if entry["setting"] == setting and all(holds(known[name], rule) for name, rule in entry["when"].items()):
            return entry["value"]
    raise LookupError(f"lift_fast/ops/tuned/{family}.{device}.json has no {setting!r} for {known}")


Rule = tuple[list[tuple[str, Any]], Any]


def rules(family: str, device: str, setting: str) -> list[Rule]:
    """A setting's (when, value) pairs, in the order in which they are tried."""
    forced = (family, setting) in _forced
    return [([], _forced[family, setting])] if forced else _rules(family, device, setting)


@functools.cache
def _rules(family: str, device: str, setting: str) -> list[Rule]:
    found = (entry for entry in entries(family, device) if entry["setting"] == setting)
    return [(list(entry["when"].items()), entry["value"]) for entry in found]


def holds(fact: int | str | bool, rule: Any) -> bool:
    """Whether a fact equals a rule's value, or lies in its [low, high]."""
    if not isinstance(rule, list):
        return fact == rule
    low, high = rule
    return (low is None or fact >= low) and (high is None or fact <= high)


@functools.cache
def entries(family: str, device: str) -> list[dict[str, Any]]:
    """All entries for a device, with those of the files that its file extends, in the order in which they are tried."""
    table = json.loads((HERE / f"{family}.{device}.json").read_text())
    return table["entries"] + (entries(family, table["extends"]) if table["extends"] else [])


@functools.cache
def devices(family: str) -> tuple[str, ...]:
    """The devices for which a family has a file."""
    return tuple(sorted(path.name.split(".")[1] for path in HERE.glob(f"{family}.*.json")))


def on(family: str, device: torch.device) -> str:
    """The name of the table for a device."""
    return "cpu" if device.type == "cpu" else gpu(family, device)


def gpu(family: str, device: torch.device) -> str:
    """The name of the table for GPU kernels on a device; interpreted or emulated ones have the least capable GPU's."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return _nearest(family, capability)


@functools.cache
def _nearest(family: str, capability: tuple[int, int]) -> str:
    known = {(int(name[3:-1]), int(name[-1])): name for name in devices(family) if name != "cpu"}
    return known[max((one for one in known if one <= capability), default=min(known))]


@contextlib.contextmanager
def using(family: str, setting: str, value: Any) -> Iterator[None]:
    """Overrides a setting inside the context, for sweeps and tests. Not thread-safe."""
    before = _forced.copy()
    _forced[family, setting] = value
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)

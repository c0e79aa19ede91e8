"""python -m benchmarks tune: updates the tables of lift_fast/ops/tuned from measurements, and docs/tuned.md.

--from results.jsonl: each candidate that was faster than the present value by more than the spread becomes the first
entry of its device's table, with the commit, the device and the path of the file. Keep the file at that path.
--docs: writes docs/tuned.md, which lists every setting with its value and source and marks those not measured.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lift_fast.errors import ConfigError

from . import lines
from .start import ROOT

TABLES = ROOT / "lift_fast/ops/tuned"
DOCS = ROOT / "docs/tuned.md"
Line = Mapping[str, Any]
Entry = dict[str, Any]

HEAD = """# Tuned settings

Written by `python -m benchmarks tune --docs` from the tables in `lift_fast/ops/tuned/`. An op uses the first row of its
device whose condition its arguments meet. If there is none, it searches the table of the device that the heading names
after "then those of". {reasoned} of these {all} entries are calculated or estimated, **not measured on any machine**.
`make gpu` measures candidates, and `python -m benchmarks tune --from` puts faster ones first.
"""


class Better(NamedTuple):
    """A measured value that was faster than the present one; times in milliseconds."""

    family: str
    device: str
    setting: str
    when: Mapping[str, Any]
    value: Any
    median: float
    before_value: Any
    before: float
    commit: str
    gpu: str


def add_parser(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = names.add_parser("tune", help="update the tables of settings from measurements")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="results", type=Path, metavar="results.jsonl")
    what.add_argument("--docs", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    if arguments.docs:
        DOCS.write_text(docs())
        return
    if not arguments.results.is_file():
        raise ConfigError(f"there is no {arguments.results}")
    found = list(better(list(lines.read(arguments.results))))
    write(found, _path_in_repository(arguments.results))
    for one in found:
        print(f"{one.family}.{one.device}: {one.setting} {_words(one.when)}: {_words(one.value)}, {_why(one)}")
    print(f"{len(found)} new entries; update the docs with: python -m benchmarks tune --docs")


def better(found: Sequence[Line]) -> Iterator[Better]:
    """Yields the fastest value of each setting and case if it beats the present one by more than the spread.

    A sweep in which the present value was not measured is skipped.
    """
    sweeps: dict[str, list[Line]] = {}
    for line in found:
        if line["phase"] == "tune" and "median_ms" in line:
            names = ("family", "device", "setting", "when", "case")
            key = json.dumps([line[name] for name in names], sort_keys=True)
            sweeps.setdefault(key, []).append(line)
    for sweep in sweeps.values():
        best = min(sweep, key=lambda line: line["median_ms"])
        for present in (line for line in sweep if line["present"]):
            if present["median_ms"] - best["median_ms"] > max(present["spread_ms"], best["spread_ms"]):
                where = (best[name] for name in ("family", "device", "setting", "when"))
                figures = best["value"], best["median_ms"], present["value"], present["median_ms"]
                yield Better(*where, *figures, best.get("commit", "unknown"), best.get("gpu", best["device"]))


def write(found: Sequence[Better], results: str, folder: Path = TABLES) -> None:
    """Writes each value as the first entry of its table, in place of an entry with the same setting and `when`.

    results: path of the measurements, which becomes part of the entry's source.
    """
    for one in found:
        file = folder / f"{one.family}.{one.device}.json"
        table = json.loads(file.read_text()) if file.is_file() else {"extends": _below(folder, one), "entries": []}
        same = one.setting, dict(one.when)
        source = {"commit": one.commit, "device": one.gpu, "results": results}
        entry = {"setting": one.setting, "when": dict(one.when), "value": one.value, "source": source, "why": _why(one)}
        others = [other for other in table["entries"] if (other["setting"], other["when"]) != same]
        table["entries"] = [entry, *others]
        file.write_text(in_json(table))


def in_json(table: Mapping[str, Any]) -> str:
    """JSON with one entry per line."""
    entries = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in table["entries"])
    return f'{{\n "extends": {json.dumps(table["extends"])},\n "entries": [\n{entries}\n ]\n}}\n'


def docs(folder: Path = TABLES) -> str:
    """The text of docs/tuned.md."""
    files = sorted(folder.glob("*.json"), key=lambda file: (file.stem.split(".")[0], _order(file.stem.split(".")[1])))
    tables = {file.stem: json.loads(file.read_text()) for file in files}
    entries = [entry for table in tables.values() for entry in table["entries"]]
    reasoned = sum(entry["source"] == "reasoned" for entry in entries)
    parts = [HEAD.format(reasoned=reasoned, all=len(entries))]
    for name, table in tables.items():
        family, device = name.split(".")
        extends = f", then those of {table['extends']}" if table["extends"] else ""
        parts.append(f"## {family} on {device}{extends}\n")
        if not table["entries"]:
            parts.append("No entries of its own.\n")
            continue
        rows = ["| setting | for | value | measured | why |", "|-|-|-|-|-|", *map(_row, table["entries"])]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(entry: Entry) -> str:
    source = entry["source"]
    where = "no"
    if source != "reasoned":
        where = f"{source['device']}, {source['commit']}" + (f": `{source['results']}`" if source["results"] else "")
    cells = entry["setting"], _words(entry["when"]) or "all", f"`{_words(entry['value'])}`", where, entry["why"]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _words(value: Any) -> str:
    """A condition or value in words, e.g. "dim 1 and more" for {"dim": [1, null]}."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return ", ".join(f"{name} {_rule(rule)}" for name, rule in value.items())


def _rule(rule: Any) -> str:
    if isinstance(rule, list) and len(rule) == 2 and None in rule and rule != [None, None]:
        return f"up to {rule[1]}" if rule[0] is None else f"{rule[0]} and more"
    return rule if isinstance(rule, str) else json.dumps(rule)


def _why(one: Better) -> str:
    return f"{one.median:.4g} ms; {_words(one.before_value)} takes {one.before:.4g}"


def _order(device: str) -> tuple[int, str]:
    return (0, device) if not device.startswith("sm_") else (int(device[3:]), device)


def _below(folder: Path, one: Better) -> str | None:
    """The device whose table a device without its own table uses: the newest one older than it."""
    known = [file.name.split(".")[1] for file in folder.glob(f"{one.family}.sm_*.json")]
    return max((name for name in known if _order(name) < _order(one.device)), key=_order, default=None)


def _path_in_repository(file: Path) -> str:
    """The file's path, relative to the repository if it is inside."""
    try:
        return str(file.resolve().relative_to(ROOT))
    except ValueError:
        return str(file)

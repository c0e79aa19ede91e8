"""What `lift-fast gallery` is given -> runs and held-out sets, each with a name."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError

_MARKS = ("run.json", "lift_fast.json")  # a run; an export
_SETS = "data/*/heldout"  # as the demo has them


def find_models(given: Sequence[str]) -> dict[str, str]:
    """Name -> what `lift_fast.load` takes.

    given: runs, or anything else that is loaded, or folders of runs, such as a demo. Of those, LIFT comes first.
    The name is the last part of the path, or more of it where two would be the same.

    Raises ConfigError when one is named twice.
    """
    found: list[str] = []
    for source in given:
        folder = Path(source)
        runs = [] if _is_model(folder) else [child for child in folder.glob("*/") if _is_model(child)]
        found += [str(run) for run in sorted(runs, key=lambda run: (run.name != "lift", run.name))] or [source]
    if twice := next((source for source in found if found.count(source) > 1), None):
        raise ConfigError(f"{twice} is named twice")
    return dict(zip(short_names(found), found, strict=True))


def find_sets(given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of the held-out sets of a demo, for the demo itself or runs in it; {} without any."""
    folders = [folder for source in given for folder in (Path(source), Path(source).absolute().parent)]
    found = list({path.resolve(): path for folder in folders for path in sorted(folder.glob(_SETS))}.values())
    names = short_names([str(path.parents[2] / path.parent.name) for path in found])
    return dict(zip(names, found, strict=True))


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of different paths, as many as it takes for the names to differ."""
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = [Path(*of_path[-count:]).as_posix() for of_path in parts]
        if len(set(names)) == len(names):
            break
    return names if paths else []


def _is_model(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)

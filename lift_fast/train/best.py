"""The weights with the best score so far, in OUT/weights/best: a folder like those below weights/ of --save-weights.

    weights/best/          whole: it gets this name by one renaming, when all of it is on disk
    weights/.best.part/    being written
    weights/.best.old/     the one before, between two renamings and while it is being removed

A run that is killed between the renamings leaves the one before whole in .best.old, where inference/sources.py finds
it, and the next start gives it its name again.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import run_folder
from ..cache import Conditioning
from ..errors import ConfigError, DataError, TrainingError
from ..files import flush_names
from ..nn import Clip, Lift
from ..ranks import rank_number, together
from .config import best_of

_R1 = ("t2i_r1", "i2t_r1")
_AUTO = ("r1", "zero_shot_top1", "composition")  # the first that any set has


class Criterion(NamedTuple):
    """The score by which weights are the best: the mean of `parts`, which are (set, score) of HeldOut.scores.

    of: what it is called, such as "heldout/r1". asked: a digest of what the sets ask: scores of other questions are not
    compared with it.
    """

    of: str
    parts: Sequence[tuple[str, str]]
    asked: str = ""

    @staticmethod
    def named(keep_best: str, scores: Mapping[str, Sequence[str]], asked: str = "") -> "Criterion | None":
        """That of config.keep_best; None for "none", or where no set has any score.

        scores: set -> the scores that it has. Raises ConfigError when no set, or not the one that is named, has it.
        """
        only, score = best_of(keep_best)
        if score == "none":
            return None
        for wanted in _AUTO if score == "auto" else [score]:
            of_set = _R1 if wanted == "r1" else (wanted,)
            sets = [name for name in scores if only in (None, name) and set(of_set) <= set(scores[name])]
            if sets:
                of = ", ".join(f"{name}/{wanted}" for name in sets)
                parts = [(name, part) for name in sets for part in of_set]
                return Criterion(of if len(sets) == 1 else f"mean of {of}", parts, asked)
        if score == "auto":
            return None
        there = ", ".join(f"{name}/{each}" for name in scores for each in scores[name])
        raise ConfigError(f"--keep-best {keep_best}: the sets of --eval-data have no such score, but {there or 'none'}")

    def value(self, scores: Mapping[str, Mapping[str, float]]) -> float:
        """The score of an evaluation, NaN where a part of it is missing."""
        return math.fsum(scores[name].get(part, math.nan) for name, part in self.parts) / len(self.parts)


class Best:
    """The best weights of the run in `out`, until now. A collective of all ranks, as its methods are.

    kept: {"step", "score", "of"} of the weights in the folder, the same on all ranks; None where there are none. step:
    the number of steps that were done. by: the score that decides; None: no weights are to be kept. warn: called on
    rank 0, where the folder cannot be read or written: a run goes on without.
    """

    def __init__(self, out: Path, by: Criterion | None, warn: Callable[[str], object]):
        self.folder, self.by, self.warn = out / "weights" / "best", by, warn
        self._part, self._old = (self.folder.with_name(f".best.{ending}") for ending in ("part", "old"))
        found = together(self._found, only_first=True)
        self.kept: dict[str, Any] | None = found and found[0]
        self._asked = found and found[1]
        if self.by is not None and self.kept is not None and not self._comparable() and rank_number() == 0:
            warn(
                f"{self.folder} has the best weights by {self.kept['of']}, or of other sets; those that the next "
                f"evaluation finds the best by {self.by.of} replace them"
            )

    def is_beaten(self, score: float) -> bool:
        """Whether weights with this score are better: strictly, where those before have a score of the same kind."""
        if self.by is None or not math.isfinite(score):
            return False
        return self.kept is None or not self._comparable() or score > self.kept["score"]

    def replace(
        self, model: Lift | Clip, description: dict[str, Any], conditioning: Conditioning | None, score: float
    ) -> None:
        """Keeps the weights of `model` in place of those before. description: for run.json, with "step".

        Where they cannot be written, `warn` is called and those before stay as they are.
        """
        assert self.by is not None
        best = {"step": description["step"], "score": score, "of": self.by.of}
        run = description | best | {"asked": self.by.asked}
        if together(lambda: self._written(model, run, conditioning), only_first=True):
            self.kept, self._asked = best, self.by.asked

    def _comparable(self) -> bool:
        assert self.by is not None and self.kept is not None
        return (self.kept["of"], self._asked) == (self.by.of, self.by.asked)

    def _found(self) -> tuple[dict[str, Any], str] | None:
        """What the folder says of its weights, on rank 0; first it is put in order after a kill."""
        try:
            if self._old.is_dir() and not os.path.lexists(self.folder):
                os.replace(self._old, self.folder)
            self._clear()
            if not os.path.lexists(self.folder):
                return None
            run = run_folder.read_description(self.folder)
            step, score, of, asked = (run[name] for name in ("step", "score", "of", "asked"))
            if not (type(step) is int and type(score) is float and isinstance(of, str) and isinstance(asked, str)):
                raise TypeError("its step or score is no number")
            return {"step": step, "score": score, "of": of}, asked
        except (OSError, DataError, ConfigError, LookupError, TypeError) as error:
            self.warn(f"cannot read which weights {self.folder} holds ({error}); the next evaluation replaces them")
            return None

    def _written(self, model: Lift | Clip, run: dict[str, Any], conditioning: Conditioning | None) -> bool:
        """Whether the weights could be written, on rank 0."""
        try:
            self._clear()
            self._part.mkdir(parents=True)
            run_folder.save(self._part, model, run, conditioning)
            if os.path.lexists(self.folder):
                os.replace(self.folder, self._old)
            os.replace(self._part, self.folder)
        except (OSError, TrainingError) as error:
            with suppress(OSError):
                if os.path.lexists(self._old) and not os.path.lexists(self.folder):
                    os.replace(self._old, self.folder)
            with suppress(OSError):
                self._clear()
            before = f"those of step {self.kept['step']} stay" if self.kept else "the run goes on without them"
            self.warn(f"cannot keep the weights of step {run['step']}, the best so far ({error}); {before}")
            return False
        with suppress(OSError):  # they are in place
            flush_names(self.folder.parent)
            self._clear()
        return True

    def _clear(self) -> None:
        """Removes what is not in place."""
        for path in (self._part, self._old):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)

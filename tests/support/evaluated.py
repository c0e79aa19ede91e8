"""lift-fast eval in this process: the figures of a run on data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lift_fast
from lift_fast.data.options import DataOptions
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set, options_of
from lift_fast.inference.subject import subject_of


def evaluated(
    run: Path, sets: Mapping[str, Path], options: DataOptions | None = None, fields: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """What evaluate returns for a run on the CPU. more: its arguments."""
    model = lift_fast.load(run, device="cpu")
    subject = subject_of(model)
    options = options_of(model.description, options or DataOptions())
    wanted = model.description.get("field", "txt")
    opened = {name: open_set(path, options=options, fields=fields, wanted=wanted) for name, path in sets.items()}
    return evaluate(subject, opened, skip_bad=options.skip_bad, **more)

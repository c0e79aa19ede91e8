"""Targets for what the models learn, read from the report of the last `make demo`.

A figure that is missing from the report counts as 0 and misses its target.
"""

import json
from collections import defaultdict
from pathlib import Path

from lift_fast.errors import DataError

from .harness import Suite

REPORT = Path("runs/demo/report.json")


def run(suite: Suite) -> None:
    if not REPORT.exists():
        raise DataError(f"no {REPORT}; make it with: make demo")
    report = json.loads(REPORT.read_text())
    for model in ("lift", "clip"):
        part = report.get(model, {})
        for name, scores in (part.get("retrieval") or {}).items():
            for way in ("i2t", "t2i"):
                times = scores[way]["r1"] / scores["chance"][way]["r1"]
                suite.add({"model": model, "what": f"{name} {way} R@1 over chance", "value": times})
        for figure in ("step_ms", "text_ms_per_step", "flops_per_sample", "peak_memory_bytes"):
            if figure in part:
                suite.add({"model": model, "what": figure, "value": part[figure]})
        if part.get("loss"):
            fall = sum(part["loss"][:5]) / sum(part["loss"][-5:])
            suite.add({"model": model, "what": "loss, first five steps over last five", "value": fall})
    lift = defaultdict(float, {row["what"]: row["value"] for row in suite.rows if row["model"] == "lift"})
    for way in ("i2t", "t2i"):
        suite.bar(f"LIFT, drawings {way}: R@1 over chance", lift[f"openmoji {way} R@1 over chance"], 25)
        suite.bar(f"LIFT, scenes {way}: R@1 over chance", lift[f"scenes {way} R@1 over chance"], 10)
    suite.bar("LIFT: loss, first five steps over last five", lift["loss, first five steps over last five"], 2)
    times = report.get("lift", {}).get("text_ms_by_context") or {}
    low, high = sorted((times.get("77", 0.0), times.get("128", 0.0)))
    suite.bar("LIFT's text time at n = 77 and 128, the smaller over the larger", low / high if high else 0.0, 0.9)

"""python lease_stub.py MODULE ARGUMENT...: stands in for the commands that `make gpu` runs, in test_lease.py.

It writes lines as the real command does, and after each line its case to the file STUB_FINISHED. STUB_TESTS are the
tests that it collects; one with "crash" or "hang" in its name crashes or hangs. The modules in STUB_BROKEN fail.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import lines  # noqa: E402

GPU_UNUSABLE, PAUSE_S = 70, float(os.environ.get("STUB_PAUSE_S", "0.01"))


def finished(line):
    lines.write(line)
    descriptor = os.open(os.environ["STUB_FINISHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (line["case"] + "\n").encode())
    os.close(descriptor)
    time.sleep(PAUSE_S)


def tests(arguments):
    if "--collect-only" in arguments:
        found = {"tests": os.environ["STUB_TESTS"].split(), "missing": {"tests/test_far.py": "absent"}, "errors": {}}
        Path(os.environ["LIFT_FAST_COLLECTED"]).write_text(json.dumps(found))
        return 0
    for test in [argument for argument in arguments if "::" in argument]:
        if "crash" in test:
            return GPU_UNUSABLE
        if "hang" in test:
            time.sleep(60)
        finished({"phase": "tests", "case": test, "outcome": "failed" if "wrong" in test else "passed"})
    return 0


def main():
    module, *arguments = sys.argv[1:]
    if module in os.environ.get("STUB_BROKEN", "").split():
        print("a traceback\nno such thing")
        return 1
    if module == "pip":
        return 0
    if module == "pytest":
        return tests(arguments)
    name = " ".join(
        [module.removeprefix("benchmarks.lease."), *(a for a in arguments if not a.replace(".", "").isdigit())]
    )
    for number in range(4):
        finished({"phase": name.split()[0], "case": f"{name} {number}", "backend": "lift_fast", "median_ms": 1.0})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What test_lease.py runs in place of a lease's processes: python lease_stub.py MODULE ARGUMENT...

It writes lines as the real ones do, and after each a note of it to STUB_FINISHED. A test whose name has "crash" or
"hang" in it does that.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import lines  # noqa: E402

POISONED, PAUSE_S = 70, float(os.environ.get("STUB_PAUSE_S", "0.01"))


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
            return POISONED
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

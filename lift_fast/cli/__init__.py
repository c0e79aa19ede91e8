"""The command line, `lift-fast`.

`main` is the entry point, a function. It hides the module of its name as an attribute of this package; the module's
other names come by `from lift_fast.cli.main import parse`.
"""

import sys

from .interrupt import INTERRUPTED, say_interrupted

try:
    from .main import main
except KeyboardInterrupt:  # Ctrl-C before anything began
    say_interrupted()
    sys.exit(INTERRUPTED)

__all__ = ["main"]

"""The command line, `lift-fast`.

`main` is the entry point, a function. It hides the module of its name as an attribute of this package; the module's
other names come by `from lift_fast.cli.main import parse`.
"""

from .main import main

__all__ = ["main"]

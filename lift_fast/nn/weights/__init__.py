"""The image tower's weights in other projects' layouts: open_clip, LIFT's authors, timm, Hugging Face.

layouts.py holds a table a layout; convert.py, which knows no project, loads and saves by them; files.py reads files.
"""

from .convert import Loaded, load, save
from .files import read
from .layouts import Layout

__all__ = ["Layout", "Loaded", "load", "read", "save"]

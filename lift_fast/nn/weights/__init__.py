"""Loads and saves the image tower's weights in the layouts of open_clip, LIFT's authors, timm and Hugging Face.

layouts.py has one table per layout; convert.py loads and saves by the tables; files.py reads files.
"""

from .convert import Loaded, load, save
from .files import read
from .layouts import Layout

__all__ = ["Layout", "Loaded", "load", "read", "save"]

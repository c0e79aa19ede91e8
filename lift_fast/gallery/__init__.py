"""The gallery: a page on this machine, in which models search images side by side."""

from .library import Library
from .server import Server

__all__ = ["Library", "Server"]

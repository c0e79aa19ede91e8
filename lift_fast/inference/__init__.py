"""A trained model in use: images and text in, features out."""

from .loading import load
from .model import Classifier, Model
from .preprocessing import Preprocessing

__all__ = ["Classifier", "Model", "Preprocessing", "load"]

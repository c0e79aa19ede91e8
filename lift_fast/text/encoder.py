"""The frozen text encoder: turns captions into unit vectors with an encoder or a decoder-only model of Hugging Face.

Pooling (arXiv 2506.04209, section 4, uses the last token, or the model's own for NV-Embed-v2):
    last  hidden state of the last token        mean  mean over the tokens
    cls   hidden state of the first token       own   what the model's repository declares

`own` is, in this order, the `encode` method of the model's own code (with trust_remote_code), the pooling that the
repository's sentence-transformers files declare, and for CLIP, SigLIP and their kin (repository.TEXT_TOWERS) the text
features that they compare with images: the pooled text, projected. The other poolings take the hidden states of such a
model's text tower. Of T5 and its kin the encoder is used.

presets.py has the pooling, prompt, end token and padding side of known models.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.captions import halved
from ..errors import DataError, EncoderError, LiftFastError
from .repository import check_files, code_of, confined, declared_pooling, first_line, locate, model_type, resolved
from .spec import Dtype, EncoderSpec, check_batch_size

# Trained on rows of full length whose padding is attended to, so that a caption is encoded as such a row, padded on the
# side that its tokenizer says.
_FULL_ROWS = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")
# Captions that a new encoder is tried with: they differ in length.
_TRIAL = ("a dog", "a photo of two small red dogs in the park")
# Distance between unit vectors: padding that moves a vector further is attended to. By dtype, for its rounding.
_MOVED = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_SAME = 1e-6  # the same between vectors of one batch that are equal


class NoTokens(EncoderError):
    """Raised for captions that the tokenizer makes nothing of: all of them would get one vector, or the padding's.

    captions: their numbers in the list that was passed to `encode`.
    """

    def __init__(self, captions: list[int], message: str):
        super().__init__(message)
        self.captions = captions

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.captions, str(self)), vars(self)  # as BadSample


class Encoder:
    """A frozen text encoder. `encode` returns float32 [captions, dim], each row of norm 1.

    dtype: of the weights, instead of the spec's. download: as of `locate`. `encoder.spec` is the spec that is used: for
    a hub model its revision is the commit. `encoder.pooling` is the pooling that is used, "encode" for the model's own
    `encode`, "own" for the text features of CLIP and its kin. `encoder.dim` is the length of a vector.

    The model is run once on two captions. One that attends to padding gets batches without any.

    Raises EncoderError when the model, its package, its declared pooling or its end_token is not found; when it does
    not load or run, needs code that it may not run, or is an encoder-decoder without an encoder of its own; and when
    max_length or the tokenizer does not fit it.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        download: bool = True,
    ):
        if dtype is not None:
            spec = replace(spec, dtype=cast(Dtype, str(dtype).removeprefix("torch.")))
        # Before the slow imports and the weights, so that a wrong name or pooling is reported at once.
        path, gguf = locate(spec, download=download)
        check_files(path)
        pooling: str = spec.pooling
        if pooling == "own" and not spec.trust_remote_code:
            pooling = declared_pooling(spec, path)
        self.spec, self.device = resolved(spec, path), torch.device(device)
        with _typed(spec, path):
            self._read(spec, path, gguf, pooling)

    def _read(self, spec: EncoderSpec, path: str, gguf: str | None, pooling: str) -> None:
        """Loads the model and finds out how it is to be run. Raises EncoderError, and what transformers raises."""
        self.tokenizer, model = _load(spec, path, gguf)
        if pooling == "own" and spec.trust_remote_code:
            pooling = "encode" if callable(getattr(model, "encode", None)) else declared_pooling(spec, path)
        self.pooling = pooling
        self._end = [] if pooling == "encode" else self._missing_end()
        self._text = model  # what has the hidden states of texts
        if hasattr(model, "get_text_features") and hasattr(model, "text_model"):
            self._text = model.text_model
        self._forward = getattr(model, "get_text_features", model) if pooling == "own" else self._text
        self._padding_position = _padding_position(self._text)
        _check_length(spec, model, self._padding_position, self.tokenizer.num_special_tokens_to_add() + len(self._end))
        self._check_prompt()
        self._embeddings = self._table_of_embeddings()
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._padding = self._padding_token()
        full = model.config.model_type in _FULL_ROWS
        self._width = int(model.config.get_text_config().max_position_embeddings) if full else None
        self._takes_positions = (
            spec.padding == "left"
            and self._padding_position is None
            and "position_ids" in inspect.signature(getattr(self._forward, "forward", self._forward)).parameters
        )
        [self._no_caption] = self._tokens([spec.prompt])  # the tokens of an empty caption
        self._pads = True
        if pooling == "encode":
            self.dim = int(model.config.get_text_config().hidden_size)
        else:
            self.dim, self._pads = self._try_out()

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

        Raises, before anything is computed, ConfigError for a batch_size below 1, DataError for a caption that is not
        valid Unicode, and NoTokens; EncoderError when the model fails, for a vector that is zero or not finite, and
        when different captions all get the same vector.
        """
        check_batch_size(batch_size)
        if (half := next(filter(halved, captions), None)) is not None:
            raise DataError(f"the caption {half!r} holds half a Unicode character; correct it")
        ids = self._tokens([self.spec.prompt + caption for caption in captions])
        if without := [i for i, row in enumerate(ids) if row == self._no_caption]:
            raise NoTokens(
                without,
                f"the tokenizer of {self.spec.name} makes no tokens of the caption {captions[without[0]]!r}"
                f"{f' and {len(without) - 1} others' if without[1:] else ''}; change it, or leave the sample out",
            )
        out = torch.empty(len(captions), self.dim, device=self.device)
        equal: list[Tensor] = []  # of each batch with different captions: whether their vectors are the same
        for chosen in self._batches([len(row) for row in ids], batch_size):
            if self.pooling == "encode":
                vectors = self._encode_own([captions[i] for i in chosen])
            else:
                vectors = self._vectors([ids[i] for i in chosen])
            vectors = F.normalize(vectors.float(), dim=-1)
            out[torch.tensor(chosen, device=self.device)] = vectors
            if len({tuple(ids[i]) for i in chosen}) > 1:
                equal.append(torch.linalg.vector_norm(vectors - vectors[:1], dim=1).amax() <= _SAME)
            done(len(chosen))
        usable = torch.linalg.vector_norm(out, dim=1) > 0.5  # False for NaN and for zero
        if not usable.all():
            bad = int((~usable).nonzero()[0])
            raise EncoderError(
                f"{self.spec.name} returned a vector that is not finite, or zero, for caption {captions[bad]!r}; use "
                "another dtype (float32)"
            )
        if equal and torch.stack(equal).all():
            raise EncoderError(
                f"{self.spec.name} gives different captions the same vector with the pooling {self.spec.pooling}; "
                "choose another (a model that reads from left to right has the caption in its last token: last)"
            )
        return out

    def _batches(self, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """The captions' numbers in batches, from the longest; without padding each batch has one length."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
        start = 0
        while start < len(order):
            stop = min(start + batch_size, len(order))
            if not self._pads:
                first = lengths[order[start]]
                stop = next((k for k in range(start, stop) if lengths[order[k]] != first), stop)
            yield order[start:stop]
            start = stop

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

    def _table_of_embeddings(self) -> int:
        """How many tokens the model has embeddings for. Raises EncoderError when the tokenizer has more.

        Tokens that were added to a tokenizer may have none, as those of images in language models.
        """
        try:
            table = self._text.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            table = None
        if not isinstance(table, torch.nn.Embedding):
            return len(self.tokenizer)  # a model without such a table
        rows = table.weight.shape[0]
        if self.tokenizer.vocab_size > rows:
            raise EncoderError(
                f"the tokenizer of {self.spec.name} has {self.tokenizer.vocab_size} tokens, and the model has "
                f"embeddings for {rows}: they are of different models; copy the tokenizer's files of this one"
            )
        return rows

    def _check_prompt(self) -> None:
        """Raises EncoderError when the prompt leaves no token to the captions."""
        if not self.spec.prompt:
            return
        tokens = len(self.tokenizer(self.spec.prompt.rstrip())["input_ids"]) + len(self._end)
        if tokens >= self.spec.max_length:
            raise EncoderError(
                f"max_length {self.spec.max_length} leaves nothing of any caption: the prompt and the special tokens "
                f"are {tokens} tokens; set it higher, or shorten the prompt"
            )

    def _try_out(self) -> tuple[int, bool]:
        """Runs the model on two captions: the length of a vector, and whether captions may be padded.

        A model that attends to padding gives a padded caption another vector than the same caption alone.
        """
        short, long = (row or [0] for row in self._tokens([self.spec.prompt + text for text in _TRIAL]))
        with torch.no_grad():
            if self._takes_positions:
                given, self._takes_positions = self._vectors([short]), False
                # Of some models the first position is not 0.
                self._takes_positions = bool(torch.allclose(self._vectors([short]), given, rtol=1e-3))
            alone, padded = (F.normalize(self._vectors(rows).float(), dim=-1)[-1] for rows in ([short], [long, short]))
        moved = float(torch.linalg.vector_norm(padded - alone))
        return len(alone), not moved > _MOVED[getattr(torch, self.spec.dtype)]

    def _vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The pooled vectors [batch, dim] of captions' token ids, not normalised. Raises EncoderError."""
        ids, mask = self._padded(rows)
        arguments = {"input_ids": ids}
        if self._width is None:
            arguments["attention_mask"] = mask
        if self._takes_positions:
            # With padding on the left the tokens' positions must still count from 0.
            arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        try:
            given = self._forward(**arguments)
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"{self.spec.name} needs more memory than there is for {len(ids)} captions of {ids.shape[1]} tokens; "
                "lower --batch-size"
            ) from error
        except Exception as error:  # the code of models raises many types
            raise EncoderError(
                f"{self.spec.name} does not run on text alone: {first_line(error)}; name a text encoder or a language "
                "model"
            ) from error
        if self.pooling == "own":
            vectors = _features(given)
            if vectors is None or vectors.dim() != 2:
                raise EncoderError(
                    f"{self.spec.name} has no text features of its own; choose --pooling last, mean or cls"
                )
            return vectors
        hidden = getattr(given, "last_hidden_state", None)  # [batch, tokens, dim]
        if hidden is None or hidden.shape[:2] != ids.shape:
            raise EncoderError(f"{self.spec.name} has no hidden state for each token; name another encoder")
        each = torch.arange(len(ids), device=ids.device)
        if self.pooling == "cls":
            return hidden[each, mask.argmax(dim=1)]
        if self.pooling == "last":
            return hidden[each, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids, int64 [batch, tokens], and the mask of the same shape that is 1 where a token is no padding.

        Raises EncoderError for a token that was added to the tokenizer and has no embedding.
        """
        if len(self.tokenizer) > self._embeddings and (largest := max(map(max, rows))) >= self._embeddings:
            raise EncoderError(
                f"the tokenizer of {self.spec.name} gives a caption the token "
                f"{self.tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}, and the model has embeddings "
                f"for {self._embeddings}; leave the caption out, or take a tokenizer that fits"
            )
        width = self._width or max(map(len, rows))
        left = (self.tokenizer.padding_side if self._width else self.spec.padding) == "left"
        ids, mask = torch.full((len(rows), width), self._padding), torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if left else slice(len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)

    def _padding_token(self) -> int:
        """The id to pad with: the mask hides it, so that any will do but to models that find positions by it."""
        if self._padding_position is not None:
            return self._padding_position
        config = self.model.config.get_text_config()
        known = (self.tokenizer.pad_token_id, getattr(config, "pad_token_id", None), self.tokenizer.eos_token_id)
        return next((i for i in known if isinstance(i, int) and 0 <= i < self._embeddings), 0)

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
                f"the `encode` of {self.spec.name}, code of its own repository, fails: {first_line(error)}; it may "
                f"need another transformers than {version('transformers')}"
            ) from error
        if vectors.shape != (len(captions), self.dim):
            raise EncoderError(
                f"the `encode` of {self.spec.name} returned {list(vectors.shape)} for {len(captions)} captions, not "
                f"[{len(captions)}, {self.dim}]; choose --pooling last, mean or cls"
            )
        return vectors


def _features(given: Any) -> Tensor | None:
    """The text features of an output of CLIP and its kin, or of their text towers."""
    if isinstance(given, Tensor):
        return given  # transformers 4
    features = getattr(given, "text_embeds", None)
    return getattr(given, "pooler_output", None) if features is None else features


def _check_length(spec: EncoderSpec, model: Any, padding: int | None, special: int) -> None:
    """Raises EncoderError when the special tokens alone fill max_length, or the model has fewer positions."""
    if spec.max_length <= special:
        raise EncoderError(
            f"max_length {spec.max_length} is too small for any caption: {spec.name} adds {special} special tokens; "
            "set it higher"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return  # no limit is declared
    positions -= 0 if padding is None else padding + 1
    if spec.max_length > positions:
        raise EncoderError(
            f"max_length {spec.max_length} is more than the {positions} positions of {spec.name}; "
            f"set it to {positions} or less"
        )


def _padding_position(text: Any) -> int | None:
    """The padding position of RoBERTa-like models, else None.

    Such models compute the positions themselves, and count them from the one after the padding position.
    """
    for module in text.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            return table.padding_idx
    return None


def _load(spec: EncoderSpec, path: str, gguf: str | None) -> tuple[Any, Any]:
    """Loads the tokenizer and the model of a repository. Raises EncoderError."""
    native = not spec.trust_remote_code and model_type(path) == "nvembed"
    if native and spec.prompt:
        raise EncoderError(
            f"{spec.name} excludes the prompt from its pooling, which only its own code does; leave the prompt out, or "
            "set trust_remote_code"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    # trust_remote_code is False and not None, for which transformers asks at the terminal. The code that the user
    # allows may be that of another repository; all else is in the folder.
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if not spec.trust_remote_code:
        options["local_files_only"] = True
    if gguf:
        options["gguf_file"] = gguf
    with nullcontext() if spec.trust_remote_code else confined():
        if native:
            from .nv_embed import NvEmbed, NvEmbedConfig

            model_class, config = NvEmbed, NvEmbedConfig.from_pretrained(path, **options)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **options)
        else:
            model_class, config = _model_class(spec, path, options)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        # The attention that a configuration names may be a kernel on the hub, which is code.
        config._attn_implementation = config._experts_implementation = None
        dtype = getattr(torch, spec.dtype)
        model = model_class.from_pretrained(path, config=config, dtype=dtype, attn_implementation=None, **options)
    if not spec.trust_remote_code:  # what an export saves shall name no code either
        vars(model.config).pop("auto_map", None)
        tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer, model


@contextmanager
def _typed(spec: EncoderSpec, path: str) -> Iterator[None]:
    """Raises EncoderError for whatever is raised within it: transformers, safetensors and a model's own code raise many
    types."""
    try:
        yield
    except LiftFastError:
        raise
    except Exception as error:
        code = code_of(spec, path)
        if code and not spec.trust_remote_code and "trust_remote_code" in str(error):
            raise EncoderError(
                f"{spec.name} needs code that comes with it, which runs only if you allow it: {'; '.join(code)}; read "
                "it, then allow it with --trust-remote-code"
            ) from error
        raise EncoderError(
            f"the text encoder {spec.name!r} does not load from {path}: {first_line(error)}; check its files, or "
            "download it again"
        ) from error


def _model_class(spec: EncoderSpec, path: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The class that loads the model, transformers' choice, or where that is no text encoder, the one that is; and the
    model's configuration.

    Raises EncoderError for an encoder-decoder whose encoder has no class.
    """
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    config = AutoConfig.from_pretrained(path, **options)
    name = (getattr(config, "architectures", None) or [""])[0] or ""
    named = getattr(transformers, name, None)
    if config.is_encoder_decoder or name.endswith("EncoderModel"):
        if not name.endswith("EncoderModel"):
            named = AutoModelForTextEncoding._model_mapping.get(type(config), None)
        if named is None or not named.__name__.endswith("EncoderModel"):
            raise EncoderError(
                f"{spec.name} is an encoder-decoder whose encoder cannot be loaded alone; name an encoder, a "
                "decoder-only language model or a T5"
            )
        return named, config
    if named is not None and (name.endswith("TextModelWithProjection") or type(config) not in AutoModel._model_mapping):
        return named, config
    return AutoModel, config

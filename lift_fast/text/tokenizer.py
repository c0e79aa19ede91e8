"""CLIP's byte-pair tokenizer: the tokens of open_clip's SimpleTokenizer (49 408 of them).

    clean   ftfy repairs the text (curly quotes, ligatures, full-width letters, decomposed accents), HTML entities are
            replaced twice, white space becomes single spaces, letters become small
    split   into words: runs of letters, single digits, runs of other characters, the English endings 's 't 're …
    merge   a word's bytes by the 48 894 merges of clip_merges.txt.gz (github.com/openai/CLIP, LICENSE-CLIP)

A word's tokens are remembered: captions have few different words.
"""

import gzip
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
from tokenizers.models import BPE
from torch import Tensor

from .. import foreign

_START, _END = 49406, 49407
_SPECIAL = {"<start_of_text>": _START, "<end_of_text>": _END}
# regex, not re: its \p{L} and its way of ignoring case are open_clip's.
_WORDS = regex.compile(
    rf"{'|'.join(_SPECIAL)}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)
_PLAIN = regex.compile("[0-9A-Za-z]")
_REMEMBERED = 1 << 18  # words, at most: some 100 MB


class ClipTokenizer:
    """Captions -> token ids int64 [captions, context]: start of text, the caption, end of text, zeros.

    context: length of a row, in tokens. A longer caption is truncated and still ends with end of text, as in CLIP.
    """

    def __init__(self, context: int = 77):
        self.context = context
        self._letters, self._merges = _merges()
        self._words: dict[str, list[int]] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        tokens = np.zeros((len(captions), self.context), dtype=np.int64)
        for row, caption in zip(tokens, captions, strict=True):
            ids = self._encode(caption)
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)

    def save(self, folder: Path) -> None:
        """Writes vocab.json, merges.txt and tokenizer_config.json, from which Hugging Face's CLIPTokenizer makes the
        same tokens, except that it does not repair texts: it has neither ftfy nor HTML entities."""
        self._merges.save(str(folder))
        file = folder / "vocab.json"
        start, end = "<|startoftext|>", "<|endoftext|>"  # Hugging Face's names of the two
        vocabulary = foreign.read_json(file) | {start: _START, end: _END}
        file.write_text(json.dumps(vocabulary), encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context}
        config |= {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    def _encode(self, caption: str) -> list[int]:
        """The ids of one caption, at most `context`."""
        ids = [_START]
        for word in _WORDS.findall(_clean(caption)):
            known = self._words.get(word)
            ids += self._encode_word(word) if known is None else known
            if len(ids) >= self.context:
                break
        ids = ids[: self.context - 1]
        ids.append(_END)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        special = _SPECIAL.get(word)
        if special is not None:
            ids = [special]
        else:
            text = "".join([self._letters[byte] for byte in word.encode(errors="replace")])
            ids = [token.id for token in self._merges.tokenize(text)]
        if len(self._words) >= _REMEMBERED:
            self._words.clear()
        self._words[word] = ids
        return ids


def has_tokens(caption: str) -> bool:
    """Whether anything is left of a caption: nothing is of one such as "&nbsp;" or an escape sequence of terminals."""
    if "&" not in caption and "\x1b" not in caption and _PLAIN.search(caption):
        return True
    return bool(_clean(caption))


def _clean(text: str) -> str:
    if not text.isascii() or not text.isprintable() or "&" in text:  # else there is nothing to repair
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _merges() -> tuple[list[str], BPE]:
    """The character that stands for each byte, and the merges, which are of such characters."""
    lines = gzip.decompress(files(__package__).joinpath("clip_merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    # Printable bytes stand for themselves, the others for characters from 256 on. This is the order of the tokens.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [*letters.values(), *(letter + "</w>" for letter in letters.values()), *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return [letters[byte] for byte in range(256)], BPE(vocabulary, merges, end_of_word_suffix="</w>")

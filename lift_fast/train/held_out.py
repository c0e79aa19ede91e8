"""Evaluation on held-out sets while a run trains: the scores of `lift-fast eval`, every so many steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_folder
from ..cache import Conditioning
from ..errors import ConfigError
from ..eval.held_out_set import HeldOutSet
from ..eval.images import ImageFeatures, Images, Pixels, image_features
from ..eval.kept import Kept
from ..eval.questions import Questions
from ..eval.run import score_set
from ..eval.sets import open_sets, options_of
from ..eval.texts import Texts, encode_texts
from ..nn import Clip, Lift, preset
from ..nn.transformer import Transformer
from ..ranks import Rank, together
from ..run_folder import EncodeText
from ..text.identity import FEATURES, text_identity
from .best import Criterion
from .config import TrainConfig

_KEPT = 1 << 29  # bytes of decoded pixels of all sets that stay in memory; more are decoded anew each time


class HeldOut:
    """The held-out sets of a run, config.eval_data, opened and checked before the first step.

    Samples whose image does not decode, or whose caption cannot be used, are left out and counted. LIFT's frozen text
    encoder encodes the captions once, now, and is dropped; their vectors are kept in eval-features in the run's folder,
    so that a run that goes on does not load it. CLIP's text tower encodes them in each evaluation.

    run: of run.json, what run_folder needs, and "field" and "read" where they are not the default. device: of the
    model. rank: this process; the constructor and `scores` are collectives. conditioning: of the run's text. notices:
    on rank 0, what to say of the sets before the first step. best_by: the score that config.keep_best names, None where
    no best weights are kept.

    Raises DataError and ConfigError for a set that cannot be read, for a score of config.keep_best that no set has, and
    for an encoder that runs code from its repository, which is not permitted while training; what
    run_folder.text_encoder raises; each also when it is raised on another rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: dict[str, Any],
        device: torch.device,
        rank: Rank,
        conditioning: Conditioning | None = None,
    ):
        self.run, self.device, self.rank = run, device, rank
        options = options_of(run, config.options)
        pixels = Pixels.of_size(preset(run["preset"]).vit.image_size)

        def opened() -> dict[str, HeldOutSet]:
            if "encoder" in run and run["encoder"].get("trust_remote_code"):
                raise ConfigError(
                    f"{run['encoder']['name']} runs code from its repository, so --eval-data cannot encode captions "
                    "while training; leave it out and evaluate with: lift-fast eval --trust-remote-code"
                )
            return open_sets(
                config.eval_data,
                config.eval_pictures,
                options=options,
                fields=config.eval_field,
                wanted=run.get("field", "txt"),
                skip_bad=True,
                templates=config.eval_templates,
                classnames=config.eval_classnames,
            )

        @cache
        def load() -> EncodeText:
            with torch.device("meta"):
                model = run_folder.build(run)  # without weights: only its kind matters
            return run_folder.text_encoder(model, run, device, conditioning=conditioning)

        def check() -> None:
            for images in self.images.values():
                images.check()

        sets = together(opened)
        self.questions = {name: held_out.questions for name, held_out in sets.items()}
        asked = blake2b(repr([*self.questions.values()]).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        scores = {name: _scores_of(questions) for name, questions in self.questions.items()}
        self.best_by = together(lambda: Criterion.named(config.keep_best, scores, asked))
        self.notices = [f"{name}: {note}" for name, questions in self.questions.items() for note in questions.notes]
        self.notices += [_problems(name, held_out) for name, held_out in sets.items() if held_out.data.problems]
        self.images = {
            name: Images(held_out.data, pixels, device, config.loader, rank) for name, held_out in sets.items()
        }
        together(check, only_first=True)
        self.texts: dict[str, Texts] | None = None
        if run["model"] == "lift":
            # Loading a model may draw random numbers, which are the training's.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                kept = together(lambda: Kept(config.out / FEATURES, None, text_identity(run, device)), only_first=True)
                self.texts = self._encode_texts(lambda texts: load()(texts), kept if rank.is_first else None)
        if sum(images.bytes for images in self.images.values()) <= _KEPT:
            for images in self.images.values():
                images.keep()

    @torch.no_grad()
    def scores(self, model: Lift | Clip, towers: nn.Module | None = None) -> dict[str, dict[str, Any]]:
        """The scores of the model as it is now, in float32, the same on every rank. A collective.

        model: what is trained, on the device. towers: with FSDP2 the module that shards the model's weights
        (parallel.spread). The training goes on as if this had not been called.

        Returns {set: {"n", "left_out"}}, n being the number of images scored, and where a set asks for them "t2i_r1"
        and "i2t_r1", "composition", the mean over the tasks, and "zero_shot_top1".

        Raises DataError when no image of a set decodes; TrainingError when features are not finite.
        """
        found = {}
        with _evaluating(model), _unsharded(towers, next(iter(self.images.values())).none.pixels.to(self.device)):
            texts = self.texts
            if texts is None:
                texts = self._encode_texts(run_folder.text_encoder(model, self.run, self.device))
            for name, images in self.images.items():
                features = image_features(model.encode_image, images)
                score = partial(_scores, features, self.questions[name], texts[name])
                found[name] = together(score, only_first=True)
        return found

    def _encode_texts(self, encode_text: EncodeText, kept: Kept | None = None) -> dict[str, Texts]:
        return {
            name: encode_texts(questions.texts(), encode_text, self.rank, True, kept.texts() if kept else None)
            for name, questions in self.questions.items()
        }


def _scores_of(questions: Questions) -> list[str]:
    """The names of the scores that a set asks for, among those that HeldOut.scores returns."""
    retrieval = ["t2i_r1", "i2t_r1"] * bool(questions.captions)
    return retrieval + ["composition"] * bool(questions.choices) + ["zero_shot_top1"] * bool(questions.classes)


def _problems(name: str, held_out: HeldOutSet) -> str:
    """A sentence on what opening a set found that belongs to no sample."""
    first, *others = held_out.data.problems
    more = f"; and {len(others)} more" if others else ""
    return f"{name}: {first.where}: {first.cause} ({first.reason}){more}"


def _scores(images: ImageFeatures, questions: Questions, texts: Texts) -> dict[str, Any]:
    """What HeldOut.scores returns of one set."""
    scores = score_set(images, questions, texts)
    found: dict[str, Any] = {}
    if scores["retrieval"]:
        found |= {f"{way}_r1": scores["retrieval"][way]["r1"] for way in ("t2i", "i2t")}
    left_out = sum(scores["skipped_causes"].values())
    found |= {"n": len(images.samples) + sum(images.causes.values()) - left_out, "left_out": left_out}
    if scores["composition"]:
        found["composition"] = scores["composition"]["mean"]
    if scores["zero_shot"]:
        found["zero_shot_top1"] = scores["zero_shot"]["top1"]
    return found


@contextmanager
def _evaluating(model: Lift | Clip) -> Iterator[None]:
    """Within it the model is as lift-fast eval has it: in eval mode, and without float8."""
    modes = [(module, module.training) for module in model.modules()]
    fp8 = [(module, module.fp8) for module in model.modules() if isinstance(module, Transformer)]
    model.eval()
    model.set_fp8(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for transformer, enabled in fp8:
            transformer.fp8 = enabled


@contextmanager
def _unsharded(towers: nn.Module | None, pixels: Tensor) -> Iterator[None]:
    """Within it the model in `towers` may be called by parts: the weights that FSDP2 gathers for a call of the whole
    towers are there, and those of a block are gathered in its call. pixels: any that the towers take.

    Afterwards no gathered weights are left, which a later change of the sharded ones would not reach.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(towers, FSDPModule):
        yield
        return
    towers(pixels)  # FSDP2 finds its root module in the first call of all
    towers.unshard()
    try:
        yield
    finally:
        for module in towers.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

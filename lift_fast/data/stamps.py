"""Whether the images of a data set are those that features were made from."""

import hashlib
import os

from .reading import stamp_of
from .samples import BadSample, Samples


def data_stamp(data: Samples, number: int, first: int) -> str:
    """A text that changes when an image of shard `number` does, or a key: from the sizes and times of the files.

    first: the number of its first sample.
    """
    digest = hashlib.blake2b(f"{data.names[number]} {data.shard_sizes[number]}".encode(), digest_size=16)
    for i in range(first, first + data.shard_sizes[number]):
        try:
            path = data.image_file(i)
            if path is None:  # it is a part of the shard, and so are the others
                digest.update(data.shard_stamp(number).encode())
                return digest.hexdigest()
            digest.update(os.fsencode(str(path).removeprefix(str(data.folder))))
            digest.update(b" %d %d," % stamp_of(os.stat(path)))
        except (BadSample, OSError, ValueError):
            digest.update(b"-")
    digest.update(data.shard_hashes(number).numpy().tobytes())
    return digest.hexdigest()

"""Opens a data set, whatever its layout."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from .folders import FILE_COLUMNS, ParquetImages, TableImages
from .samples import Collection, Samples
from .shards import Shards
from .sources import TABLES

_METADATA = tuple(f"metadata{suffix}" for suffix in TABLES)  # Hugging Face's imagefolder
_CAPTIONS = ("captions", "raw_captions", "caption_embeddings")  # LIFT's authors use the last two names, and "images"
_IMAGES = "images"
_LAYOUTS = (
    f"expected a folder of .tar shards; a folder with {', '.join(_METADATA[:-1])} or {_METADATA[-1]}; a "
    f"{', '.join(TABLES[:-1])} or {TABLES[-1]} file that names images ({', '.join(FILE_COLUMNS)}); or a folder of "
    f"parquet files, or one with such a folder ({', '.join(_CAPTIONS)}), and folders of images"
)


def open_data(path: str | Path, images: str | Path | None = None) -> Samples:
    """Opens the images and captions at `path`, as the first of these layouts that matches:

    a .csv, .tsv or .jsonl file                       TableImages
    a folder that holds .tar files                    Shards
    metadata.csv, .tsv or .jsonl in the folder        TableImages of that file
    .parquet files in the folder                      ParquetImages; the folders of images lie next to them
    captions/, raw_captions/ or caption_embeddings/   ParquetImages of the first of these that exists; the folders of
                                                      images lie in images/, or next to it when there is no images/

    images: the folder of the image files, or of the folders of them, where it is not the one above. With it `path` may
    also be a folder of folders of parquet files, as caption_embeddings/ of LIFT's authors.

    Raises DataError when there is nothing at `path`, or none of these layouts, or two tables, and where the class
    raises it; ConfigError for `images` with tars.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return TableImages(path, images)
        raise DataError(f"{path} is no data set; {_LAYOUTS}")
    if not path.is_dir():
        raise DataError(f"no data set at {path}; {_LAYOUTS}")
    if any(path.glob("*.tar")):
        if images is not None:
            raise ConfigError(f"the tar shards at {path} hold their images; leave {images} out")
        return Shards(path)
    tables = [path / name for name in _METADATA if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{path} holds {' and '.join(table.name for table in tables)}; name the one to read")
    if tables:
        return TableImages(tables[0], images or path)
    if any(path.glob("*.parquet")):
        return ParquetImages(path, images or path)
    for captions in (path / name for name in _CAPTIONS):
        if captions.is_dir():
            usual = path / _IMAGES
            return ParquetImages(captions, images or (usual if usual.is_dir() else path))
    if images is not None:
        return ParquetImages(path, images)
    names = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path} is no data set, it holds {_listed(names)}; {_LAYOUTS}")


def open_sets(paths: Sequence[str | Path], images: Sequence[str | Path] = ()) -> Collection:
    """Opens several data sets as one, in the order given. images: the folder of images of each set, or none at all.

    Raises DataError and ConfigError as open_data does.
    """
    folders: Sequence[str | Path | None] = images or len(paths) * [None]
    return Collection([open_data(path, folder) for path, folder in zip(paths, folders, strict=True)])


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""Which kind of data set lies at a path."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from .folders import FILE_COLUMNS, ParquetImages, TableImages
from .samples import Collection, Samples
from .shards import Shards
from .sources import TABLES

_METADATA = tuple(f"metadata{suffix}" for suffix in TABLES)  # Hugging Face's imagefolder
_CAPTIONS = ("captions", "raw_captions", "caption_embeddings")  # the last two and "images": as LIFT's authors name them
_IMAGES = "images"
_WANTED = (
    f"wanted is a folder of .tar shards; a folder with {', '.join(_METADATA[:-1])} or {_METADATA[-1]}; a "
    f"{', '.join(TABLES[:-1])} or {TABLES[-1]} file that names pictures ({', '.join(FILE_COLUMNS)}); or a folder of "
    f"parquet files, or one with such a folder ({', '.join(_CAPTIONS)}), and folders of pictures"
)


def open_data(path: str | Path, pictures: str | Path | None = None) -> Samples:
    """The pictures and captions at `path`, by the first of these that fits:

    a .csv, .tsv or .jsonl file                       TableImages
    a folder that holds .tar files                    Shards
    metadata.csv, .tsv or .jsonl                      TableImages of that
    .parquet files                                    ParquetImages; the folders of pictures lie beside them
    captions/, raw_captions/ or caption_embeddings/   ParquetImages of the first there is; the folders of pictures
                                                      lie in images/, or beside it when there is no images/

    pictures: the folder that picture files lie in, or the folders of them, where it is another one. With it `path` may
    also be a folder of folders of parquet files, as the authors' caption_embeddings/.

    Raises DataError: nothing there, or nothing of these, or two tables; and as those classes. ConfigError: `pictures`
    for tars.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return TableImages(path, pictures)
        raise DataError(f"{path} is no data set; {_WANTED}")
    if not path.is_dir():
        raise DataError(f"no data set at {path}; {_WANTED}")
    if any(path.glob("*.tar")):
        if pictures is not None:
            raise ConfigError(f"the tar shards at {path} hold their pictures; leave {pictures} out")
        return Shards(path)
    tables = [path / name for name in _METADATA if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{path} holds {' and '.join(table.name for table in tables)}; name the one to read")
    if tables:
        return TableImages(tables[0], pictures or path)
    if any(path.glob("*.parquet")):
        return ParquetImages(path, pictures or path)
    for captions in (path / name for name in _CAPTIONS):
        if captions.is_dir():
            images = path / _IMAGES
            return ParquetImages(captions, pictures or (images if images.is_dir() else path))
    if pictures is not None:
        return ParquetImages(path, pictures)
    names = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path} is no data set, it holds {_listed(names)}; {_WANTED}")


def open_sets(paths: Sequence[str | Path], pictures: Sequence[str | Path] = ()) -> Collection:
    """Several data sets read as one, in the order given. pictures: the folder of images of each set, or none at all.

    Raises DataError and ConfigError as open_data does.
    """
    folders: Sequence[str | Path | None] = pictures or len(paths) * [None]
    return Collection([open_data(path, folder) for path, folder in zip(paths, folders, strict=True)])


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

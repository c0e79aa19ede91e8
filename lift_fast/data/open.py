"""Opens a data set, whatever its layout."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..foreign import read_json
from .folders import ParquetImages, no_images
from .loose import LooseFiles, holds_images
from .options import DataOptions
from .samples import Collection, Samples
from .shards import Shards
from .tables import IMAGE_COLUMNS, TABLES, TableImages

_METADATA = tuple(f"metadata{suffix}" for suffix in TABLES if suffix != ".arrow")  # Hugging Face's imagefolder
_CAPTIONS = ("captions", "raw_captions", "caption_embeddings")  # LIFT's authors use the last two names, and "images"
_IMAGES = "images"
# Of Hugging Face's `datasets`: what it writes for one data set and for several, and where the Hub has parquet files.
_STATE, _SEVERAL, _HUB = "state.json", "dataset_dict.json", "data"
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_LAYOUTS = (
    f"expected a folder of .tar shards; a folder with {', '.join(_METADATA[:-1])} or {_METADATA[-1]}; a "
    f"{', '.join(TABLES[:-1])} or {TABLES[-1]} file whose rows name or hold images ({', '.join(IMAGE_COLUMNS)}), or a "
    f"folder of such parquet or Arrow files; a folder of parquet files, or one with such a folder "
    f"({', '.join(_CAPTIONS)}), and folders of images; or a folder of image files with captions next to them"
)


def open_data(
    path: str | Path,
    images: str | Path | None = None,
    options: DataOptions | None = None,
    *,
    captions_only: bool = False,
    images_only: bool = False,
) -> Samples:
    """Opens the images and captions at `path`, as the first of these layouts that matches:

    a .csv, .tsv, .jsonl, .parquet or .arrow file     TableImages
    a folder that holds .tar files                    Shards
    metadata.csv, .tsv, .jsonl or .parquet in it      TableImages of that file
    .arrow files in it, as `datasets` saves them      TableImages
    .parquet files in it                              ParquetImages where there is a folder of images for one of them,
                                                      else TableImages
    captions/, raw_captions/ or caption_embeddings/   ParquetImages of the first of these that exists; the folders of
                                                      images lie in images/, or next to it when there is no images/
    data/ with .parquet files, as on the Hub          TableImages
    train/, test/, … with one of the layouts above    that of the only one
    image files in it or in folders below it          LooseFiles

    Of several splits, such as train-00000-of-00002.parquet and test-00000-of-00001.parquet, name one: `path`/train.

    images: the folder of the image files, or of the folders of them, where it is not the one above. With it `path` may
    also be a folder of folders of parquet files, as caption_embeddings/ of LIFT's authors. options: those that do not
    apply to the layout are ignored. captions_only: there need be no images. images_only: the images in folders need
    no captions.

    Raises DataError when there is nothing at `path`, or none of these layouts, or several tables or splits, and where
    the class raises it; ConfigError for `images` with tars.
    """
    path, options = Path(path), options or DataOptions()
    if path.is_file():
        if path.suffix.lower() == ".parquet" and _folder_for(path, Path(images or path.parent)):
            return ParquetImages(path, images or path.parent, options)
        if path.suffix.lower() in TABLES:
            return TableImages(path, images, options, captions_only)
        raise DataError(f"{path} is no data set; {_LAYOUTS}")
    if not path.is_dir():
        for folder in path.parent, path.parent / _HUB:
            if files := [file for file in _files(folder) if _split(file) == path.name]:
                return _columns(folder, files, images, options, captions_only)
        raise DataError(f"no data set at {path}; {_LAYOUTS}")
    if any(path.glob("*.tar")):
        if images is not None:
            raise ConfigError(f"the tar shards at {path} hold their images; leave {images} out")
        return Shards(path, options=options)
    tables = [path / name for name in _METADATA if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{path} holds {' and '.join(table.name for table in tables)}; name the one to read")
    if tables:
        return TableImages(tables[0], images or path, options, captions_only)
    if files := _files(path):
        return _columns(path, files, images, options, captions_only)
    for captions in (path / name for name in _CAPTIONS):
        if captions.is_dir():
            usual = path / _IMAGES
            return ParquetImages(captions, images or (usual if usual.is_dir() else path), options)
    if files := _files(path / _HUB):
        return _columns(path / _HUB, files, images, options, captions_only)
    if images is not None:
        return ParquetImages(path, images, options)
    splits = [name for name in sorted(_SPLITS) if _is_table(path / name)]
    _check_one(path, splits)
    if splits:
        return open_data(path / splits[0], None, options, captions_only=captions_only, images_only=images_only)
    if holds_images(path, options):
        return LooseFiles(path, options, images_only)
    names = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path} is no data set, it holds {_listed(names)}; {_LAYOUTS}")


def open_sets(
    paths: Sequence[str | Path],
    images: Sequence[str | Path] = (),
    options: DataOptions | Sequence[DataOptions] | None = None,
) -> Collection:
    """Opens several data sets as one, in the order given.

    images: the folder of images of each set, or none at all. options: for all sets, or one for each.

    Raises DataError and ConfigError as open_data does.
    """
    folders: Sequence[str | Path | None] = images or len(paths) * [None]
    each = options if isinstance(options, Sequence) else len(paths) * [options]
    return Collection([open_data(*one) for one in zip(paths, folders, each, strict=True)])


def _columns(
    folder: Path, files: Sequence[Path], images: str | Path | None, options: DataOptions, captions_only: bool
) -> Samples:
    """The samples of parquet or Arrow files in a folder. Raises DataError when they are several splits."""
    root = Path(images or folder)
    if any(_folder_for(file, root) for file in files):
        return ParquetImages(folder, root, options)
    _check_one(folder, sorted({split for file in files if (split := _split(file))}))
    table = TableImages(folder, root, options, True, {file.name: [file] for file in files})
    if table.image_column is None and not captions_only:
        if "key" in table.columns or len(table.columns) == 1:
            raise DataError(no_images(folder, root, files[0].name))
        table.require_images()
    return table


def _folder_for(file: Path, images: Path) -> bool:
    """Whether there is a folder of images for a parquet file, as LIFT's authors and img2dataset have it."""
    return (images / file.name.partition(".")[0]).is_dir()


def _files(folder: Path) -> list[Path]:
    """The parquet files in a folder, or the Arrow files in the order of its state.json. Raises DataError."""
    state = folder / _STATE
    if state.is_file():
        try:
            return [folder / _bare(entry["filename"]) for entry in read_json(state)["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{state} does not parse ({error}); name the .arrow files themselves") from error
    if (several := folder / _SEVERAL).is_file():
        try:
            _check_one(folder, [str(name) for name in read_json(several)["splits"]], even_one=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{several} does not parse ({error}); name the folder of a split") from error
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.arrow"))


def _bare(name: Any) -> str:
    """The name of a file in the folder. Raises ValueError."""
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError("it names a file that is not in this folder")
    return name


def _split(file: Path) -> str:
    """The split that a file's name tells, "" for none: train of train-00000-of-00002.parquet."""
    named = _SHARD.fullmatch(file.stem)
    if named:
        return named[1]
    return file.stem if file.stem in _SPLITS else ""


def _is_table(folder: Path) -> bool:
    """Whether a folder holds tars, a table, or a data set that `datasets` saved."""
    return folder.is_dir() and any(
        next(folder.glob(pattern), None) for pattern in ("*.tar", "metadata.*", "*.parquet", "*.arrow")
    )


def _check_one(folder: Path, splits: Sequence[str], even_one: bool = False) -> None:
    if len(splits) > 1 or (splits and even_one):
        raise DataError(f"{folder} holds the splits {', '.join(splits)}; name the one to read: {folder / splits[0]}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

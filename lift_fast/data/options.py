"""How the files of a data set are read, where their names and headers do not say it."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..errors import ConfigError

# Settings that a cache does not record: they permit something on this machine, and change no key and no caption.
NOT_RECORDED = ("skip_bad", "absolute_paths", "follow_links")


@dataclass(frozen=True)
class DataOptions:
    """How the files of a data set are read. The defaults suit most sets; a text cache records the others, so that
    training reads the same keys and captions.
    """

    skip_bad: bool = False
    """Leave out samples, rows and shards that cannot be read, count them by cause and list them, instead of ending."""
    key: str | None = None
    """Tables and parquet: column of the sample keys. Default: key where there is such a column, else the row's
    number."""
    image_column: str | None = None
    """Tables and parquet: column that names or holds the image. Default: the first of file_name, filepath, filename,
    image, path and image_path that there is; one that holds images goes before those that name them."""
    image_suffix: str | None = None
    """Tars and folders of files: what follows KEY. in the name of the image, such as input.jpg. Default: the first of
    png, jpg, jpeg, webp, gif and bmp that a sample has."""
    text_suffix: str | None = None
    """Tars and folders of files: what follows KEY. in the name of the caption, such as cls. Default: txt."""
    delimiter: str | None = None
    """CSV and TSV: one character, or tab. Default: a tab for .tsv; for .csv what the header has: comma, tab or
    semicolon."""
    quoting: Literal["auto", "minimal", "none"] = "auto"
    """CSV and TSV: none: a quote is a character like any other. minimal: a field in double quotes may hold delimiters.
    auto: none where a tab delimits and the header has no quotes, else minimal, but rows that a quote may have joined
    by mistake are refused."""
    shard_rows: int | None = None
    """CSV, TSV, JSONL and folders of files: samples in a shard. Default: 10 000. Of tars and parquet each file is a
    shard."""
    absolute_paths: bool = False
    """Tables: allow names of images that are absolute, or lead out of the folder of images."""
    follow_links: bool = False
    """Images, texts and folders that are links: follow those that lead out of the folder of images, too. Tars and
    tables may always be links."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        if self.shard_rows is not None and self.shard_rows < 1:
            raise ConfigError(f"shard_rows is {self.shard_rows}: a shard holds at least 1 sample")
        if (
            self.delimiter is not None
            and self.delimiter != "tab"
            and (len(self.delimiter) != 1 or self.delimiter in '"\r\n')
        ):
            raise ConfigError(f"the delimiter is one character or the word tab, not {self.delimiter!r}")

    def recorded(self) -> dict[str, Any]:
        """The settings that are not the default and that decide keys and captions, as JSON values for a manifest."""
        default = DataOptions()
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in NOT_RECORDED and value != getattr(default, name)
        }

    def merged(self, recorded: dict[str, Any]) -> "DataOptions":
        """These options, with a cache's recorded settings where they have the default.

        Raises ConfigError for a recorded setting that this version does not know, or that has another value here.
        """
        known = {field.name for field in fields(self)} - set(NOT_RECORDED)
        if unknown := set(recorded) - known:
            raise ConfigError(f"the cache was made with the setting {min(unknown)!r}, which this version does not have")
        mine = self.recorded()
        for name, value in recorded.items():
            if mine.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name} is {mine[name]!r}, and the cache was made with {value!r}; leave the option out, or embed "
                    "again with it"
                )
        here = {name: getattr(self, name) for name in NOT_RECORDED}
        return DataOptions(**here, **mine)

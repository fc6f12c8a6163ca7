"""Splits of labeled images from what the datasets library reads: files, saved folders, the Hub."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import fsspec
from PIL import Image

from ..errors import DataError, first_line
from .images import open_image
from .layout import METADATA_FILES, LeftOut, RawSplit, choose_splits, find_split, find_tables

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")  # the last one in CIFAR-100


def load_parquet(folder: Path, tables: Sequence[PurePath], left_out: LeftOut) -> Mapping[str, Any]:
    """Load parquet files as a `datasets.DatasetDict`.

    Args:
        folder: The folder.
        tables: The files in it.
        left_out: Gets what is not used.

    Raises:
        DataError: If they cannot be read, or their labels mean different classes.
    """
    _import_datasets(f"{folder}:")
    places = find_tables(folder, tables, left_out)
    _check_same_classes([folder / file for files in places.values() for file in files])
    return _load_files("parquet", folder, places)


def load_metadata(
    folder: Path, tables: Sequence[PurePath], files: Iterable[PurePath], left_out: LeftOut
) -> Mapping[str, Any]:
    """Load images with metadata files as a `datasets.DatasetDict`.

    Args:
        folder: The folder.
        tables: The metadata files in it.
        files: All files in it.
        left_out: Gets what is not used.

    Raises:
        DataError: If they cannot be read, have an `image` column of their own, or a file lists
            images of several splits.
    """
    datasets = _import_datasets(f"{folder}:")
    places = find_tables(folder, tables, left_out)
    loaded = _load_files("imagefolder", folder, places)
    listed: set[PurePath] = set()
    for split, table in loaded.items():
        column = _find_image_column(table.features, folder)
        if not isinstance(table.features[column], datasets.Image):
            raise DataError(
                f"{folder}: its metadata has a column {column} beside the names of files, which "
                "stands for the files themselves; rename it"
            )
        cells = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        found = [Path(cell["path"]) for cell in cells if cell and cell["path"]]
        paths = [file.relative_to(os.path.abspath(folder)) for file in found]
        tops = {find_split(path.parts[0]) for path in paths if len(path.parts) > 1} - {""}
        if tops - {split}:
            raise DataError(
                f"{folder}: its metadata lists images of {' and '.join(sorted(tops))} together; "
                "put a metadata file into the folder of each"
            )
        listed.update(paths)
    unlisted = [file for file in files if file not in listed and file.name not in METADATA_FILES]
    left_out["files that no metadata lists"] += unlisted
    return loaded


def load_saved(folder: Path) -> Mapping[str, Any]:
    """Load a folder that `save_to_disk` wrote.

    Raises:
        DataError: If it cannot be read.
    """
    datasets = _import_datasets(f"{folder}:")
    with _raising_data_errors(f"{folder}:"):
        loaded = datasets.load_from_disk(str(folder))
    if not isinstance(loaded, Mapping):
        split = find_split(str(loaded.split).partition("[")[0])  # of train[:1000]
        return {split or "train": loaded}
    return loaded


def load_from_hub(repo_id: str, config: str | None) -> Mapping[str, Any]:
    """Load a dataset of the Hub as a `datasets.DatasetDict`.

    Args:
        repo_id: `OWNER/NAME`.
        config: One of its configurations; needed if it has several.

    Raises:
        DataError: If there is no such repository, or it cannot be read.
    """
    datasets = _import_datasets(f"{repo_id}: no such folder; if it is on the Hub,")
    where = f"{repo_id}: no such folder, and what the Hub has by that name"
    with _raising_data_errors(where):
        names = datasets.get_dataset_config_names(repo_id)
    if config not in names and (config or len(names) > 1):
        raise DataError(f"{repo_id}: holds {', '.join(names)}; choose one of them with --config")
    with _raising_data_errors(where):
        loaded: Mapping[str, Any] = datasets.load_dataset(repo_id, config)
    return loaded


def _import_datasets(what: str) -> ModuleType:
    """Import the datasets library; if it is not installed, say what needs it."""
    try:
        import datasets
    except ImportError:
        datasets = None
    if not hasattr(datasets, "load_dataset"):  # a folder of this name can be imported, too
        raise DataError(f"{what} reading it needs the datasets library: pip install datasets")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


@contextmanager
def _raising_data_errors(place: str) -> Iterator[None]:
    """Turn any error of the datasets library into a DataError that names what was read."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{place} cannot be read as a dataset ({first_line(cause)}); check its name and its "
            "files, and whether there is room in the cache, which HF_HOME moves"
        ) from None


def _check_same_classes(files: Sequence[Path]) -> None:
    """Refuse files whose labels mean different classes: datasets goes by the first file only."""
    import datasets
    from pyarrow import parquet  # which datasets brings

    meanings = []
    for file in files:
        try:
            features = datasets.Features.from_arrow_schema(parquet.read_schema(file))
        except Exception as error:  # of pyarrow, of json, of datasets
            raise DataError(
                f"{file}: cannot be read as parquet ({first_line(error)}); download it again"
            ) from None
        names = [kind.names for kind in features.values() if isinstance(kind, datasets.ClassLabel)]
        meanings.append("; ".join(", ".join(classes) for classes in names) or "only numbers")
    for file, meaning in zip(files, meanings):
        if meaning != meanings[0]:
            raise DataError(
                f"{file}: its labels mean {meaning}, those of {files[0]} {meanings[0]}; read them "
                "as two datasets"
            )


def _load_files(
    kind: str, folder: Path, places: Mapping[str, Sequence[PurePath]]
) -> Mapping[str, Any]:
    """Load the files of each split; names are escaped, so that none is read as a pattern."""
    import datasets

    patterns = {
        split: [glob.escape(os.path.abspath(folder / file)) for file in files]
        for split, files in places.items()
    }
    with _raising_data_errors(f"{folder}:"):
        loaded: Mapping[str, Any] = datasets.load_dataset(kind, data_files=patterns)
    return loaded


def read_tables(
    tables: Mapping[str, Any], source: str, label_column: str | None, left_out: LeftOut
) -> dict[str, RawSplit]:
    """Find the splits of a `datasets.DatasetDict`, and the images and labels in each.

    Args:
        tables: What one of the functions above gave.
        source: What it was loaded from.
        label_column: See `reader.open_dataset`.
        left_out: Gets what is not used.

    Raises:
        DataError: If it is not clear what they hold.
    """
    names = list(tables)
    if len(names) == 1 and not find_split(names[0]):  # nothing says that it is for anything else
        chosen = {"train": names[0]}
    else:
        chosen = choose_splits(names, source, left_out)
    return {
        split: _read_table(tables[name], source, split, label_column)
        for split, name in chosen.items()
    }


def _read_table(table: Any, source: str, split: str, label_column: str | None) -> RawSplit:
    import datasets

    table = table.with_format(None)  # a saved one may have another
    features = table.features
    if not len(table):
        raise DataError(f"{source}: has no rows for {split}; download it again")
    column = _find_image_column(features, source)
    images = None
    with suppress(Exception):  # of pyarrow, of datasets
        images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if images is None or _holds_colors_above_255(features[column]):
        raise DataError(
            f"{source}: its column '{column}' holds {features[column]}; save the images as "
            "the datasets library does, as datasets.Image"
        )
    label_column = _find_label_column(features, source, label_column)
    return RawSplit(
        table[label_column][:],
        partial(_read_row, images, column, source, split),
        getattr(features[label_column], "names", None),
        is_in_files=(images[0][column] or {}).get("bytes") is None,
    )


def _find_label_column(features: Mapping[str, Any], source: str, label_column: str | None) -> str:
    import datasets

    columns = [name for name in LABEL_COLUMNS if name in features]
    columns = columns or [
        name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)
    ]
    columns = [label_column] if label_column else columns
    if len(columns) != 1 or columns[0] not in features:
        raise DataError(
            f"{source}: has the columns {', '.join(features)}; name the one that holds the classes "
            "with --label-column"
        )
    [label_column] = columns
    kind = features[label_column]
    if not re.match("u?int|string|large_string|bool", getattr(kind, "dtype", "")):
        raise DataError(
            f"{source}: its column '{label_column}' holds {kind}, not names or "
            "numbers of classes; name another one with --label-column"
        )
    return label_column


def _holds_colors_above_255(kind: Any) -> bool:
    """Return whether a column holds colors as numbers of which datasets keeps the lowest byte."""
    dimensions = len(getattr(kind, "shape", ()))  # of datasets.Array3D
    while hasattr(kind, "feature"):  # of lists
        kind, dimensions = kind.feature, dimensions + 1
    return dimensions > 2 and kind.dtype != "uint8"


def _find_image_column(features: Mapping[str, Any], source: object) -> str:
    import datasets

    columns = [name for name in IMAGE_COLUMNS if name in features]
    columns = columns or [n for n, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise DataError(
            f"{source}: has the columns {', '.join(features)}; name the one that holds the images "
            f"{' or '.join(IMAGE_COLUMNS)}, and no other one"
        )
    return columns[0]


def _read_row(rows: Any, column: str, source: str, split: str, index: int) -> Image.Image:
    cell, name = rows[index][column], f"{source}, row {index} of its {split} images"
    path = cell and cell["path"]
    if cell and cell["bytes"] is not None:
        return open_image(cell["bytes"], name)
    if not path:
        raise DataError(f"{name}: holds no image; remove the row")
    if "::" not in path:
        return open_image(os.path.join(source, path))
    try:
        with fsspec.open(path) as file:  # in an archive
            content = file.read()
    except Exception as error:  # of zipfile, of fsspec
        raise DataError(f"{name}: cannot be read ({first_line(error)}); check {path}") from None
    return open_image(content, name)

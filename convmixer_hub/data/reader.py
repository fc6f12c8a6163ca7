"""Labeled images from disk: a folder gives the images of its splits, and the names of classes.

Three layouts are known, and a folder tells which one it is:

- parquet files as the Hugging Face Hub keeps them (`train-*.parquet`, `test-*.parquet`, at any
  depth), with an image column `img` or `image` and a class column `label` or `fine_label`;
- torchvision's `cifar-10-batches-py`;
- class folders: `train/<class>/*.png`, `test/<class>/*.png` (or `val`, `validation` for `test`), or
  `<class>/*.png` alone, all of them training images.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from tqdm import tqdm

from ..errors import DataError, first_line
from .images import open_image

LABEL_COLUMNS = ("label", "fine_label")  # the latter in CIFAR-100

# What each split may be called.
SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class LabeledImages(Dataset[tuple[Any, int]]):
    """What a reader gives: `(image, label)`, and the names of the classes by label."""

    classes: list[str]
    transform: Callable[[Image.Image], Any] | None

    def __len__(self) -> int:
        raise NotImplementedError


class ParquetImages(LabeledImages):
    """Images and labels from parquet files in the Hugging Face Hub's layout.

    Args:
        files: The files, read in this order.
        transform: Applied to each RGB image.

    Raises:
        DataError: If a file is no parquet file, or lacks the columns, or means other classes by
            its labels than the first does, or a label is out of range.
    """

    def __init__(self, files: Sequence[Path], transform: Callable | None = None) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise DataError(
                f"{files[0]}: reading parquet needs pyarrow: pip install pyarrow"
            ) from None
        try:
            tables = [parquet.read_table(file) for file in files]
            table = pyarrow.concat_tables(tables).combine_chunks()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{files[0]}: cannot be read as parquet ({first_line(error)}); download it again"
            ) from None
        image_column = next((c for c in ("img", "image") if c in table.column_names), None)
        label_column = next((c for c in LABEL_COLUMNS if c in table.column_names), None)
        if image_column is None or label_column is None:
            raise DataError(
                f"{files[0]}: has the columns {', '.join(table.column_names)}; needed are an image "
                "column 'img' or 'image' and a class column 'label' or 'fine_label'"
            )
        if not len(table):
            raise DataError(f"{files[0]}: holds no images; download it again")
        kind = table[image_column].type
        if not (pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise DataError(
                f"{files[0]}: its column '{image_column}' holds {kind}; needed is a struct with "
                "the field 'bytes', as the datasets library writes images"
            )
        self.transform = transform
        self.source = files[0].parent
        self.images = table[image_column]
        self.labels = table[label_column].to_pylist()
        names, *others = (
            _read_class_names(table.schema.metadata, label_column) for table in tables
        )
        for file, other in zip(files[1:], others):
            if other != names:
                raise DataError(
                    f"{file}: its labels mean {_list_names(other)}, those of {files[0]} "
                    f"{_list_names(names)}; read them as two data sets"
                )
        known = [label for label in self.labels if isinstance(label, int)]
        self.classes = names or [str(label) for label in range(max(known, default=-1) + 1)]
        for row, label in enumerate(self.labels):
            if not isinstance(label, int) or not 0 <= label < len(self.classes):
                raise DataError(
                    f"{files[0]}: row {row} has the label {label!r}, but there are "
                    f"{len(self.classes)} classes; labels run from 0 to {len(self.classes) - 1}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name = f"{self.source}, row {index} of its parquet files"
        content = self.images[index]["bytes"].as_py()
        if content is None:
            raise DataError(f"{name}: holds no image; remove the row")
        image = open_image(content, name)
        return (self.transform(image) if self.transform else image), self.labels[index]


def _read_class_names(metadata: Mapping[bytes, bytes] | None, label_column: str) -> list[str]:
    """Read what the datasets library writes into a parquet file; nothing if it did not write it."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][label_column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _list_names(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "numbers alone"


def load_images(
    data_dir: str | Path, split: str, transform: Callable | None = None
) -> LabeledImages:
    """Read one split of a data set; the layout is found out from the folder.

    Args:
        data_dir: Folder with one of the layouts named at the top of this module.
        split: `train`, `validation` or `test`; without test images, those for validation take
            their place.
        transform: Applied to each RGB image.

    Raises:
        DataError: If the folder holds none of the layouts, or nothing for this split.
    """
    folder = Path(data_dir)
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; give the folder that holds the data set")

    if os.path.isdir(folder / datasets.CIFAR10.base_folder) and split != "validation":
        try:
            return datasets.CIFAR10(str(folder), train=split == "train", transform=transform)
        except (RuntimeError, OSError, EOFError) as error:
            raise DataError(
                f"{folder / datasets.CIFAR10.base_folder}: incomplete or damaged "
                f"({first_line(error)}); download it again with torchvision.datasets.CIFAR10"
            ) from None
    places = _find_split(folder, split)
    if not places and split == "test":
        places = _find_split(folder, "validation")
    if not places and split == "train" and not any(_find_split(folder, name) for name in SPLITS):
        places = _find_bare_classes(folder)
    if not places and any(folder.rglob("*.parquet")):
        raise DataError(f"{folder}: holds parquet files, but none named {split}-*.parquet")
    if not places:
        raise DataError(
            f"{folder}: no data set found; expected {split}-*.parquet files, torchvision's "
            f"{datasets.CIFAR10.base_folder}, or class folders {SPLITS[split][0]}/<class>/*.png"
        )
    if places[0].suffix == ".parquet":
        return ParquetImages(places, transform)
    try:
        return _ClassFolders(str(places[0]), transform, loader=open_image)
    except OSError as error:
        raise DataError(
            f"{places[0]}: {first_line(error)}; give class folders with images"
        ) from None


def has_split(data_dir: str | Path, split: str) -> bool:
    """Tell whether a data set has images of its own for a split."""
    folder = Path(data_dir)
    if os.path.isdir(folder / datasets.CIFAR10.base_folder):
        return split != "validation"
    return os.path.isdir(folder) and bool(_find_split(folder, split))


def _find_split(folder: Path, split: str) -> list[Path]:
    """Find the parquet files or else the folder of a split; nothing if there is neither."""
    parquet_files = sorted(folder.rglob("*.parquet"))
    for name in SPLITS[split]:
        if parquet_files:
            pattern = re.compile(rf"{name}([-_]?\d.*)?\.parquet")
            places = [file for file in parquet_files if pattern.fullmatch(file.name)]
        else:
            places = [place for place in [folder / name] if os.path.isdir(place)]
        if places:
            return places
    return []


def _find_bare_classes(folder: Path) -> list[Path]:
    """Take a folder for class folders without a split, unless they look like splits themselves."""
    try:
        classes = [place for place in sorted(folder.iterdir()) if _is_visible_folder(place)]
        nested = [p for p in classes if any(_is_visible_folder(inner) for inner in p.iterdir())]
    except OSError as error:
        raise DataError(f"{error.filename}: {first_line(error)}; move it elsewhere") from None
    if nested:
        raise DataError(
            f"{nested[0]}: holds folders, so it is no class folder; name the splits of a data set "
            "train, val and test, and the class folders in them"
        )
    return [folder] if classes else []


def _is_visible_folder(place: Path) -> bool:
    return os.path.isdir(place) and not place.name.startswith(".")


class _ClassFolders(datasets.ImageFolder):
    """Class folders; hidden ones, such as those of thumbnails or notebooks, are none."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = [
            place.name for place in sorted(Path(directory).iterdir()) if _is_visible_folder(place)
        ]
        if not classes:
            return super().find_classes(directory)  # torchvision's own refusal
        return classes, {name: label for label, name in enumerate(classes)}


def hold_out(count: int, size: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of a training set into kept and held-out ones.

    Args:
        count: Number of training images.
        size: Number of images to hold out.
        seed: The same seed gives the same split everywhere.

    Raises:
        DataError: If so many cannot be held out.
    """
    if not 0 <= size < count:
        raise DataError(f"cannot hold out {size} of {count} training images; hold out fewer")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[size:]), sorted(order[:size])


def read_images(
    images: Subset,
    transform: Callable,
    skip_damaged: bool = False,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read some of the images of a data set into memory.

    Args:
        images: Some of a `LabeledImages`.
        transform: Turns an RGB image into a tensor.
        skip_damaged: Leave out images that cannot be read.
        progress: Show a progress bar, if there is a terminal.

    Returns:
        The tensors `[count, …]`, the labels `[count]`, and one line for each image left out.

    Raises:
        DataError: If images cannot be read, naming the first of them.
    """
    tensors, labels, damaged = [], [], []
    subset = with_transform(images, transform)
    rows = range(len(subset))
    for row in tqdm(rows, desc="read", leave=False, disable=None if progress else True):
        try:
            tensor, label = subset[row]
        except DataError as error:
            damaged.append(str(error))
        else:
            tensors.append(tensor)
            labels.append(label)
    if damaged and not (skip_damaged and tensors):
        raise DataError(
            f"{len(damaged)} of {len(subset)} images cannot be read, the first "
            f"is {damaged[0]}; --skip-damaged trains on the others"
        )
    return torch.stack(tensors), torch.tensor(labels), damaged


def read_batches(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    """Iterate over a loader; an error in one of its workers comes as the line that it was there."""
    try:
        yield from loader
    except DataError as error:
        _, _, line = str(error).strip().rpartition("DataError: ")
        raise DataError(line) from None


def with_transform(images: Subset, transform: Callable) -> Subset:
    """Take some images of a `LabeledImages`, seen through another transform."""
    view: Any = copy.copy(images.dataset)
    view.transform = transform
    return Subset(view, images.indices)

"""A dataset of labeled images, opened once: its splits, its classes, and what was left out.

Supported layouts:

- class folders: `train/<class>/*.png`, `val/<class>/*.png`, `test/<class>/*.png`, or
  `<class>/*.png` alone, all of them training images;
- what the datasets library reads: parquet files, images with a `metadata.csv`, folders written by
  `save_to_disk`, repositories of the Hugging Face Hub;
- torchvision's `cifar-10-batches-py` and `cifar-100-python`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any
from unicodedata import normalize

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from ..errors import DataError, first_line, printable
from .layout import (
    METADATA_FILES,
    SPLITS,
    LeftOut,
    RawSplit,
    describe_left_out,
    find_class_folders,
    is_named_like_image,
    list_files,
)
from .tables import load_from_hub, load_metadata, load_parquet, load_saved, read_tables

TORCHVISION = {kind.base_folder: kind for kind in (CIFAR10, CIFAR100)}


@dataclass(frozen=True, eq=False, repr=False)
class LabeledImages(Dataset[tuple[Any, int]]):
    """Images of a split, each with the number of its class.

    Attributes:
        raw: The whole split, as it was read, without its labels.
        labels: Number of the class of each image.
        rows: Where each image is in the split.
        transform: What is applied to each image, if anything is.
    """

    raw: RawSplit
    labels: Sequence[int]
    rows: Sequence[int]
    transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.raw.read(self.rows[index])
        return (self.transform(image) if self.transform else image), self.labels[index]

    def select(self, indices: Sequence[int]) -> LabeledImages:
        """Return some of the images, by index."""
        rows, labels = ([of[i] for i in indices] for of in (self.rows, self.labels))
        return replace(self, rows=rows, labels=labels)


@dataclass(frozen=True)
class ImageDataset:
    """A dataset that was opened.

    Attributes:
        source: The folder, or the id of a repository of the Hub.
        hub_id: The same, if it is an id; else None.
        classes: Names of the classes by number: all that the labels name, or else those of the
            training images, if there are any.
        splits: The images for `train`, `validation` and `test`, or for some of these.
        left_out: What is not used, one line for each kind.
    """

    source: str
    hub_id: str | None
    classes: list[str]
    splits: dict[str, LabeledImages]
    left_out: list[str]

    @property
    def test_split(self) -> str:
        """The split to test on: `validation` if there are no test images."""
        return "test" if "test" in self.splits or "validation" not in self.splits else "validation"

    def get(self, split: str) -> LabeledImages:
        """Return the images of a split.

        Raises:
            DataError: If there are none.
        """
        if split not in self.splits:
            remedy = f"put such images into a folder or file named {split}"
            if any(Path(self.source).resolve().name.lower() in names for names in SPLITS.values()):
                remedy = "give the folder above it, with all splits"
            raise DataError(
                f"{self.source}: has images for {' and '.join(self.splits)}, but none for {split}; "
                f"{remedy}"
            )
        return self.splits[split]


def open_dataset(
    source: str | Path, config: str | None = None, label_column: str | None = None
) -> ImageDataset:
    """Open a dataset of labeled images; its layout is detected.

    Args:
        source: A folder with one of the layouts at the top of this module, or the id of a
            repository of the Hugging Face Hub, `OWNER/NAME`.
        config: Which dataset of several: a folder in that folder, or a configuration of the
            repository.
        label_column: Column of a table that holds the classes; by default one named `label`,
            `labels` or `fine_label`, or else the only one that names classes.

    Raises:
        DataError: If there is no dataset, or it is not clear what its images, labels or splits
            are, or the datasets library, which reads it, is not installed.
    """
    if not str(source):
        raise DataError("no dataset is named; give the folder that holds it")
    folder = Path(source, config or "")
    left_out = LeftOut(list)
    hub_id, place = None, str(folder)
    if os.path.isdir(folder):
        splits = _read_folder(folder, label_column, left_out)
    elif os.path.isfile(source):
        raise DataError(f"{source}: is a file; give the folder that it is in, unpacked if need be")
    elif os.path.isdir(source):
        raise DataError(f"{folder}: no such folder; --config names a folder in {source}")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        hub_id = place = str(source)
        splits = read_tables(load_from_hub(hub_id, config), hub_id, label_column, left_out)
    else:
        raise DataError(f"{source}: no such folder; give the folder that holds the dataset")
    if not splits:
        skipped = "".join(f" ({line})" for line in describe_left_out(left_out))
        raise DataError(
            f"{folder}: no dataset found{skipped}; expected class folders train/<class>/*.png, "
            f"train-*.parquet files, or one of {', '.join(TORCHVISION)}"
        )
    return _number_classes(place, hub_id, splits, left_out)


def _read_folder(folder: Path, label_column: str | None, left_out: LeftOut) -> dict[str, RawSplit]:
    """Find out the layout of a folder, and read its splits."""
    if (place := Path(os.path.abspath(folder))).name in TORCHVISION:
        return _read_torchvision(place, label_column)
    found = [folder / name for name in TORCHVISION if os.path.isdir(folder / name)]
    if len(found) > 1:
        raise DataError(f"{folder}: holds {' and '.join(TORCHVISION)}; choose one with --config")
    files, empty = list_files(folder, left_out)
    metadata = [file for file in files if file.name in METADATA_FILES]
    tables = [f for f in files if f.suffix.lower() == ".parquet" and f not in metadata]
    saved = {file.parent for file in files if file.name in ("dataset_dict.json", "state.json")}
    is_saved = PurePath() in saved
    if found:
        splits = _read_torchvision(found[0], label_column)
    elif is_saved or tables:
        loaded = load_saved(folder) if is_saved else load_parquet(folder, tables, left_out)
        splits = read_tables(loaded, str(folder), label_column, left_out)
        if not is_saved:
            for file in files:
                if file not in tables and not is_named_like_image(file):
                    left_out[f"files beside the tables ({file.suffix or 'no suffix'})"].append(file)
    elif saved:
        names = sorted(str(place) for place in saved if not saved.intersection(place.parents))
        raise DataError(
            f"{folder}: holds what save_to_disk wrote in {', '.join(names)}; choose one of them "
            "with --config"
        )
    elif metadata:
        loaded = load_metadata(folder, metadata, files, left_out)
        return read_tables(loaded, str(folder), label_column, left_out)
    else:
        _check_no_column(folder, label_column)
        return find_class_folders(folder, files, empty, left_out)
    if not any(split.is_in_files for split in splits.values()):
        unused = [file for file in files if is_named_like_image(file)]
        left_out["images beside the dataset's own files"] += unused
    return splits


def _check_no_column(folder: Path, label_column: str | None) -> None:
    if label_column:
        raise DataError(
            f"{folder}: is no table, so it has no column '{label_column}'; leave out --label-column"
        )


def _read_torchvision(folder: Path, label_column: str | None) -> dict[str, RawSplit]:
    """Read CIFAR-10 or CIFAR-100 as torchvision keeps them."""
    _check_no_column(folder, label_column)
    kind = TORCHVISION[folder.name]
    splits = {}
    try:
        for split in ("train", "test"):
            part = kind(str(folder.parent), train=split == "train")
            splits[split] = RawSplit(part.targets, partial(_read_pixels, part.data), part.classes)
    except (RuntimeError, OSError, EOFError) as error:
        raise DataError(
            f"{folder}: incomplete or damaged ({first_line(error)}); download it again with "
            f"torchvision.datasets.{kind.__name__}"
        ) from None
    return splits


def _read_pixels(pixels: Any, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _number_classes(
    source: str,
    hub_id: str | None,
    raw: Mapping[str, RawSplit],
    left_out: LeftOut,
) -> ImageDataset:
    """Number the classes, the same way in all splits."""
    raw = {
        split: replace(
            images,
            labels=_compose(images.labels),
            names=None if images.names is None else _compose(images.names),
        )
        for split, images in raw.items()
    }
    # Splits of which no image has a label, such as the test images of competitions on the Hub.
    for split in list(raw):
        if all(label in (None, -1) for label in raw[split].labels):
            rows = range(len(raw.pop(split).labels))
            left_out[f"{split} images without labels"] += (f"row {row}" for row in rows)
    if not raw:
        raise DataError(f"{source}: its images have no labels; give a dataset that has them")

    first = "train" if "train" in raw else next(iter(raw))
    for split, images in raw.items():
        if images.names != raw[first].names:
            meanings = [", ".join(raw[s].names or ["only numbers"]) for s in (split, first)]
            raise DataError(
                f"{source}: its {split} labels mean {meanings[0]}, its {first} labels "
                f"{meanings[1]}; make them the same"
            )
    classes: list[Any]
    numbers: dict[Any, int]
    if names := raw[first].names:
        classes, numbers = list(names), {number: number for number in range(len(names))}
    else:
        of_classes = [first] if first == "train" else list(raw)
        found = {label for split in of_classes for label in raw[split].labels} - {None, -1}
        classes = sorted(found)
        numbers = {label: number for number, label in enumerate(classes)}
    splits = {
        split: LabeledImages(
            replace(images, labels=[]),
            _number(images.labels, numbers, f"{source}: its {split}"),
            range(len(images.labels)),
        )
        for split, images in raw.items()
    }
    classes = [str(label) for label in classes]
    for name in classes:
        if printable(name) != name:
            raise DataError(
                f"{source}: has a class named {name!r}; give it a name that can be printed"
            )
    return ImageDataset(source, hub_id, classes, splits, describe_left_out(left_out))


def _compose(names: Sequence[Any]) -> list[Any]:
    """Bring names to one Unicode form: those of folders made on macOS have another."""
    return [normalize("NFC", name) if isinstance(name, str) else name for name in names]


def _number(labels: Sequence[Any], numbers: Mapping[Any, int], place: str) -> list[int]:
    for row, label in enumerate(labels):
        if label is None:
            raise DataError(
                f"{place} images have no label in row {row}; give it one, or remove it (in a CSV "
                "file, None, NA and null mean no label: rename such a class)"
            )
        if label not in numbers:
            known = ", ".join([str(name) for name in numbers][:10])
            more = ", …" if len(numbers) > 10 else ""
            raise DataError(
                f"{place} images have the label {label!r} in row {row}, which is none of "
                f"{known}{more}; correct or remove it"
            )
    return [numbers[label] for label in labels]


def read_images(
    images: LabeledImages,
    transform: Callable,
    skip_damaged: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read some of the images of a dataset into memory.

    Args:
        images: The images.
        transform: Turns an RGB image into a tensor.
        skip_damaged: Leave out images that cannot be read.

    Returns:
        The tensors `[count, …]`, the labels `[count]`, and one line for each image left out.

    Raises:
        DataError: If images cannot be read, naming the first of them.
    """
    tensors, labels, damaged = [], [], []
    images = replace(images, transform=transform)
    rows = range(len(images))
    for row in tqdm(rows, desc="read", leave=False, disable=None):
        try:
            tensor, label = images[row]
        except DataError as error:
            damaged.append(str(error))
        else:
            tensors.append(tensor)
            labels.append(label)
    if damaged and not (skip_damaged and tensors):
        remedy = "" if skip_damaged else "; train and finetune leave them out with --skip-damaged"
        raise DataError(
            f"{len(damaged)} of {len(images)} images cannot be read, the first is "
            f"{damaged[0]}{remedy}"
        )
    return torch.stack(tensors), torch.tensor(labels), damaged

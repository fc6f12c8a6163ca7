"""Which files of a folder are images of which split, and of which class by their folders."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from ..errors import DataError, first_line, printable
from .images import open_image

# What a split may be called, in the name of a folder or a file, as the datasets library has it.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CLUTTER = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class RawSplit:
    """The images of a split as they are kept, with labels of any kind.

    Attributes:
        labels: Names or numbers of classes; None or -1 for no label.
        read: Gives the RGB image of an index, or raises a DataError that names it.
        names: Names of the classes by number, if they are known.
        folder: The folder with the class folders that they lie in, if they do.
    """

    labels: list[Any]
    read: Callable[[int], Image.Image]
    names: list[str] | None = None
    folder: Path | None = None


class LeftOut:
    """What of a data set is not used: how much of which kind, and the first by name."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, names: Iterable[object]) -> None:
        """Note things of one kind, a plural that stands for itself."""
        self._names[kind] += map(str, names)

    def describe(self) -> list[str]:
        """Give one line for each kind."""
        return [
            printable(f"left out: {len(names)} × {kind}, the first is {names[0]}")
            for kind, names in self._names.items()
            if names
        ]


def find_split(name: str) -> str:
    """Tell which split a name stands for; nothing if it stands for none, or for several."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    found = [split for split, names in SPLITS.items() if words.intersection(names)]
    return found[0] if len(found) == 1 else ""


def choose_splits(names: Iterable[str], place: object, left_out: LeftOut) -> dict[str, str]:
    """Find the name that each split has among the names of folders, or of a data set's splits.

    A name that is the word for a split comes before one that has it among others.

    Raises:
        DataError: If several are as good, naming them.
    """
    of_split = defaultdict(list)
    for name in names:
        of_split[find_split(name)].append(name)
    left_out.add("splits of other names", sorted(of_split.pop("", [])))
    chosen = {}
    for split, candidates in of_split.items():
        plain = [name for name in candidates if name.lower() in SPLITS[split]]
        best = plain or candidates
        if len(best) > 1:
            raise DataError(
                f"{place}: has {' and '.join(sorted(best))}, both for {split}; keep one of them"
            )
        chosen[split] = best[0]
        left_out.add("splits of other names", sorted(set(candidates) - set(best)))
    return chosen


def list_files(root: Path, left_out: LeftOut) -> tuple[list[PurePath], list[PurePath]]:
    """List all files below a folder that are not hidden, and the folders that hold nothing.

    Links to folders are followed, unless they lead to a folder that they lie in.

    Returns:
        Paths from the folder on, in the order of their names.

    Raises:
        DataError: If a folder cannot be listed.
    """
    files: list[PurePath] = []
    empty: list[PurePath] = []

    def walk(folder: Path, above: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if any(f"{place}/".startswith(f"{real.rstrip('/')}/") for place in above):
            left_out.add("links that lead to where they lie", [folder.relative_to(root)])
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be listed ({first_line(error)}); change its permissions, or "
                "move it elsewhere"
            ) from None
        entries = [entry for entry in entries if not _is_hidden(entry.name)]
        if not entries:
            empty.append(folder.relative_to(root))
        for entry in entries:
            if entry.is_dir():
                walk(folder / entry.name, (*above, real))
            elif entry.is_file():
                files.append((folder / entry.name).relative_to(root))
            else:
                left_out.add("broken links", [(folder / entry.name).relative_to(root)])

    walk(root, ())
    return files, empty


def _is_hidden(name: str) -> bool:
    """Tell the files and folders that systems and programs leave behind."""
    return name.startswith((".", "@", "__")) or name.lower() in CLUTTER


def is_image(file: Path) -> bool:
    """Tell whether Pillow can read a file, by its suffix, or else by how it begins."""
    Image.init()
    if Image.EXTENSION.get(file.suffix.lower()) in Image.OPEN:
        return True
    try:
        with Image.open(file):
            return True
    except Exception:  # each of Pillow's decoders fails in its own way
        return False


def is_metadata(file: PurePath) -> bool:
    """Tell whether a file lists images and what they show, as the datasets library knows it."""
    return file.name in METADATA_FILES


def find_tables(
    root: Path, files: Iterable[PurePath], left_out: LeftOut
) -> dict[str, list[PurePath]]:
    """Sort the tables of one data set by split, which a file's name tells, or that of its folder.

    Raises:
        DataError: If there are several data sets, or a part of a split is missing.
    """
    tables: dict[str, dict[str, list[PurePath]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        # A folder that is called after its split, or `data`, does not make another data set.
        folders = [part for part in file.parts[:-1] if part != "data" and not find_split(part)]
        split = next(filter(None, map(find_split, (file.stem, *reversed(file.parts[:-1])))), "")
        tables["/".join(folders)][split].append(file)
    if len(tables) > 1:
        raise DataError(
            f"{root}: holds several data sets, {', '.join(sorted(tables))}; "
            "choose one of them with --config"
        )
    [splits] = tables.values()
    if list(splits) == [""]:  # one table, of which nothing says that it is for anything else
        splits = {"train": splits[""]}
    left_out.add("tables named after no split", splits.pop("", []))
    for parts in splits.values():
        _check_complete(root, parts)
    return dict(splits)


def _check_complete(root: Path, parts: Iterable[PurePath]) -> None:
    """Refuse files such as train-00000-of-00003.parquet if one of the three is missing."""
    known = {part.as_posix() for part in parts}
    for name in sorted(known):
        if numbered := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
            start, number, count, end = numbered.groups()
            for i in range(int(count)):
                part = f"{start}{i:0{len(number)}}-of-{count}{end}"
                if part not in known:
                    raise DataError(f"{root / part}: is missing; download it again")


def find_class_folders(
    root: Path, files: Iterable[PurePath], empty: Iterable[PurePath], left_out: LeftOut
) -> dict[str, RawSplit]:
    """Sort images by split and class, both being names of folders.

    The splits hold class folders, or there are class folders alone, all of them for training.
    Whatever folders there are in a class folder, its images are of that class.

    Args:
        root: The folder.
        files: Its files, as `list_files` gives them.
        empty: Its folders that hold nothing, likewise.
        left_out: Gets what is not used.

    Raises:
        DataError: If there are images but no class folders, if it is not clear what the folders
            are, or if there is a class without images for training.
    """
    images: list[PurePath] = []
    folders = set(empty)
    for file in files:
        folders.update(list(file.parents)[:-1])
        if is_image(root / file):
            images.append(file)
        elif len(file.parts) > 1:
            left_out.add(f"files that are no images ({file.suffix or 'no suffix'})", [file])

    # What an archive was unpacked into may be a folder of its own.
    while (wrapper := _find_wrapper(images)) and not find_split(wrapper):
        root, images, folders = root / wrapper, _below(images, wrapper), {*_below(folders, wrapper)}
    tops = sorted({image.parts[0] for image in images if len(image.parts) > 1})
    nested = {image.parts[0] for image in images if len(image.parts) > 2}
    if any(find_split(top) for top in nested):
        names = choose_splits(tops, root, left_out)
    elif tops and all(find_split(top) for top in tops):
        raise DataError(
            f"{root / tops[0]}: holds images but no class folders; put the images of each class "
            "into a folder that is named after it"
        )
    elif nested:
        raise DataError(
            f"{root}: holds folders of folders ({', '.join(sorted(nested)[:5])}); choose one of "
            "them with --config, or name the splits of a data set train, val and test"
        )
    else:
        names = {"train": ""}
    if "" not in names.values():
        left_out.add("images beside the splits", [i for i in images if len(i.parts) == 1])
    return _sort_by_class(root, images, folders, names, left_out)


def _sort_by_class(
    root: Path,
    images: Iterable[PurePath],
    folders: Iterable[PurePath],
    names: Mapping[str, str],
    left_out: LeftOut,
) -> dict[str, RawSplit]:
    """Take the first folder of each image of a split for its class; `names` are the splits'."""
    splits: dict[str, RawSplit] = {}
    for split in sorted(names, key=list(SPLITS).index):
        place, name = root / names[split], names[split]
        inside, inner_folders = _below(images, name), _below(folders, name)
        while name and _find_wrapper(inside) == name:  # seg_train/seg_train/forest/1.jpg
            place, inside, inner_folders = (
                place / name,
                _below(inside, name),
                _below(inner_folders, name),
            )
        classed = [(image.parts[0], place / image) for image in inside if len(image.parts) > 1]
        loose = [place / image for image in inside if len(image.parts) == 1]
        known = set(splits["train"].labels) if "train" in splits else set()
        if known and {label for label, _ in classed} == {"images"} - known:
            # As in Tiny ImageNet, where a file tells the classes of validation images.
            classes = _read_annotations(place)
            loose += [file for _, file in classed if file.name not in classes]
            classed = [(classes[file.name], file) for _, file in classed if file.name in classes]
        left_out.add("images in no class folder", [file.relative_to(root) for file in loose])
        if split == "train":
            bare = {folder.parts[0] for folder in inner_folders} - {label for label, _ in classed}
            if bare and classed:
                raise DataError(
                    f"{place / min(bare)}: a class folder without an image that can be read; put "
                    "some into it, or remove it"
                )
        if classed:
            files = [file for _, file in classed]
            read = partial(_read_file, files)
            splits[split] = RawSplit([label for label, _ in classed], read, folder=place)
    return splits


def _read_file(files: Sequence[Path], index: int) -> Image.Image:
    return open_image(files[index])


def _find_wrapper(images: Iterable[PurePath]) -> str:
    """Find the one folder of folders that all images are in; nothing if there is none."""
    tops = {image.parts[0] if len(image.parts) > 2 else "" for image in images}
    return tops.pop() if len(tops) == 1 else ""


def _below(paths: Iterable[PurePath], folder: str) -> list[PurePath]:
    """Give the paths that lie in a folder, from there on; all of them for no folder."""
    if not folder:
        return list(paths)
    return [path.relative_to(folder) for path in paths if path.parts[:1] == (folder,) != path.parts]


def _read_annotations(folder: Path) -> dict[str, str]:
    """Read the classes of the images of a split, as Tiny ImageNet keeps them."""
    lines = [
        line.split("\t")
        for file in folder.glob("*_annotations.txt")
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return {line[0]: line[1] for line in lines if len(line) > 1}

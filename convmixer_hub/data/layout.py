"""Which files of a folder are images of which split, and of which class by their folders."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
# Files that list images and what they show, as the datasets library knows them.
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")  # which Pillow knows, but cannot decode
CLUTTER = ("thumbs.db", "desktop.ini", "@eadir", "__macosx", "__pycache__", "readme.md")


@dataclass(frozen=True)
class RawSplit:
    """The images of a split as they are kept, with labels of any kind.

    Attributes:
        labels: Names or numbers of classes; None or -1 for no label.
        read: Gives the RGB image of an index, or raises a DataError that names it.
        names: Names of the classes by number, if they are known.
        is_in_files: Whether the images of a table are files of their own.
        folder: Where a new folder would be read as a class; None unless the images lie in class
            folders.
        files: Paths of the images in the dataset; empty likewise.
    """

    labels: list[Any]
    read: Callable[[int], Image.Image]
    names: list[str] | None = None
    is_in_files: bool = False
    folder: Path | None = None
    files: Sequence[str] = ()


# What of a dataset is left out: names by kind, which is a plural noun.
LeftOut = defaultdict[str, list[Any]]


def describe_left_out(left_out: LeftOut) -> list[str]:
    """Return one line for each kind."""
    return [
        printable(f"left out: {len(names)} × {kind}, the first is {names[0]}")
        for kind, names in left_out.items()
        if names
    ]


def find_split(name: str) -> str:
    """Return the split that a name stands for; empty if it stands for none, or for several."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    found = [split for split, names in SPLITS.items() if words.intersection(names)]
    return found[0] if len(found) == 1 else ""


def choose_splits(names: Iterable[str], place: object, left_out: LeftOut) -> dict[str, str]:
    """Find the name that each split has among the names of folders, or of a dataset's splits.

    A name that is the word for a split comes before one that has it among others.

    Raises:
        DataError: If several are as good, naming them.
    """
    of_split = defaultdict(list)
    for name in names:
        of_split[find_split(name)].append(name)
    left_out["splits of other names"] += sorted(of_split.pop("", []))
    chosen = {}
    for split, candidates in of_split.items():
        plain = [name for name in candidates if name.lower() in SPLITS[split]]
        best = plain or candidates
        if len(best) > 1:
            raise DataError(
                f"{place}: has {' and '.join(sorted(best))}, both for {split}; keep one of them"
            )
        chosen[split] = best[0]
        left_out["splits of other names"] += sorted(set(candidates) - set(best))
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

    def walk(folder: Path, above: tuple[Path, ...]) -> None:
        real = Path(os.path.realpath(folder))
        if any(place.is_relative_to(real) for place in above):
            left_out["links to a folder above them"].append(folder.relative_to(root))
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
            place = folder / entry.name
            if os.path.isdir(place):  # not entry.is_dir(), which fails on some links
                walk(place, (*above, real))
            elif os.path.isfile(place):
                files.append(place.relative_to(root))
            else:
                left_out["broken links"].append(place.relative_to(root))

    walk(root, ())
    return files, empty


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that systems and programs leave behind."""
    return name.startswith(".") or name.lower() in CLUTTER


def is_named_like_image(file: PurePath) -> bool:
    """Return whether the suffix of a file is of a format that Pillow can read."""
    Image.init()
    kind = Image.EXTENSION.get(file.suffix.lower())
    return kind in Image.OPEN and kind not in STUBS


def find_tables(
    root: Path, files: Iterable[PurePath], left_out: LeftOut
) -> dict[str, list[PurePath]]:
    """Sort the tables of one dataset by split, which a file's name tells, or that of its folder.

    Raises:
        DataError: If there are several datasets, or a part of a split is missing.
    """
    tables: dict[str, dict[str, list[PurePath]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        # A folder that is called after its split, or `data`, does not make another dataset.
        folders = [part for part in file.parts[:-1] if part != "data" and not find_split(part)]
        found = [find_split(name) for name in (file.stem, *reversed(file.parts[:-1]))]
        split = next((name for name in found if name), "")  # the file's own name comes first
        tables["/".join(folders)][split].append(file)
    if len(tables) > 1:
        names = [name or "the folder itself" for name in sorted(tables)]
        raise DataError(
            f"{root}: holds several datasets, {', '.join(names)}; choose one of them with "
            "--config, or move the others elsewhere"
        )
    [splits] = tables.values()
    if list(splits) == [""]:  # one table, of which nothing says that it is for anything else
        splits = {"train": splits[""]}
    left_out["tables named after no split"] += splits.pop("", [])
    for parts in splits.values():
        _check_complete(root, parts)
    return dict(splits)


def _check_complete(root: Path, parts: Iterable[PurePath]) -> None:
    """Refuse files such as train-00000-of-00003.parquet unless each of the three is there once."""
    found: dict[str, tuple[PurePath, str, set[int]]] = {}
    for part in parts:
        # Older ones have a hash after that.
        if numbered := re.fullmatch(r"(.*-)(\d+)-of-(\d+)\b[^/]*", part.as_posix()):
            start, number, count = numbered.groups()
            other, others, numbers = found.setdefault(start, (part, count, set()))
            if int(number) in numbers or count != others:
                raise DataError(
                    f"{root / part}: {other.name} is of the same split, written at another time; "
                    "remove the older files"
                )
            numbers.add(int(number))
    for start, (_, count, numbers) in found.items():
        for number in range(int(count)):
            if number not in numbers:
                name = f"{start}{number:0{len(count)}}-of-{count}"
                raise DataError(f"{root / name}: is missing; download it again")


@dataclass(frozen=True)
class _Tree:
    """The images and folders below a folder, by their paths from there on."""

    place: Path
    images: list[PurePath]
    folders: list[PurePath]

    @property
    def nested(self) -> set[str]:
        """The folders in it that have folders with images."""
        return {image.parts[0] for image in self.images if len(image.parts) > 2}

    @property
    def wrapper(self) -> str:
        """The one folder of folders that all images are in; empty if there is none."""
        tops = {image.parts[0] if len(image.parts) > 2 else "" for image in self.images}
        return tops.pop() if len(tops) == 1 else ""

    def enter(self, name: str) -> _Tree:
        """Go into one of its folders, or stay if that has no name."""
        if not name:
            return self

        def below(paths: list[PurePath]) -> list[PurePath]:
            return [p.relative_to(name) for p in paths if p.parts[0] == name and len(p.parts) > 1]

        return _Tree(self.place / name, below(self.images), below(self.folders))


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
        if is_named_like_image(file):
            images.append(file)
        else:
            left_out[f"files that are not images ({file.suffix or 'no suffix'})"].append(file)

    # What an archive was unpacked into may be a folder of its own, whatever that is called.
    tree = _Tree(root, images, sorted(folders))
    while name := tree.wrapper:
        inner = tree.enter(name)
        if find_split(name) and not any(map(find_split, inner.nested)):
            break
        tree = inner
    tops = sorted({image.parts[0] for image in tree.images if len(image.parts) > 1})
    if any(map(find_split, tree.nested)):
        names = choose_splits(tops, tree.place, left_out)
        left_out["images beside the splits"] += [i for i in tree.images if len(i.parts) == 1]
    elif tree.nested:
        raise DataError(
            f"{tree.place}: holds folders of folders ({', '.join(sorted(tree.nested)[:5])}); "
            "choose one of them with --config, or name the splits of a dataset train, val and test"
        )
    elif tops and all(map(find_split, tops)):
        raise DataError(
            f"{tree.place / tops[0]}: holds images but no class folders; put the images of each "
            "class into a folder that is named after it"
        )
    elif doubtful := [top for top in tops if top.lower() in SPLITS["validation"] + SPLITS["test"]]:
        raise DataError(
            f"{tree.place / doubtful[0]}: is beside class folders, but called like a split; rename "
            "it, or put the class folders into a folder train"
        )
    else:
        names = {"train": ""}
    splits = _sort_by_class(tree, names, left_out)
    # Beside split folders at the top, a new folder changes nothing. Elsewhere it would be read as a
    # class, or hide the folder that all images are in.
    is_top = tree.place == root and "" not in names.values()
    return {
        split: replace(raw, folder=raw.folder if is_top else root) for split, raw in splits.items()
    }


def _sort_by_class(tree: _Tree, names: Mapping[str, str], left_out: LeftOut) -> dict[str, RawSplit]:
    """Sort the images of each split by the first folder that they are in, their class.

    `names` has the folder of each split; an empty name stands for the tree itself.
    """
    splits: dict[str, RawSplit] = {}
    for split in sorted(names, key=list(SPLITS).index):
        inside = tree.enter(names[split])
        while names[split] and find_split(inside.wrapper):  # seg_train/seg_train/forest/1.jpg
            inside = inside.enter(inside.wrapper)
        place = inside.place
        classed = [(image.parts[0], place / image) for image in inside.images if image.parts[1:]]
        loose = [place / image for image in inside.images if not image.parts[1:]]
        known = set(splits["train"].labels) if "train" in splits else set()
        labels = {label for label, _ in classed}
        if known and labels == {"images"} - known:
            # As in Tiny ImageNet, where a file tells the classes of validation images.
            classes = _read_annotations(place)
            loose += [file for _, file in classed if file.name not in classes]
            classed = [(classes[file.name], file) for _, file in classed if file.name in classes]
        elif known and not labels & known and {find_split(label) for label in labels} == {split}:
            loose += [file for _, file in classed]  # asl_alphabet_test/asl_alphabet_test/1.jpg
            classed = []
        left_out["images in no class folder"] += [file.relative_to(tree.place) for file in loose]
        bare = {folder.parts[0] for folder in inside.folders} - {label for label, _ in classed}
        if split == "train" and bare and classed:
            raise DataError(
                f"{place / min(bare)}: a class folder without files called like images, such as "
                "1.png; put some into it, or remove it"
            )
        if classed:
            files = [file for _, file in classed]
            splits[split] = RawSplit(
                [label for label, _ in classed],
                partial(_read_file, files),
                folder=place,
                files=[file.relative_to(tree.place).as_posix() for file in files],
            )
    return splits


def _read_file(files: Sequence[Path], index: int) -> Image.Image:
    return open_image(files[index])


def _read_annotations(folder: Path) -> dict[str, str]:
    """Read the classes of the images of a split, as Tiny ImageNet keeps them."""
    classes: dict[str, str] = {}
    for file in folder.glob("*_annotations.txt"):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({first_line(error)}); make it readable to you, or move it"
            ) from None
        lines = [line.split("\t") for line in text.splitlines()]
        classes |= {line[0]: line[1] for line in lines if len(line) > 1}
    return classes

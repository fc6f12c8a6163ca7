"""Datasets as people have them: what each gives, or the line that says what is wrong with it."""

import pickle
import shutil
from collections import Counter
from itertools import product
from unicodedata import normalize

import datasets
import numpy as np
import pyarrow
import pytest
import timm
from PIL import Image
from pyarrow import parquet

from convmixer_hub import DataError
from convmixer_hub.data.images import open_image
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.training.images import hold_out

from .conftest import ARCH, PICTURES, as_ordinary_user, count_images, encode, write_tree

# Situation: what is there, what it gives by split and class, and what is said to be left out.
FOLDERS = {
    **{
        f"splits called {train}, {validation}, {test}": (
            [f"{split}/{name}/1.png" for split in (train, validation, test) for name in ("a", "b")],
            {split: {"a": 1, "b": 1} for split in ("train", "validation", "test")},
        )
        for train, validation, test in [
            ("train", "val", "test"),
            ("training", "validation", "testing"),
            ("Train", "Valid", "Test"),  # Roboflow's, but for its capitals
            ("TRAIN", "dev", "eval"),
            ("seg_train", "seg_val", "seg_test"),
            ("images.train", "images.valid", "images.test"),
        ]
    },
    "class folders alone are for training": (
        ["cat/1.png", "dog/1.jpg", "dog/2.PNG", "dog/3"],
        {"train": {"cat": 1, "dog": 2}},
        "left out: 1 × files that are not images (no suffix), the first is dog/3",
    ),
    "an archive in folders of its own": (
        ["archive/photos/cat/1.png", "archive/photos/dog/1.png", ("archive/LICENSE.txt", b"x")],
        {"train": {"cat": 1, "dog": 1}},
        "left out: 1 × files that are not images (.txt), the first is archive/LICENSE.txt",
    ),
    "a split in a folder of the same name": (
        ["seg_train/seg_train/a/1.png", "seg_train/seg_train/b/1.png", "seg_pred/seg_pred/1.png"],
        {"train": {"a": 1, "b": 1}},
        "left out: 1 × splits of other names, the first is seg_pred",
    ),
    "a split in a folder of the same name, without classes": (
        ["asl_train/asl_train/A/1.png", "asl_train/asl_train/B/1.png", "asl_test/asl_test/A.png"],
        {"train": {"A": 1, "B": 1}},
        "left out: 1 × images in no class folder, the first is asl_test/asl_test/A.png",
    ),
    "classes named like splits": (
        ["car/1.png", "toy train/1.png", "test tube/1.png", "train/1.png", "dev kit/1.png"],
        {"train": {"car": 1, "toy train": 1, "test tube": 1, "train": 1, "dev kit": 1}},
    ),
    "splits below a folder with a word for a split": (
        ["training_set/train/a/1.png", "training_set/train/b/1.png", "training_set/val/a/1.png"],
        {"train": {"a": 1, "b": 1}, "validation": {"a": 1}},
    ),
    "classes named like what programs leave behind": (
        ["__background__/1.png", "@home/1.png"],
        {"train": {"@home": 1, "__background__": 1}},
    ),
    "a class named train in a split": (
        ["train/train/1.png", "train/bus/1.png", "val/bus/2.png"],
        {"train": {"train": 1, "bus": 1}, "validation": {"bus": 1}},
    ),
    "files named like splits": (
        ["photos/cat/train_1.png", "photos/cat/test_2.png", "photos/dog/val 1.png"],
        {"train": {"cat": 2, "dog": 1}},
    ),
    "folders in class folders": (
        ["train/cat/big/1.png", "train/cat/2.png", "train/dog/1.png"],
        {"train": {"cat": 2, "dog": 1}},
    ),
    "Tiny ImageNet": (
        [
            "tiny/train/n01/images/n01_0.JPEG",
            "tiny/train/n02/images/n02_0.JPEG",
            ("tiny/train/n02/n02_boxes.txt", b"n02_0.JPEG\t0\t0\t63\t63\n"),
            "tiny/val/images/val_0.JPEG",
            "tiny/val/images/val_1.JPEG",
            ("tiny/val/val_annotations.txt", b"val_0.JPEG\tn02\t0\t32\t44\t62\n"),
            "tiny/test/images/test_0.JPEG",
            ("tiny/wnids.txt", b"n02\nn01\n"),
        ],
        {"train": {"n01": 1, "n02": 1}, "validation": {"n02": 1}},
        "left out: 3 × files that are not images (.txt), the first is tiny/train/n02/n02_boxes.txt",
        "left out: 2 × images in no class folder, the first is val/images/val_1.JPEG",
    ),
    "test images without classes": (
        ["train/cat/1.png", "train/dog/1.png", "test/1.png", "test/2.png", "sample.png"],
        {"train": {"cat": 1, "dog": 1}},
        "left out: 1 × images beside the splits, the first is sample.png",
        "left out: 2 × images in no class folder, the first is test/1.png",
    ),
    "what systems and programs leave behind": (
        (
            "cat/1.png dog/1.png .ipynb_checkpoints/1.png cat/.ipynb_checkpoints/1.png cat/._1.png "
            "cat/@eaDir/1.png __MACOSX/cat/._1.png __pycache__/1.png cat/Thumbs.db dog/desktop.ini "
            ".DS_Store"
        ).split(),
        {"train": {"cat": 1, "dog": 1}},
    ),
    "files of other kinds": (
        [
            "cat/1.png",
            ("cat/a.txt", b"x"),
            ("cat/b.txt", b"x"),
            "dog/1.png",
            ("dog/film.mp4", b"x"),
            ("dog/film.mpg", b"\0\0\1\xb3\2\0\2\0"),  # 32×32 pixels
        ],
        {"train": {"cat": 1, "dog": 1}},
        "left out: 2 × files that are not images (.txt), the first is cat/a.txt",
        "left out: 1 × files that are not images (.mp4), the first is dog/film.mp4",
        "left out: 1 × files that are not images (.mpg), the first is dog/film.mpg",
    ),
    "formats of every kind": (
        [
            *[
                (f"a/1.{suffix}", encode(Image.new("RGB", (9, 9)), form))
                for suffix, form in zip(
                    "webp tif gif avif jfif jp2 bmp tga".split(),
                    "WEBP TIFF GIF AVIF JPEG JPEG2000 BMP TGA".split(),
                )
            ],
            "b/1.png",
        ],
        {"train": {"a": 8, "b": 1}},
    ),
    "names with characters that patterns know": (
        ["a [1]/x [2].png", "b*/?.png", "c d/1.png"],
        {"train": {"a [1]": 1, "b*": 1, "c d": 1}},
    ),
    "a test split without one of the classes": (
        ["train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "test/cat/"],
        {"train": {"cat": 1, "dog": 1}, "test": {"dog": 1}},
    ),
    "a split under two names": (
        ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test2/a/1.png"],
        {"train": {"a": 1, "b": 1}, "test": {"a": 1}},
        "left out: 1 × splits of other names, the first is test2",
    ),
    "a link to a class elsewhere": (
        ["cat/1.png", ("dog", "../elsewhere"), "../elsewhere/1.png"],
        {"train": {"cat": 1, "dog": 1}},
    ),
    "links in circles, up, and to nothing": (
        [
            ("dog/loop", "loop"),
            "cat/1.png",
            "dog/1.png",
            ("dog/self", "."),
            ("dog/up", ".."),
            ("dog/far up", "../.."),
            ("dog/gone.png", "nowhere.png"),
        ],
        {"train": {"cat": 1, "dog": 1}},
        "left out: 3 × links to a folder above them, the first is dog/far up",
        "left out: 2 × broken links, the first is dog/gone.png",
    ),
}


@pytest.mark.parametrize("situation", FOLDERS)
def test_class_folders(tmp_path, situation):
    paths, splits, *left_out = FOLDERS[situation]
    dataset = open_dataset(write_tree(tmp_path / "data", *paths))
    assert count_images(dataset) == splits
    assert dataset.left_out == left_out
    for images in dataset.splits.values():
        assert all(images[i][0].mode == "RGB" for i in range(len(images)))


# Situation: what is there, and the line that refuses it, after the folder's name.
REFUSED = {
    "a file": ("file", ": is a file; give the folder that it is in, unpacked if need be"),
    "no folder": (None, ": no such folder; give the folder that holds the dataset"),
    "nothing": (["cat/", "dog/"], ": no dataset found; expected class folders train/<class>/"),
    "no images": (
        [("cat/1.txt", b"x")],
        r": no dataset found \(left out: 1 × files that are not images \(.txt\), the first is",
    ),
    "no class folders": (
        ["train/1.png", "test/1.png"],
        "/test: holds images but no class folders; put the images of each class into a folder th",
    ),
    "unlabeled images beside class folders": (
        ["cat/1.png", "dog/1.png", "test/1.png"],
        "/test: is beside class folders, but called like a split; rename it, or put the class fo",
    ),
    "images alone": (["1.png"], r": no dataset found \(left out: 1 × images in no class folder, "),
    "two names for one split": (
        ["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"],
        ": has val and valid, both for validation; keep one of them",
    ),
    "several datasets": (
        ["flowers/rose/1.png", "flowers/lily/1.png", "pets/cat/1.png", "pets/dog/1.png"],
        r": holds folders of folders \(flowers, pets\); choose one of them with --config, or name",
    ),
    "an empty class": (
        ["train/cat/1.png", "train/dog/"],
        "/train/dog: a class folder without files called like images, such as 1.png; put some i",
    ),
    "a class in another format": (
        ["cat/1.png", ("dog/1.heic", b"x")],
        "/dog: a class folder without files called like images, such as 1.png; put some into it",
    ),
    "an unknown class in the test images": (
        ["train/a/1.png", "train/b/1.png", "test/c/1.png"],
        ": its test images have the label 'c' in row 0, which is none of a, b; correct or remove",
    ),
    "a class whose name cannot be printed": (
        ["a\nb/1.png", "c/1.png"],
        r": has a class named 'a\\nb'; give it a name that can be printed",
    ),
    "torchvision's folder without its files": (
        ["cifar-10-batches-py/"],
        "/cifar-10-batches-py: incomplete or damaged .*; download it again with torchvision.data",
    ),
    "two of torchvision's": (
        ["cifar-10-batches-py/", "cifar-100-python/"],
        ": holds cifar-10-batches-py and cifar-100-python; choose one with --config",
    ),
    "a parquet file that is none": (
        [("train-0.parquet", b"PAR1 and nothing more")],
        "/train-0.parquet: cannot be read as parquet .*; download it again",
    ),
    "a saved dataset that is damaged": (
        [("dataset_dict.json", b"{")],
        ": cannot be read as a dataset .*; check its name and its files",
    ),
    "metadata without names of files": (
        [("metadata.csv", b"image,label\n1.png,cat\n"), "1.png"],
        ": cannot be read as a dataset .*file_name.*; check its name and its files",
    ),
    "metadata with text in the column of images": (
        [("metadata.csv", b"file_name,image,label\n1.png,some text,cat\n"), "1.png"],
        ": its metadata has a column image beside the names of files, which stands for the files",
    ),
    "annotations that are none": (
        ["train/cat/1.png", "val/images/1.png", "val/val_annotations.txt/"],
        "/val/val_annotations.txt: cannot be read \\(.*\\); make it readable to you, or move it",
    ),
    "metadata of two kinds": (
        [("metadata.csv", b"file_name,label\n1.png,a\n"), ("metadata.jsonl", b"{}"), "1.png"],
        ": cannot be read as a dataset .*different extensions.*; check its name and its files",
    ),
    "metadata of several splits": (
        [
            ("metadata.csv", b"file_name,label\ntrain/1.png,a\ntest/1.png,b\n"),
            "train/1.png",
            "test/1.png",
        ],
        ": its metadata lists images of test and train together; put a metadata file into the fo",
    ),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path, situation):
    paths, message = REFUSED[situation]
    if paths == "file":
        (tmp_path / "data").touch()
    elif paths is not None:
        write_tree(tmp_path / "data", *paths)
    with pytest.raises(DataError, match=f"^{tmp_path}/data{message}") as refused:
        open_dataset(tmp_path / "data")
    assert "\n" not in str(refused.value)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    write_tree(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog").chmod(0)
    with pytest.raises(DataError, match="dog: cannot be listed .*; change its permissions, or mov"):
        as_ordinary_user(lambda: open_dataset(tmp_path))


def test_a_class_has_one_name_on_macos_and_linux(tmp_path):
    name = "전기차"
    paths = [f"train/{normalize('NFD', name)}/1.png", "train/b/1.png", f"test/{name}/1.png"]
    dataset = open_dataset(write_tree(tmp_path, *paths))
    assert count_images(dataset) == {"train": {name: 1, "b": 1}, "test": {name: 1}}
    model = timm.create_model(ARCH, label_names=[normalize("NFD", name)])
    assert model.pretrained_cfg["label_names"] == (name,)


def test_a_folder_of_torchvision_may_be_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.chdir(tmp_path / "cifar-10-batches-py")
    with pytest.raises(DataError, match="cifar-10-batches-py: incomplete or damaged"):
        open_dataset(".")


def test_one_of_several_data_sets_is_chosen(tmp_path):
    write_tree(tmp_path, "pets/cat/1.png", "pets/dog/1.png", "more/rose/1.png", "more/lily/1.png")
    pets = open_dataset(tmp_path, config="pets")
    assert pets.classes == ["cat", "dog"]
    with pytest.raises(DataError, match="pets: is no table, so it has no column 'x'; leave "):
        open_dataset(tmp_path, config="pets", label_column="x")
    with pytest.raises(DataError, match=f"^{tmp_path}/cars: no such folder; --config names a fold"):
        open_dataset(tmp_path, config="cars")


@pytest.fixture
def photos(tmp_path):
    """Images of three classes, of which there are many, some and two."""
    counts = {"many": 30, "some": 9, "two": 2}
    return open_dataset(
        write_tree(tmp_path, *(f"{name}/{i}.png" for name, n in counts.items() for i in range(n)))
    )


def test_an_empty_or_overlong_name_is_refused():
    with pytest.raises(DataError, match="^no dataset is named; give the folder that holds it"):
        open_dataset("")
    with pytest.raises(DataError, match="x: no such folder"):
        open_dataset("x" * 300)


class TestHoldOut:
    def test_each_class_is_held_out_alike(self, photos):
        labels = photos.get("train").labels
        for size in (3, 8, 20, 38):
            kept, held_out = hold_out(photos, size, seed=0)
            assert sorted(kept + held_out) == list(range(41)) and len(held_out) == size
            counts = Counter(labels[i] for i in held_out)
            assert set(counts) == {0, 1, 2} == {labels[i] for i in kept}
            assert abs(counts[0] - max(1, size * 30 / 41)) < 2

    def test_the_seed_chooses(self, photos):
        first, again, other = (hold_out(photos, 8, seed) for seed in (1, 1, 2))
        assert first == again != other
        assert hold_out(photos, 0, seed=1) == (list(range(41)), [])

    @pytest.mark.parametrize("size", [2, 39, 41])
    def test_what_cannot_be_held_out_is_refused(self, photos, size):
        message = f"cannot hold out {size} of 41 training images in 3 classes; give 3 to 38"
        with pytest.raises(DataError, match=message):
            hold_out(photos, size, seed=0)

    def test_a_class_of_one_image_is_named(self, tmp_path):
        dataset = open_dataset(write_tree(tmp_path, "a/1.png", "a/2.png", "b/1.png"))
        with pytest.raises(DataError, match="the class b has only one image, which cannot be bot"):
            hold_out(dataset, 1, seed=0)


class TestLayouts:
    """The same images from each layout: in training four times over, in testing once."""

    COPIES = (("train", 4), ("test", 1))

    def write_parquet(self, root, sample):
        shutil.copytree(sample, root)

    def write_folders(self, root, sample):
        for split, copies in self.COPIES:
            for (name, picture), i in product(PICTURES.items(), range(copies)):
                write_tree(root, (f"{split}/{name}/{i}.png", picture))

    def write_metadata(self, root, sample):
        for split, copies in self.COPIES:
            files = [f"{i} {name}.png" for i in range(copies) for name in PICTURES]
            write_tree(root / split, *zip(files, [*PICTURES.values()] * copies))
            table = pyarrow.table({"file_name": files, "label": [*PICTURES] * copies})
            parquet.write_table(table, root / split / "metadata.parquet")

    def write_saved(self, root, sample):
        loaded = datasets.load_dataset(str(sample))
        loaded.cast_column("img", datasets.Image()).save_to_disk(root)

    def write_torchvision(self, root, sample):
        pixels = [np.asarray(open_image(picture)) for picture in PICTURES.values()]
        data = np.stack([image.transpose(2, 0, 1).ravel() for image in pixels])
        content = {"data": data, "labels": list(range(10))}
        files = dict.fromkeys(["test_batch", *(f"data_batch_{i}" for i in range(1, 5))], content)
        files["data_batch_5"] = {"data": data[:0], "labels": []}
        files["batches.meta"] = {"label_names": list(CIFAR10.classes)}
        for name, content in files.items():
            write_tree(root, (f"cifar-10-batches-py/{name}", pickle.dumps(content)))

    @pytest.mark.parametrize("layout", ["parquet", "folders", "metadata", "saved", "torchvision"])
    def test_images_labels_and_classes(self, cifar_sample, tmp_path, monkeypatch, layout):
        # A small copy of torchvision's files cannot have the checksums of the original ones.
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        root = tmp_path / "data [1]{}"
        getattr(self, f"write_{layout}")(root, cifar_sample)
        dataset = open_dataset(root)
        assert dataset.classes == list(CIFAR10.classes) and dataset.left_out == []
        sizes = {split: len(images) for split, images in dataset.splits.items()}
        assert sizes == {"train": 40, "test": 10}
        for images in dataset.splits.values():
            for image, label in (images[i] for i in range(len(images))):
                expected = open_image(PICTURES[CIFAR10.classes[label]])
                np.testing.assert_array_equal(image, expected)

"""What the datasets library reads: parquet files, metadata files, repositories of the Hub."""

import io
import resource
import shutil
import sys
from types import ModuleType

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from convmixer_hub import DataError
from convmixer_hub.data.images import open_image
from convmixer_hub.data.reader import open_dataset

from .conftest import CAT, DOG, NAME, convmixer, count_images, limited, write_tree
from .hub_server import HubServer

PAIR = {"cat": 1, "dog": 1}
TRAIN = {"train": PAIR}
INT = datasets.Value("int64")
NAMED = datasets.ClassLabel(names=["cat", "dog"])


def make_table(labels, label="label", image="image", kind=None, **columns) -> bytes:
    """Make a parquet file as `push_to_hub` does, with a cat or a dog for each label."""
    features = {image: datasets.Image(), label: kind or NAMED}
    pictures = [{"bytes": DOG if each in (1, "dog") else CAT} for each in labels]
    content = {image: pictures, label: labels}
    for name, (values, kind) in columns.items():
        content[name], features[name] = values, kind
    table = datasets.Dataset.from_dict(content, datasets.Features(features))
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


def make_bare(**columns) -> bytes:
    """Make a parquet file of which only the columns are known."""
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


STRUCT = [{"bytes": CAT, "path": None}, {"bytes": DOG, "path": "dog.png"}]
TABLE = make_table([0, 1])

# Situation: the files, what they give by split and class, and what is said to be left out.
READ = {
    **{
        f"files called {train} and {test}": (
            {train: TABLE, test: TABLE},
            {"train": PAIR, "test": PAIR},
        )
        for train, test in [
            ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
            ("data/train-00000-of-00001-abcdef.parquet", "data/test-00000-of-00001-1234.parquet"),
            ("train-00000-of-00001/data.parquet", "test-00000-of-00001/data.parquet"),
            ("default/train/0000.parquet", "default/test/0000.parquet"),  # as the Hub converts
            ("cats_train.parquet", "cats_test.parquet"),
            ("training.parquet", "testing.parquet"),
        ]
    },
    "one file of no split": ({"photos.parquet": TABLE}, TRAIN),
    "a split of another name": (
        {"train.parquet": TABLE, "extra.parquet": TABLE},
        TRAIN,
        "left out: 1 × tables named after no split, the first is extra.parquet",
    ),
    "images beside the tables": (
        {"train.parquet": TABLE, "samples/1.png": CAT},
        TRAIN,
        "left out: 1 × images beside the dataset's own files, the first is samples/1.png",
    ),
    "another file beside the tables": (
        {"train.parquet": TABLE, "test.csv": b"image,label\n", "README.md": b""},
        TRAIN,
        "left out: 1 × files beside the tables (.csv), the first is test.csv",
    ),
    "train-validation is neither": (
        {"train.parquet": TABLE, "train-validation.parquet": TABLE},
        TRAIN,
        "left out: 1 × tables named after no split, the first is train-validation.parquet",
    ),
    "names in numbers": (
        {"a.parquet": make_bare(image=STRUCT, label=[3, 10])},
        {"train": {"3": 1, "10": 1}},
    ),
    "names as strings": ({"a.parquet": make_bare(image=STRUCT[::-1], label=["dog", "cat"])}, TRAIN),
    "truth values": (
        {"a.parquet": make_bare(image=STRUCT, label=[True, False])},
        {"train": {"False": 1, "True": 1}},
    ),
    "bare images": ({"a.parquet": make_bare(image=[CAT, DOG], label=["cat", "dog"])}, TRAIN),
    "a test split without labels": (
        {"train.parquet": TABLE, "test.parquet": make_table([-1, -1, -1])},
        TRAIN,
        "left out: 3 × test images without labels, the first is row 0",
    ),
    "names of files": (
        {
            "data/a.parquet": make_bare(image=["pictures/1.png", "2.png"], label=["cat", "dog"]),
            "pictures/1.png": CAT,
            "2.png": DOG,
        },
        TRAIN,
    ),
    "columns of CIFAR-100": (
        {"a.parquet": make_table([0, 1], "fine_label", "img", coarse_label=([0, 0], NAMED))},
        TRAIN,
    ),
    "columns of other names": (
        {"a.parquet": make_table([0, 1], "animal", "picture", id=([7, 8], INT))},
        TRAIN,
    ),
    "metadata.csv beside images": (
        {
            "train/metadata.csv": b"file_name,label\n1.png,cat\nmore/2.png,dog\n",
            "train/1.png": CAT,
            "train/more/2.png": DOG,
            "train/3.png": DOG,
            "valid/metadata.csv": b"file_name,label\n1.png,cat\n",
            "valid/1.png": CAT,
        },
        {"train": PAIR, "validation": {"cat": 1}},
        "left out: 1 × files that no metadata lists, the first is train/3.png",
    ),
    "metadata.csv of files named like splits": (
        {
            "metadata.csv": b"file_name,label\na train.png,cat\ntest tubes.png,dog\n",
            "a train.png": CAT,
            "test tubes.png": DOG,
        },
        TRAIN,
    ),
    "metadata.jsonl with numbers": (
        {
            "metadata.jsonl": b'{"file_name": "1.png", "label": 1}\n{"file_name": "2.png", '
            b'"label": 0}\n',
            "1.png": CAT,
            "2.png": DOG,
        },
        {"train": {"0": 1, "1": 1}},
    ),
}


@pytest.mark.parametrize("situation", READ)
def test_tables(tmp_path, situation):
    files, splits, *left_out = READ[situation]
    dataset = open_dataset(write_tree(tmp_path / "data", *files.items()))
    assert count_images(dataset) == splits
    assert dataset.left_out == left_out
    for images in dataset.splits.values():
        for image, label in (images[i] for i in range(len(images))):
            expected = DOG if dataset.classes[label] in ("dog", "10", "False", "0") else CAT
            assert image.tobytes() == open_image(expected).tobytes()


# Situation: the files, and the line that refuses them, after the folder's name.
REFUSED = {
    "a part that is missing": (
        {f"train-0000{i}-of-00003.parquet": TABLE for i in (0, 2)},
        "/train-00001-of-00003: is missing; download it again",
    ),
    "parts of two versions": (
        {f"train-00000-of-00001{end}.parquet": TABLE for end in ("-0123456789abcdef", "")},
        "/train-00000-of-00001.*: train-00000-of-00001.* is of the same split, written at another",
    ),
    "parts in two numbers": (
        {f"train-00000-of-0000{count}.parquet": TABLE for count in (1, 3)},
        "/train-00000-of-00003.parquet: train-00000-of-00001.parquet is of the same split, writ",
    ),
    "several datasets": (
        {"cifar10/plain_text/train.parquet": TABLE, "mnist/train.parquet": TABLE},
        ": holds several datasets, cifar10/plain_text, mnist; choose one of them with --config",
    ),
    "a dataset beside another": (
        {"train.parquet": TABLE, "extra/test.parquet": TABLE},
        ": holds several datasets, the folder itself, extra; choose one of them with --config, o",
    ),
    "a part with a hash that is missing": (
        {"data/train-00000-of-00002-0123456789abcdef.parquet": TABLE},
        "/data/train-00001-of-00002: is missing; download it again",
    ),
    "no column of images": (
        {"a.parquet": make_bare(label=[0, 1], text=["a", "b"])},
        ": has the columns label, text; name the one that holds the images i",
    ),
    "images of another kind": (
        {"a.parquet": make_bare(image=[0.5, 1.5], label=[0, 1])},
        r": its column 'image' holds Value\('float64'\); save the images as the dataset",
    ),
    "colors above 255": (
        {"a.parquet": make_bare(image=[[[[4000] * 3] * 8] * 8] * 2, label=[0, 1])},
        r": its column 'image' holds List\(.*\); save the images as the dataset",
    ),
    "no column of classes": (
        {"a.parquet": make_bare(image=STRUCT, animal=["cat", "dog"])},
        ": has the columns image, animal; name the one that holds the classes with --label-column",
    ),
    "several columns of classes": (
        {"a.parquet": make_table([0, 1], fine_label=([0, 1], NAMED))},
        ": has the columns image, label, fine_label; name the one that holds the classes with --l",
    ),
    "classes of another kind": (
        {"a.parquet": make_bare(image=STRUCT, label=[0.5, 1.5])},
        r": its column 'label' holds Value\('float64'\), not names or numbers of classes; n",
    ),
    "several classes an image": (
        {"a.parquet": make_bare(image=STRUCT, label=[[0, 1], [1]])},
        r": its column 'label' holds List\(.*\), not names or numbers of classes; name anot",
    ),
    "no rows": ({"train.parquet": make_table([])}, ": cannot be read as a dataset .*; check"),
    "no labels": (
        {"train.parquet": make_table([-1, -1])},
        ": its images have no labels; give a dataset that has them",
    ),
    "a row without a label": (
        {"train.parquet": make_table([0, None])},
        r": its train images have no label in row 1; give it one, or remove it \(in a CSV file, N",
    ),
    "files whose labels mean other classes": (
        {
            "train-0.parquet": TABLE,
            "train-1.parquet": make_table([0], kind=datasets.ClassLabel(names=["x", "y"])),
        },
        "/train-1.parquet: its labels mean x, y, those of .*/train-0.parquet cat, dog; read them a",
    ),
    "files of which one does not say what its labels mean": (
        {"train-0.parquet": TABLE, "train-1.parquet": make_bare(image=STRUCT, label=[0, 1])},
        "/train-1.parquet: its labels mean only numbers, those of .*/train-0.parquet cat, dog; re",
    ),
    "files with other columns": (
        {
            "train.parquet": make_bare(image=STRUCT, label=[0, 1]),
            "test.parquet": make_bare(image=STRUCT),
        },
        ": cannot be read as a dataset .*; check its name and its files",
    ),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_tables_that_are_not_clear_are_refused_in_one_line(tmp_path, situation):
    files, message = REFUSED[situation]
    write_tree(tmp_path / "data", *files.items())
    with pytest.raises(DataError, match=f"^{tmp_path}/data{message}") as refused:
        open_dataset(tmp_path / "data")
    assert "\n" not in str(refused.value)


def test_images_as_arrays_of_bytes_are_read(tmp_path):
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    columns = {"image": [pixels] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    image, _ = open_dataset(tmp_path).get("train")[0]
    np.testing.assert_array_equal(image, pixels)


def test_a_column_of_classes_is_chosen(tmp_path):
    table = make_bare(image=STRUCT, label=[0, 1], species=["felis catus", "canis lupus"])
    write_tree(tmp_path, ("a.parquet", table))
    dataset = open_dataset(tmp_path, label_column="species")
    assert dataset.classes == ["canis lupus", "felis catus"]
    with pytest.raises(DataError, match="has the columns image, label, species; name the one that"):
        open_dataset(tmp_path, label_column="animal")


def test_an_image_that_is_not_there_is_named(tmp_path):
    images = [STRUCT[0], None, {"bytes": b"", "path": None}]
    write_tree(tmp_path, ("train.parquet", make_bare(image=images, label=[0, 1, 1])))
    images = open_dataset(tmp_path).get("train")
    with pytest.raises(DataError, match="row 1 of its train images: holds no image; remove the r"):
        images[1]
    with pytest.raises(DataError, match="row 2 of its train images: not an image that Pillow can"):
        images[2]
    write_tree(tmp_path / "csv", ("metadata.csv", b"file_name,label\n1.png,a\n2.png,b\n"), "1.png")
    images = open_dataset(tmp_path / "csv").get("train")
    with pytest.raises(DataError, match="csv/2.png: no such file; check the path"):
        images[1]


def test_a_relative_path_is_no_hindrance(tmp_path, monkeypatch):
    table = b"picture_file_name,label\n1.png,cat\n2.png,dog\n"
    write_tree(tmp_path / "data", ("metadata.csv", table), "1.png", ("2.png", DOG))
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset("data")
    assert count_images(dataset) == TRAIN and dataset.left_out == []
    assert dataset.get("train")[1][0].size == (32, 32)


def make_dataset(split, kind=NAMED) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": STRUCT, "label": [0, 1]}, features, split=split)


@pytest.mark.parametrize(
    ("name", "split"),
    [(None, "train"), ("train[:1000]", "train"), ("validation[10%:]", "validation")],
)
def test_a_split_that_was_saved_alone_keeps_its_name(name, split, tmp_path):
    table = make_dataset(name)
    table.save_to_disk(tmp_path / "alone")
    assert count_images(open_dataset(tmp_path / "alone")) == {split: PAIR}
    datasets.DatasetDict({"full": table}).save_to_disk(tmp_path / "dict")
    dataset = open_dataset(tmp_path / "dict")
    assert count_images(dataset) == TRAIN and dataset.left_out == []


@pytest.mark.parametrize("kind", ["arrow", "numpy", "pandas"])
def test_the_format_in_which_it_was_saved_changes_nothing(kind, tmp_path):
    make_dataset("train").with_format(kind).save_to_disk(tmp_path)
    dataset = open_dataset(tmp_path)
    assert count_images(dataset) == TRAIN
    assert dataset.get("train")[1][0].size == (32, 32)


def test_saved_splits_whose_labels_mean_other_classes_are_refused(tmp_path):
    other = make_dataset("test", datasets.ClassLabel(names=["dog", "cat"]))
    datasets.DatasetDict(train=make_dataset("train"), test=other).save_to_disk(tmp_path)
    message = "its test labels mean dog, cat, its train labels cat, dog; make them the same$"
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_a_full_cache_is_not_blamed_on_the_dataset(tmp_path):
    write_tree(tmp_path, ("train.parquet", TABLE))
    message = r"File too large.*; check its name and its files, and whether there is room in the ca"
    with limited(resource.RLIMIT_FSIZE, 1000), pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_several_that_were_saved_are_listed(tmp_path):
    table = make_dataset("train")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "a")
    table.save_to_disk(tmp_path / "more" / "b")
    message = "holds what save_to_disk wrote in a, more/b; choose one of them with --config$"
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)
    for config in ("a", "more/b"):
        assert count_images(open_dataset(tmp_path, config)) == TRAIN


def test_an_archive_that_is_gone_is_named(tmp_path):
    table = make_bare(image=["zip://1.png::/nowhere/images.zip"], label=["cat"])
    write_tree(tmp_path, ("train.parquet", table))
    images = open_dataset(tmp_path).get("train")
    with pytest.raises(DataError, match="row 0 of its train images: cannot be read .*; check zip"):
        images[0]


def test_what_was_changed_is_read_anew(tmp_path):
    for labels in ([0, 1], [1, 1, 1]):
        (tmp_path / "train.parquet").write_bytes(make_table(labels))
        assert open_dataset(tmp_path).get("train").labels == labels


@pytest.mark.parametrize("found", [None, ModuleType("datasets")], ids=["nothing", "a folder"])
def test_without_the_datasets_library_it_is_named(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", found)
    write_tree(tmp_path, ("train.parquet", TABLE))
    with pytest.raises(DataError, match="reading it needs the datasets library: pip install data"):
        open_dataset(tmp_path)
    write_tree(tmp_path / "folders", "cat/1.png", "dog/1.png")
    assert open_dataset(tmp_path / "folders").classes == ["cat", "dog"]


@pytest.mark.slow
def test_a_split_of_more_than_2_gib_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    padding = bytes(60_000_000)  # no decoder looks at what comes after the end of a PNG
    images = [{"bytes": CAT + padding, "path": None}] * 3
    part = pyarrow.table({"image": images, "label": [0, 1, 1]})
    file = tmp_path / "train.parquet"
    with parquet.ParquetWriter(file, part.schema, compression="zstd") as writer:
        for _ in range(13):
            writer.write_table(part)
    assert file.stat().st_size < 10e6
    images = open_dataset(tmp_path).get("train")
    assert len(images) == 39
    assert images[38][0].tobytes() == open_image(CAT).tobytes()
    shutil.rmtree(tmp_path / "cache")


# Options of evaluate that name a dataset of the Hub, and the line that they give.
OF_THE_HUB = {
    "--data me/several": "Error: me/several: holds a, b; choose one of them with --config",
    "--data me/several --config b": (
        "Error: me/several: has images for train, but none for test; put such images into "
        "a folder or file named test"
    ),
    "--data me/nothing": (
        "Error: me/nothing: no such folder, and what the Hub has by that name cannot be read "
        "as a dataset (Dataset 'me/nothing' doesn't exist on the Hub or cannot be accessed); "
        "check its name and its files, and whether there is room in the cache, which HF_HOME moves"
    ),
    "--data me/one": "convmixer_cifar: top-1 100.00 % (2 of 2 test images in 2 classes correct)",
}
EVALUATE_EACH = f"""
import sys
from convmixer_hub.cli.main import main

sys.stderr = sys.stdout
for options in {list(OF_THE_HUB)}:
    try:
        main(["evaluate", *options.split()])
    except SystemExit:
        pass
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_measured_by_its_id(run_python):
    several = {"a/train.parquet": TABLE, "b/train.parquet": TABLE}
    several["README.md"] = (
        b"---\nconfigs:\n- config_name: a\n  data_files: a/*\n- config_name: b\n"
        b"  data_files: b/*\n---\n"
    )
    one = {f"data/{split}-00000-of-00001.parquet": TABLE for split in ("train", "test")}
    with HubServer() as server:
        server.repositories["datasets/me/one"] = {"main": one}
        server.repositories["datasets/me/several"] = {"main": several}
        # The libraries read the address of the Hub when they are imported.
        printed = run_python(EVALUATE_EACH, HF_HUB_OFFLINE="0", HF_ENDPOINT=server.url)
    assert printed.splitlines() == list(OF_THE_HUB.values())


@pytest.mark.parametrize(("folder", "split"), [("test", "test"), ("val", "validation")])
def test_evaluate_names_the_split_and_what_is_left_out(folder, split, tmp_path):
    write_tree(tmp_path / folder, "cat/1.png", "dog/1.png", ("cat/1.txt", b"x"))
    result = convmixer("evaluate", NAME, "--data", tmp_path, "--workers", 0)
    message = f"left out: 1 × files that are not images (.txt), the first is {folder}/cat/1.txt\n"
    assert result.stderr == message
    correct = f"1 of 2 {split} images in 2 classes correct"
    assert result.stdout == f"{NAME}: top-1 50.00 % ({correct})\n"

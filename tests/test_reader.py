import pickle

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from convmixer_hub import DataError
from convmixer_hub.data.images import eval_transform, open_image
from convmixer_hub.data.reader import has_split, hold_out, load_images
from convmixer_hub.hub.records import CIFAR10

from .conftest import CONFIG, IMAGES, encode


def gray_ramp(mode: str, highest: int | float) -> Image.Image:
    values = np.linspace(0, highest, 256).reshape(16, 16)
    kind = {"L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    return Image.fromarray(values.astype(kind))


@pytest.mark.parametrize(
    ("mode", "highest", "format"),
    [("L", 255, "PNG"), ("I;16", 65535, "PNG"), ("I", 65535, "TIFF"), ("F", 1.0, "TIFF")],
)
def test_grey_of_every_depth_keeps_its_shades(mode, highest, format):
    image = open_image(encode(gray_ramp(mode, highest), format))
    assert image.mode == "RGB"
    shades = np.asarray(image)[..., 0].ravel()
    np.testing.assert_allclose(shades, np.arange(256), atol=1)


@pytest.mark.parametrize(("value", "shade"), [(0.5, 128), (float("nan"), 0), (200.0, 255)])
def test_an_even_grey_float_image_is_not_stretched(value, shade):
    image = Image.fromarray(np.full((2, 2), value, dtype=np.float32))
    assert set(np.asarray(open_image(encode(image, "TIFF"))).ravel()) == {shade}


def test_transparency_is_laid_over_white():
    red_and_nothing = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    red_and_nothing.putpixel((1, 0), (0, 0, 0, 0))
    for image in (
        red_and_nothing,
        red_and_nothing.quantize(4),  # a palette with transparency
    ):
        pixels = np.asarray(open_image(encode(image)))[0].tolist()
        assert pixels == [[255, 0, 0], [255, 255, 255]]


def test_a_palette_image_keeps_its_colours():
    image = Image.open(IMAGES / "frog.png").convert("RGB").quantize(16)
    assert image.mode == "P"
    np.testing.assert_array_equal(open_image(encode(image)), image.convert("RGB"))


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert open_image(encode(image, "JPEG", exif=exif)).size == (2, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; check the path"),
        (b"not an image", "not an image that Pillow can read; give a PNG, JPEG, …"),
        (b"", "not an image that Pillow can read"),
        ((IMAGES / "cat.png").read_bytes()[:-900], "damaged image .*; replace the file"),
    ],
    ids=["missing", "text", "empty", "cut off"],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    file = tmp_path / "picture.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"^{file}: {message}"):
        open_image(file)


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    with pytest.raises(DataError, match="is a folder; name the image files in it"):
        open_image(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="has too many pixels to be safe; scale it down first"):
        open_image(IMAGES / "cat.png")


class TestLayouts:
    """The same images from each of the three layouts."""

    @pytest.fixture(params=["parquet", "torchvision", "folders"])
    def folder(self, request, cifar_sample, tmp_path):
        if request.param == "parquet":
            return cifar_sample
        pixels = {name: Image.open(IMAGES / f"{name}.png") for name in CIFAR10.classes}
        if request.param == "folders":
            for split, copies in (("train", 4), ("val", 1)):
                for name, image in pixels.items():
                    (tmp_path / "folders" / split / name).mkdir(parents=True)
                    for i in range(copies):
                        image.save(tmp_path / "folders" / split / name / f"{i}.png")
            return tmp_path / "folders"
        return write_torchvision(tmp_path / "torchvision", list(pixels.values()))

    def test_images_labels_and_classes(self, folder, monkeypatch):
        # A small copy of torchvision's files cannot have the checksums of the original ones.
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        images = load_images(folder, "test")
        assert list(images.classes) == list(CIFAR10.classes)
        assert len(images) == 10
        assert len(load_images(folder, "train")) == 40
        for image, label in (images[i] for i in range(10)):
            name = CIFAR10.classes[label]
            np.testing.assert_array_equal(image, Image.open(IMAGES / f"{name}.png"))


def write_torchvision(root, images):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    data = np.stack([np.asarray(image).transpose(2, 0, 1).ravel() for image in images])
    labels = list(range(10))
    for i in range(1, 6):
        rows = data if i < 5 else data[:0]
        content = {"data": rows, "labels": labels[: len(rows)]}
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(content))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": labels}))
    meta = pickle.dumps({"label_names": list(CIFAR10.classes)})
    (folder / "batches.meta").write_bytes(meta)
    return root


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (10, "row 1 has the label 10, but there are 10 classes; labels run from 0 to 9"),
        (-1, "row 1 has the label -1"),
        (None, "row 1 has the label None"),
    ],
)
def test_labels_out_of_range_are_refused(write_parquet, label, message):
    image = (IMAGES / "cat.png").read_bytes()
    folder = write_parquet("train", [image, image], [3, label])
    with pytest.raises(DataError, match=message):
        load_images(folder, "train")


def test_an_image_that_is_not_there_is_named(write_parquet):
    folder = write_parquet("train", [(IMAGES / "cat.png").read_bytes(), None], [3, 3])
    with pytest.raises(DataError, match="row 1 of its parquet files: holds no image; remove"):
        load_images(folder, "train")[1]


def test_an_empty_parquet_is_refused(write_parquet):
    with pytest.raises(DataError, match="holds no images; download it again"):
        load_images(write_parquet("test", [], []), "test")


def test_validation_images_do_not_mix_with_test_images(write_parquet):
    image = (IMAGES / "cat.png").read_bytes()
    write_parquet("validation", [image] * 2, [3, 3])
    assert len(load_images(write_parquet("train", [image], [3]), "test")) == 2
    assert len(load_images(write_parquet("test", [image], [3]), "test")) == 1


def test_the_fine_labels_of_cifar100_are_its_classes(write_parquet):
    image = (IMAGES / "cat.png").read_bytes()
    folder = write_parquet("test", [image], [2], classes=["a", "b", "c"], label_column="fine_label")
    images = load_images(folder, "test")
    assert images.classes == ["a", "b", "c"] and images[0][1] == 2


def test_a_parquet_with_other_columns_is_refused(write_parquet):
    folder = write_parquet("train", [b""], [0], column="picture")
    with pytest.raises(DataError, match="has the columns picture, label; needed are an image col"):
        load_images(folder, "train")


def test_a_parquet_with_bare_images_is_refused(tmp_path):
    table = pyarrow.table({"image": [b"bytes"], "label": [0]})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="its column 'image' holds binary; needed is a struct with"):
        load_images(tmp_path, "train")


def test_a_broken_parquet_is_refused(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="train-0.parquet: cannot be read as parquet"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder; give the folder that holds the data set"),
        (
            lambda folder: folder.mkdir(),
            "no data set found; expected test-\\*.parquet files, torch",
        ),
        (lambda folder: (folder / "test").mkdir(parents=True), "Couldn't find any class folder"),
        (lambda folder: (folder / "cifar-10-batches-py").mkdir(parents=True), "incomplete or dam"),
    ],
    ids=["missing", "empty", "no classes", "no batches"],
)
def test_a_folder_without_data_is_refused(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "data", "test")


def test_class_folders_alone_are_training_images(tmp_path):
    for place in ("cat", "dog", ".ipynb_checkpoints"):
        (tmp_path / place).mkdir()
    for name in ("cat", "dog"):
        Image.open(IMAGES / f"{name}.png").save(tmp_path / name / "1.jpg")
    images = load_images(tmp_path, "train")
    assert images.classes == ["cat", "dog"] and len(images) == 2
    assert not has_split(tmp_path, "train")
    with pytest.raises(DataError, match="no data set found"):
        load_images(tmp_path, "test")


def test_a_name_too_long_for_a_folder_is_none():
    assert not has_split("x" * 300, "train")
    with pytest.raises(DataError, match="x: no such folder"):
        load_images("x" * 300, "train")


def test_splits_of_other_names_are_not_taken_for_classes(tmp_path):
    for split in ("Training", "Testing"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.open(IMAGES / "cat.png").save(tmp_path / split / "cat" / "1.png")
    with pytest.raises(DataError, match="Testing: holds folders, so it is no class folder; name"):
        load_images(tmp_path, "train")


def test_files_of_one_split_are_told_from_those_of_another(write_parquet):
    image = (IMAGES / "cat.png").read_bytes()
    folder = write_parquet("train", [image], [3])
    write_parquet("train-validation", [image, image], [3, 3])
    (folder / "val").mkdir()
    assert len(load_images(folder, "train")) == 1
    assert not has_split(folder, "validation")


@pytest.mark.parametrize(
    ("classes", "meaning"),
    [(["cat", "dog", "frog", "bird"], "cat, dog, frog, bird"), (None, "numbers alone")],
)
def test_files_whose_labels_mean_other_classes_are_not_mixed(write_parquet, classes, meaning):
    image = (IMAGES / "cat.png").read_bytes()
    folder = write_parquet("train", [image], [3])
    write_parquet("train-1", [image], [3], classes=classes)
    message = rf"train-1\S*parquet: its labels mean {meaning}, those of \S*train-0\S*parquet airp"
    with pytest.raises(DataError, match=message):
        load_images(folder, "train")


def test_labels_without_names_are_numbers(write_parquet):
    image = (IMAGES / "cat.png").read_bytes()
    folder = write_parquet("train", [image] * 2, [0, 2], classes=None)
    assert load_images(folder, "train").classes == ["0", "1", "2"]


def test_a_missing_split_is_named(write_parquet):
    folder = write_parquet("train", [(IMAGES / "cat.png").read_bytes()], [3])
    with pytest.raises(DataError, match="holds parquet files, but none named test-"):
        load_images(folder, "test")


def test_holding_out_is_the_same_everywhere():
    kept, held_out = hold_out(10, 3, seed=0)
    assert sorted(kept + held_out) == list(range(10))
    assert held_out == [1, 4, 7]
    with pytest.raises(DataError, match="cannot hold out 10 of 10 training images; hold out fewer"):
        hold_out(10, 10, seed=0)


def test_evaluation_sees_the_whole_image_normalized():
    image = Image.open(IMAGES / "cat.png")
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(eval_transform(CONFIG)(image), expected)
    assert eval_transform(CONFIG)(image.resize((70, 50))).shape == (3, 32, 32)

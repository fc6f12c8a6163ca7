import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.utils import random_seed
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from convmixer_hub import DataError
from convmixer_hub.data.augment import TrainingImages, is_rand_augment
from convmixer_hub.data.images import eval_transform
from convmixer_hub.data.reader import open_dataset, read_images

from .conftest import CAT, CONFIG, encode, write_split


@pytest.fixture
def training_images(cifar_sample):
    """Make the forty training images of the sample, or some of them."""
    images = open_dataset(cifar_sample).get("train")

    def make(indices=range(40), config=CONFIG, **options) -> TrainingImages:
        return TrainingImages(images.select(indices), config, **options)

    return make


def to_bytes(image):
    """Undo the normalization of CONFIG."""
    return (image * 0.25 + 0.5).mul(255).round().byte()


@pytest.mark.parametrize(("size", "crop_size"), [((32, 32), (24, 24)), ((24, 41), (24, 41))])
def test_training_crops_are_parts_of_the_image_or_its_mirror(training_images, size, crop_size):
    images = training_images([3], config=CONFIG | {"input_size": (3, *size)})
    borders = [(0, 0), *((side // 8, side // 8) for side in crop_size)]
    whole = np.pad(images.images[0].numpy(), borders, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(whole, crop_size, axis=(1, 2))
    windows = windows.transpose(1, 2, 0, 3, 4).reshape(-1, 3, *crop_size)
    patches = {window.tobytes() for window in windows}
    seen, mirrored = set(), []
    for epoch in range(20):
        [crop], [label] = images.read_batch(epoch, 0, 1, crop_size)
        assert label == 3
        crop = to_bytes(crop)
        seen.add(crop.numpy().tobytes())
        mirrored.append(crop.numpy().tobytes() not in patches)
        assert not mirrored[-1] or crop.flip(2).numpy().tobytes() in patches
    assert len(seen) > 10
    assert mirrored in ([True, False] * 10, [False, True] * 10)


@pytest.mark.parametrize(("flip", "least", "most"), [("random", 5, 15), ("none", 0, 0)])
def test_mirror_images_by_chance_or_never(training_images, flip, least, most):
    images = training_images([3], flip=flip)
    images.images[:, :, :, :16] = 0  # so that the left half tells
    mirrored = []
    for epoch in range(20):
        [crop], _ = images.read_batch(epoch, 0, 1, (32, 32))
        crop = to_bytes(crop).float()
        mirrored.append(bool(crop[..., :12].sum() > crop[..., 20:].sum()))
    assert least <= sum(mirrored) <= most
    assert flip == "none" or mirrored[::2] != [mirrored[0]] * 10


def test_rand_augment_of_the_highest_level(training_images):
    images = training_images(rand_augment="rand-m10-n8-inc1")
    batch, _ = images.read_batch(0, 0, 40, (32, 32))
    assert torch.isfinite(batch).all()
    assert not torch.equal(batch, images.read_batch(0, 0, 40, (32, 32), augment=False)[0])


def test_an_epoch_shows_each_image_once_in_random_order(training_images):
    images = training_images(range(10))
    for epoch in range(2):
        steps = [images.read_batch(epoch, step, 2, (32, 32)) for step in range(5)]
        labels = [int(label) for _, labels in steps for label in labels]
        assert sorted(labels) == list(range(10))
        assert labels != list(range(10))


def test_the_same_seed_gives_the_same_batches(training_images):
    batches = [training_images(seed=seed).read_batch(1, 2, 8, (32, 32))[0] for seed in (5, 5, 6)]
    torch.testing.assert_close(batches[0], batches[1], atol=0, rtol=0)
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_timms(training_images, channels):
    config = "rand-m9-n8-p1-inc1"
    values = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    values = CONFIG | values | {"input_size": (channels, 32, 32)}
    images = training_images([3], config=values, rand_augment=config)
    picture = to_pil_image(images.images[0])
    fill = (128,) * channels
    timms = rand_augment_transform(config, {"translate_const": 10, "img_mean": fill})
    for epoch in range(20):
        random_seed(epoch)
        images.images = pil_to_tensor(timms(picture))[None]
        expected, _ = images.read_batch(epoch, 0, 1, (32, 32), augment=False)
        random_seed(epoch)
        images.images = pil_to_tensor(picture)[None]
        found, _ = images.read_batch(epoch, 0, 1, (32, 32))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_what_timm_does_not_take_for_rand_augment_is_refused():
    assert is_rand_augment("") and is_rand_augment("rand-m9-n2-mstd0.5-inc1")
    others = "random rand-n20-tweights rand-mx rand-m9-inc rand-tweight".split()
    for other in (*others, f"rand-n{10**20}"):
        assert not is_rand_augment(other), other
    assert all(is_rand_augment(f"rand-m9-t{name}-p0.5") for name in ("weights", "3a", "3aw"))


def test_images_of_other_sizes_and_modes_are_scaled_as_in_evaluation(tmp_path):
    noise = np.random.default_rng(0)
    pictures = [
        encode(Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)))
        for shape in ((40, 80, 3), (30, 20), (32, 32, 3))
    ]
    images = open_dataset(write_split(tmp_path / "data", "train", pictures, [0, 1, 2])).get("train")
    in_evaluation, _, _ = read_images(images, eval_transform(CONFIG))
    assert torch.equal(TrainingImages(images, CONFIG).images, to_bytes(in_evaluation))


def test_damaged_images_are_counted_and_named_or_skipped(tmp_path):
    folder = write_split(tmp_path / "data", "train", [CAT, CAT[:-900], b"", CAT], [3, 3, 3, 3])
    images = open_dataset(folder).get("train")
    message = (
        r"^2 of 4 images cannot be read, the first is .*/data, row 1 of its "
        r"train images: damaged image \(.*\); replace the file; train and finetune leave "
    )
    with pytest.raises(DataError, match=message):
        TrainingImages(images, CONFIG)
    kept = TrainingImages(images, CONFIG, skip_damaged=True)
    assert len(kept) == 2
    assert [line.partition("row ")[2][:1] for line in kept.damaged] == ["1", "2"]
    with pytest.raises(DataError, match="2 of 2 images cannot be read"):
        TrainingImages(images.select([1, 2]), CONFIG, skip_damaged=True)


def test_rand_augment_of_other_channels_is_refused(training_images):
    config = CONFIG | {"input_size": (4, 32, 32), "mean": (0.5,) * 4, "std": (0.25,) * 4}
    with pytest.raises(DataError, match="timm's RandAugment takes images of 1 or 3 channels"):
        training_images(config=config, rand_augment="rand-m9-n2")
    batch, _ = training_images(config=config).read_batch(0, 0, 40, (32, 32))
    assert batch.shape == (40, 4, 32, 32)

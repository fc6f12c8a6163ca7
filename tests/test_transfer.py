from functools import partial

import pytest

from convmixer_hub import DataError
from convmixer_hub.bench import transfer as transfer_module
from convmixer_hub.bench.transfer import bench_finetune
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.training.finetune import choose_settings

from .test_finetune import ANIMALS, MACHINES, write_class


@pytest.fixture
def photos(tmp_path):
    """Two class folders for training, and two with the same images for testing."""
    for split in ("train", "test"):
        write_class(tmp_path / "photos" / split / "animal", ANIMALS)
        write_class(tmp_path / "photos" / split / "machine", MACHINES)
    return open_dataset(tmp_path / "photos")


def test_fine_tuning_is_compared_on_the_same_images_and_steps(photos, monkeypatch):
    runs = []
    train = transfer_module.train

    def train_and_look(settings, dataset, output, **options):
        runs.append(
            (
                settings,
                [image.tobytes() for image, _ in map(dataset.get("train").__getitem__, range(10))],
            )
        )
        assert list(dataset.splits) == ["train"]
        return train(settings, dataset, output, **options)

    monkeypatch.setattr(transfer_module, "train", train_and_look)
    monkeypatch.setattr(transfer_module, "choose_settings", partial(choose_settings, epochs=1))
    [result] = bench_finetune("convmixer_cifar", photos, 5, seeds=1, progress=False)
    assert 0 <= result.from_scratch <= 100 and 0 <= result.finetuned <= 100
    (tuned, images), (fresh, same_images) = runs
    assert len(images) == 10 and images == same_images
    assert tuned.pretrained and not fresh.pretrained
    for name in ("epochs", "batch_size", "held_out", "seed", "rand_augment", "keep_best"):
        assert getattr(tuned, name) == getattr(fresh, name)


def test_too_few_images_to_compare_on_are_named(photos, tmp_path):
    with pytest.raises(DataError, match="photos: has 8 training images of machine; give no more"):
        next(bench_finetune("convmixer_cifar", photos, 12))
    train = open_dataset(tmp_path / "photos" / "train")
    with pytest.raises(DataError, match="train: has images for train, but none for test; give the"):
        next(bench_finetune("convmixer_cifar", train, 2))

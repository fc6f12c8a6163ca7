from dataclasses import replace
from functools import partial

import pytest

from convmixer_hub import DataError
from convmixer_hub.bench import transfer as transfer_module
from convmixer_hub.bench.transfer import Comparison, bench_finetune
from convmixer_hub.cli import measure
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.training.finetune import choose_settings

from .conftest import print_table, write_photos


@pytest.fixture
def photos(tmp_path):
    """Two class folders for training, and two with the same images for testing."""
    return write_photos(tmp_path / "photos", "train", "test")


def compare(data, options="") -> list[list[str]]:
    return print_table(f"bench finetune convmixer_cifar --data {data} {options}")


def test_fine_tuning_is_compared_on_the_same_images_and_steps(photos, monkeypatch):
    runs = []
    train = transfer_module.train

    def train_and_look(settings, dataset, output, **options):
        images = dataset.get("train")
        runs.append((settings, [images[i][0].tobytes() for i in range(10)]))
        assert list(dataset.splits) == ["train"]
        return train(settings, dataset, output, **options)

    monkeypatch.setattr(transfer_module, "train", train_and_look)
    monkeypatch.setattr(transfer_module, "choose_settings", partial(choose_settings, epochs=1))
    *_, title, _, row, mean = compare(photos, "--images-per-class 5 --seeds 1")
    start = "convmixer_cifar, 5 images per class, top-1 on the test images (%), "
    assert title[0].startswith(start)
    assert row == ["0", *mean[1:]]
    assert all(0 <= float(top1) <= 100 for top1 in row[1:3])
    (tuned, images), (fresh, same_images) = runs
    assert len(images) == 10 and images == same_images
    assert tuned.pretrained and not fresh.pretrained
    for name in ("epochs", "batch_size", "held_out", "seed", "rand_augment"):
        assert getattr(tuned, name) == getattr(fresh, name)
    assert fresh.covariance_init and not tuned.covariance_init


def test_gains_and_means_are_printed(photos, monkeypatch):
    results = [Comparison(0, 90.0, 60.0), Comparison(1, 70.0, 75.0)]
    monkeypatch.setattr(measure, "bench_finetune", lambda *_: iter(results))
    _, *table = compare(photos)
    assert table == [
        ["seed", "fine-tuned", "from scratch", "gain"],
        ["0", "90.00", "60.00", "30.00"],
        ["1", "70.00", "75.00", "-5.00"],
        ["mean", "80.00", "67.50", "12.50"],
    ]


def test_too_few_images_to_compare_on_are_named(photos):
    dataset = open_dataset(photos)
    with pytest.raises(DataError, match="photos: has 8 training images of machine; give"):
        next(bench_finetune("convmixer_cifar", dataset, 12))
    one = dataset.get("train").select([0, 1, -1])
    some = replace(dataset, splits=dataset.splits | {"train": one})
    with pytest.raises(DataError, match="has 1 training images of machine; add some, or remove"):
        next(bench_finetune("convmixer_cifar", some, 2))
    train = open_dataset(photos / "train")
    with pytest.raises(DataError, match="train: has images for train, but none for test; give the"):
        next(bench_finetune("convmixer_cifar", train, 2))

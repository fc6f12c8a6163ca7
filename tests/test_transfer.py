from functools import partial

import pytest

from convmixer_hub import DataError
from convmixer_hub.bench import transfer as transfer_module
from convmixer_hub.bench.transfer import bench_finetune
from convmixer_hub.training.finetune import choose_settings

from .test_finetune import ANIMALS, MACHINES, write_class


def write_classes(folder):
    for split in ("train", "test"):
        write_class(folder / split / "animal", ANIMALS)
        write_class(folder / split / "machine", MACHINES)
    return folder


def test_fine_tuning_is_compared_on_the_same_images_and_steps(tmp_path, monkeypatch):
    folder = write_classes(tmp_path / "photos")
    runs = []
    train = transfer_module.train

    def train_and_look(settings, data_dir, output, **options):
        files = sorted(path.name for path in data_dir.rglob("*.jpg"))
        runs.append((settings, files))
        return train(settings, data_dir, output, **options)

    monkeypatch.setattr(transfer_module, "train", train_and_look)
    monkeypatch.setattr(transfer_module, "choose_settings", partial(choose_settings, epochs=1))
    [result] = bench_finetune("convmixer_cifar", folder, 5, seeds=1, progress=False)
    assert 0 <= result.from_scratch <= 100 and 0 <= result.finetuned <= 100
    (tuned, files), (fresh, same_files) = runs
    assert len(files) == 10 and files == same_files
    assert tuned.pretrained and not fresh.pretrained
    for name in ("epochs", "batch_size", "held_out", "seed", "rand_augment", "keep_best"):
        assert getattr(tuned, name) == getattr(fresh, name)


def test_too_few_images_to_compare_on_are_named(tmp_path, cifar_sample):
    with pytest.raises(DataError, match="has no class folders in train/ and test/; make them"):
        next(bench_finetune("convmixer_cifar", cifar_sample))
    folder = write_classes(tmp_path / "few")
    with pytest.raises(DataError, match="train/machine: has 8 images; 12 are needed"):
        next(bench_finetune("convmixer_cifar", folder, 12))

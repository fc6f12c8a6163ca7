"""What fine-tuning gains over training from scratch on the same few images."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torchvision.datasets import ImageFolder

from ..data.reader import has_split, load_images
from ..errors import DataError, TrainingError
from ..evaluate import evaluate_on
from ..hub.records import get_record
from ..machine import get_world_size
from ..training.finetune import choose_settings
from ..training.run import train
from ..training.settings import TrainingSettings
from ..zoo import load_trained


@dataclass(frozen=True)
class Comparison:
    """Top-1 on the test images, in percent, after as many steps on the same images."""

    seed: int
    finetuned: float
    from_scratch: float


def bench_finetune(
    name: str, data_dir: str | Path, images_a_class: int = 50, seeds: int = 3, progress: bool = True
) -> Iterator[Comparison]:
    """Fine-tune a trained model on a few images of each class, and train one from scratch on them.

    Both take the same images, chosen by the seed, with the same augmentation and in batches of the
    same size, for as many epochs, of which both keep the one that does best on a fifth of these
    images. Training from scratch takes the optimizer and the learning rate of `convmixer train`.

    Args:
        name: The trained model, `arch.tag`, or an arch alone for its default tag.
        data_dir: Folder with `train` and `test` (or `val`) class folders.
        images_a_class: How many images of each class to train on, those held out included.
        seeds: How many times to do it.
        progress: Show progress bars, if there is a terminal, and a line an epoch.

    Raises:
        UnknownModelError: If no trained model has this name.
        DataError: If these folders are not there, or have too few images.
        TrainingError: Under torchrun.
    """
    if get_world_size() > 1:
        raise TrainingError("bench finetune works in one process; start it without torchrun")
    arch = get_record(name).arch
    images = load_images(data_dir, "train")
    has_test = any(has_split(data_dir, split) for split in ("test", "validation"))
    if not isinstance(images, ImageFolder) or not has_test:
        raise DataError(f"{data_dir}: has no class folders in train/ and test/; make them")
    if load_images(data_dir, "test").classes != images.classes:
        raise DataError(f"{data_dir}: has other classes for testing than for training; fix that")
    for seed in range(seeds):
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            _link_some(images, images_a_class, seed, folder / "data" / "train")
            tuned = choose_settings(name, folder / "data", seed=seed)
            untrained = TrainingSettings(arch)
            fresh = replace(
                tuned,
                model=arch,
                pretrained=False,
                layer_decay=1.0,
                optimizer=untrained.optimizer,
                learning_rate=untrained.learning_rate,
            )
            top1: list[float] = []
            for settings in (tuned, fresh):
                run = train(settings, folder / "data", folder / f"{len(top1)}", progress=progress)
                top1.append(evaluate_on(load_trained(run), data_dir).top1)
        yield Comparison(seed, *top1)


def _link_some(images: ImageFolder, count: int, seed: int, folder: Path) -> None:
    """Make class folders with links to some images of each class, chosen by the seed."""
    choice = random.Random(seed)
    for label, name in enumerate(images.classes):
        files = sorted(path for path, label_of in images.samples if label_of == label)
        if len(files) < count:
            raise DataError(f"{images.root}/{name}: has {len(files)} images; {count} are needed")
        (folder / name).mkdir(parents=True)
        for file in choice.sample(files, count):
            link = folder / name / os.path.relpath(file, images.root).replace(os.sep, " ")
            link.symlink_to(Path(file).resolve())

"""What fine-tuning gains over training from scratch on the same few images."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..data.reader import ImageDataset
from ..errors import DataError
from ..evaluate import evaluate_on
from ..hub.records import get_record
from ..load import load_trained
from ..training.finetune import choose_settings
from ..training.run import train
from ..training.settings import TrainingSettings


@dataclass(frozen=True)
class Comparison:
    """Top-1 on the test images, in percent, after as many steps on the same images."""

    seed: int
    finetuned: float
    from_scratch: float


def bench_finetune(
    name: str,
    dataset: ImageDataset,
    images_per_class: int = 50,
    seeds: int = 3,
) -> Iterator[Comparison]:
    """Fine-tune a trained model on a few images of each class, and train one from scratch on them.

    Both take the same images, chosen by the seed, with the same augmentation and in batches of the
    same size, for as many epochs, and hold out a fifth of them. Training from scratch takes the
    optimizer and the learning rate of `convmixer train`.

    Args:
        name: The trained model, `arch.tag`, or an arch alone for its first tag.
        dataset: Has training images and others, for test or validation.
        images_per_class: How many images of each class to train on, those held out included.
        seeds: How many times to do it.

    Raises:
        UnknownModelError: If no trained model has this name.
        DataError: If the dataset has no such splits, or too few images.
        TrainingError: As `train` does.
    """
    arch = get_record(name).arch
    dataset.get(dataset.test_split)
    for seed in range(seeds):
        some = _take_some(dataset, images_per_class, seed)
        tuned = choose_settings(name, some, seed=seed)
        untrained = TrainingSettings(arch)
        fresh = replace(
            tuned,
            model=arch,
            pretrained=False,
            layer_decay=1.0,
            optimizer=untrained.optimizer,
            learning_rate=untrained.learning_rate,
            covariance_init=untrained.covariance_init,
        )
        top1: list[float] = []
        with TemporaryDirectory() as scratch:
            for settings in (tuned, fresh):
                run = train(settings, some, Path(scratch, str(len(top1))))
                top1.append(evaluate_on(load_trained(run), dataset).top1)
        yield Comparison(seed, *top1)


def _take_some(dataset: ImageDataset, count: int, seed: int) -> ImageDataset:
    """Take some training images of each class, chosen by the seed, and no others."""
    images = dataset.get("train")
    choice = random.Random(seed)
    chosen: list[int] = []
    for number, name in enumerate(dataset.classes):
        indices = [i for i, label in enumerate(images.labels) if label == number]
        if len(indices) < count:
            remedy = "give at most that as --images-per-class"
            if len(indices) < 2:
                remedy = "add some, or remove the class"
            raise DataError(
                f"{dataset.source}: has {len(indices)} training images of {name}; {remedy}"
            )
        chosen += choice.sample(indices, count)
    return replace(dataset, splits={"train": images.select(chosen)})

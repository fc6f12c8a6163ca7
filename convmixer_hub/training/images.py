"""The training and validation images of a run: chosen, loaded into memory, served in batches."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from ..data.augment import TrainingImages, derive_seed
from ..data.images import eval_transform
from ..data.reader import ImageDataset, LabeledImages, read_images
from ..errors import DataError, TrainingError
from ..evaluate import serve
from .settings import TrainingSettings


class RunImages(NamedTuple):
    """The images of a run.

    Attributes:
        training: Those that it is trained on.
        validation: Those by which it measures itself after each epoch; there may be none.
        image_digest: Digest of the labels of all training images and of those for validation, and
            of their paths if they lie in class folders.
    """

    training: LabeledImages
    validation: LabeledImages
    image_digest: str


def choose_images(settings: TrainingSettings, dataset: ImageDataset) -> RunImages:
    """Choose the images of a run with these settings.

    Raises:
        DataError: If there are no training images, or so many cannot be held out.
        TrainingError: If more are to be used than are not held out.
    """
    images = dataset.get("train")
    kept, held_out = hold_out(dataset, settings.held_out, settings.seed)
    if settings.train_images > len(kept):
        raise TrainingError(
            f"train_images is {settings.train_images}: only {len(kept)} training images are not "
            f"held out; give at most {len(kept)}"
        )
    if settings.train_images:
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(kept), generator=generator)[: settings.train_images]
        kept = [kept[i] for i in sorted(order.tolist())]
    is_own = not held_out and "validation" in dataset.splits
    validation = dataset.get("validation") if is_own else images.select(held_out)
    return RunImages(images.select(kept), validation, _hash(images, validation))


def _hash(*parts: LabeledImages) -> str:
    text = repr([(list(part.labels), list(part.raw.files)) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hold_out(dataset: ImageDataset, size: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of the training images into kept and held-out ones, each class alike.

    Args:
        dataset: The dataset.
        size: Number of images to hold out; 0 for none.
        seed: The same seed gives the same split everywhere.

    Raises:
        DataError: If a class cannot have an image in each part, naming it.
    """
    labels = torch.tensor(dataset.get("train").labels)
    if not size:
        return list(range(len(labels))), []
    counts = labels.bincount(minlength=len(dataset.classes))
    present = counts > 0
    for name, count in zip(dataset.classes, counts.tolist()):
        if count == 1:
            raise DataError(
                f"{dataset.source}: the class {name} has only one image, which cannot be both "
                "trained on and held out; add some, or remove it"
            )
    least, most = int(present.sum()), len(labels) - int(present.sum())
    if not least <= size <= most:
        raise DataError(
            f"{dataset.source}: cannot hold out {size} of {len(labels)} training images in "
            f"{least} classes; give {least} to {most}"
        )
    # One of each class, then always of the class that is farthest from its share.
    chosen = present.long()
    for _ in range(size - least):
        missing = size * counts / len(labels) - chosen
        missing[chosen >= counts - 1] = -math.inf
        chosen[missing.argmax()] += 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    held_out = torch.cat(
        [order[shuffled == number][:count] for number, count in enumerate(chosen.tolist())]
    )
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    return kept.nonzero().flatten().tolist(), sorted(held_out.tolist())


def load_images(
    settings: TrainingSettings,
    images: RunImages,
    data_config: Mapping[str, Any],
    skip_damaged: bool,
) -> tuple[TrainingImages, DataLoader | None]:
    """Read the images of a run into memory.

    Args:
        settings: Those of the run.
        images: From `choose_images`.
        data_config: From `timm.data.resolve_input_data_config(model)`.
        skip_damaged: Leave out images that cannot be read, naming them on stderr.

    Returns:
        The training images, and those for validation, if there are any.

    Raises:
        DataError: If they cannot be read, or are fewer than one batch.
    """
    training = TrainingImages(
        images.training,
        data_config,
        settings.seed,
        settings.rand_augment,
        settings.flip,
        skip_damaged,
    )
    damaged = training.damaged
    validation: DataLoader | None = None
    if len(images.validation):
        tensors, labels, skipped = read_images(
            images.validation, eval_transform(data_config), skip_damaged
        )
        damaged = damaged + skipped
        validation = DataLoader(TensorDataset(tensors, labels), settings.batch_size)
    for line in damaged:
        tqdm.write(f"skipped: {line}", file=sys.stderr)
    if len(training) < settings.batch_size:
        remedy = "a smaller --batch-size" if len(training) > 1 else "more of them"
        raise DataError(
            f"{len(training)} training images are fewer than one batch of "
            f"{settings.batch_size}; give {remedy}"
        )
    return training, validation


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """The augmented batches of a run, by epoch and step."""

    def __init__(self, settings: TrainingSettings, images: TrainingImages) -> None:
        self.settings = settings
        self.images = images
        self.erase = RandomErasing(settings.random_erasing, mode="pixel", device="cpu")

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        settings, (epoch, step) = self.settings, place
        # The seed of each step is its own, so that a run that is resumed at any step computes what
        # it would have computed.
        random_seed(derive_seed(settings.seed, epoch, step) % 2**31)
        crop_size = settings.choose_crop_size(epoch, self.images.image_size)
        augments = settings.augments(epoch)
        images, labels = self.images.read_batch(
            epoch, step, settings.batch_size, crop_size, augments
        )
        return self.erase(images) if augments else images, labels


def serve_batches(
    settings: TrainingSettings, images: TrainingImages, epoch: int, step: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Serve the batches of a run, from a step of an epoch to the last of the last.

    Args:
        settings: Those of the run.
        images: Its training images.
        epoch: The first epoch, from 0.
        step: The first step in it, from 0.
        workers: Processes that augment images while this one trains; 0 to do it in turns. The
            batches are the same.

    Yields:
        Images `[batch_size, channels, *crop_size]` and their labels, on the CPU.

    Raises:
        DataError: If a process that augments images dies.
    """
    steps = len(images) // settings.batch_size
    first, last = epoch * steps + step, settings.epochs * steps
    loader = DataLoader(
        _Batches(settings, images),
        batch_size=None,
        sampler=[divmod(number, steps) for number in range(first, last)],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from serve(loader)

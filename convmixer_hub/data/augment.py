"""Training images: kept in memory, shuffled and augmented by the batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch.nn import functional as F
from torchvision import transforms

from ..errors import DataError
from .images import eval_transform
from .reader import LabeledImages, read_images

FLIPS = ("alternating", "random", "none")


def is_rand_augment(description: str) -> bool:
    """Return whether timm accepts this description of RandAugment; an empty one means none."""
    if not description:
        return True
    if not re.fullmatch(
        r"rand(-((m|n|p|mstd|mmax|inc)\d{1,3}(\.\d+)?|t(weights|3aw?)))*", description
    ):
        return False  # timm would pass over a part that it does not know
    try:
        _make_rand_augment(description)(Image.new("RGB", (32, 32)))
    except (AssertionError, ValueError, KeyError, TypeError):
        return False
    return True


def _make_rand_augment(description: str, channels: int = 3, image_size: int = 32) -> RandAugment:
    if channels not in (1, 3):
        raise DataError(
            f"timm's RandAugment takes images of 1 or 3 channels, the model {channels}; give "
            "--rand-augment ''"
        )
    gray = (128,) * channels  # what fills the corners of a turned image
    hparams = {"translate_const": image_size // 3, "img_mean": gray}
    transform = rand_augment_transform(description, hparams)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_keep_one_bit, operation.level_fn)
    return transform


def _keep_one_bit(choose_bits: Callable, level: float, hparams: Mapping[str, Any]) -> tuple[int]:
    # At its highest level timm leaves no bit of a color, which Pillow 13 refuses.
    return (max(1, choose_bits(level, hparams)[0]),)


class TrainingImages:
    """A training set in memory, served in shuffled and augmented batches.

    The usual augmentation of CIFAR: reflected borders, random crops, and mirror images. By default
    an image is mirrored every other epoch, starting with a random half of them, so that two epochs
    show all images both ways ("alternating flip", Jordan 2024, arXiv:2404.00498).

    Args:
        images: The images.
        data_config: From `timm.data.resolve_input_data_config(model)`; images of other sizes are
            scaled and cropped as in evaluation.
        seed: The same seed gives the same batches everywhere, but for the RandAugment, which takes
            its random numbers from `random` and `numpy.random`.
        rand_augment: timm's description of a RandAugment, such as `rand-m9-n2-mstd0.5-inc1`.
        flip: One of `FLIPS`.
        skip_damaged: Leave out images that cannot be read.

    Attributes:
        damaged: One line for each image that was left out.

    Raises:
        DataError: If images cannot be read, naming the first of them, or have another number of
            channels than RandAugment takes.
    """

    def __init__(
        self,
        images: LabeledImages,
        data_config: Mapping[str, Any],
        seed: int = 0,
        rand_augment: str = "",
        flip: str = "alternating",
        skip_damaged: bool = False,
    ) -> None:
        channels, *sides = data_config["input_size"]
        self.image_size = tuple(sides)
        self.seed = seed
        self.flip = flip
        self.rand_augment = (
            _make_rand_augment(rand_augment, channels, min(sides)) if rand_augment else None
        )
        # uint8 [count, channels, height, width]
        self.images, self.labels, self.damaged = read_images(
            images, eval_transform(data_config, normalize=False), skip_damaged
        )
        self.mean = torch.tensor(data_config["mean"]).view(-1, 1, 1)
        self.std = torch.tensor(data_config["std"]).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def read_batch(
        self,
        epoch: int,
        step: int,
        batch_size: int,
        crop_size: Sequence[int],
        augment: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one batch; an epoch has `len(self) // batch_size` of them.

        Args:
            epoch: Number of the epoch, from 0.
            step: Number of the batch in it, from 0.
            batch_size: Images per batch.
            crop_size: Height and width of the crops, in pixels; an eighth is padded on each side.
            augment: Apply the RandAugment.

        Returns:
            Images `[batch_size, channels, *crop_size]` and their labels `[batch_size]`.
        """
        # Which images, which part of each, and which of them mirrored.
        order = torch.randperm(len(self), generator=_generator(self.seed, epoch))
        batch = order[step * batch_size : (step + 1) * batch_size]
        borders = [crop // 8 for crop in crop_size]
        counts = [
            side + 2 * border - crop + 1
            for side, border, crop in zip(self.image_size, borders, crop_size)
        ]
        generator = _generator(self.seed, epoch, step)
        corners = torch.stack(
            [torch.randint(count, (batch_size, 1), generator=generator) for count in counts]
        )
        if self.flip == "random":
            mirrored = torch.rand(batch_size, generator=generator) < 0.5
        elif self.flip == "none":
            mirrored = torch.zeros(batch_size, dtype=torch.bool)
        else:
            mirrored_first = torch.rand(len(self), generator=_generator(self.seed)) < 0.5
            mirrored = mirrored_first[batch] ^ bool(epoch % 2)

        # Bytes: [batch_size, channels, *image_size].
        images = self.images[batch]
        if augment and self.rand_augment is not None:
            pictures = [transforms.functional.to_pil_image(image) for image in images]
            images = torch.stack(
                [transforms.functional.pil_to_tensor(self.rand_augment(p)) for p in pictures]
            )
        # Floats: [batch_size, channels, *crop_size].
        images = _crop(images, borders, crop_size, corners, mirrored)
        return (images / 255.0 - self.mean) / self.std, self.labels[batch]


def derive_seed(*numbers: int) -> int:
    """Mix numbers, such as a run's seed, an epoch and a step, into a seed of 63 bits."""
    # Their count goes in as well: a SeedSequence takes no note of zeros at the end.
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*numbers))


def _crop(
    images: torch.Tensor,
    borders: Sequence[int],
    size: Sequence[int],
    corners: torch.Tensor,
    mirrored: torch.Tensor,
) -> torch.Tensor:
    """Pad images by reflection, crop each at a corner of its own, and mirror some of them.

    Args:
        images: `[count, channels, height, width]`.
        borders: Rows and columns to pad on each side.
        size: Height and width of the crops.
        corners: First row and first column of each crop, `[2, count, 1]`.
        mirrored: Which crops to mirror, `[count]`.
    """
    (top, left), (height, width) = borders, size
    images = F.pad(images.float(), (left, left, top, top), mode="reflect")
    rows = corners[0] + torch.arange(height)  # [count, height]
    columns = corners[1] + torch.arange(width)  # [count, width]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    count, channels = images.shape[:2]
    positions = (
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    return images[positions]

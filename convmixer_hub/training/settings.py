"""What a training run computes: its settings, their defaults and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.augment import FLIPS, is_rand_augment
from ..errors import TrainingError
from ..zoo import IMAGE_SIZE

PRECISIONS = ("auto", "fp32", "bf16")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"fallback_lr_scale": 0.5},
    "adamw": {"betas": (0.9, 0.99)},
}


def _setting(
    default: Any,
    help: str,
    range: str = "",
    fits: Callable[[Any], bool] = lambda _: True,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a setting: options of commands, checks and error messages are made from this.

    Args:
        default: What `convmixer train` does. Of a setting that is added later, what was done
            before, so that older runs can be resumed.
        help: What it does, as a sentence that stands by itself.
        range: What it may be, for the error message.
        fits: Whether a value is in that range.
        choices: What it may be, if it is one of a few words.
    """
    if choices:
        range, fits = " or ".join(choices), lambda value: value in choices
    metadata = {"help": help, "range": range, "fits": fits, "choices": choices}
    return field(default=default, metadata=metadata)


_AT_LEAST_0 = ("at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = ("at least 1", lambda value: value >= 1)
_SHARE = ("from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_1 = ("at least 0 and below 1", lambda value: 0 <= value < 1)


def option_name(setting: str) -> str:
    """Name the option of the command line for a setting."""
    return "--lr" if setting == "learning_rate" else f"--{setting.replace('_', '-')}"


@dataclass(frozen=True)
class TrainingSettings:
    """What a run computes, given the data and the kind of device.

    The learning rate rises for a while, stays at its peak, and falls to 0 over the last epochs.

    Raises:
        TrainingError: If a setting is out of its range, naming it and what it may be.
    """

    model: str

    # Schedule
    epochs: int = _setting(40, "Passes over the training images.", *_AT_LEAST_1)
    final_share: float = _setting(
        0.75,
        "Share of the epochs in the decay phase, in which the learning rate falls to 0.",
        *_SHARE,
    )
    whole_share: float = _setting(
        0.73,
        "Share of the decay phase trained at full resolution; smaller crops before that save time.",
        *_SHARE,
    )
    warmup_epochs: float = _setting(1.0, "Epochs of linear warmup from 0.", *_AT_LEAST_0)
    small_crop_size: int = _setting(
        24,
        "Side of the smaller crops, in pixels, for images of 32 pixels; for others in proportion.",
        *_AT_LEAST_1,
    )
    first_crop_size: int = _setting(
        0,
        "Side of the crops in the first half of the epochs with smaller crops, likewise for images "
        "of 32 pixels; 0 for small_crop_size.",
        *_AT_LEAST_0,
    )

    # Optimizer
    batch_size: int = _setting(128, "Images per step.", "at least 2", lambda value: value >= 2)
    optimizer: str = _setting("muon", "Optimizer, by its name in timm.", choices=tuple(OPTIMIZERS))
    # Muon takes the peak for matrices of at least 4x4 (1x1 convolutions, the head, and the stem
    # where patches are larger than a pixel), its AdamW for the rest takes half of it.
    learning_rate: float = _setting(
        0.02, "Peak of the learning rate.", "above 0", lambda value: 0 < value < math.inf
    )
    weight_decay: float = _setting(
        0.05, "Weight decay of convolutions and linear maps.", *_AT_LEAST_0
    )
    label_smoothing: float = _setting(
        0.1, "Share of the target spread over all classes.", *_BELOW_1
    )
    clip_grad: float = _setting(
        1.0, "Largest norm of the gradient.", "above 0", lambda value: value > 0
    )

    # Augmentation
    rand_augment: str = _setting(
        "rand-m9-n1-mstd0.5-inc1",
        "timm's description of a RandAugment, such as rand-m9-n2-mstd0.5-inc1.",
        "one like rand-m9-n2-inc1",
        is_rand_augment,
    )
    random_erasing: float = _setting(
        0.1, "Probability that a rectangle of an image is filled with noise.", *_SHARE
    )
    mixup: float = _setting(0.0, "Alpha of mixup; 0 for none.", *_AT_LEAST_0)
    cutmix: float = _setting(
        0.0, "Alpha of cutmix; 0 for none. With both, a batch gets one of them.", *_AT_LEAST_0
    )
    late_augmentation: bool = _setting(
        True,
        "Apply RandAugment, erasing, mixup and cutmix only in the decay phase.",
    )

    # Averaging and data
    ema_decay: float = _setting(
        0.0,
        "Decay of the exponential moving average (EMA); its weights are saved. 0 for none.",
        *_BELOW_1,
    )
    held_out: int = _setting(
        0,
        "Training images kept back to measure accuracy after each epoch; with 0, the dataset's "
        "validation images serve, if there are any.",
        *_AT_LEAST_0,
    )
    train_images: int = _setting(
        0,
        "Number of training images to use; 0 for all that are not held out.",
        *_AT_LEAST_0,
    )
    img_size: int = _setting(
        0,
        "Side of the images that the model takes, in pixels; 0 keeps that of the model: 32, unless "
        "it was trained with another.",
        "0 or at least 8",
        lambda value: value == 0 or value >= 8,
    )
    flip: str = _setting(
        "alternating",
        "Mirror an image every other epoch, at random, or never, as for letters.",
        choices=FLIPS,
    )

    # Start
    covariance_init: bool = _setting(
        True,
        "Initialize depthwise kernels with the covariance initialization of arXiv:2210.03651; not "
        "with pretrained weights.",
    )
    pretrained: bool = _setting(
        False,
        "Start from the trained weights of MODEL, which may then be a folder as well; with a new "
        "head where the classes differ.",
    )

    # Distillation
    teacher: str = _setting(
        "",
        "Trained model, by name or folder, whose soft targets are learned beside the labels "
        "(distillation); the logits of several, with commas between, are averaged.",
        "names or folders of trained models, with commas between",
        lambda names: not names or all(name.strip() for name in names.split(",")),
    )

    # Fine-tuning
    layer_decay: float = _setting(
        1.0,
        "Factor of the learning rate from one layer to the one before it.",
        "above 0 and at most 1",
        lambda value: 0 < value <= 1,
    )
    freeze_batch_norm: bool = _setting(False, "Keep BatchNorm's means and variances as they are.")

    # Precision and seed
    precision: str = _setting(
        "auto",
        "Precision of a step; bf16 uses autocast, auto takes the faster one when the run begins.",
        choices=PRECISIONS,
    )
    seed: int = _setting(
        0,
        "Seed of the initial weights, of the choice and order of images, and of their "
        "augmentation.",
        "from 0 to 2147483647",
        lambda value: 0 <= value < 2**31,
    )

    def __post_init__(self) -> None:
        for setting in fields(self)[1:]:  # all but the model
            value = getattr(self, setting.name)
            if not setting.metadata["fits"](value):
                raise TrainingError(
                    f"{setting.name} is {value}: must be {setting.metadata['range']}"
                )
        if self.pretrained:
            object.__setattr__(self, "covariance_init", False)  # the class is frozen

    @property
    def teachers(self) -> list[str]:
        """Names of the models that are learned from."""
        return [name.strip() for name in self.teacher.split(",")] if self.teacher else []

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def decay_epochs(self) -> int:
        """Number of epochs in which the learning rate falls."""
        return max(1, round(self.final_share * self.epochs))

    @property
    def cropped_epochs(self) -> int:
        """Number of epochs before those at full resolution."""
        return self.epochs - round(self.whole_share * self.decay_epochs)

    def choose_crop_size(self, epoch: int, image_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return height and width of the crops in an epoch, counted from 0.

        `image_size` is the height and width of the images.
        """
        if epoch >= self.cropped_epochs:
            return image_size
        is_first_half = epoch < self.cropped_epochs // 2
        crop_size = (is_first_half and self.first_crop_size) or self.small_crop_size
        return tuple(side * crop_size // IMAGE_SIZE for side in image_size)

    def check_crops(self, side: int, patch_size: int) -> None:
        """Refuse crops that do not fit a model.

        Args:
            side: The shorter side of the images that the model takes.
            patch_size: Side of its patches.

        Raises:
            TrainingError: If they are larger than the images, or smaller than a patch.
        """
        first = self.first_crop_size or self.small_crop_size
        least = math.ceil(patch_size * IMAGE_SIZE / side)
        if self.cropped_epochs and not least <= first <= self.small_crop_size <= IMAGE_SIZE:
            raise TrainingError(
                f"first_crop_size is {first}, small_crop_size {self.small_crop_size}: must be "
                f"from {least}, one patch, to {IMAGE_SIZE}, the whole image (of {side} pixels, in "
                "proportion), the first not above the second"
            )

    def augments(self, epoch: int) -> bool:
        """Return whether RandAugment, erasing, mixup and cutmix are applied in an epoch, from 0."""
        return epoch >= self.epochs - self.decay_epochs or not self.late_augmentation

    def learning_rate_factor(self, epochs_done: float) -> float:
        """Return the learning rate as a share of its peak."""
        rise = epochs_done / self.warmup_epochs if self.warmup_epochs else 1.0
        fall = (self.epochs - epochs_done) / self.decay_epochs
        return min(rise, 1.0, fall)

"""What a training run computes: its settings, their limits, and the recipe of `convmixer train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..data.augment import FLIPS, is_rand_augment
from ..errors import TrainingError

PRECISIONS = ("auto", "fp32", "bf16")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"fallback_lr_scale": 0.5},
    "adamw": {"betas": (0.9, 0.99)},
}


# What `convmixer train` computes if nothing else is asked for, where that differs from the plain
# defaults below.
RECIPE: dict[str, Any] = {
    "epochs": 40,
    "final_share": 0.75,
    "whole_share": 0.73,
    "rand_augment": "rand-m9-n1-mstd0.5-inc1",
    "random_erasing": 0.1,
    "late_augmentation": True,
    "covariance_init": True,
}


@dataclass(frozen=True)
class TrainingSettings:
    """What a run computes, given the data and the kind of device.

    The learning rate rises for a while, stays at its peak, and falls to 0 over the last epochs. A
    setting that is new in a version has a default that changes nothing, so that older runs can be
    gone on with; what is better than that belongs into `RECIPE`.

    Attributes:
        model: Name of an arch of this package.
        epochs: Passes over the training images.
        final_share: Share of the epochs (rounded, at least one epoch) at the end in which the
            learning rate falls.
        whole_share: Share of those epochs (rounded) at the end in which images are seen whole;
            before that, smaller crops save time.
        warmup_epochs: In the first so many, the learning rate rises from 0.
        small_crop_size: Side of the smaller crops, in pixels.
        batch_size: Images a step, over all processes.
        optimizer: `muon` or `adamw`, as timm has them.
        learning_rate: The peak. Muon takes it for matrices of at least 4x4 (1x1 convolutions, the
            head, and the stem where patches are larger than a pixel), its AdamW for the rest takes
            half of it.
        weight_decay: On the weights of convolutions and linear maps alone.
        label_smoothing: Share of the target spread over all classes.
        clip_grad: Largest norm of the gradient.
        rand_augment: timm's description of a RandAugment, such as `rand-m9-n2-mstd0.5-inc1`.
        random_erasing: Probability that a rectangle of an image is filled with noise.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none. With both, a batch gets one of them.
        late_augmentation: RandAugment, erasing, mixup and cutmix wait until the learning rate
            falls.
        ema_decay: If above 0, the run gives the exponential moving average of the weights.
        held_out: Training images kept back to measure accuracy after each epoch.
        train_images: Train on so many of the images that are not held out; 0 for all. Damaged
            ones that are skipped count.
        flip: `alternating` mirrors an image every other epoch, `random` by chance.
        covariance_init: Draw the depth-wise kernels as `kernels.draw_kernels_by_depth` does.
        pretrained: Start from the trained weights of `model`, which may then be a folder as well,
            with a new head where the classes differ.
        layer_decay: Factor of the learning rate from one layer to the one before it.
        freeze_batch_norm: Keep BatchNorm's means and variances as they are.
        keep_best: The run gives the weights of the epoch that did best on the validation images:
            those of the data set, or else those held out.
        precision: `fp32`, `bf16` (autocast), or `auto`: whichever is faster where the run begins,
            see `cpu.choose_dtype`.
        seed: Of the initial weights, the order of the images and their augmentation.
    """

    model: str
    epochs: int = 25
    final_share: float = 0.28
    whole_share: float = 1.0
    warmup_epochs: float = 1.0
    small_crop_size: int = 24
    batch_size: int = 128
    optimizer: str = "muon"
    learning_rate: float = 0.02
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad: float = 1.0
    rand_augment: str = ""
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    late_augmentation: bool = False
    ema_decay: float = 0.0
    held_out: int = 0
    train_images: int = 0
    flip: str = "alternating"
    covariance_init: bool = False
    pretrained: bool = False
    layer_decay: float = 1.0
    freeze_batch_norm: bool = False
    keep_best: bool = False
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            TrainingError: Naming the setting and what it may be.
        """
        for name, fits, range_ in [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("final_share", 0 <= self.final_share <= 1, "0 to 1"),
            ("whole_share", 0 <= self.whole_share <= 1, "0 to 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "at least 0"),
            ("small_crop_size", self.small_crop_size >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2"),
            ("optimizer", self.optimizer in OPTIMIZERS, " or ".join(sorted(OPTIMIZERS))),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("clip_grad", self.clip_grad > 0, "above 0"),
            ("rand_augment", is_rand_augment(self.rand_augment), "one such as rand-m9-n2-inc1"),
            ("random_erasing", 0 <= self.random_erasing <= 1, "0 to 1"),
            ("mixup", 0 <= self.mixup < math.inf, "at least 0"),
            ("cutmix", 0 <= self.cutmix < math.inf, "at least 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1"),
            ("held_out", self.held_out >= 0, "at least 0"),
            ("train_images", self.train_images >= 0, "at least 0"),
            ("flip", self.flip in FLIPS, " or ".join(FLIPS)),
            (
                "covariance_init",
                not (self.covariance_init and self.pretrained),
                "False for pretrained weights",
            ),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1"),
            ("precision", self.precision in PRECISIONS, ", ".join(PRECISIONS)),
            ("seed", 0 <= self.seed < 2**31, "0 to 2147483647"),
        ]:
            if not fits:
                raise TrainingError(f"{name} is {getattr(self, name)}: give {range_}")

    @property
    def mixes(self) -> bool:
        """Tell whether images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def final_epochs(self) -> int:
        """Number of epochs in which the learning rate falls."""
        return max(1, round(self.final_share * self.epochs))

    @property
    def peak_epochs(self) -> int:
        """Number of epochs before the learning rate falls."""
        return self.epochs - self.final_epochs

    @property
    def whole_epochs(self) -> int:
        """Number of epochs in which images are seen whole."""
        return round(self.whole_share * self.final_epochs)

    def shows_whole_images(self, epoch: int) -> bool:
        """Tell whether images are seen whole in an epoch, counted from 0."""
        return epoch >= self.epochs - self.whole_epochs

    def augments(self, epoch: int) -> bool:
        """Tell whether RandAugment, erasing, mixup and cutmix are applied in an epoch, from 0."""
        return epoch >= self.peak_epochs or not self.late_augmentation

    def learning_rate_factor(self, epochs_done: float) -> float:
        """Give the learning rate as a share of its peak."""
        rise = epochs_done / self.warmup_epochs if self.warmup_epochs else 1.0
        fall = (self.epochs - epochs_done) / self.final_epochs
        return min(rise, 1.0, fall)

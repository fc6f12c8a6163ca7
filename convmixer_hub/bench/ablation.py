"""What choices in training are worth: short runs that differ from a plain one in one choice.

All are measured on held-out training images, the same ones for the same seed, so that no test image
is spent on a choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.reader import ImageDataset
from ..errors import TrainingError
from ..training.folder import METRICS_FILE, read_metrics
from ..training.run import train
from ..training.settings import TrainingSettings

UNCHANGED = "plain"

# Settings other than the plain defaults, by a name that is also that of the run's folder.
CHANGES: dict[str, dict[str, Any]] = {
    UNCHANGED: {},
    "another-seed": {"seed": 1},  # what no change at all may differ by
    "covariance-init": {"covariance_init": True},
    "random-flip": {"flip": "random"},
    "whole-images": {"small_crop_size": 32},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01},
    "cutmix": {"cutmix": 0.5},
    "rand-augment": {"rand_augment": "rand-m9-n2-mstd0.5-inc1"},
    "random-erasing": {"random_erasing": 0.25},
    "ema": {"ema_decay": 0.998},
    "lr-doubled": {"learning_rate": 0.04},
    "lr-halved": {"learning_rate": 0.01},
    "batch-size-256": {"batch_size": 256},
    "no-label-smoothing": {"label_smoothing": 0.0},
    "weight-decay-0.01": {"weight_decay": 0.01},
    "mixup": {"mixup": 0.5},
    "falling-rate": {"final_share": 1.0},  # from the start, so that all images are whole, too
}


@dataclass(frozen=True)
class Outcome:
    """What a run with one change gave.

    Attributes:
        change: Key of `CHANGES`.
        top1: Top-1 on the held-out images after the last epoch, in percent.
        seconds: Time spent in its epochs.
    """

    change: str
    top1: float
    seconds: float


def compare_changes(
    model: str,
    dataset: ImageDataset,
    output: str | Path,
    changes: Sequence[str] = tuple(CHANGES),
    **common: Any,
) -> Iterator[Outcome]:
    """Train with plain settings and with one change at a time, from the same seed if not that.

    Args:
        model: Name of an arch of this package.
        dataset: Its test images are not looked at.
        output: Folder for the run folders; runs that are in it are resumed.
        changes: Keys of `CHANGES`.
        common: Settings of all the runs, such as `epochs`, other than those of `changes`;
            `held_out` is at least 1.

    Yields:
        What each run gave, when it is finished.

    Raises:
        UnknownModelError: If no arch of this package has this name.
        TrainingError: As `train` does, and if nothing is held out.
        DataError: As `train` does.
        CheckpointError: If the `metrics.csv` of a run was damaged.
    """
    if not common.get("held_out"):
        raise TrainingError("held_out is 0: must be at least 1, for the runs to be compared on")
    for change in changes:
        settings = TrainingSettings(model, **(common | CHANGES[change]))
        run = train(settings, dataset, Path(output) / change)
        metrics = read_metrics(run / METRICS_FILE)
        yield Outcome(change, metrics["held_out_top1"][-1], sum(metrics["seconds"]))

"""How good a model is on labeled images: accuracy, confusions, calibration."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data.images import eval_transform
from .data.reader import ImageDataset, LabeledImages
from .errors import DataError
from .machine import find_device
from .model.config import check_classifies, get_label_names
from .model.inference import WORTH_COMPILING, prepare_if_possible

CALIBRATION_BINS = 15
MIN_MISTAKES = 10  # fewer do not determine a temperature


@dataclass(frozen=True)
class Evaluation:
    """How many of the images the model got right."""

    correct: int
    count: int

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in percent."""
        return 100.0 * self.correct / self.count


def count_correct(logits: Tensor, labels: Tensor) -> Evaluation:
    """Compare the largest of logits `[count, num_classes]` with labels `[count]`."""
    return Evaluation(int((logits.argmax(dim=1) == labels).sum()), len(labels))


def prepare_test_images(model: nn.Module, dataset: ImageDataset) -> LabeledImages:
    """Prepare the test images of a dataset, and the numbers of their classes, for a model.

    Args:
        model: From `timm.create_model`.
        dataset: Its classes are matched with the model's by name, which may be a number. A model
            whose classes have no names must have as many, unless they are numbers.

    Returns:
        Its test images, or else those for validation, as the model's config says.

    Raises:
        CheckpointError: If the model has fewer than two classes.
        DataError: If there are none, or it is not clear which of the model's classes theirs are.
    """
    check_classifies(model)
    images = dataset.get(dataset.test_split)
    known = get_label_names(model)
    if not known and all(re.fullmatch(r"0|[1-9]\d*", name) for name in dataset.classes):
        if images.raw.files and cast("int", model.num_classes) > 10:
            raise DataError(
                f"{dataset.source}: its class folders are called by numbers, and the model does "
                "not name its classes, so that 10 may come after 9 or after 1; call the folders "
                "00, 01, … in the order of the model's classes"
            )
        known = [str(number) for number in range(cast("int", model.num_classes))]
    if not known and len(dataset.classes) == model.num_classes:
        known = dataset.classes
    unknown = [name for name in dataset.classes if name not in (known or [])]
    if unknown:
        raise DataError(
            f"{dataset.source}: has the class {unknown[0]}, but the model knows "
            f"{', '.join(known) if known else f'{model.num_classes} classes without names'}; "
            "evaluate it on data with the same classes"
        )
    assert known
    numbers = [known.index(name) for name in dataset.classes]
    transform = eval_transform(resolve_input_data_config(model))
    labels = [numbers[label] for label in images.labels]
    return replace(images, labels=labels, transform=transform)


def evaluate_on(
    model: nn.Module, dataset: ImageDataset, batch_size: int = 64, workers: int = 0
) -> Evaluation:
    """Measure a model on the test images of a dataset, prepared as the model's config says.

    Args:
        model: From `timm.create_model`; left in evaluation mode, on the GPU if there is one.
        dataset: See `prepare_test_images`.
        batch_size: Images at a time; changes the speed, not the result.
        workers: Processes that read images.

    Raises:
        CheckpointError: As `prepare_test_images` does.
        DataError: As `prepare_test_images` does, and if an image cannot be read.
    """
    model = model.to(find_device())
    return count_correct(*collect_test_logits(model, dataset, batch_size, workers))


def collect_test_logits(
    model: nn.Module, dataset: ImageDataset, batch_size: int = 64, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Collect the logits of the test images, on the device that the model is on.

    Returns:
        As `collect_logits` does.
    """
    images = prepare_test_images(model, dataset)
    network = prepare_if_possible(model.eval(), cpp=len(images) >= WORTH_COMPILING)
    return collect_logits(network, DataLoader(images, batch_size, num_workers=workers))


@torch.inference_mode()
def collect_logits(model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Collect the logits of all images.

    Args:
        model: Maps images to logits; left in evaluation mode.
        loader: Serves `(images, labels)`.

    Returns:
        Logits `[count, num_classes]` in double precision, and labels `[count]`.

    Raises:
        DataError: If an image cannot be read, or a process that reads them fails.
    """
    model.eval()
    like = next(model.parameters())
    logits, labels = [], []
    for images, numbers in tqdm(serve(loader), "evaluate", len(loader), leave=False, disable=None):
        logits.append(model(images.to(like.device, like.dtype)).cpu())
        labels.append(numbers)
    return torch.cat(logits).double(), torch.cat(labels)


def serve(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Serve batches, and tell in one line what goes wrong in a process that reads images.

    Raises:
        DataError: If an image cannot be read, or such a process dies.
    """
    try:
        yield from loader
    except DataError as error:
        _, _, line = str(error).strip().rpartition("DataError: ")
        raise DataError(line) from None
    except (RuntimeError, OSError) as error:
        if not loader.num_workers:
            raise
        *_, reason = str(error).strip().splitlines()  # after a traceback of that process
        raise DataError(
            f"the process that reads images failed ({reason}); give more shared memory (docker run "
            "--shm-size 1g), or, in evaluate, --workers 0"
        ) from None


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find what to divide logits by so that their softmax says how often they are right.

    It is the temperature with the smallest cross-entropy, between 1/4 and 4 (Guo et al. 2017,
    arXiv:1706.04599). Which class comes first does not change.

    Args:
        logits: `[count, num_classes]`, of images that the model was not trained on.
        labels: `[count]`.

    Returns:
        The temperature; 1 if fewer than `MIN_MISTAKES` images are wrong, which do not tell how
        often the others will be.
    """
    if (logits.argmax(dim=1) != labels).sum() < MIN_MISTAKES:
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = logits.double() / math.exp(log_temperature)
        return F.cross_entropy(scaled, labels).item()

    low, high = -math.log(4), math.log(4)
    while high - low > 1e-4:  # the loss falls to its minimum and rises from there
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return math.exp((low + high) / 2)


def count_confusions(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Make the confusion matrix `[num_classes, num_classes]`: label (row), prediction (column)."""
    num_classes = probabilities.shape[1]
    pairs = labels * num_classes + probabilities.argmax(dim=1)
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Calibration:
    """Confidence (the probability of the top-1 prediction) beside accuracy, in bins of equal width.

    Attributes:
        counts: Images in each bin.
        confidence: Mean confidence in each bin, 0 where there is no image.
        accuracy: Share of correct predictions in each bin, 0 where there is no image.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def mean_confidence(self) -> float:
        """Mean confidence over all images."""
        return float((self.counts * self.confidence).sum() / self.counts.sum())

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy (0 to 1)."""
        distances = (self.confidence - self.accuracy).abs()
        return float((self.counts * distances).sum() / self.counts.sum())


def measure_calibration(probabilities: Tensor, labels: Tensor) -> Calibration:
    """Compare the confidence of probabilities `[count, num_classes]` with their accuracy.

    A probability on the border of two bins belongs to the lower one.
    """
    bins = CALIBRATION_BINS
    confidence, predicted = probabilities.max(dim=1)
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = bin_of.bincount(minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return bin_of.bincount(weights=values, minlength=bins) / counts.clamp(min=1)

    return Calibration(counts, mean(confidence), mean((predicted == labels).double()))

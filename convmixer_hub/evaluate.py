"""Top-1 accuracy of a model on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import eval_transform, load_images, make_loader, read_batches
from .errors import DataError
from .zoo import get_label_names


@dataclass(frozen=True)
class Evaluation:
    """How many of the images the model got right."""

    correct: int
    count: int

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in percent."""
        return 100.0 * self.correct / self.count


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader, device: torch.device, progress: bool = True
) -> Evaluation:
    """Compare the model's first choice with the label of every image.

    Args:
        model: Maps images to logits; left in evaluation mode.
        loader: Serves `(images, labels)`.
        device: Where the model is.
        progress: Show a progress bar, if there is a terminal.
    """
    model.eval()
    correct = count = 0
    batches = read_batches(loader)
    for images, labels in tqdm(
        batches, desc="evaluate", total=len(loader), leave=False, disable=None if progress else True
    ):
        predicted = model(images.to(device)).argmax(dim=1)
        correct += int((predicted == labels.to(device)).sum())
        count += len(labels)
    return Evaluation(correct, count)


def evaluate_on(
    model: nn.Module, data_dir: str | Path, batch_size: int = 64, workers: int = 0
) -> Evaluation:
    """Measure a model on the test images of a data set, prepared as the model's config says.

    Args:
        model: From `timm.create_model`.
        data_dir: Folder of the data set, see `data.load_images`.
        batch_size: Images at a time; changes the speed, not the result.
        workers: Processes that read images.

    Raises:
        DataError: If the data cannot be read, or its classes are not the model's.
    """
    transform = eval_transform(resolve_model_data_config(model))
    images = load_images(data_dir, "test", transform)
    known = get_label_names(model)
    if len(images.classes) != model.num_classes or known not in (None, list(images.classes)):
        raise DataError(
            f"{data_dir}: has the classes {', '.join(images.classes)}, but the model knows "
            f"{', '.join(known) if known else model.num_classes}; "
            "evaluate it on data with the same classes in the same order"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate(model.to(device), make_loader(images, batch_size, workers), device)

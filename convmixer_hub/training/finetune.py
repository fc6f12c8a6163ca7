"""Fine-tuning: a trained model learns to tell apart other classes of images.

It is a run of `train` that starts from trained weights, with settings that suit few images, and
pictures of what the model still gets wrong.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

from ..checkpoints.resolve import resolve
from ..data.images import eval_transform
from ..data.reader import ImageDataset, read_images
from ..errors import TrainingError
from ..evaluate import Evaluation, collect_logits, count_confusions
from ..figures import check_matplotlib, draw_confusion, draw_predictions
from ..files import write_file
from ..load import load_trained
from ..predict import name_best
from .images import choose_images
from .run import train
from .settings import TrainingSettings

CONFUSION_FILE = "validation_confusion.png"
MISTAKES_FILE = "mistakes.png"
MISTAKES_SHOWN = 20
FEW_IMAGES = 5000
MIN_STEPS = 200


def choose_settings(name: str, dataset: ImageDataset, **changes: Any) -> TrainingSettings:
    """Choose how to fine-tune, for the data at hand.

    Args:
        name: The trained model, as in `load.load_trained`.
        dataset: What to fine-tune on.
        changes: Settings that override those chosen here; None overrides nothing. By default a
            fifth of the training images is held out, if there are none for validation.

    Raises:
        DataError: If there are no training images.
        TrainingError: If a setting is out of its range, or there is nothing to measure on.
        UnknownModelError: If there is no such model.
        CheckpointError: If it cannot be found or downloaded, or is a file alone.
    """
    source = resolve(name)
    source.check_is_whole()
    is_folder = source.name.startswith("local-dir:")
    model = str(source.folder.absolute()) if is_folder else source.name
    changes = {setting: value for setting, value in changes.items() if value is not None}
    labels = dataset.get("train").labels
    count = len(labels)
    fifth = 0 if "validation" in dataset.splits else max(len(set(labels)), round(count / 5))
    held_out = changes.setdefault("held_out", fifth)
    if not held_out and "validation" not in dataset.splits:
        raise TrainingError(
            f"{dataset.source}: has no validation images to measure the model on; give --held-out"
        )
    kept = max(1, count - held_out)
    few = kept < FEW_IMAGES
    # Even, as mixup and cutmix take pairs.
    batch_size = changes.setdefault("batch_size", max(2, min(50, kept // 4) // 2 * 2))
    settings: dict[str, Any] = {
        "epochs": max(10, math.ceil(MIN_STEPS / max(1, kept // max(1, batch_size)))),
        "final_share": 1.0,  # the learning rate falls from the start, and images are seen whole
        "whole_share": 1.0,
        "optimizer": "adamw",
        "learning_rate": 0.005,
        "layer_decay": 0.8,
        "rand_augment": "rand-m5-n1-mstd0.5-inc1" if few else "",
        "random_erasing": 0.25 if few else 0.0,
        "late_augmentation": False,
    }
    return TrainingSettings(model, **settings | changes, pretrained=True)


def finetune(
    settings: TrainingSettings,
    dataset: ImageDataset,
    output: str | Path,
    skip_damaged: bool = False,
) -> Evaluation:
    """Fine-tune a trained model, or resume it if it was interrupted.

    Besides what `train` writes, the run folder gets `validation_confusion.png`, the confusion
    matrix of the validation images, and `mistakes.png`, the most confident mistakes.

    Args:
        settings: From `choose_settings`.
        dataset: Its test images are not looked at.
        output: The run folder. If it holds a run with the same settings, that run is resumed.
        skip_damaged: Leave out images that cannot be read, naming them on stderr.

    Returns:
        How good the model is on the images for validation.

    Raises:
        UnknownModelError: If there is no such model.
        CheckpointError: If its weights cannot be found or downloaded, are damaged or do not fit.
        TrainingError: As `train` does.
        DataError: As `train` does, and if matplotlib is not installed.
    """
    check_matplotlib()
    folder = train(settings, dataset, output, skip_damaged)
    model = load_trained(folder)
    config = resolve_input_data_config(model)
    images, labels, _ = read_images(
        choose_images(settings, dataset).validation,
        eval_transform(config),
        skip_damaged,
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    logits, _ = collect_logits(model, loader)
    probabilities = logits.softmax(dim=1)
    confusion = count_confusions(probabilities, labels)
    write_file(folder / CONFUSION_FILE, draw_confusion(confusion, dataset.classes))
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pictures = (images * std + mean).clamp(0, 1)
    _draw_mistakes(folder / MISTAKES_FILE, pictures, labels, probabilities, dataset.classes)
    return Evaluation(int(confusion.trace()), len(labels))


def _draw_mistakes(
    file: Path, images: Tensor, labels: Tensor, probabilities: Tensor, classes: list[str]
) -> None:
    """Draw the most confident mistakes to a PNG, if there are any.

    Images are `[count, channels, height, width]`, 0 to 1, probabilities `[count, num_classes]`.
    """
    confidence, predicted = probabilities.max(dim=1)
    order = confidence.argsort(descending=True)
    wrong = order[(predicted != labels)[order]][:MISTAKES_SHOWN]
    if not len(wrong):
        return
    titles = [classes[label] for label in labels[wrong].tolist()]
    predictions = list(name_best(probabilities[wrong], classes, top_k=3))
    pictures = [to_pil_image(image).convert("RGB") for image in images[wrong]]
    write_file(file, draw_predictions(pictures, titles, predictions))

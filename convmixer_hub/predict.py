"""What a model sees in images: the likeliest classes, in words or as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from .data import eval_transform
from .errors import DataError
from .zoo import get_label_names


@dataclass(frozen=True)
class Prediction:
    """One class and how likely the model holds it to be, between 0 and 1."""

    label: str
    probability: float


@torch.inference_mode()
def predict(
    model: nn.Module, images: Sequence[Image.Image], top_k: int = 3
) -> list[list[Prediction]]:
    """Classify images of any size; a model that does not name its classes gives their numbers.

    Args:
        model: From `timm.create_model`; left in evaluation mode.
        images: RGB images.
        top_k: How many classes to give for each image, the likeliest first; all if there are fewer.
    """
    transform = eval_transform(resolve_model_data_config(model))
    names = get_label_names(model)
    model.eval()
    predictions = []
    for image in images:
        probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]
        values, indices = probabilities.topk(min(top_k, len(probabilities)))
        predictions.append(
            [
                Prediction(names[i] if names else str(i), probability)
                for i, probability in zip(indices.tolist(), values.tolist())
            ]
        )
    return predictions


def draw_predictions(
    images: Sequence[Image.Image],
    titles: Sequence[str],
    predictions: Sequence[Sequence[Prediction]],
    file: Path,
) -> None:
    """Draw images with bars for their likeliest classes.

    Args:
        images: RGB images.
        titles: One above each image.
        predictions: As `predict` gives them.
        file: PNG, SVG or PDF to write.

    Raises:
        DataError: If matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("drawing needs matplotlib: pip install 'convmixer-hub[figures]'") from None
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, title, classes) in enumerate(zip(images, titles, predictions)):
        picture = axes[2 * (i // columns), i % columns]
        picture.imshow(image, interpolation="nearest")
        picture.set_title(title, fontsize=10)
        bars = axes[2 * (i // columns) + 1, i % columns]
        heights = range(len(classes))
        bars.barh(heights, [c.probability for c in classes], color="#9ecae1")
        for height, c in zip(heights, classes):
            bars.text(0.02, height, f"{c.label} {c.probability:.0%}", va="center", fontsize=9)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
    try:
        figure.savefig(file, dpi=100)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be written ({error}); name a PNG file") from None

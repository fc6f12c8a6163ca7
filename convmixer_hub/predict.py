"""What a model sees in images: the most likely classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import resolve_input_data_config
from torch import nn

from .data.images import eval_transform, to_rgb
from .model.config import check_classifies, get_label_names


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
        images: Images of any mode, see `data.images.to_rgb`.
        top_k: Number of classes to give for each image, the most likely first.

    Raises:
        CheckpointError: If the model has fewer than two classes.
        DataError: If an image has negative gray values, or the model takes what no image has.
    """
    check_classifies(model)
    transform = eval_transform(resolve_input_data_config(model))
    parameter = next(model.parameters())
    names = get_label_names(model)
    model.eval()
    predictions = []
    for image in images:
        batch = transform(to_rgb(image)).unsqueeze(0).to(parameter.device, parameter.dtype)
        probabilities = model(batch).float().softmax(dim=1)[0]
        values, indices = probabilities.topk(min(top_k, len(probabilities)))
        predictions.append(
            [
                Prediction(names[i] if names else str(i), probability)
                for i, probability in zip(indices.tolist(), values.tolist())
            ]
        )
    return predictions

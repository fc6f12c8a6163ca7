"""What a model sees in images: the most likely classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from timm.data import resolve_input_data_config
from torch import Tensor, nn

from .data.images import eval_transform, to_rgb
from .model.config import check_classifies, get_label_names
from .model.inference import prepare_if_possible

WORTH_PREPARING = 8  # images: for fewer, preparing a model takes longer than it saves


@dataclass(frozen=True)
class Prediction:
    """One class and how likely the model holds it to be, between 0 and 1."""

    label: str
    probability: float


def predict(
    model: nn.Module, images: Iterable[Image.Image], top_k: int = 3, batch_size: int = 64
) -> Iterator[list[Prediction]]:
    """Classify images of any size; a model that does not name its classes gives their numbers.

    Args:
        model: From `timm.create_model`, or `prepare_for_inference`; left in evaluation mode.
        images: Images of any mode, see `data.images.to_rgb`.
        top_k: Number of classes to give for each image, the most likely first.
        batch_size: Number of images that are kept in memory at once.

    Yields:
        The predictions for one image after another.

    Raises:
        CheckpointError: If the model has fewer than two classes.
        DataError: If an image has negative gray values, or the model takes what no image has.
    """
    check_classifies(model)
    transform = eval_transform(resolve_input_data_config(model))
    parameter = next(model.parameters())
    names = get_label_names(model)
    network = model.eval()
    tensors = (transform(to_rgb(image)) for image in images)
    while batch := list(islice(tensors, batch_size)):
        if network is model and len(batch) >= WORTH_PREPARING:
            network = prepare_if_possible(model)
        with torch.inference_mode():
            logits = network(torch.stack(batch).to(parameter.device, parameter.dtype))
            probabilities = logits.float().softmax(dim=1)
        yield from name_best(probabilities, names, top_k)


def name_best(
    probabilities: Tensor, names: Sequence[str] | None, top_k: int
) -> Iterator[list[Prediction]]:
    """Name the most likely classes, the first one first, for each row of `[count, num_classes]`."""
    for values, indices in zip(*probabilities.topk(min(top_k, probabilities.shape[1]))):
        yield [
            Prediction(names[i] if names else str(i), probability)
            for i, probability in zip(indices.tolist(), values.tolist())
        ]

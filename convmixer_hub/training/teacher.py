"""A teacher: trained models whose answers a run learns beside the labels (distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TrainingError
from ..model.config import get_label_names
from ..model.convmixer import ConvMixer
from ..model.gpu import FastOnGPU, can_speed_up
from ..model.inference import prepare_if_possible
from ..zoo import load_trained


class Teacher(nn.Module):
    """The mean logits of trained models, for images as a run has them.

    Args:
        names: Names or folders of trained models, of this package or of timm's.
        classes: Names of the classes of the run.
        data_config: From `timm.data.resolve_input_data_config(model)` of the model that learns.

    Raises:
        TrainingError: If one has other classes.
        CheckpointError: If one cannot be found or downloaded, is damaged or does not fit.
    """

    def __init__(
        self, names: Sequence[str], classes: list[str], data_config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        models = [load_trained(name) for name in names]
        for name, model in zip(names, models):
            if model.num_classes != len(classes) or get_label_names(model) not in (None, classes):
                raise TrainingError(
                    f"teacher {name}: tells other classes apart than those of the dataset; name a "
                    "model that was trained on it"
                )
        self.models = nn.ModuleList(ForOtherImages(model, data_config) for model in models)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, num_classes]`."""
        return torch.stack([model(images) for model in self.models]).mean(0)


class ForOtherImages(nn.Module):
    """A model, taking images that were prepared for another one.

    Args:
        model: The model.
        data_config: From `timm.data.resolve_input_data_config(other_model)`.
    """

    factor: Tensor
    summand: Tensor

    def __init__(self, model: nn.Module, data_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        if not torch.cuda.is_available():
            self.model = prepare_if_possible(model)
        elif isinstance(model, ConvMixer) and can_speed_up(model):
            self.model = FastOnGPU(model)
        own = resolve_input_data_config(model)
        mean, std, own_mean, own_std = (
            torch.tensor(config[name]).view(-1, 1, 1)
            for config in (data_config, own)
            for name in ("mean", "std")
        )
        self.register_buffer("factor", std / own_std)
        self.register_buffer("summand", (mean - own_mean) / own_std)
        # Crops are enlarged as much as whole images are.
        self.enlargement = own["input_size"][-1] / data_config["input_size"][-1]

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, num_classes]`."""
        images = images * self.factor + self.summand
        if self.enlargement != 1:
            images = F.interpolate(images, scale_factor=self.enlargement, mode="bilinear")
        return self.model(images.contiguous(memory_format=torch.channels_last))

"""A teacher: trained models whose soft targets a run learns beside the labels (distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, TrainingError, UnknownModelError
from ..load import load_trained
from ..model.config import get_label_names
from ..model.convmixer import ConvMixer
from ..model.gpu import FastOnGPU, can_speed_up
from ..model.inference import prepare_if_possible


class Teacher(nn.Module):
    """The mean logits of trained models, for images as a run has them.

    Args:
        names: What names the models, as in `load_trained`. Of a model that does not name its
            classes, only their number is checked.
        classes: Names of the classes of the run.
        data_config: From `timm.data.resolve_input_data_config(model)` of the model that learns.
        device: Where it computes.

    Raises:
        TrainingError: If one has other classes, or takes images of another number of channels.
        UnknownModelError: If one does not exist.
        CheckpointError: If one cannot be downloaded, is damaged or does not fit.
    """

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[str],
        data_config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList()
        for name in names:
            try:
                model = load_trained(name).eval()
            except (UnknownModelError, CheckpointError) as error:
                raise type(error)(f"teacher {name}: {error}") from None
            own = resolve_input_data_config(model)
            _check_fit(name, model, classes, own, data_config)
            if device.type == "cpu":
                model = prepare_if_possible(model, cpp=True)
            elif isinstance(model, ConvMixer) and can_speed_up(model):
                model = FastOnGPU(model)
            self.models.append(ForOtherImages(model, own, data_config))
        self.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, num_classes]`."""
        return torch.stack([model(images) for model in self.models]).mean(0)


def _check_fit(
    name: str,
    model: nn.Module,
    classes: Sequence[str],
    own: Mapping[str, Any],
    data_config: Mapping[str, Any],
) -> None:
    known = get_label_names(model)
    if model.num_classes != len(classes) or known not in (None, list(classes)):
        described = ", ".join(known) if known else f"{model.num_classes} classes without names"
        raise TrainingError(
            f"teacher {name}: has the classes {described}, the dataset {', '.join(classes)}; name "
            "a model with the same ones in the same order"
        )
    theirs, ours = own["input_size"][0], data_config["input_size"][0]
    if theirs != ours:
        raise TrainingError(
            f"teacher {name}: takes images of {theirs} channels, the model {ours}; name a teacher "
            "that takes as many"
        )


class ForOtherImages(nn.Module):
    """A model, taking images that were prepared for another one.

    Args:
        model: The model.
        own: Its `timm.data.resolve_input_data_config(model)`.
        other: The same of the other model. Crops of its images are resized as whole ones are; for a
            model that takes one size alone, or patches of its own such as a ViT, to the whole size.
    """

    factor: Tensor
    summand: Tensor

    def __init__(self, model: nn.Module, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        mean, std, own_mean, own_std = (
            torch.tensor(config[name]).view(-1, 1, 1)
            for config in (other, own)
            for name in ("mean", "std")
        )
        self.register_buffer("factor", std / own_std)
        self.register_buffer("summand", (mean - own_mean) / own_std)
        self.size: tuple[int, ...] = own["input_size"][1:]
        config = getattr(model, "pretrained_cfg", {})  # which `FastOnGPU` has not
        self.has_one_size = bool(config.get("fixed_input_size")) or hasattr(model, "patch_embed")
        self.scale = [to / of for to, of in zip(self.size, other["input_size"][1:])]

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, num_classes]`."""
        images = images * self.factor + self.summand
        sides = images.shape[2:]
        size = self.size
        if not self.has_one_size:
            size = tuple(round(side * scale) for side, scale in zip(sides, self.scale))
        if size != sides:
            is_smaller = any(to < of for to, of in zip(size, sides))
            images = F.interpolate(images, size, mode="bilinear", antialias=is_smaller)
        return self.model(images.contiguous(memory_format=torch.channels_last))

"""What a run trains: the model, prepared for its device, its moving average, and the optimizer."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from ..errors import TrainingError
from ..load import load_trained
from ..model.config import get_config
from ..model.convmixer import ConvMixer
from ..model.cpu import keep_freed_memory, speed_up_on_cpu
from ..model.gpu import MAX_POSITIONS, FastOnGPU, can_speed_up
from ..model.init import init_depthwise_kernels
from .folder import RunState
from .settings import OPTIMIZERS, TrainingSettings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """A model in training.

    Attributes:
        model: The model.
        module: What is called in training: the model, or what computes it faster.
        average: Its exponential moving average, if there is one.
        optimizer: The optimizer of its parameters.
    """

    model: ConvMixer
    module: nn.Module
    average: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer

    @property
    def result(self) -> nn.Module:
        """The model to measure and save, as it is after the last step."""
        return self.model if self.average is None else self.average.module

    def get_state(self) -> dict[str, Any]:
        """Return the state dicts, by their names in `RunState`."""
        average = None if self.average is None else self.average.module.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
        }

    def load_state(self, state: RunState) -> None:
        """Go on from the state dicts of a run."""
        assert state.model is not None and state.optimizer is not None
        self.model.load_state_dict(state.model)
        # The run may have been on another kind of device before.
        capturable = {"capturable": self.optimizer.param_groups[0]["capturable"]}
        groups = [group | capturable for group in state.optimizer["param_groups"]]
        self.optimizer.load_state_dict(state.optimizer | {"param_groups": groups})
        if self.average is not None and state.average is not None:
            self.average.module.load_state_dict(state.average)


def build_network(settings: TrainingSettings, classes: list[str], device: torch.device) -> Network:
    """Build what a run trains.

    On a CPU, the C library keeps memory that tensors gave back, from here on in this process.

    Args:
        settings: Those of the run.
        classes: Names of the classes.
        device: Where it is trained.

    Raises:
        CheckpointError: If trained weights to start from cannot be found or downloaded, are
            damaged or do not fit.
        TrainingError: If they were saved without pooling, or `img_size` is no multiple of the
            patch size.
    """
    if settings.pretrained:
        model = load_trained(settings.model, classes)
    else:
        model = timm.create_model(settings.model, num_classes=len(classes))
    assert isinstance(model, ConvMixer)  # as every arch of this package is
    if not model.global_pool:
        raise TrainingError(
            f"{settings.model}: was saved without pooling, which a head needs; load it with "
            "global_pool='avg', and save that"
        )
    if side := settings.img_size:
        rows, rest = divmod(side, model.patch_emb.patch_size)
        if rest:
            raise TrainingError(
                f"img_size is {side}: must be a multiple of {model.patch_emb.patch_size}, the "
                "patch size"
            )
        get_config(model).update(input_size=(model.in_chans, side, side), pool_size=(rows, rows))
    if settings.covariance_init:
        init_depthwise_kernels(model)
    model.to(device)
    module: nn.Module = model
    if device.type == "cpu":
        keep_freed_memory()
        speed_up_on_cpu(model)
    elif can_speed_up(model) and not settings.freeze_batch_norm:
        image_size = resolve_input_data_config(model)["input_size"][1:]
        if _has_room(model, image_size, device, settings.precision):
            module = FastOnGPU(model)
    average = ModelEmaV3(model, settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    optimizer = create_optimizer_v2(
        model,
        opt=settings.optimizer,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        # So that a step can be captured, see `TrainingStep`.
        capturable=device.type == "cuda",
        **OPTIMIZERS[settings.optimizer],
    )
    return Network(model, module, average, optimizer)


def _has_room(
    model: ConvMixer, image_size: tuple[int, int], device: torch.device, precision: str
) -> bool:
    """Return whether the matrices of `FastOnGPU` take at most half of a GPU's free memory.

    `image_size` is the height and width of the images, in pixels.
    """
    patches = math.prod(side // model.patch_emb.patch_size for side in image_size)
    positions = min(patches, MAX_POSITIONS)  # of larger images, only the crops go the fast way
    in_bf16 = precision != "fp32" and torch.cuda.is_bf16_supported(including_emulation=False)
    layers = len(model.conv_mixer_layers)
    needed = layers * model.num_features * positions**2 * (2 if in_bf16 else 4)
    torch.cuda.empty_cache()  # what earlier runs gave back is free, too
    free, _ = torch.cuda.mem_get_info(device)
    if 2 * needed > free:
        _logger.warning(
            "training is slower than it could be: the fast way takes %.1f GB of matrices, which "
            "is more than half of the %.1f GB that the GPU has free",
            needed / 1e9,
            free / 1e9,
        )
    return 2 * needed <= free

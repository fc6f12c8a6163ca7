"""A ConvMixer prepared for inference: the same logits, several times faster on a CPU.

Three things make it fast. What BatchNorm does in evaluation, one scale and one shift per channel,
is computed with the residual connection or goes into the next convolution; GELU is computed by
oneDNN while a convolution's output is in the cache, as PyTorch's compiled models do it; and a batch
goes through in parts that are small enough to stay there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelSizeError
from .convmixer import ConvMixer, ConvMixerLayer, name_activation

BYTES_IN_CACHE = 2**21  # of one feature map of a part of a batch


def prepare_for_inference(model: nn.Module) -> InferenceConvMixer:
    """Make a model that gives the same logits faster, up to rounding (1e-5).

    It has the weights as they are now, takes images of any size, and cannot be trained. Where
    oneDNN is missing, on a GPU, in another type than float32, and under `torch.compile`, autocast
    or `torch.export`, it computes with ordinary operations, which is right but gains less.

    Args:
        model: A ConvMixer of this package; it stays as it is.

    Returns:
        The model, on the same device and in the same type.

    Raises:
        ModelSizeError: If it is another model, or one that `cpu.speed_up_on_cpu` changed.
    """
    if not isinstance(model, ConvMixer):
        raise ModelSizeError(
            f"a {type(model).__name__} cannot be prepared for inference: give a ConvMixer of this "
            "package, whole rather than with features_only"
        )
    if any(type(m) is not nn.BatchNorm2d for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        raise ModelSizeError("the model is prepared for training: load the one that was saved")
    return InferenceConvMixer(model)


def prepare_if_possible(model: nn.Module) -> nn.Module:
    """Return the model prepared for inference, or as it is if it cannot be prepared."""
    try:
        return prepare_for_inference(model)
    except ModelSizeError:
        return model


class _Convolution(nn.Module):
    """A convolution and the activation after it.

    Args:
        conv: The convolution. Given `shift`, it takes `x` in place of `x + shift`.
        act: The activation; None for exact GELU.
        shift: One number for each input channel, which goes into the bias; for a 1x1 convolution.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.act = act
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
        bias = torch.zeros_like(conv.weight[:, 0, 0, 0]) if conv.bias is None else conv.bias
        bias = bias.detach().cpu().double()  # not every device has this type
        if shift is not None:
            bias = bias + conv.weight.detach().cpu().double().flatten(1) @ shift.flatten()
        self.register_buffer("weight", conv.weight.detach().clone(), persistent=False)
        self.register_buffer("bias", bias.to(conv.weight), persistent=False)
        self._packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # in oneDNN's own layout, of this machine

    def forward(self, x: Tensor) -> Tensor:
        """Compute with ordinary operations."""
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        return F.gelu(x, approximate="none") if self.act is None else self.act(x)

    def compute_fused(self, x: Tensor) -> Tensor:
        """Compute the same, with exact GELU, by one call of oneDNN; on a CPU, in float32."""
        geometry = (self.padding, self.stride, [1, 1], self.groups)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, *geometry, list(x.shape)
            )
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *geometry, "gelu", [], "none"
        )
        return y


class _Layer(nn.Module):
    """A ConvMixer layer; each BatchNorm is a scale and a shift, or folded into what follows."""

    scale1: Tensor
    scale2: Tensor
    shift2: Tensor

    def __init__(self, layer: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        assert isinstance(layer, ConvMixerLayer)
        scale1, shift1 = _read_norm(layer.norm1)
        scale2, shift2 = _read_norm(layer.norm2)
        self.depth_wise = _Convolution(layer.depth_wise_conv, act)
        self.point_wise = _Convolution(layer.point_wise_conv, act, shift1)
        weight = self.point_wise.weight
        self.register_buffer("scale1", scale1.to(weight), persistent=False)
        self.register_buffer("scale2", scale2.to(weight), persistent=False)
        self.register_buffer("shift2", shift2.to(weight), persistent=False)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        """Map `[batch, d_model, height, width]` to the same shape."""
        mixed = self.depth_wise.compute_fused(x) if fused else self.depth_wise(x)
        x = torch.addcmul(x, mixed, self.scale1)  # and shift1 is in the bias of what follows
        mixed = self.point_wise.compute_fused(x) if fused else self.point_wise(x)
        return torch.addcmul(self.shift2, mixed, self.scale2)


class InferenceConvMixer(nn.Module):
    """What `prepare_for_inference` gives; it has the attributes by which timm knows a model."""

    stem_scale: Tensor
    stem_shift: Tensor

    def __init__(self, model: ConvMixer) -> None:
        super().__init__()
        stem = model.patch_emb
        self.patch_size = stem.patch_size
        self.num_features = model.num_features
        act = None if name_activation(model) == "gelu" else copy.deepcopy(stem.act).eval()
        scale, shift = _read_norm(stem.norm)
        self.stem = _Convolution(stem.conv, act)
        self.register_buffer("stem_scale", scale.to(stem.conv.weight), persistent=False)
        self.register_buffer("stem_shift", shift.to(stem.conv.weight), persistent=False)
        self.layers = nn.ModuleList(_Layer(layer, act) for layer in model.conv_mixer_layers)
        self.classification = copy.deepcopy(model.classification)
        self.requires_grad_(False)
        super().train(False)
        for name in ("num_classes", "in_chans", "global_pool", "pretrained_cfg"):
            setattr(self, name, copy.copy(getattr(model, name, None)))
        self._traits = copy.copy(getattr(model, "_traits", {}))
        self._can_fuse = act is None and self._is_fused_right()

    def train(self, mode: bool = True) -> InferenceConvMixer:
        """Refuse to be trained."""
        if mode:
            raise ModelSizeError(
                "a model that is prepared for inference cannot be trained: train the one it was "
                "made from"
            )
        return super().train(False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to `[batch, d_model, rows, columns]`."""
        return self._map_features(x, self._fuses(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to logits `[batch, num_classes]`."""
        if not self._fuses(x):
            logits: Tensor = self.classification(self._map_features(x, False))
            return logits
        patches = max(1, x.shape[2] * x.shape[3] // self.patch_size**2)
        images = max(1, BYTES_IN_CACHE // (4 * self.num_features * patches))
        x = x.contiguous(memory_format=torch.channels_last)
        parts = [self.classification(self._map_features(part, True)) for part in x.split(images)]
        return torch.cat(parts)

    def _map_features(self, x: Tensor, fused: bool) -> Tensor:
        for side in x.shape[-2:]:
            torch._assert(
                side >= self.patch_size,
                "the image is smaller than one patch: resize it, or use a model with smaller "
                "patches",
            )
        x = self.stem.compute_fused(x) if fused else self.stem(x)
        x = torch.addcmul(self.stem_shift, x, self.stem_scale)
        for layer in self.layers:
            x = layer(x, fused)
        return x

    def _fuses(self, x: Tensor) -> bool:
        return (
            not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and self._can_fuse
            and x.device.type == self.stem.weight.device.type == "cpu"
            and x.dtype == self.stem.weight.dtype == torch.float32
            and x.dim() == 4
            and x.shape[0] > 0
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu")
        )

    def _is_fused_right(self) -> bool:
        """Check that oneDNN's fused operation, which PyTorch does not make public, is right."""
        conv = self.stem
        if conv.weight.device.type != "cpu" or conv.weight.dtype != torch.float32:
            return False
        x = torch.linspace(-2, 2, conv.weight[0].numel() * 4)
        x = x.view(1, conv.weight.shape[1], 2 * conv.stride[0], 2 * conv.stride[1])
        try:
            found = conv.compute_fused(x.contiguous(memory_format=torch.channels_last))
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            return False
        finally:
            conv._packed = None  # for images of the usual size
        return torch.allclose(found, conv(x), atol=1e-5, rtol=1e-5)


def _read_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return what BatchNorm multiplies by and then adds in evaluation, each `[channels, 1, 1]`."""
    assert norm.running_var is not None and norm.running_mean is not None
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (tensor.detach().cpu().double() for tensor in tensors)
    scale = weight * (variance + norm.eps).rsqrt()
    shift = bias - mean * scale
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)

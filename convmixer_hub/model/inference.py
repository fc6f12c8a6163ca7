"""A ConvMixer prepared for inference: the same logits, several times faster on a CPU.

Three things make it fast. What BatchNorm does in evaluation, one scale and one shift per channel,
is computed with the residual connection or goes into the next convolution; GELU is computed while a
convolution's output is in the cache, by oneDNN, as PyTorch's compiled models do it, or by
`inference.cpp`; and a batch goes through in parts that are small enough to stay there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..errors import ModelSizeError
from .compiler import KERNEL_SIZES, load_operators
from .convmixer import ConvMixer, ConvMixerLayer
from .parts import find_changed_part, name_activation

BYTES_IN_CACHE = 2**21  # of one feature map of a part of a batch
WORTH_COMPILING = 5000  # images: for fewer, nobody should wait for a compiler
PANEL = 32  # channels whose weights lie together in `inference.cpp`


def prepare_for_inference(model: nn.Module, cpp: bool = False) -> InferenceConvMixer:
    """Make a model that gives the same logits faster, up to rounding (1e-5).

    It has the weights as they are now, takes images of any size, and cannot be trained. Where
    neither oneDNN nor `cpp` can be used, with another activation than exact GELU, on a GPU, in
    another type than float32, and under `torch.compile`, autocast or `torch.export`, it computes
    with ordinary operations, which is right but gains less.

    Args:
        model: A ConvMixer of this package; it stays as it is.
        cpp: In float32 on a CPU, compute the layers with `inference.cpp`, which is faster still. It
            is compiled when the first images come (10 seconds, once per machine). It is not used
            without a C++ compiler (a WARNING says so), with another activation than exact GELU, a
            number of channels that is no multiple of 32, or a kernel other than 3, 5, 7 and 9.

    Returns:
        The model, on the same device and in the same type.

    Raises:
        ModelSizeError: If it is another model, a subclass too, or its parts were replaced or have
            hooks.
    """
    if type(model) is not ConvMixer:
        raise ModelSizeError(
            f"a {type(model).__name__} cannot be prepared for inference: give a ConvMixer of this "
            "package, whole rather than with features_only"
        )
    if changed := find_changed_part(model):
        raise ModelSizeError(
            f"{changed}, which is not as in this package's models, so the model cannot be prepared "
            "for inference: use it as it is"
        )
    return InferenceConvMixer(model, cpp)


def prepare_if_possible(model: nn.Module, cpp: bool = False) -> nn.Module:
    """Return the model prepared for inference, or as it is if it cannot be prepared."""
    try:
        return prepare_for_inference(model, cpp)
    except ModelSizeError:
        return model


def load_cpp() -> bool:
    """Load `inference.cpp`, see `load_operators`."""
    return load_operators("inference", "inference is slower than it could be")


class _Convolution(nn.Module):
    """A convolution, the activation after it, and the scale and shift of the BatchNorm after that.

    `before` is a BatchNorm whose shift was left out of the input of a 1x1 convolution; it goes into
    the bias.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        conv: nn.Conv2d,
        act: nn.Module,
        norm: nn.BatchNorm2d,
        before: nn.BatchNorm2d | None = None,
    ) -> None:
        super().__init__()
        self.act = copy.deepcopy(act).eval()
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
        assert conv.bias is not None  # see `find_changed_part`
        bias = conv.bias.detach().cpu().double()  # not every device has this type
        if before is not None:
            _, shift = _read_norm(before)
            bias = bias + conv.weight.detach().cpu().double().flatten(1) @ shift.flatten()
        scale, shift = _read_norm(norm)
        tensors = {"weight": conv.weight.detach().clone(), "bias": bias}
        for name, tensor in {**tensors, "scale": scale, "shift": shift}.items():
            self.register_buffer(name, tensor.to(conv.weight, copy=True), persistent=False)
        self._packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # in oneDNN's own layout, of this machine

    def _apply(self, *args: Any, **options: Any) -> _Convolution:
        self._packed = None
        return super()._apply(*args, **options)

    def activate(self, x: Tensor, fused: bool) -> Tensor:
        """Compute convolution and activation, by one call of oneDNN if `fused`."""
        if fused:
            return self.compute_fused(x)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        y: Tensor = self.act(x)
        return y

    def compute_fused(self, x: Tensor) -> Tensor:
        """Compute the same where the activation is exact GELU; on a CPU, in float32."""
        geometry = (self.padding, self.stride, [1, 1], self.groups)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, *geometry, list(x.shape)
            )
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *geometry, "gelu", [], "none"
        )
        return y

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        """Map `[batch, channels, height, width]` to what BatchNorm gives."""
        return torch.addcmul(self.shift, self.activate(x, fused), self.scale)


class InferenceConvMixer(nn.Module):
    """What `prepare_for_inference` gives; it has the attributes by which timm knows a model."""

    def __init__(self, model: ConvMixer, cpp: bool) -> None:
        super().__init__()
        stem, layers = model.patch_emb, cast("list[ConvMixerLayer]", model.conv_mixer_layers)
        self.patch_size = stem.patch_size
        self.num_features = model.num_features
        self.stem = _Convolution(stem.conv, stem.act, stem.norm)
        self.spatial = nn.ModuleList(
            _Convolution(layer.depth_wise_conv, layer.act1, layer.norm1) for layer in layers
        )
        self.channel = nn.ModuleList(
            _Convolution(layer.point_wise_conv, layer.act2, layer.norm2, before=layer.norm1)
            for layer in layers
        )
        self.classification = copy.deepcopy(model.classification)
        self.classification.drop.p = 0.0  # whatever mode it is put into
        self.requires_grad_(False)
        self.eval()
        for name in ("num_classes", "in_chans", "global_pool", "pretrained_cfg"):
            setattr(self, name, copy.copy(getattr(model, name, None)))
        self._is_gelu = name_activation(model) == "gelu"
        _can_fuse()  # here, as a tracer may be the first to call the model
        has_layers = model.kernel_size in KERNEL_SIZES and model.num_features % PANEL == 0
        self._cpp = cpp and self._is_gelu and has_layers
        for i, tensor in enumerate(self._lay_out_parameters() if self._cpp else ()):
            self.register_buffer(f"panel{i}", tensor, persistent=False)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Refuse to give weights, as it has only those of the head.

        torch's exporters get these, which ask with `keep_vars`, and so do modules around it.
        """
        if not options.get("keep_vars") and options.get("destination") is None:
            raise ModelSizeError(
                "a model that is prepared for inference has no state dict to save: save that of "
                "the one it was made from"
            )
        return super().state_dict(*args, **options)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to `[batch, d_model, rows, columns]`."""
        return self._map_features(x, self._is_fast(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits `[batch, num_classes]`, or to what stands before them."""
        y: Tensor = self.classification(x, pre_logits)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to logits `[batch, num_classes]`."""
        if not self._is_fast(x):
            return self.forward_head(self._map_features(x, False))
        patches = max(1, x.shape[2] * x.shape[3] // self.patch_size**2)
        images = max(1, BYTES_IN_CACHE // (4 * self.num_features * patches))
        x = x.contiguous(memory_format=torch.channels_last)
        parts = [self.forward_head(self._map_features(part, True)) for part in x.split(images)]
        return torch.cat(parts)

    def _map_features(self, x: Tensor, fast: bool) -> Tensor:
        if fast and self._cpp and load_cpp():
            return self._map_in_cpp(x)
        x = self.stem(x, fast)
        for module, channel in zip(self.spatial, self.channel):
            spatial = cast("_Convolution", module)
            # The shift of this BatchNorm is in the bias of the next convolution.
            x = channel(torch.addcmul(x, spatial.activate(x, fast), spatial.scale), fast)
        return x

    def _map_in_cpp(self, x: Tensor) -> Tensor:
        side = self.patch_size
        x = x[:, :, : x.shape[2] // side * side, : x.shape[3] // side * side]
        patches = F.pixel_unshuffle(x, side).contiguous(memory_format=torch.channels_last)
        y: Tensor = torch.ops.convmixer_hub.map_features(patches, list(self._buffers.values()))
        return y

    def _lay_out_parameters(self) -> Iterator[Tensor]:
        """Give the parameters as `inference.cpp` takes them."""
        layers = chain([self.stem], *zip(self.spatial, self.channel))
        for layer in cast("Iterator[_Convolution]", layers):
            weight = layer.weight.flatten(1)
            if layer.groups == 1:
                weight = weight.view(-1, PANEL, weight.shape[1])
            yield weight.mT.contiguous()
            yield layer.bias
            yield layer.scale.flatten()
            if layer.groups == 1:
                yield layer.shift.flatten()

    def _is_fast(self, x: Tensor) -> bool:
        return (
            not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and x.device.type == self.stem.weight.device.type == "cpu"
            and x.dtype == self.stem.weight.dtype == torch.float32
            and x.dim() == 4
            and x.shape[0] > 0
            and min(x.shape[2:]) >= self.patch_size
            and x.shape[1] == self.stem.weight.shape[1]
            and not (torch.is_grad_enabled() and x.requires_grad)
            and forward_ad.unpack_dual(x).tangent is None
            and not torch.is_autocast_enabled("cpu")
            and ((self._cpp and load_cpp()) or (self._is_gelu and _can_fuse()))  # may compile
        )


@cache
def _can_fuse() -> bool:
    """Check that oneDNN's fused operation, which PyTorch does not make public, is right."""
    place: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    # Without random numbers, so that those of a user stay the same.
    conv = nn.utils.skip_init(nn.Conv2d, 3, 8, 2, stride=2, **place)
    norm = nn.BatchNorm2d(8, **place)
    x = torch.linspace(-2, 2, 192, **place).view(1, 3, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            conv.weight.copy_(torch.linspace(-1, 1, 96, **place).view(8, 3, 2, 2))
            conv.bias.zero_()
            fused = _Convolution(conv, nn.GELU(), norm)
            found, expected = fused.compute_fused(x), fused.activate(x, False)
        return torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def _read_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return what BatchNorm multiplies by and then adds in evaluation, each `[channels, 1, 1]`."""
    assert norm.running_var is not None and norm.running_mean is not None
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (tensor.detach().cpu().double() for tensor in tensors)
    scale = weight * (variance + norm.eps).rsqrt()
    shift = bias - mean * scale
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)

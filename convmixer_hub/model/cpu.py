"""Faster training on a CPU: GELU and BatchNorm fused, and a fast depthwise weight gradient.

The results are the same. Next to the convolutions, GELU and BatchNorm are most of a training step,
and what they cost is reading and writing memory. `cpu.cpp` has them in as few passes as there can
be, and a fast weight gradient of the depthwise convolutions, which PyTorch computes on a slow
generic path; it is compiled the first time that it is needed.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compiler import KERNEL_SIZES, load_operators
from .convmixer import ConvMixer
from .parts import check_parts

CHANNELS_AT_A_TIME = 16


def load_passes() -> bool:
    """Load `cpu.cpp` as `torch.ops.convmixer_hub`, see `load_operators`."""
    return load_operators("cpu", "training is several times slower than it could be")


def keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of giving their pages back to the kernel.

    By default every tensor over 32 MiB is mapped, zeroed page by page, and unmapped again at each
    step, which is a good part of its time. Elsewhere than on glibc this does nothing.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # never
    mallopt(m_top_pad, 2**28)  # grow in steps of 256 MiB


def _takes(x: Tensor) -> bool:
    """Return whether `cpu.cpp` takes x; what it does not take, the plain modules compute."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
    )


def _count(x: Tensor) -> int:
    """Number of values in a channel of `[batch, channels, height, width]`."""
    return x.numel() // x.shape[1]


class _GELUBatchNormFunction(torch.autograd.Function):
    """BatchNorm of GELU with the statistics of the batch; also gives these statistics."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, center: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes = torch.ops.convmixer_hub
        z = z.contiguous(memory_format=torch.channels_last)
        # A center near the mean keeps the variance from being a small difference of large numbers.
        y, slope, sums = passes.activate(z, center)
        result, mean, variance = passes.normalize(y, sums, center, weight, bias, _count(z), eps)
        ctx.save_for_backward(y, slope, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return result, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        passes = torch.ops.convmixer_hub
        y, slope, weight, mean, variance = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        sums = passes.sum_gradient(grad, y, mean)
        grad_bias, grad_weight = sums[0], sums[1] * (variance + ctx.eps).rsqrt()
        grad_z = passes.input_gradient(
            grad, y, slope, sums, weight, mean, variance, _count(y), ctx.eps
        )
        return grad_z, grad_weight, grad_bias, None, None


class GELUBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d(gelu(x))`, with the parameters, buffers and state dict of the former.

    It takes a multiple of 16 channels; `load_passes` comes first.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` to the same shape."""
        if not self.training or not _takes(x) or _count(x) == 1:  # for which torch has an error
            return super().forward(F.gelu(x))
        x, mean, variance = _GELUBatchNormFunction.apply(
            x, self.weight, self.bias, self.running_mean, self.eps
        )
        count = _count(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return x


class _DepthwiseConvFunction(torch.autograd.Function):
    """Depthwise convolution with stride 1, an odd kernel and "same" padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kernel_size, channels = weight.shape[-1], weight.shape[0]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=kernel_size // 2, groups=channels)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
            gradients = torch.ops.convmixer_hub.depth_wise_gradients(x, grad, kernel_size)
            grad_weight, grad_bias = gradients
        return grad_x, grad_weight, grad_bias


class FastDepthwiseConv2d(nn.Conv2d):
    """The depthwise convolution of a `ConvMixerLayer`, with the gradients of `cpu.cpp`.

    It takes a multiple of 16 channels and the kernels in `KERNEL_SIZES`; `load_passes` comes first.
    """

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` to the same shape."""
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if not _takes(x):
            return super().forward(x)
        return _DepthwiseConvFunction.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def _store_channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def speed_up_on_cpu(model: nn.Module) -> None:
    """Make a ConvMixer train several times faster on a CPU, in place.

    Parameters, state dict, results and gradients stay what they are, the latter two up to rounding.
    Under `torch.autocast`, all but statistics and parameters is in bfloat16, as with the plain
    modules. `cpu.cpp` is compiled the first time (10 seconds, once per machine); without a C++
    compiler (a WARNING says so), the model only stores images channels last.

    Args:
        model: A ConvMixer of this package, on the CPU. It gains less if it has another activation
            than exact GELU, a number of channels that is no multiple of 16, or a kernel other than
            3, 5, 7 and 9.

    Raises:
        ModelSizeError: If it is another model, a subclass too, or its parts were replaced.
    """
    model = check_parts(model, "sped up")
    for layer in (model.patch_emb, *model.conv_mixer_layers):
        # As oneDNN's convolutions take and give images, without reordering them.
        layer.register_forward_pre_hook(_store_channels_last)
    if model.num_features % CHANNELS_AT_A_TIME or not load_passes():
        return
    _fuse(model.patch_emb, "act", "norm")
    for layer in model.conv_mixer_layers:
        _fuse(layer, "act1", "norm1")
        _fuse(layer, "act2", "norm2")
        if model.kernel_size in KERNEL_SIZES:
            # The same object, with its parameters and hooks.
            layer.depth_wise_conv.__class__ = FastDepthwiseConv2d


def _fuse(layer: nn.Module, act_name: str, norm_name: str) -> None:
    act = getattr(layer, act_name)
    if type(act) is nn.GELU and act.approximate == "none":
        setattr(layer, act_name, nn.Identity())
        getattr(layer, norm_name).__class__ = GELUBatchNorm2d


def choose_dtype(
    model: ConvMixer, device: torch.device, image_size: int
) -> tuple[torch.dtype, str]:
    """Find out in which type a model is trained faster: on a CPU by trying, half a second long.

    What a CPU says of itself does not tell: some list instructions for bfloat16 and take longer in
    it.

    Args:
        model: On the device; on a CPU, prepared by `speed_up_on_cpu`. It stays as it is.
        device: Where it will be trained.
        image_size: Side of its images, in pixels.

    Returns:
        `torch.bfloat16` or `torch.float32`, and the reason in a few words.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16: this GPU has it"
        return torch.float32, "fp32: this GPU has no bf16"
    layer = copy.deepcopy(model.conv_mixer_layers[0]).train()
    side = image_size // model.patch_emb.patch_size
    x = torch.rand(max(2, 8192 // side**2), model.num_features, side, side)
    dtypes = (torch.float32, torch.bfloat16)
    inputs = {dtype: x.to(dtype, copy=True).requires_grad_() for dtype in dtypes}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    for _ in range(5):  # in turns, and the first of each does not count
        for dtype, features in inputs.items():
            layer.zero_grad()
            features.grad = None
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = layer(features)
            y.backward(y.detach())
            seconds[dtype].append(time.perf_counter() - start)
    fp32, bf16 = (1000 * statistics.median(taken[1:]) for taken in seconds.values())
    if bf16 < fp32:
        return torch.bfloat16, f"bf16: a layer takes {bf16:.1f} ms, {fp32:.1f} ms in fp32"
    return torch.float32, f"fp32: a layer takes {fp32:.1f} ms, {bf16:.1f} ms in bf16"

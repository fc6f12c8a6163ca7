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

from ..errors import ModelSizeError
from .compiler import KERNEL_SIZES, load_operators
from .convmixer import ConvMixer, ConvMixerLayer, PatchEmbeddings

CHANNELS_AT_A_TIME = 16
SAMPLED = 64  # values of a channel, for a first guess of their mean


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


def _count(x: Tensor) -> int:
    """Return the number of values in a channel of `[batch, channels, height, width]`."""
    return x.numel() // x.shape[1]


class _GELUBatchNormFunction(torch.autograd.Function):
    """BatchNorm of GELU with the statistics of the batch, which the running ones follow."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
        passes = torch.ops.convmixer_hub
        z = z.contiguous(memory_format=torch.channels_last)
        count = _count(z)
        # A center near the mean keeps the variance from being a small difference of large numbers.
        # An odd step meets more than one column where sides are even.
        some = z.movedim(1, -1).flatten(0, 2)[:: count // SAMPLED | 1]
        center = F.gelu(some.float()).mean(0)
        y, slope, sums = passes.activate(z, center)
        result, mean, variance = passes.normalize(y, sums, center, weight, bias, count, norm.eps)
        # Here, so that gradient checkpointing repeats it as it does in BatchNorm.
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        ctx.save_for_backward(y, slope, weight, mean, variance)
        ctx.eps = norm.eps
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        passes = torch.ops.convmixer_hub
        y, slope, weight, mean, variance = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        sums = passes.sum_gradient(grad, y, mean)
        grad_bias, grad_weight = sums[0], sums[1] * (variance + ctx.eps).rsqrt()
        grad_z = passes.input_gradient(
            grad, y, slope, sums, weight, mean, variance, _count(y), ctx.eps
        )
        return grad_z, grad_weight, grad_bias, None


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
        (n, c, h, w), kernel_size = x.shape, weight.shape[-1]
        padding = kernel_size // 2
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=padding, groups=c)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_x, None, None
        if kernel_size in KERNEL_SIZES and c % CHANNELS_AT_A_TIME == 0 and load_passes():
            x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
            gradients = torch.ops.convmixer_hub.depth_wise_gradients(x, grad, kernel_size)
            grad_weight, grad_bias = gradients
        else:
            # The same sums are a convolution of the image by the gradient, with the batch folded
            # into the channels: [1, n*c, k, k].
            images, kernels = x.reshape(1, n * c, h, w), grad.reshape(n * c, 1, h, w)
            products = F.conv2d(images, kernels, padding=padding, groups=n * c)
            grad_weight = products.view(n, c, 1, kernel_size, kernel_size).sum(0)
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def has_hooks(module: nn.Module) -> bool:
    """Return whether something is called with a module, such as by `torch.nn.utils.prune`."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name) for name in hooks)


def _takes(x: Tensor, parameter: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and parameter.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _activate_and_normalize(x: Tensor, act: nn.Module, norm: nn.Module) -> Tensor:
    """Return `norm(act(x))`, at once if these are GELU and BatchNorm and in training."""
    if not (
        type(act) is nn.GELU
        and act.approximate == "none"
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and norm.affine
        and norm.num_features % CHANNELS_AT_A_TIME == 0
        and _count(x) > 1  # else torch has an error
        and not (has_hooks(act) or has_hooks(norm))
        and _takes(x, norm.weight)
        and load_passes()
    ):
        y: Tensor = norm(act(x))
        return y
    y = _GELUBatchNormFunction.apply(x, norm.weight, norm.bias, norm)
    return y


def _convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """Return `conv(x)`; if it is depthwise, with faster gradients."""
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype("cpu"))
    channels = x.shape[1]
    if (
        type(conv) is nn.Conv2d
        and conv.weight.shape[:2] == (channels, 1)
        and conv.kernel_size[0] % 2 == 1
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[0] // 2)
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == (1, 1)
        and conv.bias is not None
        and not has_hooks(conv)
        and _takes(x, conv.weight)
    ):
        return _DepthwiseConvFunction.apply(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype))
    y: Tensor = conv(x)
    return y


class FastPatchEmbeddings(PatchEmbeddings):
    """`PatchEmbeddings` with GELU and BatchNorm at once where it is trained on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images as `PatchEmbeddings` does."""
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.training:
            return super().forward(x)
        return _activate_and_normalize(self.conv(x), self.act, self.norm)


class FastConvMixerLayer(ConvMixerLayer):
    """`ConvMixerLayer` with all of the above where it is trained on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, d_model, height, width]` to the same shape."""
        # As oneDNN's convolutions take and give images, without reordering them.
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.training:
            return super().forward(x)
        mixed = _activate_and_normalize(_convolve(x, self.depth_wise_conv), self.act1, self.norm1)
        x = x + self.drop_path(mixed)
        return _activate_and_normalize(self.point_wise_conv(x), self.act2, self.norm2)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    PatchEmbeddings: FastPatchEmbeddings,
    ConvMixerLayer: FastConvMixerLayer,
}


def speed_up_on_cpu(model: nn.Module) -> None:
    """Make a ConvMixer train several times faster on a CPU, in place.

    Modules, parameters and the state dict stay what they are, and so do results and gradients, up
    to rounding. Under `torch.autocast`, all but statistics and parameters is in bfloat16, as
    without this. `cpu.cpp` is compiled the first time (10 seconds, once per machine); without a
    C++ compiler (a WARNING says so), the gain is smaller. In evaluation mode, nothing changes;
    `prepare_for_inference` takes the model, too. TorchScript, FX in training mode and gradients of
    gradients do not: for these, load the state dict into a new model.

    Args:
        model: A ConvMixer of this package. It gains less if it has another activation than exact
            GELU, a number of channels that is no multiple of 16, or a kernel other than 3, 5, 7
            and 9. Where it has hooks or other parts than those it was built with, or is not trained
            in float32 or bfloat16 on a CPU, these compute as before.

    Raises:
        ModelSizeError: If it is another model.
    """
    parts = [module for module in model.modules() if isinstance(module, tuple(FAST))]
    if not parts:
        raise ModelSizeError(
            f"a {type(model).__name__} cannot be sped up: give a ConvMixer of this package"
        )
    for part in parts:
        part.__class__ = FAST.get(type(part), type(part))
    load_passes()


def choose_precision(model: ConvMixer, device: torch.device, image_size: int) -> tuple[str, str]:
    """Find the precision in which a model is trained faster: on a CPU by trying, for half a second.

    What a CPU says of itself does not tell: some list instructions for bfloat16 and take longer in
    it.

    Args:
        model: On the device; on a CPU, prepared by `speed_up_on_cpu`. It stays as it is.
        device: Where it will be trained.
        image_size: Side of its images, in pixels.

    Returns:
        `bf16` or `fp32`, and the reason in a few words.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has it"
        return "fp32", "this GPU has no bf16"
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
        return "bf16", f"a layer takes {bf16:.1f} ms, {fp32:.1f} ms in fp32"
    return "fp32", f"a layer takes {fp32:.1f} ms, {bf16:.1f} ms in bf16"

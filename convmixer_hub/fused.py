"""What a CPU trains faster: GELU and BatchNorm as one, on images stored channels last.

Next to the convolutions, GELU and BatchNorm are most of a training step, and what they cost is
reading and writing memory. `torch.compile` turns each function below into one pass over it. A sum
is a pass of its own: together with values to be written, it would be computed along the other way
through memory, and all else twice.

With several processes the statistics are those of all their batches together, which torch's own
SyncBatchNorm computes on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .depthwise import DepthWiseConv2d
from .machine import compiled, get_world_size, sum_over_processes
from .model import ConvMixerLayer, PatchEmbeddings


def _gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute exact GELU, z * cdf(z), and its derivative."""
    density = torch.exp(-0.5 * z * z)  # of the normal distribution, times sqrt(2 pi)
    if z.dtype == torch.float32:
        # Far out, where it rounds to nothing in all that follows, it would be a denormal number,
        # and products with these take some CPUs ten times as long.
        density = torch.where(z.abs() < 9, density, 0.0)
        # Abramowitz & Stegun 7.1.26: erf to 1.5e-7 from the exponential that is needed anyway.
        t = 1 / (1 + 0.3275911 * 0.7071067811865476 * z.abs())
        series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t) - 0.284496736) * t
        tail = 0.5 * (series + 0.254829592) * t * density
        cdf = torch.where(z < 0, tail, 1 - tail)
    else:
        cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
    return z * cdf, cdf + z * density * 0.3989422804014327


def _widen(x: Tensor) -> Tensor:
    """Give what is stored in fewer bits the 32 that are computed with."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@compiled
def _activate(z: Tensor) -> tuple[Tensor, Tensor]:
    """Map z `[batch, channels, height, width]` to gelu(z) and the slope there."""
    y, slope = _gelu_and_slope(_widen(z))
    return y.to(z.dtype), slope.to(z.dtype)


@compiled
def _sum_deviation(y: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sum y - centre and its square over each plane: `[batch, channels]`.

    A centre near the mean keeps the variance from being a small difference of large numbers.
    """
    deviation = _widen(y) - centre.view(-1, 1, 1)
    return deviation.sum((2, 3)), deviation.square().sum((2, 3))


@compiled
def _scale_and_shift(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (_widen(y) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(y.dtype)


@compiled
def _sum_gradient(grad: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sum grad and grad * (y - mean) over each plane: `[batch, channels]`."""
    grad = _widen(grad)
    return grad.sum((2, 3)), (grad * (_widen(y) - mean.view(-1, 1, 1))).sum((2, 3))


@compiled
def _input_gradient(
    grad: Tensor, y: Tensor, slope: Tensor, of_grad: Tensor, of_y: Tensor, constant: Tensor
) -> Tensor:
    """Combine grad and y linearly, channel by channel, and go back through the GELU."""
    combined = of_grad.view(-1, 1, 1) * _widen(grad) + of_y.view(-1, 1, 1) * _widen(y)
    return (_widen(slope) * (combined + constant.view(-1, 1, 1))).to(y.dtype)


def _count(x: Tensor) -> int:
    """Number of values in a channel of `[batch, channels, height, width]`, in all processes."""
    return x.numel() // x.shape[1] * get_world_size()


class _GELUBatchNormFunction(torch.autograd.Function):
    """BatchNorm of GELU with the statistics of the batch; also gives these statistics."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, slope = _activate(z)
        sums, squares = _sum_deviation(y, centre)
        count = _count(y)
        offset, square = sum_over_processes(torch.stack([sums.sum(0), squares.sum(0)])) / count
        mean = centre + offset
        variance = (square - offset.square()).clamp(min=0)
        inverse_std = (variance + eps).rsqrt()
        scale = weight * inverse_std
        ctx.save_for_backward(y, slope, weight, mean, inverse_std)
        ctx.mark_non_differentiable(mean, variance)
        return _scale_and_shift(y, scale, bias - mean * scale), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        y, slope, weight, mean, inverse_std = ctx.saved_tensors
        sums, products = _sum_gradient(grad, y, mean)
        grad_bias = sums.sum(0)
        grad_weight = products.sum(0) * inverse_std
        all_bias, all_weight = sum_over_processes(torch.stack([grad_bias, grad_weight])) / _count(y)
        of_grad = weight * inverse_std
        of_y = -of_grad * inverse_std * all_weight
        constant = -of_grad * all_bias - of_y * mean
        grad_z = _input_gradient(grad, y, slope, of_grad, of_y, constant)
        return grad_z, grad_weight, grad_bias, None, None


class GELUBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d(gelu(x))`, with the parameters, buffers and state dict of the former."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` to the same shape."""
        if not self.training:
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


def _store_channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def speed_up_on_cpu(model: nn.Module) -> None:
    """Let a ConvMixer and its layers compute what is above, in place.

    Results, gradients and the state dict stay those of the separate modules, up to rounding, and
    as with these, `torch.autocast` has all but statistics and parameters in bfloat16. Make the
    optimizer after this: some parameters are new objects.

    Args:
        model: On the CPU, in fp32. Layers with another activation stay as they are.
    """
    for module in list(model.modules()):
        if isinstance(module, ConvMixerLayer | PatchEmbeddings):
            # As oneDNN's convolutions take and give images, without reordering them.
            module.register_forward_pre_hook(_store_channels_last)
        if isinstance(module, ConvMixerLayer):
            _fuse(module, "act1", "norm1")
            _fuse(module, "act2", "norm2")
        elif isinstance(module, PatchEmbeddings):
            _fuse(module, "act", "norm")
        elif isinstance(module, DepthWiseConv2d):
            module.compiles = True


def _fuse(module: nn.Module, act_name: str, norm_name: str) -> None:
    act, norm = getattr(module, act_name), getattr(module, norm_name)
    if type(act) is not nn.GELU or act.approximate != "none" or type(norm) is not nn.BatchNorm2d:
        return
    fused = GELUBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    fused.load_state_dict(norm.state_dict(), assign=True)
    setattr(module, act_name, nn.Identity())
    setattr(module, norm_name, fused.train(norm.training))

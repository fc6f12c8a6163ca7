"""Faster training on a GPU: depthwise convolutions as matrix products, GELU and BatchNorm fused.

The results are the same. A GPU multiplies matrices ten times as fast as it does anything else, but
has no such unit for depthwise convolutions. On small images these are matrix products, too: for
each channel, `[images, positions]` times `[positions, positions]`, a matrix that holds each weight
of the kernel once for every pair of positions that it connects (a Toeplitz matrix). What is left,
GELU, BatchNorm and the residual connection, costs what reading and writing memory costs, so it is
done in as few passes as there can be.

Activations are `[channels, images, positions]`, so that a 1x1 convolution is one matrix product,
and the statistics of a channel are sums over a row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from functools import cache, wraps
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import first_line
from .convmixer import ConvMixer, ConvMixerLayer
from .parts import find_changed_part, name_activation

# The matrices grow with its square: with 256 channels, these take 0.5 GB per layer in bfloat16.
MAX_POSITIONS = 1024
# Matrix products are faster where rows have a multiple of this length.
ALIGNMENT = 8
# Into how many partial sums rows are split, if they can be, so that a GPU has enough to do.
PARTS = 1024
# How many shapes torch.compile compiles a function for. Three sizes of images in a run and in its
# teacher, with and without a residual, are 12.
MAX_SHAPES = 64

_logger = logging.getLogger(__name__)

_compiling = True


def _compiled_on_gpu(function: Callable) -> Callable:
    """Let torch.compile fuse a function of tensors on a GPU; elsewhere it stays as it is."""

    @cache
    def compile_it() -> Callable:  # not before there is a need, as it takes a second to import
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def call(x: Tensor, *others: Any) -> Any:
        global _compiling
        if not (x.is_cuda and _compiling):
            return function(x, *others)
        try:
            # By default torch.compile gives up after 8 shapes. Since torch 2.7 this is another name
            # of recompile_limit.
            with torch._dynamo.config.patch(cache_size_limit=MAX_SHAPES):
                return compile_it()(x, *others)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.compile has no public error of its own
            _compiling = False
            _logger.warning(
                "training is half as fast as it could be: torch.compile fails (%s); install Triton "
                "and a C compiler such as gcc",
                first_line(getattr(error, "inner_exception", error)),
            )
            return function(x, *others)

    return call


def _normal_cdf(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative standard normal distribution, which is GELU(z) / z, and exp(-z²/2)."""
    density = torch.exp(-0.5 * z * z)
    if z.dtype != torch.float32:
        return 0.5 + 0.5 * torch.erf(z * 0.5**0.5), density
    # A GPU's erf takes longer than reading what it is computed of. This one is exact to 1.5e-7
    # (Abramowitz & Stegun, 7.1.26), and makes use of the density.
    t = 1.0 / (1.0 + 0.3275911 * 0.5**0.5 * z.abs())
    terms = t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * (0.254829592 + terms) * density
    return torch.where(z < 0, tail, 1.0 - tail), density


def _gelu(z: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU(z + bias), of `[channels, parts, values]`."""
    z = z.to(bias.dtype) + bias[:, None, None]
    return z * _normal_cdf(z)[0]


def _split(rows: Tensor) -> Tensor:
    """View rows as `[channels, parts, values]`.

    A sum over few long rows keeps little of a GPU busy, and torch.compile's own way to split them
    writes all that is summed.
    """
    channels, values = rows.shape
    parts = 2 ** max(0, math.ceil(math.log2(PARTS / channels)))
    return rows.unflatten(1, (math.gcd(values, parts), -1))


def _sum_all(x: Tensor) -> Tensor:
    return x.sum(2).sum(1)


@_compiled_on_gpu
def _sum(z: Tensor, bias: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sum GELU(z + bias) - center, and its squares, over each row of `[channels, values]`."""
    h = _gelu(_split(z), bias) - center[:, None, None]
    return _sum_all(h), _sum_all(h * h)


@_compiled_on_gpu
def _normalize(
    z: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    sums: tuple[Tensor, Tensor],
    center: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of GELU(z + bias), plus the residual; also give mean and variance."""
    from_center = sums[0] / z.shape[1]
    variance = sums[1] / z.shape[1] - from_center * from_center
    mean = center + from_center
    h = _gelu(z[:, None], bias)[:, 0] - mean[:, None]
    y = h * (weight * (variance + eps).rsqrt())[:, None] + shift[:, None]
    if residual is not None:
        y = y + residual
    return y.to(z.dtype), mean, variance


@_compiled_on_gpu
def _sum_gradient(grad: Tensor, z: Tensor, bias: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradient, and its product with GELU(z + bias) - mean, over each row."""
    h = _gelu(_split(z), bias) - mean[:, None, None]
    grad = _split(grad).to(bias.dtype)
    return _sum_all(grad), _sum_all(grad * h)


@_compiled_on_gpu
def _input_gradient(
    grad: Tensor,
    z: Tensor,
    bias: Tensor,
    sums: tuple[Tensor, Tensor],
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z, of the bias, and of the weight of BatchNorm."""
    rstd = (variance + eps).rsqrt()
    from_mean = sums[0] / z.shape[1]
    from_variance = sums[1] * rstd * rstd / z.shape[1]
    biased = _split(z).to(bias.dtype) + bias[:, None, None]
    cdf, density = _normal_cdf(biased)
    slope = cdf + biased * density * (2.0 * math.pi) ** -0.5
    h = biased * cdf - mean[:, None, None]
    grad = _split(grad).to(bias.dtype) - from_mean[:, None, None]
    grad_z = (grad - h * from_variance[:, None, None]) * (weight * rstd)[:, None, None] * slope
    return grad_z.to(z.dtype).view_as(z), _sum_all(grad_z), sums[1] * rstd


def _multiply(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mix positions (one matrix per channel) or channels; also return the former's residual.

    Args:
        x: `[channels, images, positions]`.
        matrix: `[channels, positions, positions]`, or `[channels out, channels]`.

    Returns:
        Both as rows, `[channels, values]`.
    """
    rows = x.flatten(1)
    return ((x @ matrix).flatten(1), rows) if matrix.ndim == 3 else (matrix @ rows, None)


class _MixFunction(torch.autograd.Function):
    """A matrix product, GELU, BatchNorm and a residual, all of it one function.

    `bias` is that of the convolution; `weight`, `shift` (its bias) and `center` (its running mean)
    are those of BatchNorm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor,
        weight: Tensor,
        shift: Tensor,
        center: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, residual = _multiply(x, matrix)
        # A center near the mean keeps the variance from being a small difference of large numbers.
        sums = _sum(rows, bias, center)
        y, mean, variance = _normalize(rows, residual, bias, sums, center, weight, shift, eps)
        ctx.save_for_backward(x, matrix, rows, bias, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return y.view(-1, *x.shape[1:]), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, matrix, rows, bias, weight, mean, variance = ctx.saved_tensors
        grad = grad.contiguous()
        sums = _sum_gradient(grad.flatten(1), rows, bias, mean)
        grad_z, grad_bias, grad_weight = _input_gradient(
            grad.flatten(1), rows, bias, sums, mean, variance, weight, ctx.eps
        )
        grad_x = None
        if matrix.ndim == 3:
            grad_z = grad_z.view_as(grad)
            if ctx.needs_input_grad[0]:
                # With that of the residual, in place: nothing else needs the gradient.
                grad_x = grad.baddbmm_(grad_z, matrix.mT)
            grad_matrix = x.mT @ grad_z
        else:
            if ctx.needs_input_grad[0]:
                grad_x = (matrix.mT @ grad_z).view_as(x)
            grad_matrix = grad_z @ x.flatten(1).mT
        return grad_x, grad_matrix, grad_bias, grad_weight, sums[0], None, None


def _mix(x: Tensor, matrix: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Mix positions or channels of `[channels, images, positions]`, as `ConvMixerLayer` does."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None and norm.momentum is not None
    if not norm.training:
        rows, residual = _multiply(x, matrix)
        sums = (torch.zeros_like(mean), variance * rows.shape[1])  # what gives these statistics
        y = _normalize(rows, residual, bias, sums, mean, norm.weight, norm.bias, norm.eps)[0]
        return y.view(-1, *x.shape[1:])
    y, batch_mean, batch_variance = _MixFunction.apply(
        x, matrix, bias, norm.weight, norm.bias, mean, norm.eps
    )
    count = y[0].numel()
    with torch.no_grad():
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        mean.lerp_(batch_mean, norm.momentum)
        variance.lerp_(batch_variance * (count / (count - 1)), norm.momentum)
    return y


def _pad(x: Tensor, dim: int) -> Tensor:
    """Add zeros at the end of a dimension, up to a multiple of `ALIGNMENT`."""
    missing = -x.shape[dim] % ALIGNMENT
    return F.pad(x, (0, missing) if dim == 1 else (0, 0, 0, missing))


@cache
@torch.inference_mode(False)
def _find_pairs(
    kernel_size: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return which weight connects which positions: `[weights, positions * positions]`, 0 or 1."""
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    y, x = y.repeat_interleave(columns), x.repeat(rows)
    # [positions in, positions out]: the row and the column of the weight between them.
    dy = y[:, None] - y[None, :] + kernel_size // 2
    dx = x[:, None] - x[None, :] + kernel_size // 2
    connected = (dy >= 0) & (dy < kernel_size) & (dx >= 0) & (dx < kernel_size)
    weight = torch.where(connected, dy * kernel_size + dx, -1).flatten()
    weights = torch.arange(kernel_size**2, device=device)
    return _pad((weight == weights[:, None]).to(dtype), dim=0)


def _make_toeplitz(kernels: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Turn depthwise kernels `[channels, 1, k, k]` into `[channels, positions, positions]`."""
    pairs = _find_pairs(kernels.shape[-1], rows, columns, kernels.device, dtype)
    matrices = _pad(kernels.flatten(1), dim=1).to(dtype) @ pairs
    return matrices.view(-1, rows * columns, rows * columns)


class FastOnGPU(nn.Module):
    """A ConvMixer computed as above: same parameters, buffers, results and gradients.

    As with the model itself, `torch.autocast` has all but statistics and parameters in bfloat16.

    Args:
        model: It must be one that `can_speed_up` takes. Where its parameters need no gradients, as
            a teacher's, they must not change any more.
    """

    def __init__(self, model: ConvMixer) -> None:
        super().__init__()
        self.model = model
        self._frozen: dict[Hashable, Tensor] = {}  # matrices of layers by size and dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to logits `[batch, num_classes]`."""
        model, kind = self.model, images.device.type
        size = model.patch_emb.patch_size
        rows, columns = images.shape[2] // size, images.shape[3] // size
        if rows * columns > MAX_POSITIONS:
            return model(images)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype

        # Patches: [channels of a patch, images, positions].
        patches = images[:, :, : rows * size, : columns * size].to(dtype)
        patches = patches.unflatten(3, (columns, size)).unflatten(2, (rows, size))
        patches = patches.permute(1, 3, 5, 0, 2, 4).flatten(4).flatten(0, 2)
        stem = model.patch_emb
        matrix = _pad(stem.conv.weight.flatten(1), dim=1).to(dtype)
        patches = _pad(patches.flatten(1), dim=0).view(-1, *patches.shape[1:])
        x = _mix(patches, matrix, _bias(stem.conv), stem.norm)

        # Layers: [d_model, images, positions].
        for layer in model.conv_mixer_layers:
            assert isinstance(layer, ConvMixerLayer)
            matrices = self._make_matrices(layer.depth_wise_conv.weight, rows, columns, dtype)
            x = _mix(x, matrices, _bias(layer.depth_wise_conv), layer.norm1)
            matrix = layer.point_wise_conv.weight.flatten(1).to(dtype)
            x = _mix(x, matrix, _bias(layer.point_wise_conv), layer.norm2)
        return model.classification.linear(x.mean(2).mT)

    def _make_matrices(
        self, kernels: Tensor, rows: int, columns: int, dtype: torch.dtype
    ) -> Tensor:
        if kernels.requires_grad:
            return _make_toeplitz(kernels, rows, columns, dtype)
        key = (kernels, rows, columns, dtype)
        if key not in self._frozen:
            self._frozen[key] = _make_toeplitz(kernels, rows, columns, dtype)
        return self._frozen[key]


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def can_speed_up(model: ConvMixer) -> bool:
    """Return whether `FastOnGPU` can stand in for a model: all must be as in the paper."""
    head = model.classification
    return (
        name_activation(model) == "gelu"
        and find_changed_part(model) is None
        and not any(isinstance(module, DropPath) for module in model.modules())
        and model.global_pool == "avg"
        and head.drop.p == 0
        and type(head.linear) is nn.Linear
    )

"""Depthwise kernels drawn with a covariance like that of trained ConvMixers."""

from __future__ import annotations

import torch
from torch import Tensor

from .convmixer import ConvMixer


def init_depthwise_kernels(model: ConvMixer) -> None:
    """Initialize the depthwise kernels of a model, smoother and wider the deeper the layer.

    After Trockman, Willmott & Kolter (2022, arXiv:2210.03651), with a simpler covariance and the
    mean square that PyTorch's own initialization gives the values of a layer. The numbers come
    from torch's global generator.
    """
    last = len(model.conv_mixer_layers) - 1
    for i in range(last + 1):
        depth = i / max(last, 1)
        variance = 0.16 + 0.32 * depth + 0.5 * 2.88 * depth**2  # the paper's, for CIFAR-10
        weight = model.get_parameter(f"conv_mixer_layers.{i}.depth_wise_conv.weight")
        values, vectors = torch.linalg.eigh(make_covariance(model.kernel_size, variance))
        # The symmetric root, which unlike others is the same wherever it is computed. Rounding
        # gives some eigenvalues a little below 0.
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        kernels = torch.randn(weight.shape[0], len(root), dtype=root.dtype) @ root
        kernels *= weight.detach().square().mean().sqrt().cpu() / kernels.square().mean().sqrt()
        weight.data.copy_(kernels.view_as(weight))


def make_covariance(kernel_size: int, variance: float) -> Tensor:
    """Make the covariance `[kernel_size², kernel_size²]` of the values of one kernel.

    It is a product of Gaussians, of the distance between two positions and of the distance of each
    from the center: values are alike where they are near one another, and small far outside.

    Args:
        kernel_size: Side of the kernel.
        variance: Of both Gaussians, in squared positions (the paper's sigma).
    """
    sides = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    positions = torch.cartesian_prod(sides, sides)
    alike = torch.exp(-torch.cdist(positions, positions).square() / (2 * variance))
    spread = torch.exp(-positions.square().sum(dim=1) / (2 * variance)).sqrt()
    return spread[:, None] * alike * spread

"""Depth-wise kernels drawn with the covariance that those of trained ConvMixers have."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import ConvMixer


def draw_kernels_by_depth(model: ConvMixer) -> None:
    """Draw the depth-wise kernels of a network anew, smoother and wider the deeper the layer.

    After Trockman, Willmott & Kolter (2022, arXiv:2210.03651), with two changes: the covariance
    is the nearest one like theirs that is positive semi-definite by construction, and the values
    of a layer keep the mean square that PyTorch's own initialisation gives them.
    """
    last = len(model.conv_mixer_layers) - 1
    for i in range(last + 1):
        depth = i / max(last, 1)
        width = 0.16 + 0.32 * depth + 0.5 * 2.88 * depth**2  # the paper's, for CIFAR-10
        weight = model.get_parameter(f"conv_mixer_layers.{i}.depth_wise_conv.weight")
        covariance = make_covariance(model.kernel_size, width)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()  # rounding gives some a little below 0
        kernels = torch.randn(weight.shape[0], len(root), dtype=root.dtype) @ root.T
        kernels *= weight.detach().square().mean().sqrt().cpu() / kernels.square().mean().sqrt()
        weight.data.copy_(kernels.view_as(weight))


def make_covariance(kernel_size: int, width: float) -> Tensor:
    """Make the covariance `[kernel_size², kernel_size²]` of the values of one kernel.

    Values are alike where their places are near one another, and small far from the centre.

    Args:
        kernel_size: Side of the kernel.
        width: The paper's sigma: variance of both Gaussians, in squared places.
    """
    sides = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    places = torch.cartesian_prod(sides, sides)
    alike = torch.exp(-torch.cdist(places, places).square() / (2 * width))
    spread = torch.exp(-places.square().sum(dim=1) / (2 * width)).sqrt()
    return spread[:, None] * alike * spread

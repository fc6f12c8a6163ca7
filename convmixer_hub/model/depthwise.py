"""Depthwise convolution with a backward pass that a CPU computes quickly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAST_KERNEL_SIZES = (3, 5, 7, 9)  # those that `cpu.cpp` and `inference.cpp` have


class _DepthWiseConvFunction(torch.autograd.Function):
    """Stride-1, odd-kernel, same-padded depthwise convolution; both gradients are convolutions.

    PyTorch's own weight gradient of a depthwise convolution runs on a slow generic path on CPUs.
    The same sums are a depthwise convolution of the image by the gradient of the output, with the
    batch folded into the channels, and for that there is a fast kernel.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, fast: bool = False) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.fast = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, c, h, w = x.shape
        kernel_size = weight.shape[-1]
        padding = kernel_size // 2

        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=padding, groups=c)
        if ctx.fast and ctx.needs_input_grad[1]:
            x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
            grads = torch.ops.convmixer_hub.depth_wise_gradients(x, grad, kernel_size)
            grad_weight, grad_bias = grads
            return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None
        if ctx.needs_input_grad[1]:
            images = x.reshape(1, n * c, h, w)
            kernels = grad.reshape(n * c, 1, h, w)
            products = F.conv2d(images, kernels, padding=padding, groups=n * c)  # (1, n*c, k, k)
            grad_weight = products.view(n, c, 1, kernel_size, kernel_size).sum(0)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None

    @staticmethod
    def jvp(
        ctx: Any,
        x_tangent: Tensor | None,
        weight_tangent: Tensor | None,
        bias_tangent: Tensor | None,
        fast: None,
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        options = {"padding": weight.shape[-1] // 2, "groups": weight.shape[0]}
        tangent = torch.zeros_like(x)
        if bias_tangent is not None:
            tangent = tangent + bias_tangent.view(-1, 1, 1)
        if x_tangent is not None:
            tangent = tangent + F.conv2d(x_tangent, weight, **options)
        if weight_tangent is not None:
            tangent = tangent + F.conv2d(x, weight_tangent, **options)
        return tangent


def _get_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution with these weights computes, as autocast decides."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


class DepthWiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1 and "same" padding: one kernel for each channel.

    It is an `nn.Conv2d` in every respect (parameters, initialization, state dict, result). Where
    it is trained eagerly on a CPU, in fp32 or under `torch.autocast`, the gradients come from a
    faster, equal formula.

    Args:
        d_model: Number of channels, in and out.
        kernel_size: Side of the square kernel, in patches; odd.

    Attributes:
        fast_weight_gradient: Take it from `cpu.cpp`; set by `cpu.speed_up_on_cpu`.
    """

    fast_weight_gradient = False

    def __init__(
        self,
        d_model: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_model,
            kernel_size,
            padding=kernel_size // 2,  # "same"; quantization and TorchScript need the number
            groups=d_model,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, d_model, height, width]` to the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript needs it to stand alone)
            if self._trains_eagerly_on_cpu(x):
                return self._convolve_fast(x)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _convolve_fast(self, x: Tensor) -> Tensor:
        dtype = _get_dtype(self.weight)
        weight = self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _DepthWiseConvFunction.apply(x.to(dtype), weight, bias, self.fast_weight_gradient)

    @torch.jit.unused
    def _trains_eagerly_on_cpu(self, x: Tensor) -> bool:
        if not isinstance(x, Tensor):  # a torch.fx proxy: record the plain convolution
            return False
        return (
            x.device.type == self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and _get_dtype(self.weight) in (torch.float32, torch.bfloat16)
            and x.dtype in (torch.float32, _get_dtype(self.weight))
            and x.dim() == 4
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and x.shape[0] > 0  # last: while tracing, a size is no number
        )

import pytest
import torch
from torch.nn import functional as F

from convmixer_hub.model import depthwise
from convmixer_hub.model.cpu import load_passes
from convmixer_hub.model.depthwise import DepthWiseConv2d


def result_and_gradients(conv, x):
    """The output, and what input, weight and bias get for one fixed gradient of it."""
    x = x.detach().requires_grad_()
    y = conv(x)
    direction = torch.arange(y.numel(), dtype=torch.float32).sin().to(y.dtype).view_as(y)
    return y, *torch.autograd.grad(y, [x, conv.weight, conv.bias], direction)


def make_pair(channels, kernel_size, fast):
    """Our convolution, and the plain one with the same weights."""
    conv = DepthWiseConv2d(channels, kernel_size)
    conv.fast_weight_gradient = fast
    assert load_passes()

    def plain(x):
        return F.conv2d(x, conv.weight, conv.bias, padding="same", groups=channels)

    plain.weight, plain.bias = conv.weight, conv.bias
    return conv, plain


SHAPES = [(1, 4, 5, 5), (3, 8, 16, 16), (2, 5, 12, 7), (2, 3, 1, 2)]
SHAPES_FOR_FAST = [(1, 16, 5, 5), (3, 48, 16, 16), (2, 16, 12, 7), (2, 32, 1, 2)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel_size", "shape", "fast"),
    [(kernel_size, shape, False) for kernel_size in (1, 3, 5, 7, 9) for shape in SHAPES]
    + [(kernel_size, shape, True) for kernel_size in (3, 5, 7, 9) for shape in SHAPES_FOR_FAST],
)
def test_gradients_are_those_of_the_plain_convolution(kernel_size, shape, fast, memory_format):
    conv, plain = make_pair(shape[1], kernel_size, fast)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    found = result_and_gradients(conv, x)
    assert found[0].grad_fn.name() == "_DepthWiseConvFunctionBackward"
    torch.testing.assert_close(found, result_and_gradients(plain, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
def test_under_autocast_it_is_as_exact_as_the_plain_convolution(kernel_size, memory_format, fast):
    conv, plain = make_pair(16, kernel_size, fast)
    x = torch.randn(16, 16, 12, 12).contiguous(memory_format=memory_format)
    exact = result_and_gradients(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).grad_fn.name() == "_DepthWiseConvFunctionBackward"
        found, expected = (result_and_gradients(each, x) for each in (conv, plain))
    for ours, plain_one, reference in zip(found, expected, exact):
        assert ours.dtype == plain_one.dtype
        errors = [(each.float() - reference).norm() for each in (ours, plain_one)]
        assert errors[0] <= 1.2 * errors[1] + 1e-3 * reference.norm()


def test_the_formula_is_exact_to_second_order():
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 3, 4, 5), (3, 1, 3, 3), (3,)]
    )
    function = depthwise._DepthWiseConvFunction.apply
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_frozen_parts_get_no_gradient(frozen, fast):
    conv = DepthWiseConv2d(16, 3)
    conv.fast_weight_gradient = fast
    x = torch.randn(2, 16, 6, 6, requires_grad=frozen != "input")
    parts = {"weight": conv.weight, "bias": conv.bias, "input": x}
    parts[frozen].requires_grad_(False)
    conv(x).sum().backward()
    assert {name for name, part in parts.items() if part.grad is None} == {frozen}


def test_elsewhere_it_is_the_plain_convolution():
    conv = DepthWiseConv2d(4, 3)
    x = torch.randn(2, 4, 6, 6)
    names = [conv.double()(x.double()).grad_fn.name(), conv.float()(x[0]).grad_fn.name()]
    with torch.autocast("cpu", torch.float16):
        names.append(conv(x).grad_fn.name())
        with pytest.raises(RuntimeError, match="type"):
            conv(x.double())
    names.append(conv(x[:0]).grad_fn.name())
    with pytest.raises(RuntimeError, match="type"):
        conv(x.bfloat16())
    assert "_DepthWiseConvFunctionBackward" not in names
    with torch.no_grad():
        assert conv(x).grad_fn is None


def test_forward_and_reverse_jacobians_agree():
    conv = DepthWiseConv2d(2, 3)
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(torch.func.jacfwd(conv)(x), torch.func.jacrev(conv)(x))
    tangents = (torch.randn_like(x), torch.randn_like(conv.weight), torch.randn_like(conv.bias))
    function = depthwise._DepthWiseConvFunction.apply
    inputs = (x, conv.weight.detach(), conv.bias.detach())
    _, found = torch.func.jvp(function, inputs, tangents)
    _, expected = torch.func.jvp(
        lambda *inputs: F.conv2d(*inputs, padding="same", groups=2), inputs, tangents
    )
    torch.testing.assert_close(found, expected)


def test_it_works_under_functional_transforms():
    conv = DepthWiseConv2d(4, 3)
    x = torch.randn(3, 2, 4, 6, 6)
    parameters = dict(conv.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(conv, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        one = torch.func.grad(loss)(parameters, x[i])
        for name, gradient in one.items():
            torch.testing.assert_close(each[name][i], gradient, atol=1e-4, rtol=1e-4)

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from convmixer_hub import ModelSizeError, speed_up_on_cpu
from convmixer_hub.model import cpu
from convmixer_hub.model.convmixer import ConvMixer
from convmixer_hub.model.cpu import (
    FastDepthwiseConv2d,
    GELUBatchNorm2d,
    choose_dtype,
    load_passes,
)


@pytest.fixture(autouse=True)
def _passes():
    assert load_passes()


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "expanded gradient"])
@pytest.mark.parametrize("shape", [(2, 48, 5, 7), (4, 16, 8, 8)])
def test_result_gradients_and_statistics_are_those_of_the_two_modules(shape, kind):
    separate = nn.BatchNorm2d(shape[1])
    nn.init.normal_(separate.weight)
    nn.init.normal_(separate.bias)
    separate.running_mean += 3  # far from the mean of the batch
    together = GELUBatchNorm2d(shape[1])
    together.load_state_dict(separate.state_dict())
    x = 3 * torch.randn(shape)
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    direction = torch.randn(shape)
    if kind == "expanded gradient":  # as the mean over all places gives it
        direction = torch.randn(*shape[:2], 1, 1).expand(shape)
    found = []
    for norm, y in [(separate, lambda x: separate(F.gelu(x))), (together, together)]:
        x = x.detach().requires_grad_()
        result = y(x)
        gradients = torch.autograd.grad(result, [x, norm.weight, norm.bias], direction)
        found.append([result, *gradients, *norm.buffers()])
        norm.eval()
        found[-1].append(y(x))
    torch.testing.assert_close(found[1], found[0], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_an_almost_constant_channel_far_from_zero_gives_numbers_at_once(spread):
    x = 100.0 + spread * torch.randn(8, 16, 16, 16)
    norm = GELUBatchNorm2d(16)
    assert norm(x).isfinite().all() and (norm.running_var >= 0).all()
    for _ in range(200):  # until the running mean is there
        y = norm(x)
    torch.testing.assert_close(y, nn.BatchNorm2d(16)(x), atol=5e-3, rtol=1e-3)


def run_gelu(z):
    """Give GELU and its slope as `cpu.cpp` computes them."""
    z = z.view(-1, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    y, slope, _ = torch.ops.convmixer_hub.activate(z, torch.zeros(16))
    return y.flatten(), slope.flatten()


def test_gelu_is_exact_to_rounding():
    z = torch.linspace(-12, 12, 160_000, dtype=torch.float64).requires_grad_()
    exact = F.gelu(z)
    [slope] = torch.autograd.grad(exact.sum(), z)
    for found, expected in zip(run_gelu(z.detach().float()), (exact.detach(), slope)):
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    for found, expected in zip(run_gelu(z.detach().bfloat16()), (exact.detach(), slope)):
        # What rounding z moves, the result may be off by; and by its own rounding.
        torch.testing.assert_close(found.double(), expected, atol=3e-2, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_denormal_number_slows_a_cpu_down(dtype):
    for values in run_gelu(torch.linspace(-40, 40, 16_000).to(dtype)):
        assert ((values == 0) | (values.abs() >= torch.finfo(dtype).tiny)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_any_more_is_passed_on(value):
    norm = GELUBatchNorm2d(16)
    x = torch.zeros(2, 16, 3, 3)
    x[1, 5, 0, 0] = value
    finite = norm(x).isfinite().all(dim=0).all(dim=-1).all(dim=-1)
    assert finite.tolist() == [i != 5 for i in range(16)]


def test_bfloat16_is_rounded_to_the_nearest():
    y = torch.randn(4, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    mean, scale, shift = torch.zeros(16), torch.rand(16), torch.rand(16)
    sums = torch.stack([torch.zeros(16), torch.ones(16)])  # mean 0, variance 1
    found = torch.ops.convmixer_hub.normalize(y, sums, mean, scale, shift, 1, 0.0)[0]
    expected = torch.addcmul(shift.view(-1, 1, 1), y.float(), scale.view(-1, 1, 1)).bfloat16()
    assert (found == expected).float().mean() > 0.99  # a fused product may round the other way
    torch.testing.assert_close(found, expected, atol=0, rtol=2**-7)


def make_convolutions(channels, kernel_size):
    """Our depthwise convolution, and the plain one with the same weights."""
    size = {"kernel_size": kernel_size, "padding": kernel_size // 2, "groups": channels}
    fast = FastDepthwiseConv2d(channels, channels, **size)
    plain = nn.Conv2d(channels, channels, **size)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def result_and_gradients(conv, x):
    """The output, and what input, weight and bias get for one fixed gradient of it."""
    x = x.detach().requires_grad_()
    y = conv(x)
    direction = torch.arange(y.numel(), dtype=torch.float32).sin().to(y.dtype).view_as(y)
    return y, *torch.autograd.grad(y, [x, conv.weight, conv.bias], direction)


def is_fast(y):
    return y.grad_fn.name() == "_DepthwiseConvFunctionBackward"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 16, 5, 5), (3, 48, 16, 16), (2, 16, 12, 7), (2, 32, 1, 2)])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
def test_depthwise_gradients_are_those_of_the_plain_convolution(kernel_size, shape, memory_format):
    fast, plain = make_convolutions(shape[1], kernel_size)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    found = result_and_gradients(fast, x)
    assert is_fast(found[0])
    torch.testing.assert_close(found, result_and_gradients(plain, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
def test_under_autocast_depthwise_gradients_are_as_exact(kernel_size):
    fast, plain = make_convolutions(16, kernel_size)
    x = torch.randn(16, 16, 12, 12)
    exact = result_and_gradients(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fast(fast(x))
        found, expected = (result_and_gradients(each, x) for each in (fast, plain))
    for ours, plain_one, reference in zip(found, expected, exact):
        assert ours.dtype == plain_one.dtype
        errors = [(each.float() - reference).norm() for each in (ours, plain_one)]
        assert errors[0] <= 1.2 * errors[1] + 1e-3 * reference.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_frozen_parts_get_no_gradient(frozen):
    conv, _ = make_convolutions(16, 3)
    x = torch.randn(2, 16, 6, 6, requires_grad=frozen != "input")
    parts = {"weight": conv.weight, "bias": conv.bias, "input": x}
    parts[frozen].requires_grad_(False)
    conv(x).sum().backward()
    assert {name for name, part in parts.items() if part.grad is None} == {frozen}


def test_a_fused_model_trains_as_the_plain_one():
    plain = timm.create_model("convmixer_96_8_ks5_p1")
    fast = copy.deepcopy(plain)
    speed_up_on_cpu(fast)
    assert sum(isinstance(module, GELUBatchNorm2d) for module in fast.modules()) == 17
    assert list(fast.state_dict()) == list(plain.state_dict())
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for model in (plain, fast):
        F.cross_entropy(model(x), labels).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), fast.parameters()):
        difference = (parameter.grad - expected.grad).norm()
        assert difference <= 1e-4 * expected.grad.norm() + 1e-6, name
    torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), atol=1e-4, rtol=1e-4)


def test_under_autocast_a_fused_model_is_as_exact_as_the_plain_one():
    plain = timm.create_model("convmixer_96_8_ks5_p1")
    fast = copy.deepcopy(plain)
    speed_up_on_cpu(fast)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    before = copy.deepcopy(plain.state_dict())
    found = []
    for model, in_bf16 in [(plain, False), (plain, True), (fast, True)]:
        model.load_state_dict(before)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            logits = model(x).float()
        F.cross_entropy(logits, labels).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters()]
        averages = [buffer.flatten() for buffer in model.buffers()]
        found.append([logits.detach(), torch.cat(gradients), torch.cat(averages)])
    for exact, plain_one, ours in zip(*found):
        errors = [(each - exact).norm() / exact.norm() for each in (plain_one, ours)]
        assert errors[1] <= 1.2 * errors[0] + 1e-3


@pytest.mark.parametrize("change", [{"act_layer": nn.ReLU}, {"d_model": 24}])
def test_other_activations_and_widths_stay_as_they_are(change):
    model = ConvMixer(**{"d_model": 16, "n_layers": 1, "kernel_size": 3, "patch_size": 2, **change})
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    speed_up_on_cpu(model)
    assert not any(isinstance(module, GELUBatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kernel_size", [1, 11])
def test_other_kernel_sizes_keep_their_convolution(kernel_size):
    model = ConvMixer(16, 1, kernel_size=kernel_size, patch_size=2)
    speed_up_on_cpu(model)
    assert type(model.conv_mixer_layers[0].depth_wise_conv) is nn.Conv2d
    model(torch.randn(2, 3, 16, 16)).sum().backward()


def use_double(model, x):
    return model.double()(x.double())


def use_float16(model, x):
    with torch.autocast("cpu", torch.float16):
        return model(x)


def use_compiled(model, x):
    return torch.compile(model, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("use", [use_double, use_float16, use_compiled])
def test_what_the_fast_passes_do_not_take_is_computed_as_before(use):
    plain = ConvMixer(16, 1, kernel_size=3, patch_size=2)
    fast = copy.deepcopy(plain)
    speed_up_on_cpu(fast)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(use(fast, x), use(plain, x))
    one_value = torch.randn(1, 3, 2, 2)
    for model in (plain.float(), fast.float()):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(one_value)


def test_speeding_up_keeps_parameters_and_what_is_frozen():
    model = ConvMixer(16, 1, kernel_size=3, patch_size=2)
    model.conv_mixer_layers[0].norm1.requires_grad_(False)
    before = dict(model.named_parameters())
    speed_up_on_cpu(model)
    speed_up = dict(model.named_parameters())
    assert list(speed_up) == list(before)
    assert all(speed_up[name] is parameter for name, parameter in before.items())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert model.conv_mixer_layers[0].norm1.weight.grad is None


def test_other_models_are_not_sped_up():
    with pytest.raises(ModelSizeError, match="a ResNet cannot be sped up: give a ConvMixer of"):
        speed_up_on_cpu(timm.create_model("test_resnet"))
    model = ConvMixer(16, 1, kernel_size=3, patch_size=2)
    speed_up_on_cpu(model)
    with pytest.raises(ModelSizeError, match="norm is GELUBatchNorm2d.*cannot be sped up"):
        speed_up_on_cpu(model)


def test_the_faster_type_is_found_by_trying(monkeypatch):
    model = ConvMixer(16, 1, kernel_size=3, patch_size=2)
    ticks = iter(range(1000))
    slow = {"fp32": 0.0, "bf16": 0.0}
    offset = 0.0

    def tick():  # each try reads the clock before and after; tries take turns, fp32 first
        nonlocal offset
        count = next(ticks)
        offset += slow[("fp32", "bf16")[count // 2 % 2]] * (count % 2)
        return offset

    monkeypatch.setattr(cpu.time, "perf_counter", tick)
    for faster, slower, dtype in [
        ("fp32", "bf16", torch.float32),
        ("bf16", "fp32", torch.bfloat16),
    ]:
        slow.update({faster: 0.001, slower: 0.003})
        found, reason = choose_dtype(model, torch.device("cpu"), 32)
        assert found is dtype
        assert reason == f"{faster}: a layer takes 1.0 ms, 3.0 ms in {slower}"


def test_choosing_a_type_leaves_the_model_as_it_is():
    model = timm.create_model("convmixer_96_8_ks5_p1").eval()
    speed_up_on_cpu(model)
    before = copy.deepcopy(model.state_dict())
    choose_dtype(model, torch.device("cpu"), 32)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert not model.training and all(p.grad is None for p in model.parameters())

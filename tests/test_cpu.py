import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from convmixer_hub import ModelSizeError, speed_up_on_cpu
from convmixer_hub.model import cpu
from convmixer_hub.model.convmixer import ConvMixer
from convmixer_hub.model.cpu import FastConvMixerLayer, choose_precision, load_passes

from .conftest import ARCH


@pytest.fixture(autouse=True)
def _passes():
    assert load_passes()


def fuse(x, act, norm):
    """GELU and BatchNorm at once; fail if they are not."""
    y = cpu._activate_and_normalize(x, act, norm)
    assert "_GELUBatchNormFunction" in y.grad_fn.name()
    return y


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "expanded gradient"])
@pytest.mark.parametrize("shape", [(2, 48, 5, 7), (4, 16, 8, 8)])
def test_result_gradients_and_statistics_are_those_of_the_two_modules(shape, kind):
    separate = nn.BatchNorm2d(shape[1])
    nn.init.normal_(separate.weight)
    nn.init.normal_(separate.bias)
    separate.running_mean += 1000  # far from the mean of the batch
    together = copy.deepcopy(separate)
    x = 3 * torch.randn(shape)
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    direction = torch.randn(shape)
    if kind == "expanded gradient":  # as the mean over all places gives it
        direction = torch.randn(*shape[:2], 1, 1).expand(shape)
    found = []
    for norm, run in [(separate, lambda x, act, norm: norm(act(x))), (together, fuse)]:
        x = x.detach().requires_grad_()
        result = run(x, nn.GELU(), norm)
        gradients = torch.autograd.grad(result, [x, norm.weight, norm.bias], direction)
        found.append([result, *gradients, *norm.buffers()])
    torch.testing.assert_close(found[1], found[0], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_an_almost_constant_channel_far_from_zero_is_normalized(spread):
    x = 100.0 + spread * torch.randn(8, 16, 16, 16)
    norm = nn.BatchNorm2d(16)
    y = fuse(x, nn.GELU(), norm)
    assert (norm.running_var >= 0).all()
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
    x = torch.zeros(2, 16, 3, 3)
    x[1, 5, 0, 0] = value
    finite = fuse(x, nn.GELU(), nn.BatchNorm2d(16)).isfinite().all(dim=0).all(dim=-1).all(dim=-1)
    assert finite.tolist() == [i != 5 for i in range(16)]


def test_bfloat16_is_rounded_to_the_nearest():
    y = torch.randn(4, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    mean, scale, shift = torch.zeros(16), torch.rand(16), torch.rand(16)
    sums = torch.stack([torch.zeros(16), torch.ones(16)])  # mean 0, variance 1
    found = torch.ops.convmixer_hub.normalize(y, sums, mean, scale, shift, 1, 0.0)[0]
    expected = torch.addcmul(shift.view(-1, 1, 1), y.float(), scale.view(-1, 1, 1)).bfloat16()
    assert (found == expected).float().mean() > 0.99  # a fused product may round the other way
    torch.testing.assert_close(found, expected, atol=0, rtol=2**-7)


def make_conv(channels, kernel_size):
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


def convolve_fast(x, conv):
    """A depthwise convolution with our gradients; fail if they are not."""
    y = cpu._convolve(x, conv)
    assert "_DepthwiseConvFunction" in y.grad_fn.name()
    return y


def result_and_gradients(x, conv, fast):
    """The output, and what input, weight and bias get for one fixed gradient of it."""
    x = x.detach().requires_grad_()
    y = convolve_fast(x, conv) if fast else conv(x)
    direction = torch.arange(y.numel(), dtype=torch.float32).sin().to(y.dtype).view_as(y)
    return y, *torch.autograd.grad(y, [x, conv.weight, conv.bias], direction)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(1, 16, 5, 5), (3, 48, 16, 16), (2, 16, 12, 7), (2, 32, 1, 2), (3, 5, 9, 8)]
)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11])
def test_depthwise_gradients_are_those_of_the_plain_convolution(kernel_size, shape, memory_format):
    conv = make_conv(shape[1], kernel_size)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    found, expected = (result_and_gradients(x, conv, fast) for fast in (True, False))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9, 11])
def test_under_autocast_depthwise_gradients_are_as_exact(kernel_size):
    conv = make_conv(16, kernel_size)
    x = torch.randn(16, 16, 12, 12)
    exact = result_and_gradients(x, conv, fast=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (result_and_gradients(x, conv, fast) for fast in (True, False))
    for ours, plain_one, reference in zip(found, expected, exact):
        assert ours.dtype == plain_one.dtype
        errors = [(each.float() - reference).norm() for each in (ours, plain_one)]
        assert errors[0] <= 1.2 * errors[1] + 1e-3 * reference.norm()


@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_frozen_parts_get_no_gradient(frozen, kernel_size):
    conv = make_conv(16, kernel_size)
    x = torch.randn(2, 16, 6, 6, requires_grad=frozen != "input")
    parts = {"weight": conv.weight, "bias": conv.bias, "input": x}
    parts[frozen].requires_grad_(False)
    convolve_fast(x, conv).sum().backward()
    assert {name for name, part in parts.items() if part.grad is None} == {frozen}


def test_under_autocast_a_fused_model_is_as_exact_as_the_plain_one():
    plain = timm.create_model(ARCH)
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


def make_pair(**options):
    """A plain model, and the same sped up."""
    plain = ConvMixer(**{"d_model": 16, "n_layers": 2, "kernel_size": 3, "patch_size": 2} | options)
    fast = copy.deepcopy(plain)
    speed_up_on_cpu(fast)
    return plain, fast


def train_step(model, x):
    """One step's logits, gradients and running statistics; drop path is the same each time."""
    torch.manual_seed(0)
    logits = model(x.to(model.classification.linear.weight.dtype))
    F.cross_entropy(logits, torch.arange(len(x))).backward()
    return {
        "logits": logits,
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        **{name: buffer.float() for name, buffer in model.named_buffers()},
    }


def assert_same_step(fast, plain, x):
    tolerance = 0.1 if plain.classification.linear.weight.dtype is torch.bfloat16 else 1e-4
    found = train_step(fast, x)
    for name, expected in train_step(plain, x).items():
        if expected is None:
            assert found[name] is None, name
        else:
            assert (found[name] - expected).norm() <= tolerance * expected.norm() + 1e-6, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_model": 96, "n_layers": 8, "kernel_size": 5, "patch_size": 1},
        {"act_layer": nn.ReLU},
        {"d_model": 24},
        {"kernel_size": 1},
        {"kernel_size": 11},
        {"drop_path_rate": 0.5},
    ],
    ids=str,
)
def test_a_fused_model_trains_as_the_plain_one(options):
    plain, fast = make_pair(**options)
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 16, 16)
    assert_same_step(fast, plain, x)
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), atol=1e-4, rtol=1e-4)


def replacing(part, name, value):
    return lambda model: setattr(model.get_submodule(part), name, copy.deepcopy(value))


@pytest.mark.parametrize(
    "change",
    [
        replacing("conv_mixer_layers.0", "act1", nn.ReLU()),
        replacing("conv_mixer_layers.0", "norm2", nn.GroupNorm(4, 16)),
        replacing("conv_mixer_layers.1", "depth_wise_conv", nn.Conv2d(16, 16, 3, padding=1)),
        replacing("conv_mixer_layers.1.depth_wise_conv", "padding_mode", "reflect"),
        replacing("conv_mixer_layers.1.depth_wise_conv", "bias", None),
        replacing("patch_emb.norm", "momentum", None),  # as torch.optim.swa_utils.update_bn does
        lambda model: timm.utils.freeze(model, ["patch_emb"]),
        nn.Module.double,
        nn.Module.bfloat16,
        nn.Module.eval,
    ],
)
def test_other_parts_and_types_are_computed_as_before(change):
    plain, fast = make_pair()
    for model in (plain, fast):
        change(model)
    assert_same_step(fast, plain, torch.randn(4, 3, 16, 16))


def test_with_gradient_checkpointing_statistics_are_as_without_speed():
    plain, fast = make_pair()
    x = torch.randn(4, 3, 16, 16)
    for model in (plain, fast):
        model.set_grad_checkpointing()
    for _ in range(3):
        assert_same_step(fast, plain, x)


def test_pruned_parts_and_hooks_work_as_without_speed():
    called = []
    for model in make_pair():
        layer = model.conv_mixer_layers[0]
        prune.l1_unstructured(layer.depth_wise_conv, "weight", 0.5)
        modules = [module for module in model.modules() if not list(module.children())]
        counts = []
        for module in modules:
            module.register_forward_hook(lambda *_, counts=counts: counts.append(1))
        for _ in range(2):
            model(torch.randn(4, 3, 16, 16)).sum().backward()
        called.append(len(counts))
    assert called[0] == called[1] == 2 * len(modules)


@pytest.mark.filterwarnings("ignore")  # torch's own, of tracing
@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: torch.autocast("cpu", torch.float16)(model.forward)(x),
        lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
        lambda model, x: torch.jit.trace(model, x, check_trace=False)(x),
        lambda model, x: model.set_grad_checkpointing() or model(x),
    ],
    ids=["float16", "compiled", "traced", "checkpoints"],
)
def test_it_is_used_as_the_plain_model(use):
    plain, fast = make_pair()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(use(fast, x), use(plain, x), atol=2e-3, rtol=2e-3)


def test_one_value_per_channel_is_an_error_as_before():
    for model in make_pair():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.randn(1, 3, 2, 2))


def test_a_fast_model_stays_one_when_it_is_pickled(run_python, tmp_path):
    plain, fast = make_pair()
    torch.save(fast, tmp_path / "model.pth")
    x = torch.ones(2, 3, 16, 16)
    found = run_python(f"""
import torch
model = torch.load({str(tmp_path / "model.pth")!r}, weights_only=False)
print(model(torch.ones(2, 3, 16, 16)).norm().item(), type(model.patch_emb).__name__)
""")
    norm, name = found.split()
    assert name == "FastPatchEmbeddings"
    assert float(norm) == pytest.approx(plain(x).norm().item(), rel=1e-3)


def test_speeding_up_keeps_what_there_is():
    model = ConvMixer(16, 1, kernel_size=3, patch_size=2)
    model.conv_mixer_layers[0].norm1.requires_grad_(False)
    before = list(model.named_parameters())
    speed_up_on_cpu(model)
    speed_up_on_cpu(model)
    for (name, parameter), (name_after, after) in zip(before, model.named_parameters()):
        assert name_after == name and after is parameter
    assert type(model.conv_mixer_layers[0]) is FastConvMixerLayer
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert model.conv_mixer_layers[0].norm1.weight.grad is None


def test_other_models_are_not_sped_up():
    with pytest.raises(ModelSizeError, match="a ResNet cannot be sped up: give a ConvMixer of"):
        speed_up_on_cpu(timm.create_model("test_resnet"))


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
    for faster, slower in [("fp32", "bf16"), ("bf16", "fp32")]:
        slow.update({faster: 0.001, slower: 0.003})
        found = choose_precision(model, torch.device("cpu"), 32)
        assert found == (faster, f"a layer takes 1.0 ms, 3.0 ms in {slower}")


def test_choosing_a_type_leaves_the_model_as_it_is():
    model = timm.create_model(ARCH).eval()
    speed_up_on_cpu(model)
    before = copy.deepcopy(model.state_dict())
    choose_precision(model, torch.device("cpu"), 32)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert not model.training and all(p.grad is None for p in model.parameters())

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from convmixer_hub import fused, machine
from convmixer_hub.fused import GELUBatchNorm2d, speed_up_on_cpu
from convmixer_hub.model import ConvMixer

from .conftest import CHECKOUT


@pytest.fixture(params=["compiled", "plain"])
def _compiler(request, monkeypatch):
    """With a C++ compiler, and on a machine without one."""
    if request.param == "plain":
        monkeypatch.setattr(machine, "can_compile", lambda: False)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "expanded gradient"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 16, 8, 8)])
@pytest.mark.usefixtures("_compiler")
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


@pytest.mark.slow
def test_any_number_of_shapes_is_compiled():
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["total"] - frames["ok"]
    for batch_size in range(1, 12):
        fused._scale_and_shift(torch.ones(batch_size, 2, 3, 3), torch.ones(2), torch.zeros(2))
    assert frames["ok"] and frames["total"] - frames["ok"] == before


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_an_almost_constant_channel_far_from_zero_gives_numbers_at_once(spread):
    x = 100.0 + spread * torch.randn(8, 1, 16, 16)
    norm = GELUBatchNorm2d(1)
    assert norm(x).isfinite().all() and norm.running_var >= 0
    for _ in range(200):  # until the running mean is there
        y = norm(x)
    torch.testing.assert_close(y, nn.BatchNorm2d(1)(x), atol=5e-3, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_statistics_of_their_batches(tmp_path):
    code = """
import torch
from torch import nn
from torch.nn import functional as F
from convmixer_hub.fused import GELUBatchNorm2d
from convmixer_hub.machine import get_rank, join_processes, sum_over_processes

torch.manual_seed(0)
x, direction = torch.randn(2, 6, 4, 5, 5)
half = slice(3 * get_rank(), 3 * get_rank() + 3)
whole, shared = nn.BatchNorm2d(4), GELUBatchNorm2d(4)
x.requires_grad_()
part = x[half].detach().requires_grad_()
expected = whole(F.gelu(x))
expected.backward(direction)
with join_processes():
    found = shared(part)
    found.backward(direction[half])
    pairs = [(found, expected[half]), (part.grad, x.grad[half])]
    for name in ("weight", "bias"):
        gradient = sum_over_processes(shared.get_parameter(name).grad)
        pairs.append((gradient, whole.get_parameter(name).grad))
    pairs += zip(shared.buffers(), whole.buffers())
    for pair in pairs:
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
"""
    (tmp_path / "check.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(tmp_path / "check.py")]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_gradient_formula_is_exact():
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(3, 2, 4, 3), (2,), (2,)]
    )

    def function(x, weight, bias):
        centre = torch.zeros(2, dtype=torch.float64)
        return fused._GELUBatchNormFunction.apply(x, weight, bias, centre, 1e-5)[0]

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    expected = F.batch_norm(F.gelu(x), None, None, weight, bias, training=True)
    torch.testing.assert_close(function(x, weight, bias), expected)


def test_gelu_is_exact_to_rounding():
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64).requires_grad_()
    exact = F.gelu(z)
    [slope] = torch.autograd.grad(exact.sum(), z)
    y, fast_slope = fused._gelu_and_slope(z.detach().float())
    torch.testing.assert_close(y.double(), exact.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fast_slope.double(), slope, atol=1e-6, rtol=1e-6)


def test_no_denormal_number_slows_a_cpu_down():
    z = torch.linspace(-40, 40, 10_000)
    for values in fused._gelu_and_slope(z):
        assert ((values == 0) | (values.abs() >= torch.finfo(values.dtype).tiny)).all()


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


@pytest.mark.usefixtures("_compiler")
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


def test_another_activation_stays_as_it_is():
    model = ConvMixer(8, 1, kernel_size=3, patch_size=2, act_layer=nn.ReLU)
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    speed_up_on_cpu(model)
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 3
    torch.testing.assert_close(model(x), before)

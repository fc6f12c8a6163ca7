"""Training on a GPU: what it computes is tested on CPUs, too."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from convmixer_hub.model import gpu
from convmixer_hub.model.convmixer import ConvMixer
from convmixer_hub.model.gpu import FastOnGPU, _gelu, can_speed_up
from convmixer_hub.training.muon import fast_muon
from convmixer_hub.training.network import _has_room, build_network
from convmixer_hub.training.settings import TrainingSettings
from convmixer_hub.training.step import TrainingStep

from .conftest import on_gpu, randomise_norms


def train_step(network, model, images, labels):
    """Give logits and all gradients of one step in training."""
    logits = network(images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7, "patch_size": 2},
        {"kernel_size": 5, "patch_size": 1},
        {"kernel_size": 9, "patch_size": 3},  # 16 pixels are no multiple of 3
        {"kernel_size": 3, "patch_size": 4, "in_chans": 1},
    ],
)
def test_gives_logits_gradients_and_statistics_of_the_model(options):
    model = ConvMixer(16, 3, num_classes=5, **options).double()
    images, labels = torch.randn(6, model.in_chans, 16, 12).double(), torch.arange(6) % 5
    reference = copy.deepcopy(model)
    for _ in range(2):  # the second time with a center other than 0
        logits, grads = train_step(FastOnGPU(model), model, images, labels)
        expected, expected_grads = train_step(reference, reference, images, labels)
        assert torch.allclose(logits, expected, atol=1e-10)
        for name, grad in grads.items():
            assert torch.allclose(grad, expected_grads[name], atol=1e-10), name
        for (name, mine), theirs in zip(model.named_buffers(), reference.buffers()):
            assert torch.allclose(mine, theirs, atol=1e-10), name


def test_frozen_kernels_are_turned_into_matrices_once(monkeypatch):
    model = ConvMixer(16, 3, 5, 2, num_classes=5).double().eval()
    randomise_norms(model)
    images = torch.randn(2, 3, 16, 12).double()
    fast = FastOnGPU(model.requires_grad_(False)).eval()
    expected = model(images)
    made, make = [], gpu._make_toeplitz
    monkeypatch.setattr(gpu, "_make_toeplitz", lambda *args: made.append(args) or make(*args))
    for _ in range(2):
        torch.testing.assert_close(fast(images), expected)
    assert len(made) == 3


def test_under_autocast_computes_in_bfloat16():
    model = timm.create_model("convmixer_cifar")
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    exact, exact_grads = train_step(model, model, images, labels)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits, grads = train_step(FastOnGPU(model), model, images, labels)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.05 * exact.norm()
    for name, grad in grads.items():
        if name.endswith("weight"):
            assert (grad - exact_grads[name]).norm() < 0.1 * exact_grads[name].norm(), name


def test_computes_gelu_in_fp32_as_exactly_as_torch():
    z = torch.linspace(-8, 8, 10001, dtype=torch.float64)
    exact = F.gelu(z)
    [[gelu]] = _gelu(z.float()[None, None], torch.zeros(1))
    assert (gelu - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"act_layer": "relu"}, False),
        ({"drop_rate": 0.1}, False),
        ({"drop_path_rate": 0.1}, False),
        ({"global_pool": "max"}, False),
        ({"num_classes": 0}, False),
    ],
)
def test_leaves_other_models_alone(options, fits):
    assert can_speed_up(timm.create_model("convmixer_cifar", **options)) is fits


def test_leaves_changed_models_alone():
    reflecting, overlapping = (timm.create_model("convmixer_cifar") for _ in range(2))
    reflecting.conv_mixer_layers[0].depth_wise_conv.padding_mode = "reflect"
    overlapping.patch_emb.conv = nn.Conv2d(3, 256, 4, stride=2, padding=1)
    assert not can_speed_up(reflecting) and not can_speed_up(overlapping)


@pytest.mark.parametrize(("free", "fits"), [(8.7e9, True), (8.5e9, False)])
def test_needs_room_for_its_matrices(monkeypatch, free, fits):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24e9))
    model = timm.create_model("convmixer_256_8_ks9_p1")
    assert _has_room(model, (16, 64), torch.device("cuda"), "auto") is fits
    assert not _has_room(model, (32, 32), torch.device("cuda"), "fp32")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_gives_logits_and_gradients_at_many_sizes(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # These are more kinds than torch.compile takes unless told otherwise.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = ConvMixer(64, 2, kernel_size=5, patch_size=2, num_classes=5).cuda()
    reference = copy.deepcopy(model).double()
    labels = torch.arange(16, device="cuda") % 5
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for side in (8, 12, 16, 24, 32):
        images = torch.randn(16, 3, side, side, device="cuda")
        for each in (model, reference):
            each.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            logits, grads = train_step(FastOnGPU(model), model, images, labels)
        expected, expected_grads = train_step(reference, reference, images.double(), labels)
        assert (logits - expected).norm() < tolerance * expected.norm()
        for name, grad in grads.items():
            difference = (grad - expected_grads[name]).norm()
            assert difference < tolerance * (1e-3 + expected_grads[name].norm()), (side, name)
    assert gpu._compiling


@on_gpu
def test_on_a_gpu_replays_the_steps_that_it_captured():
    results = []
    for captures in (False, True):
        torch.manual_seed(0)
        settings = TrainingSettings("convmixer_cifar", pretrained=True, learning_rate=1e-3)
        device = torch.device("cuda")
        network = build_network(settings, [*"0123456789"], device)
        network.module.train()
        step = TrainingStep(network, settings, torch.bfloat16, device)
        step.captures = captures
        numbers = []
        with fast_muon(torch.bfloat16, device):
            for number in range(12):
                side = 24 if number < 6 else 32
                images = torch.randn(32, 3, side, side, device=device)
                labels = torch.randint(10, (32,), device=device)
                numbers.append(step(images, labels, labels, (number + 1) / 12))
        assert (step._captured is not None) is captures
        results.append(torch.stack(numbers).cpu())
    plain, captured = results
    assert torch.allclose(captured[:, [0, 2]], plain[:, [0, 2]], rtol=0.02)  # loss, norm
    assert (captured[:, 1] - plain[:, 1]).abs().max() <= 2  # correct images

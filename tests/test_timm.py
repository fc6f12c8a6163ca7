"""The models do what timm's users expect of any model of timm's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.optim import create_optimizer_v2
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from convmixer_hub import ConvMixer, ModelSizeError
from convmixer_hub.data.images import eval_transform, open_image
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.training.settings import OPTIMIZERS

from .conftest import ARCH, CHECKOUT, IMAGES, NAME

TIMM_SOURCE = os.environ.get("TIMM_SOURCE")


@pytest.mark.slow
@pytest.mark.skipif(not TIMM_SOURCE, reason="TIMM_SOURCE names no unpacked source of timm")
def test_timms_own_tests_pass(tmp_path):
    tests = Path(TIMM_SOURCE, "tests", "test_models.py")
    options = ["-p", "timm_names", "-p", "no:cacheprovider", "-W", "ignore", "-q", "-rs"]
    options += ["-c", str(Path(TIMM_SOURCE, "pyproject.toml"))]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout, result.stdout


@pytest.mark.parametrize(
    "global_pool", ["avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastcatavgmax", ""]
)
@pytest.mark.parametrize("num_classes", [0, 7])
def test_every_kind_of_pooling(global_pool, num_classes, batch):
    model = timm.create_model(ARCH, num_classes=num_classes, global_pool=global_pool).eval()
    features = model.forward_features(batch)
    pooled = model.forward_head(features, pre_logits=True)
    pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
    torch.testing.assert_close(pooled, pool(features))
    if global_pool:
        assert pooled.shape[1] == model.head_hidden_size
        torch.testing.assert_close(model(batch), model.get_classifier()(pooled))


def test_dropout_before_the_head_is_for_training_alone(batch):
    model = timm.create_model(ARCH, num_classes=0, drop_rate=0.5)
    assert (model(batch) == 0).float().mean() == pytest.approx(0.5, abs=0.15)
    assert not (model.eval()(batch) == 0).any()


class TestStochasticDepth:
    def test_its_rate_rises_with_depth(self):
        model = timm.create_model(ARCH, drop_path_rate=0.7)
        rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])

    def test_an_image_skips_the_mixing_of_places_or_has_more_of_it(self):
        layer = ConvMixer(8, 2, 3, 1, drop_path_rate=0.75).conv_mixer_layers[1]
        x = torch.randn(64, 8, 4, 4)
        mixed = layer.norm1(layer.act1(layer.depth_wise_conv(x)))
        seen = []
        layer.point_wise_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer(x)
        skipped = (seen[0] == x).all((1, 2, 3))
        assert 32 < skipped.sum() < 64
        torch.testing.assert_close(seen[0][~skipped], (x + 4 * mixed)[~skipped])


@pytest.mark.parametrize("features_only", [False, True])
def test_gradient_checkpointing_runs_a_layer_twice_and_keeps_the_gradients(features_only, batch):
    model = timm.create_model(ARCH)
    runs, gradients = [], []
    model.conv_mixer_layers[3].register_forward_pre_hook(lambda *_: runs.append(enable))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        _, features = model.forward_intermediates(batch) if features_only else (0, [model(batch)])
        sum(feature.square().sum() for feature in features).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    assert runs == [False, True, True]


@pytest.mark.parametrize(
    ("out_indices", "layers"), [((0, 3, 7), (0, 3, 7)), ((-2, -1), (6, 7)), (2, (6, 7))]
)
def test_features_are_those_of_the_layers_asked_for(out_indices, layers, batch):
    model = timm.create_model(NAME, pretrained=True).eval()
    features = timm.create_model(
        NAME, pretrained=True, features_only=True, out_indices=out_indices
    ).eval()
    assert features.feature_info.channels() == [256] * len(layers)
    assert features.feature_info.reduction() == [2] * len(layers)
    expected = model.forward_intermediates(batch, indices=list(layers), intermediates_only=True)
    torch.testing.assert_close(features(batch), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.script(features)(batch), expected)


def test_another_format_of_features_is_refused(batch):
    message = "^output_fmt is 'NLC': ConvMixers give 'NCHW' only$"
    with pytest.raises(ModelSizeError, match=message):
        timm.create_model(ARCH).forward_intermediates(batch, output_fmt="NLC")


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_learning_rates_fall_from_the_head_to_the_stem(opt):
    model = timm.create_model(ARCH)
    optimizer = create_optimizer_v2(model, opt=opt, lr=1.0, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {
        names[id(parameter)].removesuffix(".weight").removesuffix(".bias"): group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert scales["classification.linear"] == 1
    for layer in range(8):
        for module in ("depth_wise_conv", "norm1", "point_wise_conv", "norm2"):
            assert scales[f"conv_mixer_layers.{layer}.{module}"] == 0.5 ** (8 - layer)
    assert scales["patch_emb.conv"] == scales["patch_emb.norm"] == 0.5**9


def test_bfloat16_and_channels_last_stay_what_they_are(batch):
    model = timm.create_model(NAME, pretrained=True).eval()
    expected = model(batch)
    images = batch.to(memory_format=torch.channels_last)
    last = timm.create_model(NAME, pretrained=True).to(memory_format=torch.channels_last).eval()
    features = last.forward_features(images)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images), expected, atol=1e-4, rtol=1e-4)
    half = timm.create_model(NAME, pretrained=True, dtype=torch.bfloat16).eval()
    assert half.forward_features(batch.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(batch.bfloat16()).float(), expected, atol=0.5, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(batch).float(), expected, atol=0.5, rtol=0.05)


def test_a_model_from_the_meta_device_can_be_filled(batch):
    model = timm.create_model(NAME, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    trained = timm.create_model(NAME, pretrained=True).eval()
    model.to_empty(device="cpu").load_state_dict(trained.state_dict())
    assert torch.equal(model.eval()(batch), trained(batch))


@pytest.mark.parametrize("arch", [ARCH, "convmixer_cifar"])
def test_torchscript_optimizes_the_model_for_inference(arch, batch):
    model = timm.create_model(arch).eval()
    with torch.no_grad():
        optimized = torch.jit.optimize_for_inference(torch.jit.script(model))
        for _ in range(3):  # the first calls compile it
            torch.testing.assert_close(optimized(batch), model(batch), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its quantization
def test_static_quantization_works():
    # Not a trained model, of whose answers torch's default settings keep few.
    model = timm.create_model("convmixer_cifar").eval()
    images = [open_image(IMAGES / f"{name}.png") for name in CIFAR10.classes]
    transform = eval_transform(timm.data.resolve_model_data_config(model))
    batch = torch.stack([transform(image) for image in images])
    observed = prepare_fx(model, get_default_qconfig_mapping("x86"), (batch,))
    with torch.no_grad():
        observed(batch)
        quantized = convert_fx(observed)
        exact = model(batch)
        assert (quantized(batch) - exact).norm() < 0.2 * exact.norm()
    kinds = [type(module) for module in quantized.modules()]
    assert kinds.count(torch.ao.nn.quantized.Conv2d) == 17

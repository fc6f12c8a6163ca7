import copy
import io
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle

import pytest
import timm
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from convmixer_hub import ModelSizeError, prepare_for_inference, speed_up_on_cpu
from convmixer_hub.data.images import open_image
from convmixer_hub.hub.records import RECORDS
from convmixer_hub.load import load_trained
from convmixer_hub.model import inference
from convmixer_hub.model.convmixer import ConvMixer, ConvMixerLayer
from convmixer_hub.predict import predict
from convmixer_hub.release.golden import make_golden_input
from convmixer_hub.zoo import VARIANTS

from .conftest import ARCH, CHECKOUT, PICTURES, randomise_norms, uses_cpp

MIXED = cycle([nn.GELU, nn.SiLU])


def make_model(arch=ARCH, **options):
    """Make a model whose BatchNorms show whether they are used, and where."""
    model = timm.create_model(arch, **options)
    randomise_norms(model)
    return model.eval()


def assert_same(model, prepared, x):
    with torch.no_grad():
        expected, found = model(x), prepared(x)
    assert found.shape == expected.shape
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.fixture(params=[False, True], ids=["onednn", "cpp"])
def prepare(request):
    """Prepare a model in one way or the other."""
    return partial(prepare_for_inference, cpp=request.param)


def uses_onednn(prepared):
    return prepared.stem._packed is not None


@pytest.mark.parametrize("name", RECORDS)
def test_logits_of_trained_models(prepare, name):
    model = load_trained(name).eval()  # in which some BatchNorms multiply by hundreds
    assert_same(model, prepare(model), make_golden_input((3, 32, 32)).float())


def test_an_image_smaller_than_a_patch_is_an_error(prepare):
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        prepare(make_model("convmixer_cifar"))(torch.randn(1, 3, 1, 9))


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("count", [1, 3, 20])
def test_logits_are_those_of_the_model(prepare, arch, count):
    model = make_model(arch)
    prepared = prepare(model)
    assert_same(model, prepared, torch.randn(count, 3, 32, 32))
    assert uses_cpp(prepared) == prepare.keywords["cpp"]
    assert uses_onednn(prepared) != prepare.keywords["cpp"]


@pytest.mark.parametrize("size", [(2, 2), (7, 50), (33, 31), (64, 64)])
def test_images_of_any_size_and_brightness(prepare, size):
    model = make_model("convmixer_cifar")
    prepared = prepare(model)
    for count, scale in ((4, 1), (4, 100), (1, 1)):
        assert_same(model, prepared, scale * torch.randn(count, 3, *size))


@pytest.mark.parametrize(
    "options",
    [
        {"act_layer": "relu"},
        {"act_layer": nn.SiLU},
        {"act_layer": lambda: nn.GELU("tanh")},
        {"act_layer": lambda: next(MIXED)()},
        {"global_pool": "catavgmax"},
        {"global_pool": "", "num_classes": 0},
        {"num_classes": 0},
        {"in_chans": 1},
        {"drop_path_rate": 0.5, "drop_rate": 0.5},
    ],
    ids=str,
)
def test_other_models(prepare, options):
    model = make_model(**options)
    x = torch.randn(5, options.get("in_chans", 3), 32, 32)
    assert_same(model, prepare(model), x)


@pytest.mark.parametrize(
    ("d_model", "kernel_size", "is_fast"),
    [(32, 3, True), (64, 9, True), (16, 5, False), (48, 7, False), (32, 11, False), (32, 1, False)],
)
def test_cpp_computes_supported_sizes_alone(d_model, kernel_size, is_fast):
    model = ConvMixer(d_model, 2, kernel_size=kernel_size, patch_size=3, num_classes=10).eval()
    randomise_norms(model)
    prepared = prepare_for_inference(model, cpp=True)
    assert_same(model, prepared, torch.randn(2, 3, 20, 41))
    assert uses_cpp(prepared) == is_fast
    assert uses_onednn(prepared) != is_fast


def test_without_onednn_and_elsewhere_ordinary_operations_do(prepare, batch, monkeypatch):
    model = make_model()
    expected = model(batch).detach()
    prepared = prepare(model)
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_can_fuse", lambda: False)
        again = prepare(model)
        assert_same(model, again, batch)
        assert not uses_onednn(again)
        assert uses_cpp(again) == prepare.keywords["cpp"]
    monkeypatch.setattr(inference._Convolution, "compute_fused", None)
    assert not inference._can_fuse.__wrapped__()
    assert_same(model.double(), prepare(model), batch.double())
    half = copy.deepcopy(model).bfloat16()
    found = prepare(half)(batch.bfloat16())
    assert found.dtype is torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for rounded in (found, prepared(batch)):
            assert (rounded - expected).norm() < 0.05 * expected.norm()
    x = batch.clone().requires_grad_()
    prepared(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    _, tangent = torch.func.jvp(prepared, (batch,), (torch.ones_like(batch),))
    torch.testing.assert_close(tangent.sum(), x.grad.sum(), atol=1e-2, rtol=1e-3)


def test_features_are_those_of_the_model(prepare, batch):
    model = make_model()
    with torch.no_grad():
        prepared = prepare(model)
        found, expected = prepared.forward_features(batch), model.forward_features(batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(prepared.forward_head(found), model.forward_head(found))


def test_the_model_stays_as_it_is_and_the_other_as_it_was(batch):
    model = make_model()
    before = copy.deepcopy(model)
    prepared = prepare_for_inference(model)
    expected = prepared(batch)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), atol=0, rtol=0)
    nn.init.zeros_(model.patch_emb.conv.weight)
    assert torch.equal(prepared(batch), expected)
    assert model.train().training


def test_it_is_copied_saved_traced_and_exported(prepare, batch):
    prepared = prepare(make_model())
    expected = prepared(batch)
    assert torch.equal(copy.deepcopy(prepared)(batch), expected)
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(batch), expected)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check of sizes is for these images alone
            traced = torch.jit.trace(prepared, batch)
        torch.testing.assert_close(traced(batch), expected, atol=1e-4, rtol=1e-4)
        program = torch.export.export(prepared, (batch,))
        torch.testing.assert_close(program.module()(batch), expected, atol=1e-4, rtol=1e-4)
        recorded = make_fx(copy.deepcopy(prepared))(torch.zeros_like(batch))
        torch.testing.assert_close(recorded(batch), expected, atol=1e-4, rtol=1e-4)


def test_several_threads_may_call_it(prepare):
    model = make_model("convmixer_cifar")
    prepared = prepare(model)
    batches = [torch.randn(count, 3, 32, 32) for count in (1, 20, 3, 7) * 3]
    expected = [prepare(model)(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(prepared, batches), expected):
            torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


def test_bfloat16_and_back_rounds_the_weights(prepare, batch):
    prepared = prepare(make_model())
    before = prepared(batch)
    found = prepared.bfloat16().float()(batch)
    assert 0 < (found - before).norm() < 0.05 * before.norm()
    assert torch.equal(found, copy.deepcopy(prepared)(batch))


@pytest.mark.slow
def test_it_can_be_compiled(batch):
    model = ConvMixer(16, 2, kernel_size=5, patch_size=1, num_classes=10)
    randomise_norms(model)
    prepared = prepare_for_inference(model)
    with torch.no_grad():
        compiled = torch.compile(prepared)
        torch.testing.assert_close(compiled(batch), prepared(batch), atol=1e-4, rtol=1e-4)


def test_it_is_as_fast_wherever_it_was_prepared(batch):
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        prepared = [prepare_for_inference(model)]
    prepared.append(prepare_for_inference(copy.deepcopy(model).bfloat16()).float())
    prepared.append(copy.deepcopy(prepared[1]))
    for one in prepared:
        one(batch)
        assert uses_onednn(one)
    assert_same(model, prepared[0], batch)


class Doubling(ConvMixerLayer):
    """A layer that may compute something else."""


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("conv_mixer_layers", "3", Doubling(96, 5), "conv_mixer_layers.3 is Doubling"),
        ("conv_mixer_layers", "x", nn.Dropout(), "mixer_layers.x is Dropout"),
        ("conv_mixer_layers.0", "norm1", nn.GroupNorm(4, 96), "layers.0.norm1 is GroupNorm"),
        ("conv_mixer_layers.0.depth_wise_conv", "padding_mode", "reflect", "padding_mode=reflect"),
        ("conv_mixer_layers.0.depth_wise_conv", "padding", "same", "padding=same"),
        ("conv_mixer_layers.7", "point_wise_conv", nn.Conv2d(96, 192, 1), "is Conv2d(96, 192,"),
        ("patch_emb", "conv", nn.Conv2d(3, 96, 3, padding=1), "patch_emb.conv is Conv2d(3, 96, "),
        ("", "patch_emb", nn.Sequential(nn.Conv2d(3, 96, 1)), "patch_emb is Sequential"),
    ],
)
def test_other_layers_are_refused(part, name, value, message):
    model = make_model()
    setattr(model.get_submodule(part), name, value)
    with pytest.raises(ModelSizeError, match=f"{re.escape(message)}.*, which is not as in this"):
        prepare_for_inference(model)


@pytest.mark.parametrize("part", ["", "conv_mixer_layers.6", "classification.linear"])
def test_models_with_hooks_are_refused(part):
    model = make_model()
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    message = f"^{part or 'the model'} has hooks, such as of pruning, which is not as in this"
    with pytest.raises(ModelSizeError, match=message):
        prepare_for_inference(model)


def test_a_head_of_several_layers(prepare, batch):
    model = make_model()
    model.classification.linear = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 2))
    assert_same(model, prepare(model), batch)


def test_layers_may_be_shared_and_nothing_is_dropped(prepare):
    model = make_model(drop_rate=0.5)
    model.conv_mixer_layers[1] = model.conv_mixer_layers[0]
    model.patch_emb.conv = nn.Conv2d(1, 96, 1)
    assert_same(model, prepare(model).train(), torch.randn(2, 1, 32, 32))


def test_predict_takes_it():
    model = load_trained("convmixer_cifar")
    images = [open_image(PICTURES[name]) for name in ("cat", "ship")]
    found = predict(prepare_for_inference(model), images)
    for one, other in zip(found, predict(model, images), strict=True):
        assert {p.label: p.probability for p in one} == pytest.approx(
            {p.label: p.probability for p in other}, abs=1e-5
        )


def test_a_model_that_was_sped_up_for_training_is_prepared():
    model = make_model()
    fast = copy.deepcopy(model)
    speed_up_on_cpu(fast)
    assert_same(model, prepare_for_inference(fast), torch.randn(3, 3, 32, 32))


def test_models_that_cannot_be_prepared_are_refused():
    model = make_model()
    prepared = prepare_for_inference(model)
    with pytest.raises(ModelSizeError, match="has no state dict to save: save that of the one"):
        prepared.state_dict()
    features = timm.create_model(ARCH, features_only=True)
    for other in (timm.create_model("test_resnet"), features, prepared):
        with pytest.raises(ModelSizeError, match=f"a {type(other).__name__} cannot be prepared"):
            prepare_for_inference(other)


def test_the_embeddings_of_the_docs_are_what_they_say():
    page = (CHECKOUT / "docs" / "inference.md").read_text()
    found: dict = {}
    exec(re.findall("```python\n(.*?)```", page, re.S)[-1], found)
    assert found["features"].shape == (8, 256, 16, 16)
    torch.testing.assert_close(found["embeddings"], found["features"].mean((2, 3)))
    assert [tuple(features.shape) for features in found["maps"]] == [(8, 256, 16, 16)] * 3
    torch.testing.assert_close(found["maps"][-1], found["features"])

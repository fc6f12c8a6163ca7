import pytest
import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer_hub import ClassificationHead, ConvMixer, ConvMixerLayer, PatchEmbeddings
from convmixer_hub.errors import ModelSizeError

from .conftest import randomise_norms


@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("kernel_size", [5, 9])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_gradients_are_timms(patch_size, kernel_size, act_layer, batch):
    ours, timms = (
        kind(48, 3, kernel_size, patch_size, num_classes=7, act_layer=act_layer).double()
        for kind in (ConvMixer, TimmConvMixer)
    )
    randomise_norms(timms)
    ours.load_state_dict(timms.state_dict())
    for model in (ours, timms):
        model(batch.double()).square().sum().backward()
    for mine, theirs in zip(ours.parameters(), timms.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_parts_fit_together_as_in_the_paper(batch):
    parts = nn.Sequential(
        PatchEmbeddings(d_model=16, patch_size=4, in_channels=3),
        ConvMixerLayer(d_model=16, kernel_size=5),
        ClassificationHead(d_model=16, n_classes=10),
    )
    model = ConvMixer(16, 1, kernel_size=5, patch_size=4, num_classes=10)
    weights = zip(parts.state_dict(), model.state_dict().values(), strict=True)
    parts.load_state_dict(dict(weights))
    torch.testing.assert_close(parts(batch), model(batch), atol=0, rtol=0)


def test_state_dict_has_the_keys_of_labml_nn():
    keys = ConvMixer(8, 2, 3, 2, num_classes=5).state_dict().keys()
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    layer = ["depth_wise_conv", "norm1", "point_wise_conv", "norm2"]
    assert modules == [
        "patch_emb.conv",
        "patch_emb.norm",
        *(f"conv_mixer_layers.{i}.{name}" for i in range(2) for name in layer),
        "classification.linear",
    ]


def test_each_layer_is_initialized_on_its_own():
    first, second = ConvMixer(8, 2, 3, 2).conv_mixer_layers
    assert not torch.equal(first.point_wise_conv.weight, second.point_wise_conv.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size is 4: an even kernel has no center, give an odd one"),
        ({"num_classes": -1}, "n_classes is -1: give 0 \\(no head\\) or more"),
        ({"act_layer": "swish"}, "act_layer is 'swish': give gelu or relu, or a c"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ModelSizeError, match=message):
        ConvMixer(**{"d_model": 8, "n_layers": 1, "kernel_size": 3, "patch_size": 2, **options})


@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU])
def test_scripted_and_traced_models_give_the_same_logits(act_layer, batch):
    model = ConvMixer(8, 2, 5, 2, num_classes=4, act_layer=act_layer).eval()
    expected = model(batch)
    for copy in (
        torch.jit.script(model),
        torch.jit.trace(model, batch),
        torch.fx.symbolic_trace(model),
        torch.jit.script(torch.fx.symbolic_trace(model)),
        torch.export.export(model, (batch,)).module(),
    ):
        torch.testing.assert_close(copy(batch), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
def test_a_model_with_a_counter_and_a_quantized_one_load_their_own_states():
    model = ConvMixer(48, 2, 3, 2)
    model.register_buffer("steps", torch.tensor(7))
    for each in (model, torch.ao.quantization.quantize_dynamic(model, {nn.Linear})):
        each.load_state_dict(each.state_dict())


def test_what_is_no_tensor_is_refused_by_torch():
    model = ConvMixer(8, 1, 3, 2)
    with pytest.raises(RuntimeError, match='"patch_emb.conv.weight", expected torch.Tensor'):
        model.load_state_dict({k: t.numpy() for k, t in model.state_dict().items()})


def test_reset_classifier_keeps_pooling_type_and_mode(batch):
    model = ConvMixer(8, 1, 3, 2, num_classes=4, global_pool="catavgmax", dtype=torch.float64)
    model.eval().reset_classifier(6)
    assert model.classification.pool.pool_type == "catavgmax"
    assert not model.classification.training
    assert model.head_hidden_size == 16
    logits = model(batch.double())
    assert logits.shape == (2, 6)
    assert logits.dtype == torch.float64


def test_without_classes_the_pooled_features_come_out(batch):
    model = ConvMixer(8, 1, 3, 2, num_classes=0).eval()
    features = model.forward_features(batch)
    torch.testing.assert_close(model(batch), features.mean((2, 3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(batch), features)


def test_intermediates_are_the_outputs_of_the_layers(batch):
    model = ConvMixer(8, 3, 3, 2).eval()
    final, [first, last] = model.forward_intermediates(batch, indices=[0, 2])
    torch.testing.assert_close(first, model.conv_mixer_layers[0](model.patch_emb(batch)))
    torch.testing.assert_close(last, final)
    torch.testing.assert_close(final, model.forward_features(batch))
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.conv_mixer_layers) == 2

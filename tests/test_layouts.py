import argparse
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from convmixer_hub import CheckpointError, ConvMixer, DataError
from convmixer_hub.checkpoints.convert import convert
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.load import load_trained
from convmixer_hub.model.layouts import convert_layout, detect_layout

from .conftest import ARCH, randomise_norms

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


def make_locuslab(*sizes):
    """The `nn.Sequential` of the authors' convmixer.py, with the parts of timm's copy of it."""
    timms = MAKE["timm"](*sizes)
    end = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), timms.head
    return nn.Sequential(*timms.stem, *timms.blocks, *end)


def make_locuslab_short(h, d, k, p, n, act):
    """The short form in the authors' paper, which fits a tweet."""
    S, C, A = nn.Sequential, nn.Conv2d, lambda x: S(x, act(), nn.BatchNorm2d(h))
    R = type("", (S,), {"forward": lambda s, x: s[0](x) + x})
    return S(
        A(C(3, h, p, p)),
        *[S(R(A(C(h, h, k, groups=h, padding=k // 2))), A(C(h, h, 1))) for _ in range(d)],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(h, n),
    )


MAKE = {
    "ours": lambda d, n, k, p, c, act: ConvMixer(d, n, k, p, c, act_layer=act),
    "timm": lambda d, n, k, p, c, act: TimmConvMixer(d, n, k, p, num_classes=c, act_layer=act),
    "locuslab": make_locuslab,
    "locuslab-short": make_locuslab_short,
}
SMALL = (12, 3, 5, 2, 7)
AS_ARCH = (96, 8, 5, 1, 10)


def make(layout: str, sizes=SMALL, activation="gelu") -> nn.Module:
    model = MAKE[layout](*sizes, ACTIVATIONS[activation]).eval()
    randomise_norms(model)
    return model


@pytest.fixture
def file(tmp_path):
    return tmp_path / "in.safetensors"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", MAKE)
@pytest.mark.parametrize("source", MAKE)
def test_logits_are_equal_from_any_layout_to_any(source, target, activation, file, output, batch):
    original = make(source, activation=activation)
    safetensors.torch.save_file(original.state_dict(), file)
    written = convert(str(file), output, target, activation)
    copy = make(target, activation=activation)
    tensors = safetensors.torch.load_file(output)
    assert tensors.keys() == copy.state_dict().keys() == written.tensors.keys()
    copy.load_state_dict(tensors)
    torch.testing.assert_close(copy(batch), original(batch), atol=1e-5, rtol=0)
    with safe_open(output, framework="pt") as content:
        assert content.metadata() == {"format": "pt", "layout": target, "activation": activation}


@pytest.mark.parametrize("way", ["directly", "checkpoint_path", "file", "state_dict", "local-dir"])
@pytest.mark.parametrize("layout", MAKE)
def test_every_layout_loads_by_itself(layout, way, file, tmp_path, batch):
    original = make(layout, AS_ARCH)
    safetensors.torch.save_file(original.state_dict(), file)
    if way == "directly":
        model = timm.create_model(ARCH)
        model.load_state_dict(original.state_dict())
    elif way == "checkpoint_path":
        model = timm.create_model(ARCH, checkpoint_path=file)
    elif way == "local-dir":
        save_model(timm.create_model(ARCH), tmp_path, {})
        file.rename(tmp_path / "model.safetensors")
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    else:
        overlay = {way: str(file) if way == "file" else original.state_dict()}
        model = timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)
    images = batch[..., :8, :8]
    torch.testing.assert_close(model.eval()(images), original(images), atol=1e-5, rtol=0)


WRAPPED = "module. _orig_mod. model. ema. ema_model. model_ema. module._orig_mod. _orig_mod.module."


@pytest.mark.parametrize("layout", MAKE)
@pytest.mark.parametrize("prefix", WRAPPED.split())
def test_prefixes_of_wrappers_go(layout, prefix):
    original = make(layout)
    wrapped = {f"{prefix}{key}": tensor for key, tensor in original.state_dict().items()}
    assert detect_layout(wrapped) == layout
    found = convert_layout(wrapped, layout)
    torch.testing.assert_close(found, dict(original.state_dict()), atol=0, rtol=0)


def test_an_averaged_model_loads(batch):
    original = make("timm")
    model = make("ours")
    model.load_state_dict(AveragedModel(original).state_dict())
    torch.testing.assert_close(model(batch), original(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrap", "part"),
    [
        (lambda weights, other: weights, ""),
        (lambda weights, other: {"state_dict": weights, "epoch": 3}, "state_dict"),
        (lambda weights, other: {"state_dict": other, "state_dict_ema": weights}, "state_dict_ema"),
        (lambda weights, other: {"model": other, "model_ema": weights}, "model_ema"),
        (lambda weights, other: {"net": weights, "acc": 93.1}, "net"),
        (
            lambda weights, other: {
                "model": {f"module.{key}": tensor for key, tensor in weights.items()},
                "args": argparse.Namespace(lr=0.1),
            },
            "model",
        ),
    ],
    ids=["plain", "timm", "timm average", "average", "net", "parallel with options"],
)
def test_convert_reads_what_training_programs_save(wrap, part, tmp_path, output):
    original = make("locuslab")
    content = wrap(original.state_dict(), make("locuslab").state_dict())
    torch.save(content, tmp_path / "in.pth")
    written = convert(str(tmp_path / "in.pth"), output, "locuslab", "gelu")
    assert written.part == part
    tensors = safetensors.torch.load_file(output)
    torch.testing.assert_close(tensors, dict(original.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("is_flat", [False, True], ids=["today", "as older timm wrote it"])
def test_convert_keeps_how_the_images_of_a_folder_are_prepared(is_flat, tmp_path):
    overlay = {"input_size": (3, 48, 40), "mean": (0.5,) * 3, "crop_pct": 0.9}
    original = timm.create_model(ARCH, num_classes=2, pretrained_cfg_overlay=overlay)
    save_model(original, tmp_path, {})
    if is_flat:
        config = json.loads((tmp_path / "config.json").read_text())
        config |= config.pop("pretrained_cfg")
        (tmp_path / "config.json").write_text(json.dumps(config))
    convert(str(tmp_path), tmp_path / "out.safetensors", "timm")
    found = timm.data.resolve_model_data_config(load_trained(str(tmp_path / "out.safetensors")))
    assert found == timm.data.resolve_model_data_config(original)
    assert found["input_size"] == (3, 48, 40)


def test_what_timms_train_py_was_told_is_not_guessed(tmp_path, batch):
    original = timm.create_model(ARCH, act_layer="relu", global_pool="max").eval()
    options = {"img_size": 48, "mean": [0.5], "std": None, "interpolation": ""}
    args = argparse.Namespace(gp="max", model_kwargs={"act_layer": "relu"}, **options)
    content = {"arch": ARCH, "state_dict": original.state_dict(), "args": args}
    torch.save(content, tmp_path / "last.pth.tar")
    convert(str(tmp_path / "last.pth.tar"), tmp_path / "out.safetensors", "timm")
    for file in ("last.pth.tar", "out.safetensors"):
        loaded = load_trained(str(tmp_path / file)).eval()
        torch.testing.assert_close(loaded(batch), original(batch), atol=1e-5, rtol=0)
        config = timm.data.resolve_model_data_config(loaded)
        expected = timm.data.resolve_model_data_config(original)
        assert config == expected | {"input_size": (3, 48, 48), "mean": (0.5, 0.5, 0.5)}
    args.mean, args.input_size = np.array([0.5, 0.5]), 64  # not timm's, and DeiT's
    torch.save(content, tmp_path / "last.pth.tar")
    loaded = load_trained(str(tmp_path / "last.pth.tar"))
    config = timm.data.resolve_model_data_config(loaded)
    assert config == expected | {"input_size": (3, 64, 64)}
    args.mean = [0.5, 0.5]
    torch.save(content, tmp_path / "last.pth.tar")
    with pytest.raises(CheckpointError, match="says how images are prepared, but timm does not u"):
        load_trained(str(tmp_path / "last.pth.tar"))
    args.mean, args.gp = None, "most"
    torch.save(content, tmp_path / "last.pth.tar")
    with pytest.raises(CheckpointError, match="is said to have the pooling 'most', which timm doe"):
        load_trained(str(tmp_path / "last.pth.tar"))


def hold_itself():
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict; save the state dict of the model"),
        ({"state_dict": {"a": 1}}, "'a' is a int, not a tensor with a name; save the state"),
        ({"net": {0: torch.zeros(1)}}, "'0' is a Tensor, not a tensor with a name; save the state"),
        ({}, "tensor '' is of no ConvMixer; give a state dict in one of the layouts ours, timm"),
        (hold_itself(), "'model' is a dict, not a tensor with a name; save the state dict alone"),
    ],
)
def test_a_pickle_without_a_state_dict_is_refused(content, message, tmp_path, output):
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "in.pth"), output, "timm", "gelu")


def drop(key):
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize("load", ["convert", "directly"])
@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            "timm",
            drop("blocks.1.3.bias"),
            r"tensor 'conv_mixer_layers.1.norm2.bias' is missing; .* \(taken for layout timm of ",
        ),
        ("locuslab", drop("8.bias"), "tensor 'classification.linear.bias' is missing; .* locuslab"),
        (
            "ours",
            lambda tensors: tensors.update({"extra": torch.zeros(1)}),
            "the model has no tensor 'extra'; .* layout ours of ours, timm, locuslab, locuslab-sh",
        ),
        (
            "timm",
            lambda tensors: tensors.update({"patch_emb.conv.weight": torch.zeros(1)}),
            "two tensors for 'patch_emb.conv.weight', as if layouts were mixed; give the state",
        ),
    ],
    ids=["missing", "no bias", "extra", "mixture"],
)
def test_the_first_tensor_that_is_wrong_is_named(layout, change, message, load, file, output):
    tensors = dict(make(layout).state_dict())
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message) as refused:
        if load == "convert":
            convert(str(file), output, "ours", "gelu")
        else:
            make("ours").load_state_dict(tensors)
    assert "\n" not in str(refused.value)
    assert not output.exists()


def test_tensors_of_another_model_are_in_no_layout(file, output):
    tensors = {"layer1.0.conv1.weight": torch.zeros(2, 2, 3, 3)}
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match="'layer1.0.conv1.weight' is of no ConvMixer; give"):
        convert(str(file), output, "ours", "gelu")
    with pytest.raises(CheckpointError, match="in none of the layouts ours, timm, locuslab, locus"):
        make("ours").load_state_dict(tensors)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("head.weight", ()),
        ("stem.0.weight", (12,)),
        ("stem.0.weight", (0, 3, 2, 2)),
        ("blocks.0.0.fn.0.weight", (12, 5, 5)),
    ],
)
def test_a_tensor_with_other_dimensions_is_named(key, shape, file, output):
    tensors = {**make("timm").state_dict(), key: torch.zeros(shape)}
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensor '\S+' is missing, empty or has not \d dim"):
        convert(str(file), output, "ours", "gelu")


@pytest.mark.parametrize("layout", MAKE)
def test_counters_of_batches_may_be_missing_as_in_torch(layout, file, output, batch):
    original = make(layout)
    tensors = {k: t for k, t in original.state_dict().items() if "num_batches" not in k}
    model = make("ours")
    model.load_state_dict(tensors)
    torch.testing.assert_close(model(batch), original(batch), atol=1e-5, rtol=0)
    safetensors.torch.save_file(tensors, file)
    assert len(convert(str(file), output, "ours", "gelu").tensors) == len(tensors)


def test_what_is_no_mapping_is_refused_by_torch():
    with pytest.raises(TypeError, match="state_dict to be dict-like"):
        make("ours").load_state_dict([1, 2])


def test_a_lenient_load_is_as_lenient_as_torch():
    model, other = make("ours"), make("timm")
    given = {"head.weight": other.head.weight, "blocks.1.1.bias": other.blocks[1][1].bias}
    result = model.load_state_dict({**given, "extra": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["extra"]
    assert torch.equal(model.get_classifier().weight, other.head.weight)
    assert torch.equal(model.conv_mixer_layers[1].point_wise_conv.bias, other.blocks[1][1].bias)


class TestActivation:
    """No tensor tells GELU from ReLU, so something else has to."""

    def test_an_unknown_one_in_the_metadata_is_refused(self, file, output):
        safetensors.torch.save_file(make("timm").state_dict(), file, {"activation": "swish"})
        with pytest.raises(CheckpointError, match="have the activation 'swish', which is none of "):
            convert(str(file), output, "ours")

    def test_metadata_tells_it_and_is_handed_on(self, file, output):
        metadata = {"activation": "relu"}
        safetensors.torch.save_file(make("timm").state_dict(), file, metadata)
        assert convert(str(file), output, "locuslab").activation == "relu"
        assert convert(str(output), output, "ours").activation == "relu"
        with pytest.raises(CheckpointError, match="was trained with relu, not gelu; leave --activ"):
            convert(str(output), file, "ours", "gelu")

    @pytest.mark.parametrize(
        ("arch", "activation"), [("convmixer_768_32", "relu"), ("convmixer_1536_20", "gelu")]
    )
    @pytest.mark.parametrize("tag", ["", ".in1k"])
    def test_the_arch_in_a_training_checkpoint_tells_it(
        self, arch, tag, activation, tmp_path, output
    ):
        content = {"arch": f"{arch}{tag}", "state_dict": make("timm").state_dict()}
        torch.save(content, tmp_path / "in.pth.tar")
        written = convert(str(tmp_path / "in.pth.tar"), output, "ours")
        assert (written.arch, written.activation) == (arch, activation)

    def test_the_arch_of_another_network_tells_nothing(self, tmp_path, output):
        content = {"arch": "resnet18", "state_dict": make("timm").state_dict()}
        torch.save(content, tmp_path / "in.pth.tar")
        with pytest.raises(CheckpointError, match="in.pth.tar: nothing in it tells the activation"):
            convert(str(tmp_path / "in.pth.tar"), output, "ours")
        assert convert(str(tmp_path / "in.pth.tar"), output, "ours", "gelu").arch is None

    @pytest.mark.parametrize("kind", [str, ACTIVATIONS.get], ids=["name", "class"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_folder_keeps_it(self, activation, kind, tmp_path, output, batch):
        model = timm.create_model(ARCH, act_layer=kind(activation)).eval()
        save_model(model, tmp_path, {})
        assert torch.equal(load_trained(str(tmp_path)).eval()(batch), model(batch))
        for name in (tmp_path, tmp_path / "model.safetensors"):
            assert convert(str(name), output, "timm").activation == activation

    def test_a_file_of_another_activation_is_refused(self, file, output, batch):
        original = make("timm", AS_ARCH, "relu")
        safetensors.torch.save_file(original.state_dict(), file)
        convert(str(file), output, "ours", "relu")
        overlay = {"file": str(output)}
        message = f"^{output}: was trained with relu, the model has gelu; give act_layer='relu'$"
        with pytest.raises(CheckpointError, match=message):
            timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)
        model = timm.create_model(
            ARCH, pretrained=True, pretrained_cfg_overlay=overlay, act_layer="relu"
        )
        images = batch[..., :8, :8]
        torch.testing.assert_close(model.eval()(images), original(images), atol=1e-5, rtol=0)

    def test_a_trained_model_of_another_activation_is_refused(self, tmp_path):
        message = ": was trained with gelu, the model has relu; give act_layer='gelu'$"
        with pytest.raises(CheckpointError, match=message):
            timm.create_model("convmixer_cifar", pretrained=True, act_layer=nn.ReLU)
        save_model(timm.create_model(ARCH), tmp_path, {})
        with pytest.raises(CheckpointError, match=message):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, act_layer="relu")


def test_an_imagenet_model_of_timms_converts_without_a_copy():
    timms = timm.create_model("convmixer_768_32").eval()
    with torch.device("meta"):
        ours = ConvMixer(768, 32, 7, 7, act_layer="relu").eval()
    ours.load_state_dict(timms.state_dict(), assign=True)
    back = convert_layout(ours.state_dict(), "timm")
    assert list(back) == list(timms.state_dict())
    for key, tensor in timms.state_dict().items():
        assert back[key].data_ptr() == tensor.data_ptr()


def test_what_is_not_there_is_named(tmp_path, output):
    with pytest.raises(CheckpointError, match="model.safetensors: no such file; check the path"):
        convert(str(tmp_path), output, "timm")
    with pytest.raises(CheckpointError, match="out.pth: is written as safetensors; give it a name"):
        convert("convmixer_cifar", tmp_path / "out.pth", "timm")
    with pytest.raises(DataError, match=r"cannot be written \(.*\); make room, or name another"):
        convert("convmixer_cifar", tmp_path / "none" / "out.safetensors", "timm")

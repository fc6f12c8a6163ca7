import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from convmixer_hub import CheckpointError, UnknownModelError
from convmixer_hub.checkpoints import files
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.hub.find import find_checkpoint
from convmixer_hub.hub.records import CIFAR10, CIFAR100, RECORDS
from convmixer_hub.load import load_trained
from convmixer_hub.zoo import VARIANTS

from .conftest import ARCH, CHECKOUT, NAME

ARCHS = ["convmixer_256_8_ks9_p1", ARCH, "convmixer_cifar"]
UNTAGGED = {**timm.models.get_pretrained_cfg(NAME).to_dict(), "tag": None}
SAVED = {"config.json", "model.safetensors"}


@pytest.fixture
def tampered_folder(tmp_path):
    """A copy of the shipped folder whose tensors went through a function."""

    def tamper(change) -> str:
        folder = tmp_path / NAME
        shutil.copytree(CHECKOUT / "weights" / NAME, folder)
        state_dict = safetensors.torch.load_file(folder / "model.safetensors")
        change(state_dict)
        safetensors.torch.save_file(state_dict, folder / "model.safetensors")
        return str(folder)

    return tamper


def test_timm_lists_our_models():
    assert set(timm.list_models("*convmixer*")) >= {*ARCHS, "convmixer_768_32"}
    pretrained = set(timm.list_pretrained("*convmixer*"))
    assert {name for name in pretrained if name.partition(".")[0] in ARCHS} == set(RECORDS)


@pytest.mark.parametrize(
    ("arch", "parameters", "macs"),
    [
        ("convmixer_cifar", 643_338, 160_696_832),
        ("convmixer_256_8_ks9_p1", 706_570, 707_529_216),
        ("convmixer_96_8_ks5_p1", 99_082, 95_454_144),
    ],
)
def test_every_arch_is_what_its_name_says(arch, parameters, macs):
    model = timm.create_model(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * macs
    assert VARIANTS[arch].count_parameters(10) == parameters
    assert VARIANTS[arch].count_macs(10) == macs
    assert model.num_classes == 10
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert model.pretrained_cfg["label_names"] == CIFAR10.classes
    rows, columns = model.forward_features(torch.randn(1, 3, 32, 32)).shape[2:]
    assert (rows, columns) == model.pretrained_cfg["pool_size"]
    for role in ("first_conv", "classifier"):
        assert model.get_submodule(model.pretrained_cfg[role]) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_name": NAME},
        {"model_name": "convmixer_cifar"},
        {"model_name": "convmixer_cifar", "pretrained_cfg": timm.models.get_pretrained_cfg(NAME)},
        {"model_name": "convmixer_cifar", "pretrained_cfg": UNTAGGED},
        {"model_name": NAME, "pretrained_cfg_overlay": {"crop_pct": 0.9}},
        {"model_name": f"local-dir:{CHECKOUT}/weights/{NAME}"},
    ],
    ids=["name", "arch", "configuration", "no tag", "overlay", "folder"],
)
def test_every_way_to_the_weights_gives_the_same_logits(arguments, batch, monkeypatch):
    monkeypatch.setenv("CONVMIXER_HUB_SOURCE", "embedded")
    expected = safetensors.torch.load_file(find_checkpoint(NAME))
    model = timm.create_model(**arguments, pretrained=True).eval()
    torch.testing.assert_close(model.state_dict(), expected, atol=0, rtol=0)
    reference = timm.create_model("convmixer_cifar").eval()
    reference.load_state_dict(expected)
    assert torch.equal(model(batch), reference(batch))


def test_a_tag_in_place_of_a_configuration_chooses_the_weights():
    model = timm.create_model("convmixer_cifar", pretrained=True, pretrained_cfg="cifar100")
    expected = safetensors.torch.load_file(find_checkpoint("convmixer_cifar.cifar100"))
    torch.testing.assert_close(model.state_dict(), expected, atol=0, rtol=0)
    assert model.pretrained_cfg["label_names"] == CIFAR100.classes


def test_head_and_stem_are_adapted_and_nothing_else(batch):
    original = timm.create_model(NAME, pretrained=True)
    model = timm.create_model(NAME, pretrained=True, num_classes=37, in_chans=1)
    assert model.eval()(batch[:, :1]).shape == (2, 37)
    changed = {
        key
        for key, tensor in model.state_dict().items()
        if tensor.shape != original.state_dict()[key].shape
        or not torch.equal(tensor, original.state_dict()[key])
    }
    assert changed == {
        "patch_emb.conv.weight",
        "classification.linear.weight",
        "classification.linear.bias",
    }
    gray = original.patch_emb.conv.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.patch_emb.conv.weight, gray)


@pytest.mark.parametrize("adapted", [{}, {"num_classes": 37}, {"in_chans": 1, "num_classes": 37}])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("patch_emb.conv.weight"),
            "tensor 'patch_emb.conv.weight' is missing; use the checkpoint of this architecture",
        ),
        (
            lambda tensors: tensors.pop("conv_mixer_layers.3.norm1.bias"),
            "tensor 'conv_mixer_layers.3.norm1.bias' is missing; use the checkpoint of this",
        ),
        (
            lambda tensors: tensors.update(extra=torch.zeros(1)),
            "the model has no tensor 'extra'; use the checkpoint of this architecture",
        ),
        (
            lambda tensors: tensors.update({"patch_emb.conv.weight": torch.zeros(256, 3, 4, 4)}),
            r"tensor 'patch_emb.conv.weight' has shape \(256, 3, 4, 4\), the model's has "
            r"\(256, 3, 2, 2\); use the checkpoint of this architecture",
        ),
        (
            lambda tensors: tensors["patch_emb.norm.weight"][7:].fill_(float("nan")),
            "tensor 'patch_emb.norm.weight' holds NaN or infinite numbers; use another copy",
        ),
    ],
    ids=["no stem", "missing", "extra", "shape", "nan"],
)
def test_a_state_dict_that_does_not_fit_is_refused(tampered_folder, change, message, adapted):
    folder = tampered_folder(change)
    with pytest.raises(CheckpointError, match=f"^{folder}: {message}"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, **adapted)


def test_an_arch_without_weights_says_so():
    overlay = {"hf_hub_id": None}
    with pytest.raises(UnknownModelError, match="has no trained weights; use pretrained=False, or"):
        timm.create_model("convmixer_cifar", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: missing, or not a model's config"):
        load_trained(str(tmp_path))


@pytest.mark.parametrize(
    "config", ["[" * 100_000, '{"model_args": [1]}', '{"training": 1}', '{"pretrained_cfg": "x"}']
)
def test_a_folder_whose_configuration_is_none_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config.json: is not a model's configuration \("):
        load_trained(str(tmp_path))


@pytest.mark.parametrize(
    ("section", "entry", "message"),
    [
        ("pretrained_cfg", {"color": "blue"}, "unexpected keyword argument 'color'"),
        ("pretrained_cfg", {"input_size": None}, "'NoneType' object is not subscriptable"),
        ("model_args", {"foo": 1}, "unexpected keyword argument 'foo'"),
    ],
)
def test_a_folder_with_a_bad_configuration_is_refused(section, entry, message, tampered_folder):
    folder = tampered_folder(lambda tensors: None)
    file = Path(folder, "config.json")
    config = json.loads(file.read_text())
    config[section].update(entry)
    file.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=rf"^{folder}: cannot be loaded as convmixer_cifar \(.*{message}\); fix its config",
    ):
        load_trained(folder)


def test_what_is_saved_may_be_read_by_those_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(timm.create_model(ARCH), tmp_path, {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_another_pooling_is_saved_too(tmp_path, batch):
    model = timm.create_model(NAME, pretrained=True).eval()
    model.reset_classifier(10, "catavgmax")
    save_model(model, tmp_path, {})
    assert torch.equal(load_trained(str(tmp_path)).eval()(batch), model.eval()(batch))


def test_two_processes_may_save_into_one_folder(tmp_path, monkeypatch):
    def save_between(model, *arguments, **options):
        save_for_hf(model, *arguments, **options)
        monkeypatch.setattr(files, "save_for_hf", save_for_hf)
        save_model(model, tmp_path, {})

    save_for_hf = files.save_for_hf
    monkeypatch.setattr(files, "save_for_hf", save_between)
    save_model(timm.create_model(ARCH), tmp_path, {})
    load_trained(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == SAVED

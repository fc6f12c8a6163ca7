"""Loads say what they did, and refuse what does not fit."""

import json
import logging

import numpy as np
import pandas
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer_hub import CheckpointError, ConvMixer, ModelSizeError, find_checkpoint
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.load import load_trained
from convmixer_hub.model.config import get_label_names

from .conftest import ARCH, NAME

ANIMALS = ("dog", "axolotl", "cat")
HEAD = "classification.linear"


@pytest.fixture
def said(caplog):
    """Give the lines that the package logged."""
    caplog.set_level(logging.INFO, logger="convmixer_hub")

    def get_lines():
        return [line[1:] for line in caplog.record_tuples if line[0].startswith("convmixer_hub")]

    return get_lines


@pytest.fixture
def saved(tmp_path):
    """Save a model's tensors, perhaps changed; give the overlay that makes timm load them."""

    def save(model, change=lambda tensor: tensor):
        tensors = {key: change(tensor) for key, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, tmp_path / "mine.safetensors")
        return {"file": str(tmp_path / "mine.safetensors")}

    return save


@pytest.fixture(params=["file", "checkpoint_path", "directly"])
def load(request, saved):
    """Load a model's tensors, perhaps changed, into a model of `ARCH`, in one of three ways."""

    def load(model, change=lambda tensor: tensor, **adapted):
        if request.param == "file":
            overlay = saved(model, change)
            timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay, **adapted)
        elif request.param == "checkpoint_path":
            timm.create_model(ARCH, checkpoint_path=saved(model, change)["file"], **adapted)
        else:
            tensors = {key: change(tensor) for key, tensor in model.state_dict().items()}
            timm.create_model(ARCH, **adapted).load_state_dict(tensors)

    return load


def to_bf16(tensor):
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize(
    "arguments", [{}, {"features_only": True}, {"label_names": CIFAR10.classes}]
)
def test_a_plain_load_says_nothing(arguments, said):
    timm.create_model(NAME, pretrained=True, **arguments)
    timm.create_model(ARCH, num_classes=37)
    assert said() == []


@pytest.mark.parametrize(
    ("arguments", "loaded", "changes"),
    [
        (
            {"num_classes": 37, "in_chans": 1},
            119,
            "patch_emb.conv.weight adapted from 3 to 1 channels; "
            f"{HEAD} newly initialized for 37 classes, that of the checkpoint for 10 left out",
        ),
        ({"num_classes": 0}, 119, f"{HEAD} left out"),
        (
            {"in_chans": 4, "features_only": True},
            119,
            "patch_emb.conv.weight adapted from 3 to 4 channels",
        ),
        ({"label_names": ANIMALS}, 121, f"{HEAD} keeps the rows of 2 classes, 1 newly initialized"),
        ({"dtype": torch.bfloat16}, 121, "torch.float32 turned into torch.bfloat16"),
    ],
    ids=["head and stem", "no head", "features", "labels", "dtype"],
)
def test_one_line_says_what_was_adapted(arguments, loaded, changes, said):
    timm.create_model(NAME, pretrained=True, **arguments)
    source = find_checkpoint(NAME)
    line = f"convmixer_cifar: loading {loaded} tensors from {source}; {changes}"
    assert said() == [(logging.INFO, line)]


def test_one_line_says_what_was_converted(saved, said, batch):
    original = TimmConvMixer(96, 8, 5, 1, num_classes=10).eval()
    overlay = saved(original, to_bf16)
    model = timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    line = (
        f"{ARCH}: loading 121 tensors from {overlay['file']}; keys renamed from layout timm; "
        "torch.bfloat16 turned into torch.float32"
    )
    assert said() == [(logging.INFO, line)]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    images = batch[..., :8, :8]
    expected = original.bfloat16().float()(images)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_a_stem_that_fits_is_not_adapted(saved, said, batch):
    original = timm.create_model(ARCH, in_chans=1).eval()
    overlay = saved(original)
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "in_chans": 1}
    model = timm.create_model(ARCH, **options).eval()
    torch.testing.assert_close(model(batch[:, :1]), original(batch[:, :1]), atol=0, rtol=0)
    assert said() == []


def test_a_head_that_fits_is_not_thrown_away(saved, said):
    overlay = saved(timm.create_model(ARCH, num_classes=7))
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    message = "has a head for 7 classes, but its configuration says 10; put num_classes=7 into pre"
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(ARCH, num_classes=7, **options)
    timm.create_model(ARCH, num_classes=37, **options)
    assert said()[0][-1].endswith("for 37 classes, that of the checkpoint for 7 left out")
    overlay["num_classes"] = 7
    timm.create_model(ARCH, num_classes=7, **options)
    overlay["num_classes"] = -1  # as timm's train.py does with --pretrained-path, for a new head
    timm.create_model(ARCH, num_classes=7, **options)
    assert said()[-1][-1].endswith("for 7 classes, that of the checkpoint for 7 left out")


def save_by_number(model, folder, _):
    names = {"label_names": {2: ANIMALS[2], 0: ANIMALS[0], 1: ANIMALS[1]}}
    timm.models.save_for_hf(model, folder, names, model_args=names, safe_serialization=True)


class TestLabelNames:
    """A head for a new task keeps what the checkpoint knows of it."""

    def test_rows_of_known_classes_are_kept(self, batch):
        whole = timm.create_model(NAME, pretrained=True).eval()
        model = timm.create_model(NAME, pretrained=True, label_names=ANIMALS).eval()
        assert model.num_classes == 3
        assert get_label_names(model) == list(ANIMALS)
        kept = [CIFAR10.classes.index(name) for name in ("dog", "cat")]
        torch.testing.assert_close(model(batch)[:, [0, 2]], whole(batch)[:, kept])
        fresh = model.get_classifier().weight[1]
        assert 0 < fresh.abs().max() <= 256**-0.5

    def test_as_many_classes_in_another_order_are_no_trap(self, batch):
        whole = timm.create_model(NAME, pretrained=True).eval()
        backwards = CIFAR10.classes[::-1]
        model = timm.create_model(NAME, pretrained=True, num_classes=10, label_names=backwards)
        torch.testing.assert_close(model.eval()(batch), whole(batch).flip(1))

    @pytest.mark.parametrize("save", [save_model, save_by_number])
    def test_a_folder_remembers_them_and_can_be_adapted_again(self, save, tmp_path, batch, said):
        model = timm.create_model(NAME, pretrained=True, label_names=ANIMALS).eval()
        save(model, tmp_path, {})
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["num_classes"] == 3
        if save is save_model:
            assert "tag" not in config["pretrained_cfg"]
        said_before = len(said())
        loaded = load_trained(str(tmp_path)).eval()
        assert get_label_names(loaded) == list(ANIMALS)
        assert torch.equal(loaded(batch), model(batch))
        assert len(said()) == said_before
        folder = f"local-dir:{tmp_path}"
        assert timm.create_model(folder, pretrained=True, num_classes=5)(batch).shape == (2, 5)
        cats = timm.create_model(folder, pretrained=True, label_names=["cat", "axolotl"]).eval()
        torch.testing.assert_close(cats(batch), model(batch)[:, [2, 1]])

    def test_a_checkpoint_without_a_head_gets_one(self, tmp_path, said):
        save_model(timm.create_model(NAME, pretrained=True, num_classes=0), tmp_path, {})
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, label_names=ANIMALS)
        assert get_label_names(model) == list(ANIMALS)
        assert said()[-1][-1].endswith(f"{HEAD} keeps the rows of 0 classes, 3 newly initialized")

    @pytest.mark.parametrize(
        "names",
        [
            np.array(ANIMALS),
            pandas.Index(ANIMALS),
            pandas.Series(ANIMALS, index=[7, 8, 9]),
            {2: ANIMALS[2], 0: ANIMALS[0], 1: ANIMALS[1]},
            {"1": ANIMALS[1], "0": ANIMALS[0], "2": ANIMALS[2]},
        ],
        ids=["array", "Index", "Series", "id2label", "id2label of JSON"],
    )
    def test_they_may_be_given_as_other_libraries_have_them(self, names, tmp_path, batch):
        expected = timm.create_model(NAME, pretrained=True, label_names=ANIMALS).eval()
        model = timm.create_model(NAME, pretrained=True, label_names=names).eval()
        assert get_label_names(model) == list(ANIMALS)
        torch.testing.assert_close(model(batch)[:, [0, 2]], expected(batch)[:, [0, 2]])
        save_model(model, tmp_path, {})
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert get_label_names(loaded) == list(ANIMALS) and torch.equal(loaded(batch), model(batch))

    def test_numbers_of_a_folder_that_do_not_begin_with_0_are_no_names(self, tmp_path):
        from_1 = {"label_names": {1: "cat", 2: "dog"}}
        model = timm.create_model(NAME, num_classes=2)
        timm.models.save_for_hf(model, tmp_path, from_1, safe_serialization=True)
        assert get_label_names(timm.create_model(f"local-dir:{tmp_path}", pretrained=True)) is None

    @pytest.mark.parametrize(
        "names",
        [
            "cat,dog",
            ["cat", "dog", "cat"],
            {"cat", "dog"},
            (name for name in ANIMALS),
            ["cat", None],
            [b"cat", b"dog"],
            {1: "cat", 2: "dog"},
            {"cat": 0, "dog": 1},
            np.array([["cat", "dog"]]),
        ],
        ids=str,
    )
    def test_what_is_no_list_of_different_names_is_refused(self, names):
        with pytest.raises(ModelSizeError, match="^label_names is .*: give a list of different na"):
            timm.create_model(NAME, label_names=names)

    @pytest.mark.parametrize("num_classes", [10, 3])
    def test_a_fresh_head_has_classes_without_names(self, num_classes, tmp_path, batch):
        model = timm.create_model(NAME, pretrained=True, label_names=ANIMALS)
        model.reset_classifier(num_classes)
        assert get_label_names(model) is None
        save_model(model, tmp_path, {})
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert get_label_names(loaded) is None
        assert torch.equal(loaded(batch), model.eval()(batch))
        again = timm.create_model(NAME, pretrained=True)
        assert get_label_names(again) == list(CIFAR10.classes)
        assert get_label_names(timm.create_model(ARCH, num_classes=num_classes)) is None
        named = timm.create_model(ARCH, label_names=CIFAR10.classes)
        assert get_label_names(named) == list(CIFAR10.classes)

    def test_a_checkpoint_that_does_not_name_its_classes_gives_a_fresh_head(self, saved, said):
        overlay = {**saved(ConvMixer(96, 8, 5, 1, num_classes=3)), "num_classes": 3}
        timm.create_model(
            ARCH, pretrained=True, pretrained_cfg_overlay=overlay, label_names=["cat", "dog"]
        )
        [(*_, line)] = said()
        assert line.endswith(f"{HEAD} keeps the rows of 0 classes, 2 newly initialized")

    def test_names_of_the_registry_are_not_those_of_another_file(self, saved, batch):
        model = timm.create_model(ARCH).eval()
        options = {"pretrained": True, "pretrained_cfg_overlay": saved(model)}
        names = ["cat", *(f"class {i}" for i in range(9))]
        named = timm.create_model(ARCH, label_names=names, **options).eval()
        assert get_label_names(named) == names
        assert torch.equal(named(batch), model(batch))
        assert get_label_names(timm.create_model(ARCH, **options)) is None
        cfg = timm.get_pretrained_cfg(ARCH).to_dict() | options["pretrained_cfg_overlay"]
        named = timm.create_model(ARCH, pretrained=True, pretrained_cfg=cfg, label_names=names)
        assert torch.equal(named.eval()(batch), model(batch))

    @pytest.mark.parametrize("names", [CIFAR10.classes, [f"class {i}" for i in range(10)]])
    def test_a_new_model_does_not_have_names_of_the_registry(self, names):
        cfg = timm.get_pretrained_cfg(ARCH).to_dict() | {"label_names": names}  # as timm's scripts
        model = timm.create_model(ARCH, pretrained_cfg=cfg, num_classes=10)
        assert get_label_names(model) == (None if names is CIFAR10.classes else names)
        overlay = {"label_names": names}
        model = timm.create_model(ARCH, pretrained_cfg_overlay=overlay, num_classes=10)
        assert get_label_names(model) == list(names)

    def test_classes_without_names_get_these_if_they_are_as_many(self, tmp_path, batch, said):
        model = timm.create_model(ARCH, num_classes=2).eval()
        save_model(model, tmp_path, {})
        name, names = f"local-dir:{tmp_path}", ["cat", "dog"]
        named = timm.create_model(name, pretrained=True, label_names=names).eval()
        assert torch.equal(named(batch), model(batch))
        assert get_label_names(named) == names
        [(*_, line)] = said()
        assert line.endswith(f"{HEAD} kept, its 2 classes had no names")

    def test_classes_of_a_file_get_these_if_they_are_as_many(self, saved, batch, said):
        model = timm.create_model(ARCH, num_classes=3).eval()
        options = {"pretrained": True, "pretrained_cfg_overlay": saved(model)}
        named = timm.create_model(ARCH, label_names=ANIMALS, **options).eval()
        assert torch.equal(named(batch), model(batch))
        assert said()[0][-1].endswith(f"{HEAD} kept, its 3 classes had no names")
        timm.create_model(ARCH, label_names=["cat", "dog"], **options)
        assert said()[-1][-1].endswith(f"{HEAD} keeps the rows of 0 classes, 2 newly initialized")

    def test_another_number_of_classes_is_refused(self):
        with pytest.raises(ModelSizeError, match="num_classes is 5, but label_names has 3 names"):
            timm.create_model(NAME, num_classes=5, label_names=ANIMALS)


def test_another_number_of_classes_in_the_file_is_refused(load):
    checkpoint = TimmConvMixer(96, 8, 5, 1, num_classes=7)
    message = (
        rf"tensor '{HEAD}.weight' has shape \(7, 96\), the model's has \(10, 96\); use the "
        "checkpoint .*taken for layout timm of"
    )
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_refused(dtype, load):
    checkpoint = timm.create_model(ARCH)
    with pytest.raises(CheckpointError, match=rf"'patch_emb.conv.weight' is {dtype}, not floating"):
        load(checkpoint, lambda tensor: tensor.to(dtype))


def test_a_state_dict_is_named_as_such(tmp_path, said, monkeypatch):
    """A file that is not loaded has no say, nor has one that happens to be in this folder."""
    tensors = timm.create_model(ARCH).bfloat16().state_dict()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"activation": "relu"})
    monkeypatch.chdir(tmp_path)
    overlay = {"state_dict": tensors, "file": str(tmp_path / "model.safetensors")}
    timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)
    [(*_, line)] = said()
    assert line.startswith(f"{ARCH}: loading 121 tensors from the state dict; ")


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    names=st.none() | st.lists(st.text(min_size=1), min_size=2, max_size=12, unique=True),
    num_classes=st.none() | st.integers(2, 12),
    in_chans=st.sampled_from([None, 1, 2, 3, 4]),
    pretrained=st.booleans(),
    reset=st.none() | st.integers(2, 12),
    config=st.booleans(),
)
@pytest.mark.slow
def test_what_was_saved_is_what_is_loaded(
    tmp_path_factory, names, num_classes, in_chans, pretrained, reset, config
):
    """No load of a folder replaces a trained head, whatever the model in it was made with."""
    options = {"label_names": names, "num_classes": num_classes, "in_chans": in_chans}
    options = {name: value for name, value in options.items() if value is not None}
    if names and num_classes:
        options["num_classes"] = len(names)
    model = timm.create_model("convmixer_cifar", pretrained=pretrained, **options).eval()
    if reset:
        model.reset_classifier(reset)
    expected = get_label_names(model)
    if config:
        expected = [f"class {i}" for i in range(model.num_classes)]
    folder = tmp_path_factory.mktemp("saved")
    save_model(model, folder, {"label_names": expected} if config else {})
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert get_label_names(loaded) == expected
    names = expected or [f"class {i}" for i in range(model.num_classes)]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, label_names=names).eval()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)

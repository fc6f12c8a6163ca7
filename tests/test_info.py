"""`convmixer info` on repositories of the Hub and on files of `torch.save`."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer_hub import CheckpointError, UnknownModelError, get_record
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.checkpoints.info import describe
from convmixer_hub.load import load_trained
from convmixer_hub.model.config import get_label_names

from .conftest import ARCH, NAME, REVISION, no_network, offline
from .hub_server import error

SMALL = "hf-hub:somebody/small"
MISSING = "is missing or private \\(HTTP 401\\); check its name, @REVISION and HF_ENDPOINT, or l"


@pytest.fixture
def somebodys(hub, tmp_path):
    """A repository with a model of somebody's, `somebody/small`; give its files."""
    save_model(timm.create_model(ARCH, num_classes=7), tmp_path / "small", {})
    files = {file.name: file.read_bytes() for file in (tmp_path / "small").iterdir()}
    hub.repositories["somebody/small"] = {"main": files, "v2": files}
    return files


@pytest.mark.parametrize("prefix", ["hf-hub:", ""])
@pytest.mark.parametrize("revision", ["", "@v2"])
def test_a_repository_is_described(prefix, revision, somebodys):
    info = describe(f"{prefix}somebody/small{revision}")
    digest = hashlib.sha256(somebodys["model.safetensors"]).hexdigest()
    assert info["sha256"] == f"{digest}, not on record"
    assert info["layout"] == "ours"
    assert info["arch"] == ARCH
    assert info["activation"] == "gelu"
    assert info["tensors"] == "104 float32, 17 int64"
    assert info["size"].endswith("7 classes")


def test_no_configuration_names_another_file(hub, somebodys, tmp_path):
    config = json.loads(somebodys["config.json"])
    config["pretrained_cfg"]["hf_hub_filename"] = "other.bin"
    torch.save(timm.create_model(ARCH, num_classes=7).state_dict(), tmp_path / "other.bin")
    other = (tmp_path / "other.bin").read_bytes()
    files = somebodys | {"config.json": json.dumps(config).encode(), "other.bin": other}
    hub.repositories["somebody/small"]["main"] = files
    expected = safetensors.torch.load(somebodys["model.safetensors"])
    found = dict(load_trained(SMALL).state_dict())
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["hf-hub:convmixer-hub/{}", f"convmixer-hub/{{}}@{REVISION}"])
def test_a_repository_on_record_is_verified(name, hub):
    info = describe(name.format(NAME))
    assert info["sha256"] == f"{get_record(NAME).sha256}, on record for {NAME}"
    hub.repositories[f"convmixer-hub/{NAME}"][REVISION]["model.safetensors"] = b"another"
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(CheckpointError, match="not to be trusted"):
        describe(name.format(NAME))


def test_types_and_metadata_are_told(hub, untrained):
    timms = TimmConvMixer(96, 8, 5, 1, num_classes=10).bfloat16()
    tensors = safetensors.torch.save(timms.state_dict(), {"activation": "gelu", "by": "me"})
    config = (untrained / "config.json").read_bytes()
    hub.repositories["a/b"] = {"main": {"config.json": config, "model.safetensors": tensors}}
    info = describe("hf-hub:a/b")
    assert info["layout"] == "timm"
    assert info["metadata"] == "activation=gelu, by=me"
    assert info["tensors"] == "104 bfloat16, 17 int64"


def test_a_repository_without_a_configuration_is_a_file(somebodys, hub):
    del somebodys["config.json"]
    info = describe("somebody/small")
    assert info["arch"] == "not told"
    assert info["size"].endswith("7 classes")


@pytest.mark.parametrize(
    ("name", "arrange", "message"),
    [
        ("hf-hub:no/such", None, f"^http://[^ ]*/no/such {MISSING}"),
        ("no/such", None, f"^no/such: no file or folder, and http://[^ ]*/no/such {MISSING}"),
        ("somebody/small@v9", None, "/somebody/small has no revision 'v9'; check its name, @REV"),
        (SMALL, no_network, r"cannot be read \(.*\); check the network and HF_E"),
        (SMALL, lambda *_: Path(constants.HF_TOKEN_PATH).mkdir(), r"^your token cannot be read \("),
        (SMALL, offline, "cannot be asked, as HF_HUB_OFFLINE is set; unset that$"),
        (
            SMALL,
            lambda hub, _: hub.repositories["somebody/small"]["main"].pop("model.safetensors"),
            f"^{SMALL}: has no model.safetensors; pickles are not taken from the Hub",
        ),
        (SMALL, lambda hub, _: hub.order(error(400)), r"HTTP 400 Bad Request\); check its name"),
    ],
)
def test_a_repository_that_cannot_be_read_is_one_line(
    name, arrange, message, somebodys, hub, monkeypatch
):
    if arrange:
        arrange(hub, monkeypatch)
    with pytest.raises(CheckpointError, match=message) as refusal:
        describe(name)
    assert "\n" not in str(refusal.value)


def test_a_repository_in_the_cache_needs_no_network(somebodys, hub, monkeypatch):
    described = describe(SMALL)
    offline(hub, monkeypatch)
    assert describe(SMALL) == described


@pytest.mark.parametrize("name", ["hf-hub:small", "hf-hub:a/b/c", "hf-hub:"])
def test_what_can_be_no_repository_is_named(name):
    with pytest.raises(UnknownModelError, match=f"^{name}: is no repository; give hf-hub:OWNER/"):
        describe(name)


def test_a_path_that_exists_is_no_repository(tmp_path, monkeypatch):
    save_model(timm.create_model(ARCH), tmp_path / "runs" / "mine", {})
    monkeypatch.chdir(tmp_path)
    assert describe("runs/mine")["file"] == "runs/mine/model.safetensors"
    with pytest.raises(UnknownModelError, match="^no file or folder, and no trained weights are n"):
        describe("runs/mine.pth")


def test_a_pickle_is_read_with_weights_only(tmp_path):
    model, file = timm.create_model(ARCH), tmp_path / "last.pth.tar"
    torch.save(model.state_dict(), file)
    assert describe(str(file))["activation"] == "not told, and no tensor would tell it"
    torch.save(model, file)
    message = r"last.pth.tar: cannot be read with weights_only=True \(it holds convmixer_hub"
    with pytest.raises(CheckpointError, match=message):
        describe(str(file))


def test_figures_of_numpy_beside_the_weights_are_no_hindrance(tmp_path):
    model = timm.create_model(ARCH)
    figures = {"loss": np.float64(0.5), "step": np.int64(3), "best": np.bool_(True)}
    content = {"model": model.state_dict(), **figures, "curve": np.arange(3.0, dtype="float32")}
    torch.save(content, tmp_path / "last.pth")
    assert describe(str(tmp_path / "last.pth"))["parameters"] == "99,082"


def test_a_network_is_found_among_the_modules_of_a_lightning_checkpoint(tmp_path):
    model = timm.create_model(ARCH)
    modules = torch.nn.ModuleDict({"network": model, "criterion": torch.nn.Linear(3, 3)})
    content = {"state_dict": modules.state_dict(), "pytorch-lightning_version": "2.5", "epoch": 3}
    file = tmp_path / "last.ckpt"
    torch.save(content, file)
    info = describe(str(file))
    assert info["file"] == f"{file} (state_dict.network of it)"
    assert info["tensors"] == "104 float32, 17 int64"
    # As SimCLR has it: its keys begin as those of the authors' convmixer.py do.
    modules["projector"] = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3)
    )
    torch.save({"state_dict": modules.state_dict()}, file)
    assert describe(str(file))["file"] == f"{file} (state_dict.network of it)"
    modules["teacher"] = TimmConvMixer(8, 1, 3, 1)
    torch.save({"state_dict": modules.state_dict()}, file)
    with pytest.raises(CheckpointError, match="last.ckpt: holds several networks, network, teach"):
        describe(str(file))


def test_a_configuration_may_begin_with_a_mark_and_hold_any_letters(tmp_path):
    save_model(timm.create_model(ARCH, label_names=["Kätzchen", "熊"]), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps(config, ensure_ascii=False)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert get_label_names(load_trained(tmp_path)) == ["Kätzchen", "熊"]
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    assert describe(str(tmp_path))["arch"] == ARCH
    with pytest.raises(CheckpointError, match="cannot be loaded as .* UTF-8 BOM .*; fix its conf"):
        load_trained(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2620544\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_pointer_of_git_lfs_is_named(untrained, name):
    (untrained / name).write_bytes(POINTER)
    message = f"^{untrained / name}: is a Git LFS pointer, not the file itself; run git lfs pull wh"
    with pytest.raises(CheckpointError, match=message):
        describe(str(untrained / name))
    if name == "model.safetensors":
        for load in (load_trained, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True)):
            with pytest.raises(CheckpointError, match=message):
                load(untrained)


def test_a_path_that_is_not_utf8_is_named(untrained):
    folder = untrained.rename(untrained.with_name("a\udcff"))
    with pytest.raises(CheckpointError, match=r"safetensors file \(.* is not valid UTF-8\)"):
        load_trained(folder)


def test_a_pickle_beside_no_safetensors_is_named(untrained):
    (untrained / "model.safetensors").rename(untrained / "pytorch_model.bin")
    message = (
        "no such file, but pytorch_model.bin beside it; convert that: convmixer convert "
        f"{untrained}/pytorch_model.bin {untrained}/model.safetensors --layout ours$"
    )
    with pytest.raises(CheckpointError, match=message):
        load_trained(untrained)

"""`convmixer bundle` and `convmixer unbundle`: models without a network."""

import io
import os
import shutil
import tarfile

import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import constants, scan_cache_dir

from convmixer_hub import CheckpointError, ConvMixerHubError, UnknownModelError, find_checkpoint
from convmixer_hub.checkpoint import find_embedded, locate
from convmixer_hub.cli import main
from convmixer_hub.golden import verify
from convmixer_hub.kit import bundle, unbundle
from convmixer_hub.records import RECORDS

from .conftest import CHECKOUT, as_ordinary_user
from .test_doctor import PULL
from .test_hub import forbid_sockets, list_files

NAME = "convmixer_cifar.cifar10"
RECORD = RECORDS[NAME]
WEIGHTS = (CHECKOUT / "weights" / NAME / "model.safetensors").read_bytes()


@pytest.fixture
def kit(tmp_path):
    """A kit from the copy in the checkout."""
    bundle([NAME], tmp_path / "kit.tar")
    return tmp_path / "kit.tar"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A machine without network, with an empty cache and no other copy of the weights.

    A test that makes a kit asks for this afterwards.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("CONVMIXER_HUB_SOURCE", raising=False)
    monkeypatch.setattr("convmixer_hub.checkpoint.__file__", "/nowhere/convmixer_hub/checkpoint.py")
    forbid_sockets(monkeypatch)
    return tmp_path / "cache"


def convmixer(*arguments: str) -> tuple[int, str]:
    """Run the command line; give its exit status and what it printed."""
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_a_kit_serves_timm_and_torch_hub_without_a_network(kit, cache, batch):
    with pytest.raises(CheckpointError, match="may not be asked"):
        find_checkpoint(NAME)
    status, output = convmixer("unbundle", str(kit))
    assert (status, output) == (0, f"{NAME}: {find_checkpoint(NAME)}\n")
    assert find_checkpoint(NAME).read_bytes() == WEIGHTS
    assert locate(RECORD) == "cache"
    by_timm = timm.create_model(NAME, pretrained=True).eval()
    by_hub = torch.hub.load(str(CHECKOUT), "convmixer_cifar", source="local", pretrained=True)
    assert torch.equal(by_timm(batch), by_hub.eval()(batch))
    assert verify(NAME).holds
    [repository] = scan_cache_dir(cache).repos
    assert repository.repo_id == RECORD.repo_id
    assert not [path for path in cache.iterdir() if path.name.startswith(".unbundling")]


def test_a_kit_of_a_kit_has_the_same_bytes(kit, cache, tmp_path):
    unbundle(kit)
    status, output = convmixer("bundle", NAME, "convmixer_cifar", "-o", str(tmp_path / "2.tar"))
    assert (status, output) == (0, f"{tmp_path}/2.tar: {NAME}\n")
    assert (tmp_path / "2.tar").read_bytes() == kit.read_bytes()


def test_the_same_files_give_the_same_bytes(kit, tmp_path, monkeypatch):
    copy = shutil.copytree(CHECKOUT / "weights" / NAME, tmp_path / "weights" / NAME)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    monkeypatch.setattr("convmixer_hub.checkpoint.__file__", f"{tmp_path}/package/checkpoint.py")
    assert find_embedded(RECORD).parent == copy
    bundle([NAME], tmp_path / "other.tar")
    assert (tmp_path / "other.tar").read_bytes() == kit.read_bytes()


def test_a_kit_heals_a_damaged_cache(kit, cache):
    unbundle(kit)
    find_checkpoint(NAME).write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(NAME)
    unbundle(kit)
    assert find_checkpoint(NAME).read_bytes() == WEIGHTS


def test_a_kit_is_taken_in_place_of_a_download_before(kit, hub):
    downloaded = find_checkpoint(NAME)
    downloaded.resolve().write_bytes(b"damage")
    assert unbundle(kit)[NAME].parent != downloaded.parent
    assert find_checkpoint(NAME).read_bytes() == WEIGHTS
    assert len(hub.requests) == len(PULL)  # those of the download


def member(name: str, content: bytes = b"", **attributes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, content


def write_tar(file, *members, mode="w", **options) -> None:
    with tarfile.open(file, mode, **options) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))


GOOD = member(f"{NAME}/model.safetensors", WEIGHTS)
LINK = {"linkname": "/etc/passwd"}
SPARSE = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40)}
ESCAPES = {
    "parent": member("../README.md", b"x"),
    "parent in the middle": member(f"{NAME}/../../README.md", b"x"),
    "parent as the name": member("../model.safetensors", WEIGHTS),
    "absolute": member("/example/README.md", b"x"),
    "symbolic link": member(f"{NAME}/README.md", type=tarfile.SYMTYPE, **LINK),
    "link of a folder": member(NAME, type=tarfile.SYMTYPE, linkname="/tmp"),
    "hard link": member(f"{NAME}/README.md", type=tarfile.LNKTYPE, **LINK),
    "device": member(f"{NAME}/README.md", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "fifo": member(f"{NAME}/README.md", type=tarfile.FIFOTYPE),
    "folder": member(f"{NAME}/README.md", type=tarfile.DIRTYPE),
    "sparse file": member(f"{NAME}/README.md", pax_headers=SPARSE),
    "hidden file": member(f"{NAME}/.README.md", b"x"),
    "pickle": member(f"{NAME}/model.pth", b"x"),
    "no folder": member("model.safetensors", WEIGHTS),
    "nested": member(f"{NAME}/deep/README.md", b"x"),
    "empty name": member("", b"x"),
}


@pytest.mark.parametrize("evil", ESCAPES.values(), ids=ESCAPES)
def test_no_member_escapes(evil, cache, tmp_path):
    write_tar(tmp_path / "kit.tar", GOOD, evil, format=tarfile.PAX_FORMAT)
    before = list_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"kit.tar: holds '.*', which is no file of a model"):
        unbundle(tmp_path / "kit.tar")
    assert list_files(tmp_path) == before


def other_name(file):
    write_tar(file, GOOD, member("convmixer_new.cifar10/model.safetensors", b"x"))


def flipped(file):
    write_tar(file, member(f"{NAME}/model.safetensors", WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "cannot be read (.*No such file"),
        (lambda file: file.mkdir(), "cannot be read (.*Is a directory"),
        (lambda file: file.write_bytes(b""), "is no whole tar archive"),
        (lambda file: file.write_bytes(WEIGHTS), "is no whole tar archive"),
        (lambda file: write_tar(file, GOOD, mode="w:gz"), "is no whole tar archive"),
        (lambda file: write_tar(file), "holds no model; make the kit again with"),
        (lambda file: write_tar(file, member(f"{NAME}/README.md", b"x")), "No such file"),
        (other_name, "holds 'convmixer_new.cifar10', which this version does not know; update "),
        (
            flipped,
            f"its SHA-256 is [0-9a-f]+, but {NAME} has {RECORD.sha256}; it is of .*/kit.tar: make ",
        ),
    ],
    ids=["none", "folder", "empty", "no tar", "gzip", "no member", "no weights", "name", "flipped"],
)
def test_a_kit_that_does_not_serve_is_one_line(make, message, cache, tmp_path):
    make(tmp_path / "kit.tar")
    with pytest.raises(
        (CheckpointError, UnknownModelError), match=message.replace("(", r"\(")
    ) as e:
        unbundle(tmp_path / "kit.tar")
    assert "\n" not in str(e.value) and "; " in str(e.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_kit_cut_anywhere_is_refused(kit, cache):
    content = kit.read_bytes()
    end = content.rindex(WEIGHTS[-1000:]) + 1000
    for length in [*range(1, end, 100_001), end - 1]:
        kit.write_bytes(content[:length])
        with pytest.raises(ConvMixerHubError):
            unbundle(kit)
        assert not cache.exists() or not list(cache.iterdir())


def test_a_cache_that_cannot_be_made_is_one_line(kit, tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"cannot be unbundled into the Hub's cache \(.*Not a directory: .*\); make room ",
    ):
        unbundle(kit, cache_dir=kit / "cache")


def test_what_cannot_be_bundled_is_one_line(tmp_path):
    status, output = convmixer("bundle", "convmixer_cifr", "-o", str(tmp_path / "kit.tar"))
    assert (status, output.count("\n")) == (1, 1)
    status, output = convmixer("bundle", NAME, "-o", str(tmp_path / "none" / "kit.tar"))
    assert (status, output.count("\n")) == (1, 1)
    status, output = convmixer("bundle", NAME, "-o", str(tmp_path))
    assert (status, output.count("\n")) == (1, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_read_is_not_bundled(hub, tmp_path):
    folder = find_checkpoint(NAME).parent
    folder.chmod(0o111)
    status, output = as_ordinary_user(
        lambda: convmixer("bundle", NAME, "-o", str(tmp_path / "kit.tar"))
    )
    folder.chmod(0o700)
    assert (status, output.count("\n")) == (1, 1)
    assert output.startswith(f"Error: {folder}: cannot be read whole (")


def test_the_embedded_folder_is_bundled_whole(kit):
    folder = find_embedded(RECORD).parent
    with tarfile.open(kit) as archive:
        names = archive.getnames()
    assert names == [f"{NAME}/{file.name}" for file in sorted(folder.iterdir())]

import shutil

import pytest

from convmixer_hub import CheckpointError, find_checkpoint
from convmixer_hub.hub import find

from .conftest import CHECKOUT, NAME


@pytest.fixture
def installed_copy(tmp_path, monkeypatch):
    """Let the package believe that it is installed elsewhere; give the file of its weights."""
    package = tmp_path / "site" / "convmixer_hub"
    file = package / "weights" / NAME / "model.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(CHECKOUT / "weights" / NAME / "model.safetensors", file)
    monkeypatch.setattr(find, "__file__", str(package / "hub" / "find.py"))
    return file


def test_a_wheel_carries_the_weights_inside_the_package(installed_copy):
    assert find_checkpoint(NAME) == installed_copy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
            "its SHA-256 is [0-9a-f]{64}, but convmixer_cifar.cifar10 has [0-9a-f]{64}; reinstall",
        ),
        (lambda content: content[:-1], r"has \d+ bytes, but convmixer_cifar.cifar10 has \d+; rei"),
    ],
    ids=["one byte flipped", "truncated"],
)
def test_a_damaged_copy_is_refused(installed_copy, damage, message):
    installed_copy.write_bytes(damage(installed_copy.read_bytes()))
    with pytest.raises(CheckpointError, match=f"^{installed_copy}: {message}") as refused:
        find_checkpoint(NAME)
    assert "\n" not in str(refused.value)


def test_an_unknown_source_is_refused(monkeypatch):
    monkeypatch.setenv("CONVMIXER_HUB_SOURCE", "ftp")
    with pytest.raises(CheckpointError, match="unknown source of weights 'ftp'; set .* auto, emb"):
        find_checkpoint(NAME)

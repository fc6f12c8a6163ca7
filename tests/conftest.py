"""Fixtures that several test modules share."""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TypeVar

import datasets
import pyarrow
import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants
from PIL import Image
from pyarrow import parquet
from timm.utils import random_seed
from torch import nn

import convmixer_hub  # noqa: F401  (registers the models)
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.cli.main import main
from convmixer_hub.data.reader import Dataset
from convmixer_hub.hub.records import CIFAR10, get_record

from .hub_server import HubServer

T = TypeVar("T")

CHECKOUT = Path(__file__).resolve().parent.parent
IMAGES = CHECKOUT / "tests" / "images"
# By class, in the order of the classes.
PICTURES = {name: (IMAGES / f"{name}.png").read_bytes() for name in CIFAR10.classes}
CAT, DOG = PICTURES["cat"], PICTURES["dog"]
NAME = "convmixer_cifar.cifar10"
ARCH = "convmixer_96_8_ks5_p1"
REVISION = get_record(NAME).revision
KINDS = {
    "animal": ["bird", "cat", "deer", "dog", "frog", "horse"],
    "machine": ["airplane", "automobile", "ship", "truck"],
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# Of a model, as timm resolves it for its data.
CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


@pytest.fixture(autouse=True, scope="session")
def _own_cache_of_datasets(tmp_path_factory):
    """Let the datasets library, which keeps a copy of all that it reads, keep it for the tests."""
    cache = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # for processes that tests start
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    random_seed(0)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in list(os.environ):
        if name.startswith("CONVMIXER_HUB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def batch() -> torch.Tensor:
    """Two images' worth of numbers."""
    return torch.randn(2, 3, 32, 32)


def convmixer(*arguments: object, **options) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False, **options)


def print_table(command: str) -> list[list[str]]:
    """Run a command, written as on the command line; give the lines that it printed, as cells."""
    result = convmixer(*command.split())
    assert result.exit_code == 0, result.output
    return [re.split("  +", line) for line in result.stdout.splitlines()]


def randomise_norms(model: nn.Module) -> None:
    """Give BatchNorm layers statistics that show whether they are used, and where."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)


def uses_cpp(prepared: nn.Module) -> bool:
    with torch.profiler.profile() as profile:
        prepared(torch.zeros(1, prepared.in_chans, 32, 32))
    return "convmixer_hub::map_features" in {event.key for event in profile.key_averages()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Load the weights in the folder of a model."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def write_split(folder: Path, split: str, images: list[bytes], labels: list[int]) -> Path:
    """Write images and labels as the Hub keeps CIFAR-10; give the folder."""
    table = pyarrow.table({"img": [{"bytes": i, "path": None} for i in images], "label": labels})
    classes = {"names": list(CIFAR10.classes), "_type": "ClassLabel"}
    info = {"huggingface": json.dumps({"info": {"features": {"label": classes}}})}
    file = folder / "plain_text" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata(info), file)
    return folder


@pytest.fixture
def untrained(tmp_path) -> Path:
    """The folder of an untrained model."""
    folder = tmp_path / "a_run"
    save_model(timm.create_model(ARCH), folder, {})
    return folder


def write_tree(root: Path, *paths: str | tuple[str, bytes | Path]) -> Path:
    """Write a cat, or what a pair of path and content says, at each path; / makes a folder."""
    for path in paths:
        path, content = path if isinstance(path, tuple) else (path, CAT)
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            place.symlink_to(content)
    return root


def count_images(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Count the images of each split by the names of their classes."""
    return {
        split: dict(Counter(dataset.classes[label] for label in images.labels))
        for split, images in dataset.splits.items()
    }


def write_photos(folder: Path, *splits: str) -> Path:
    """Make class folders of the shipped images, each in two sizes, in every split."""
    for place, label in product([folder / split for split in splits], KINDS):
        (place / label).mkdir(parents=True)
        for name, size in product(KINDS[label], [(32, 32), (50, 40)]):
            image = Image.open(IMAGES / f"{name}.png").resize(size)
            image.save(place / label / f"{name} {size[0]}.jpg", quality=95)
    return folder


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """Encode an image in memory."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def cifar_sample(tmp_path_factory) -> Path:
    """A dataset of the ten shipped images: four times over for training, once for testing.

    The datasets library reads it once for all tests, so it stays as it is.
    """
    images = list(PICTURES.values())
    folder = tmp_path_factory.mktemp("sample") / "data"
    write_split(folder, "train", images * 4, list(range(10)) * 4)
    return write_split(folder, "test", images, list(range(10)))


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a fresh process, offline, in another folder; give what it printed."""

    def run(code: str, *options: str, **environment: str) -> str:
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(CHECKOUT)}
        result = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


def as_ordinary_user(function: Callable[[], T]) -> T:
    """Call a function with no more rights than the modes of files give, for root too.

    It is called in a thread that gives up root's capabilities, and stays the owner of its files.
    """

    def call() -> T:
        if os.geteuid() == 0:
            version_3_of_this_thread, none = (ctypes.c_uint32 * 2)(0x20080522, 0), bytes(24)
            assert ctypes.CDLL(None).capset(version_3_of_this_thread, none) == 0
        return function()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


@contextmanager
def limited(what: int, amount: int) -> Iterator[None]:
    """Let this process have no more than so much of a resource, such as `RLIMIT_AS`."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (amount, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let huggingface_hub, which read the environment when imported, use another Hub."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody answer for the Hub, and the client not wait between its attempts."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    use_endpoint(monkeypatch, "http://127.0.0.1:1")


def offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which read the environment when imported, not use the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on 127.0.0.1 with the shipped model, an empty cache, no token, and no other source."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONVMIXER_HUB_SOURCE", "hub")
    with HubServer() as server:
        use_endpoint(monkeypatch, server.url)
        for folder in (CHECKOUT / "weights").iterdir():
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            revisions = {"main": files, get_record(folder.name).revision: dict(files)}
            server.repositories[f"convmixer-hub/{folder.name}"] = revisions
        yield server

import hashlib
import http.server
import shutil
import threading
from pathlib import Path

import pytest

from convmixer_hub import CheckpointError, checkpoint, find_checkpoint, get_record

from .conftest import CHECKOUT

NAME = "convmixer_cifar.cifar10"


@pytest.fixture
def installed_copy(tmp_path, monkeypatch):
    """Let the package believe that it is installed elsewhere; give the file of its weights."""
    package = tmp_path / "site" / "convmixer_hub"
    file = package / "weights" / NAME / "model.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(CHECKOUT / "weights" / NAME / "model.safetensors", file)
    monkeypatch.setattr(checkpoint, "__file__", str(package / "checkpoint.py"))
    return file


@pytest.fixture
def hub(tmp_path):
    """A Hub on 127.0.0.1 that has one file: the weights, at any revision; give its address."""
    content = (CHECKOUT / "weights" / NAME / "model.safetensors").read_bytes()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.asked = asked
        yield server
        server.shutdown()


def test_the_recorded_file_is_the_embedded_one():
    record = get_record(NAME)
    file = CHECKOUT / "weights" / NAME / "model.safetensors"
    assert find_checkpoint(NAME) == file
    assert file.stat().st_size == record.size


def test_a_bare_arch_means_its_first_tag():
    assert get_record("convmixer_cifar") is get_record(NAME)


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
        (lambda content: content + b"x", r"has \d+ bytes, but convmixer_cifar.cifar10 has \d+"),
        (lambda content: b"", "has 0 bytes, but convmixer_cifar.cifar10 has "),
    ],
    ids=["one byte flipped", "truncated", "longer", "empty"],
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


def test_embedded_only_without_a_copy_is_refused(installed_copy):
    installed_copy.unlink()
    with pytest.raises(CheckpointError, match="this installation carries no copy of the weights"):
        find_checkpoint(NAME, source="embedded")


@pytest.mark.slow
def test_the_hub_serves_the_same_weights_and_then_its_cache(hub, run_python, tmp_path):
    code = (
        "import timm, convmixer_hub\n"
        "model = timm.create_model('convmixer_cifar', pretrained=True, cache_dir='cache')\n"
        "print(convmixer_hub.find_checkpoint('convmixer_cifar', cache_dir='cache'))\n"
    )
    environment = {
        "PYTHONPATH": str(CHECKOUT),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "CONVMIXER_HUB_SOURCE": "hub",
        "CONVMIXER_HUB_NAMESPACE": "somebody",
    }
    path = run_python(code, HF_HUB_OFFLINE="0", **environment)
    repository = tmp_path / "cache" / "models--somebody--convmixer_cifar.cifar10"
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == get_record(NAME).sha256
    assert repository in Path(path).parents
    assert f"/somebody/{NAME}/resolve/v1/model.safetensors" in hub.asked
    assert run_python(code, HF_HUB_OFFLINE="1", **environment) == path


@pytest.mark.slow
def test_without_network_and_copy_one_line_says_what_to_do(run_python):
    code = (
        "import convmixer_hub\n"
        "try:\n"
        "    convmixer_hub.find_checkpoint('convmixer_cifar', source='hub')\n"
        "except convmixer_hub.CheckpointError as error:\n"
        "    print(error)\n"
    )
    message = run_python(code, PYTHONPATH=str(CHECKOUT))
    assert message.startswith(
        f"{NAME}: cannot be had from the Hub repository convmixer-hub/{NAME} ("
    )
    assert message.endswith(
        "; check the network, or reinstall the package and unset CONVMIXER_HUB_SOURCE to use its "
        "own copy"
    )
    assert "\n" not in message

"""`convmixer pull` and `convmixer doctor`, with a Hub on this machine."""

import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from convmixer_hub import find_checkpoint

from .conftest import CHECKOUT, NAME, as_ordinary_user, convmixer, no_network, offline
from .hub_server import headers, ordered, other_body

TOKEN = "hf_secret"
PULL = ["HEAD", "HEAD", "GET"]  # what is there, by us and by the client, and then the file


def doctor(*arguments: str) -> tuple[int, dict[str, str], str]:
    """Run `convmixer doctor`; give its exit status, its lines by subject, and its verdict."""
    result = convmixer("doctor", *arguments)
    *lines, verdict = result.output.splitlines()
    found = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    return result.exit_code, found, verdict


def test_pull_fills_the_cache_for_a_machine_without_network(hub, monkeypatch):
    monkeypatch.delenv("CONVMIXER_HUB_SOURCE")  # so that the embedded copy would be enough
    result = convmixer("pull", "convmixer_cifar", NAME)
    assert result.exit_code == 0
    assert result.output == f"{NAME}: {find_checkpoint(NAME, 'hub')}\n" * 2
    offline(hub, monkeypatch)
    file = CHECKOUT / "weights" / NAME / "model.safetensors"
    assert find_checkpoint(NAME, "hub").read_bytes() == file.read_bytes()


def test_pull_of_anything_else_downloads_nothing(hub):
    result = convmixer("pull", NAME, "convmixer_cifr")
    assert result.exit_code == 1
    assert "Error: no trained weights are named 'convmixer_cifr'; did" in result.output
    assert hub.requests == []


def test_doctor_reports_what_loading_depends_on(hub, tmp_path):
    status, found, verdict = doctor()
    assert (status, verdict) == (0, "healthy")
    assert found["endpoint"] == f"{hub.url} answers (HTTP 200)"
    assert found["token"] == "none"
    assert found["offline"] == "no"
    assert found["cache"].startswith(f"{tmp_path}/cache, ")
    assert found["cache"].endswith(" GB free")
    for package in ("convmixer-hub 0.", "torch 2.", "timm 1.", "huggingface_hub ", "Python 3."):
        assert package in found["versions"]
    assert found[NAME] == "hub: to be downloaded, 2.6 MB; the Hub names the recorded SHA-256"
    assert not (tmp_path / "cache").exists()


def test_doctor_never_prints_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for accepted in (True, False):
        hub.tokens = {TOKEN} if accepted else set()
        result = convmixer("doctor")
        assert result.exit_code == (0 if accepted else 1)
        assert "token" in result.output and "present" in result.output
        assert TOKEN not in result.output
    assert "does not accept your token" in result.output


def embedded(hub, monkeypatch):
    monkeypatch.delenv("CONVMIXER_HUB_SOURCE")


def embedded_without_network(hub, monkeypatch):
    embedded(hub, monkeypatch)
    no_network(hub, monkeypatch)


def cached_and_offline(hub, monkeypatch):
    find_checkpoint(NAME)
    offline(hub, monkeypatch)


def small_file(hub, monkeypatch):
    hub.order(headers(ETag='"0123456789abcdef0123456789abcdef01234567"'))


@pytest.mark.parametrize(
    ("arrange", "subject", "result"),
    [
        (embedded, NAME, "embedded: its SHA-256 is the recorded one"),
        (embedded_without_network, "endpoint", r"http://127.0.0.1:1 does not answer \("),
        (cached_and_offline, NAME, "cache: its SHA-256 is the recorded one"),
        (cached_and_offline, "offline", "HF_HUB_OFFLINE is set"),
        (cached_and_offline, "endpoint", "http://.* is not asked, because HF_HUB_OFFLINE is set$"),
        (small_file, NAME, "hub: to be downloaded, 2.6 MB; its SHA-256 is checked then"),
    ],
)
def test_doctor_finds_what_is_healthy(hub, monkeypatch, arrange, subject, result):
    arrange(hub, monkeypatch)
    status, found, verdict = doctor(NAME)
    assert (status, verdict) == (0, "healthy")
    assert re.match(result, found[subject])


@pytest.mark.parametrize("needed", [True, False])
def test_doctor_reports_a_token_that_cannot_be_read(hub, tmp_path, monkeypatch, needed):
    (tmp_path / "token").mkdir()
    if not needed:
        embedded(hub, monkeypatch)
    status, found, verdict = doctor(NAME)
    assert found["token"].startswith("your token cannot be read ([Errno 21] Is a directory: ")
    assert found["token"].endswith(f"); fix or remove {tmp_path}/token, or set HF_TOKEN")
    assert (status, verdict) == ((1, f"not healthy: token, {NAME}") if needed else (0, "healthy"))


def damaged_in_the_cache(hub, monkeypatch):
    with find_checkpoint(NAME).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")


def damaged_and_offline(hub, monkeypatch):
    damaged_in_the_cache(hub, monkeypatch)
    offline(hub, monkeypatch)


def no_embedded_copy(hub, monkeypatch):
    monkeypatch.setenv("CONVMIXER_HUB_SOURCE", "embedded")
    monkeypatch.setattr("convmixer_hub.hub.find.__file__", "/nowhere/convmixer_hub/hub/find.py")


def no_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/dev/null/cache")


def full_disk(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_600_000))


def bad_namespace(hub, monkeypatch):
    monkeypatch.setenv("CONVMIXER_HUB_NAMESPACE", "a/b")


OTHER_FILE = "hub: http://127.0.0.1:.*: its model.safetensors is not the recorded file; "


@pytest.mark.parametrize(
    ("arrange", "subject", "result"),
    [
        (
            damaged_in_the_cache,
            NAME,
            "cache: .*: its SHA-256 is [0-9a-f]{64}, but .*; "
            f"`convmixer pull {NAME}` downloads it again$",
        ),
        (damaged_and_offline, NAME, "cache: .* downloads it again, once HF_HUB_OFFLINE is unset$"),
        (offline, NAME, r"hub: http\S+ cannot be asked, as HF_HUB_OFFLINE is set; unset that"),
        (no_embedded_copy, NAME, f"embedded: {NAME}: this installation carries no copy of the "),
        (no_cache, "cache", "/dev/null/cache, .* GB free, not writable; name another with HF_HOME"),
        (full_disk, "cache", "/.*/cache, 0.0 GB free; make room, or name another with HF_HOME$"),
        (bad_namespace, NAME, f"{NAME}: no repository is named 'a/b/{NAME}'; check CONVMIXER_HU"),
        (ordered(other_body(lambda _: b"other")), NAME, OTHER_FILE),
        (ordered(headers(ETag='"' + 64 * "a" + '"')), NAME, OTHER_FILE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_doctor_finds_what_is_not(hub, monkeypatch, arrange, subject, result):
    arrange(hub, monkeypatch)
    status, found, verdict = doctor(NAME)
    assert (status, verdict) == (1, f"not healthy: {subject}")
    assert re.match(result, found[subject])
    assert "; " in found[subject]  # the remedy


def test_list_with_a_bad_namespace_is_one_line(hub, monkeypatch):
    bad_namespace(hub, monkeypatch)
    result = convmixer("list")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    message = f"Error: {NAME}: no repository is named 'a/b/{NAME}'; check CONVMIXER_HUB_NAMESPACE "
    assert result.output.startswith(message)


def test_doctor_reports_a_cache_in_a_closed_folder(hub, monkeypatch, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{closed}/home/hub")
    status, found, verdict = as_ordinary_user(lambda: doctor(NAME))
    assert (status, verdict) == (1, "not healthy: cache")
    assert found["cache"].endswith(" GB free, not writable; name another with HF_HOME")
    closed.chmod(0o700)

"""Weights from a Hub, through the real client over HTTP, when all is well and when it is not."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from time import sleep as pause  # also where `time.sleep` is replaced

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants, hf_hub_download

from convmixer_hub import CheckpointError, find_checkpoint, get_record
from convmixer_hub.hub.find import locate

from .conftest import (
    CHECKOUT,
    NAME,
    REVISION,
    as_ordinary_user,
    limited,
    no_network,
    offline,
)
from .hub_server import HubServer, cut, drip, error, headers, ordered, other_body, redirect
from .test_doctor import PULL

REPOSITORY = f"convmixer-hub/{NAME}"
FILE = f"/{REPOSITORY}/resolve/{REVISION}/model.safetensors"
WEIGHTS = (CHECKOUT / "weights" / NAME / "model.safetensors").read_bytes()
FLIPPED = WEIGHTS[:1000] + bytes([WEIGHTS[1000] ^ 1]) + WEIGHTS[1001:]
DIGESTS = (
    rf"its SHA-256 is {hashlib.sha256(FLIPPED).hexdigest()}, "
    f"but {NAME} has {hashlib.sha256(WEIGHTS).hexdigest()}"
)
OWN_COPY = "reinstall the package and unset CONVMIXER_HUB_SOURCE to use its own copy$"


def with_token(token, arrange=lambda hub, monkeypatch: None):
    def arranged(hub, monkeypatch):
        hub.tokens.add("hf_right")
        monkeypatch.setenv("HF_TOKEN", token)
        arrange(hub, monkeypatch)

    return arranged


def stall(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.order(drip(1, lambda: pause(3)), "GET", times=1)


def rename(hub, monkeypatch):
    """Send on whoever asks for the old name, which is there no longer."""
    hub.repositories["new/name"] = hub.repositories.pop(REPOSITORY)
    onward = redirect(f"/new/name/resolve/{REVISION}/model.safetensors")
    hub.order(lambda answer: onward(answer) if answer.status == 401 else None)


THE_WEIGHTS = None
NOT_A_HUB = (
    r"http\S+ comes without a usable X-Repo-Commit or ETag, so not from a Hub; check HF_ENDPOINT, "
    f"or {OWN_COPY}"
)
FAULTS = {
    "refused connection": (
        no_network,
        rf"http://127.0.0.1:1/{REPOSITORY} cannot be read \(.*Connection refused\); check the "
        f"network and HF_ENDPOINT, or {OWN_COPY}",
    ),
    "offline": (
        offline,
        rf"{REPOSITORY} cannot be asked, as HF_HUB_OFFLINE is set; unset "
        "that, or copy the Hub's cache folder from a machine where "
        f"`convmixer pull {NAME}` was run, or {OWN_COPY}",
    ),
    "wrong token": (
        with_token("hf_wrong"),
        r"http\S+:\d+ does not accept your token \(HTTP 401\); renew it with `hf auth login`, or "
        r"do without \(`hf auth logout`, and unset HF_TOKEN\)$",
    ),
    "private repository, no token": (
        lambda hub, monkeypatch: hub.private.add(REPOSITORY),
        rf"/{REPOSITORY} is missing or private \(HTTP 401\); check CONVMIXER_HUB_NAMESPACE and "
        "HF_ENDPOINT, or log in with `hf auth login` or HF_TOKEN$",
    ),
    "private repository, right token": (
        with_token("hf_right", lambda hub, monkeypatch: hub.private.add(REPOSITORY)),
        THE_WEIGHTS,
    ),
    "403": (
        ordered(error(403, X_Error_Message="no")),
        rf"/{REPOSITORY} is closed to you \(HTTP 403\); ask its owner for access, or use a token",
    ),
    "missing repository": (
        with_token("hf_right", lambda hub, monkeypatch: hub.repositories.clear()),
        rf"/{REPOSITORY} does not exist, or is closed to your token \(HTTP 404\); check "
        "CONVMIXER_HUB_NAMESPACE and HF_ENDPOINT, or ",
    ),
    "missing revision": (
        lambda hub, monkeypatch: hub.repositories[REPOSITORY].pop(REVISION),
        rf"/{REPOSITORY} has no revision '{REVISION}'; check CONVMIXER_HUB_NAMESPACE and HF_",
    ),
    "missing file": (
        lambda hub, monkeypatch: hub.repositories[REPOSITORY][REVISION].pop("model.safetensors"),
        rf"/{REPOSITORY} has no file 'model.safetensors'; check CONVMIXER_HUB_NAMESPACE and ",
    ),
    "404 from something else": (
        ordered(error(404)),
        rf"/{REPOSITORY} cannot be read \(HTTP 404 Not Found\); check CONVMIXER_HUB_NAMESPACE and "
        f"HF_ENDPOINT, or {OWN_COPY}",
    ),
    "429 twice": (ordered(error(429, Retry_After="7"), "HEAD", times=2), THE_WEIGHTS),
    "429 always": (
        ordered(error(429, Retry_After="7")),
        r"cannot be read \(HTTP 429 Too Many Requests\); try again later, or ",
    ),
    "500 twice": (ordered(error(500), "HEAD", times=2), THE_WEIGHTS),
    "500 always": (
        ordered(error(500)),
        r"cannot be read \(HTTP 500 Internal Server Error\); try again later, or ",
    ),
    "500 for the body": (
        ordered(error(500), "GET", times=1),
        r"cannot be read \(HTTP 500 Internal Server Error\); try again later, or ",
    ),
    "redirect to another path": (rename, THE_WEIGHTS),
    "redirect in a circle": (
        ordered(redirect(FILE)),
        r"cannot be read \(Exceeded \d+ redirects .*\); check the network and HF_ENDPOINT, or ",
    ),
    "slow drip": (ordered(drip(20, lambda: pause(0.01)), "GET"), THE_WEIGHTS),
    "stalled once": (stall, THE_WEIGHTS),
    "cut once": (ordered(cut(len(WEIGHTS) // 2), "GET", times=1), THE_WEIGHTS),
    "length promised wrongly": (
        ordered(headers(Content_Length="1000"), "HEAD"),
        r"cannot be read \(Consistency check failed: file should be of size 1000 but has size ",
    ),
    "wrong bytes once": (ordered(other_body(lambda _: FLIPPED), "GET", times=1), THE_WEIGHTS),
    "wrong bytes": (
        ordered(other_body(lambda _: FLIPPED)),
        rf"http\S+{REPOSITORY} gives another file, so it is not to be trusted \({DIGESTS}\); "
        f"check HF_ENDPOINT and CONVMIXER_HUB_NAMESPACE, or {OWN_COPY}",
    ),
    "wrong ETag": (ordered(headers(ETag='"0123456789abcdef"')), THE_WEIGHTS),
    "no ETag": (ordered(headers(ETag=None)), NOT_A_HUB),
    "not a Hub": (ordered(headers(X_Repo_Commit=None)), NOT_A_HUB),
    "ETag that leads elsewhere": (ordered(headers(ETag='"../../../elsewhere"')), NOT_A_HUB),
    "commit that leads elsewhere": (ordered(headers(X_Repo_Commit="../../..")), NOT_A_HUB),
    "cache in a file": (
        lambda hub, mp: mp.setattr(constants, "HF_HUB_CACHE", f"{__file__}/cache"),
        rf"^{NAME}: the Hub's cache cannot be used \(.*Not a directory: .*\); make room",
    ),
}


@pytest.mark.parametrize(("arrange", "message"), FAULTS.values(), ids=FAULTS)
def test_a_user_gets_the_weights_or_one_clear_line(arrange, message, hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    arrange(hub, monkeypatch)
    if message is THE_WEIGHTS:
        assert find_checkpoint(NAME).read_bytes() == WEIGHTS
        return
    with pytest.raises(CheckpointError, match=message) as refused:
        find_checkpoint(NAME)
    assert "\n" not in str(refused.value)
    assert NAME in str(refused.value)
    assert "hf_" not in str(refused.value)


def test_a_token_is_not_sent_on_to_another_host(hub, monkeypatch):
    with_token("hf_right")(hub, monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with HubServer() as storage:
        storage.repositories = hub.repositories
        hub.order(redirect(storage.url.replace("127.0.0.1", "localhost") + FILE))
        assert find_checkpoint(NAME).read_bytes() == WEIGHTS
        assert {request.headers.get("Authorization") for request in storage.requests} == {None}
    # The client's first request, once a day, is one of its own.
    asked = next(request for request in hub.requests if request.method == "HEAD")
    assert asked.headers["Authorization"] == "Bearer hf_right"


def test_timm_says_where_the_cache_is(hub, tmp_path):
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "elsewhere")
    assert find_checkpoint(NAME, cache_dir=tmp_path / "elsewhere").read_bytes() == WEIGHTS
    assert [request.method for request in hub.requests] == PULL
    assert locate(get_record(NAME)) == "hub"


def put_on_main(hub, name, content):
    """Change a file of the repository, but not in the recorded revision."""
    hub.repositories[REPOSITORY]["main"] = {**hub.repositories[REPOSITORY]["main"], name: content}


def assert_loaded(model, content):
    expected = safetensors.torch.load(content)
    torch.testing.assert_close(model.state_dict(), expected, atol=0, rtol=0)


@pytest.mark.parametrize("revision", ["", f"@{REVISION}"])
def test_timms_own_name_of_a_recorded_repository_gives_the_recorded_file(revision, hub):
    put_on_main(hub, "model.safetensors", FLIPPED)
    assert_loaded(timm.create_model(f"hf-hub:{REPOSITORY}{revision}", pretrained=True), WEIGHTS)
    hub.repositories[REPOSITORY][REVISION] = hub.repositories[REPOSITORY]["main"]
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(CheckpointError, match=rf"is not to be trusted \({DIGESTS}\);"):
        timm.create_model(f"hf-hub:{REPOSITORY}{revision}", pretrained=True)


@pytest.mark.parametrize(
    ("name", "overlay"),
    [
        (f"hf-hub:{REPOSITORY}@main", {}),
        (f"hf-hub:{REPOSITORY}", {"hf_hub_filename": "other.safetensors"}),
        (NAME, {"hf_hub_filename": "other.safetensors"}),
        (NAME, {"url": "{hub}/resolve/main/other.pth"}),
    ],
    ids=["another revision", "another file of it", "another file", "a URL"],
)
def test_what_a_caller_chose_is_loaded(name, overlay, hub, tmp_path):
    other = timm.create_model("convmixer_cifar").state_dict()
    content, pickled = safetensors.torch.save(other), io.BytesIO()
    torch.save(other, pickled)
    put_on_main(hub, "model.safetensors", content if "@" in name else FLIPPED)
    put_on_main(hub, "other.safetensors", content)
    put_on_main(hub, "other.pth", pickled.getvalue())
    repository = f"{hub.url}/{REPOSITORY}"
    overlay = {key: value.replace("{hub}", repository) for key, value in overlay.items()}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "timm"
    )
    assert_loaded(model, content)


def test_a_repository_whose_metadata_tell_another_activation_is_refused(hub):
    tensors = timm.create_model("convmixer_cifar").state_dict()
    content = safetensors.torch.save(tensors, {"activation": "relu"})
    config = hub.repositories[REPOSITORY]["main"]["config.json"]
    files = {"config.json": config, "model.safetensors": content}
    hub.repositories["somebody/relu"] = {"main": files}
    message = "^somebody/relu: was trained with relu, the model has gelu; give act_layer='relu'$"
    with pytest.raises(CheckpointError, match=message):
        timm.create_model("hf-hub:somebody/relu", pretrained=True)
    assert_loaded(
        timm.create_model("hf-hub:somebody/relu", pretrained=True, act_layer="relu"), content
    )


def list_files(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_cached_weights_are_loaded_without_a_socket_and_without_writing(hub, tmp_path, monkeypatch):
    find_checkpoint(NAME)
    monkeypatch.delattr("socket.socket")
    before = list_files(tmp_path)
    timm.create_model(NAME, pretrained=True)
    assert list_files(tmp_path) == before
    assert locate(get_record(NAME)) == "cache"


@pytest.fixture(params=[False, True], ids=["links", "no links"])
def damaged(request, hub, monkeypatch):
    """A file that the client put into the cache, with or without links, with one byte flipped."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", request.param)
    file = Path(hf_hub_download(REPOSITORY, "model.safetensors", revision=REVISION))
    assert file.is_symlink() is not request.param
    file.resolve().write_bytes(FLIPPED)
    hub.requests.clear()
    return file


def test_a_damaged_file_in_the_cache_is_downloaded_again(damaged, hub):
    assert find_checkpoint(NAME) == damaged
    assert damaged.resolve().read_bytes() == WEIGHTS
    assert [request.method for request in hub.requests] == PULL


def test_a_damaged_file_in_the_cache_is_named_where_no_other_can_be_had(damaged, hub, monkeypatch):
    offline(hub, monkeypatch)
    with pytest.raises(
        CheckpointError,
        match=rf"^{NAME}: the copy in the Hub's cache is damaged \({damaged}\), and http\S+ "
        "cannot be asked, as HF_HUB_OFFLINE is set; unset that, or copy ",
    ):
        find_checkpoint(NAME)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("honest", [0, 1], ids=["liar", "liar when asked again"])
@pytest.mark.parametrize(
    "lie",
    [
        headers(ETag='"{folder}/there"'),
        headers(ETag='"{folder}/new"'),
        headers(ETag='"../../../new"'),
        headers(X_Repo_Commit="{folder}/new"),
        headers(X_Repo_Commit="../../../new"),
        error(404, X_Error_Code="EntryNotFound", X_Repo_Commit="{folder}/new"),
    ],
    ids=["ETag of a file", "ETag", "relative ETag", "commit", "relative commit", "commit of none"],
)
def test_no_path_outside_of_the_cache_is_written(lie, honest, cached, hub, tmp_path):
    (tmp_path / "there").write_text("mine")
    if cached:
        find_checkpoint(NAME).write_bytes(FLIPPED)
        hub.requests.clear()

    answers = []

    def lie_later(answer):
        answers.append(answer)
        if len(answers) > honest:
            lie(answer)
            for name, value in answer.headers.items():
                answer.headers[name] = value.replace("{folder}", str(tmp_path))

    hub.order(lie_later, "HEAD")
    with contextlib.suppress(CheckpointError):
        find_checkpoint(NAME)
    assert len(answers) > honest  # so the lie was told
    assert {path.name for path in tmp_path.iterdir()} <= {"there", "cache"}
    assert (tmp_path / "there").read_text() == "mine"
    repositories = {path.name for path in (tmp_path / "cache").glob("*")}
    assert repositories <= {f"models--{REPOSITORY.replace('/', '--')}"}


def test_a_link_that_leads_out_of_the_cache_is_replaced_not_followed(hub, tmp_path):
    file = find_checkpoint(NAME)
    (tmp_path / "mine").write_text("mine")
    file.unlink()
    file.symlink_to(tmp_path / "mine")
    assert find_checkpoint(NAME).read_bytes() == WEIGHTS
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_cache_may_be_moved(hub, tmp_path, monkeypatch):
    find_checkpoint(NAME)
    (tmp_path / "cache").rename(tmp_path / "moved")
    offline(hub, monkeypatch)
    assert find_checkpoint(NAME, cache_dir=tmp_path / "moved").read_bytes() == WEIGHTS


def test_a_read_only_cache_is_read(hub, tmp_path):
    find_checkpoint(NAME)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        path.chmod(0o555)
    assert as_ordinary_user(lambda: find_checkpoint(NAME)).read_bytes() == WEIGHTS


def test_an_empty_read_only_cache_is_one_line(hub, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o555)
    message = (
        rf"^{NAME}: the Hub's cache cannot be used \(.*Permission denied: '{tmp_path}/cache/.*\); "
        "make room there, or name another folder with HF_HOME$"
    )
    with pytest.raises(CheckpointError, match=message):
        as_ordinary_user(lambda: find_checkpoint(NAME))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.touch(mode=0), "Permission denied: '{path}'"),
        (Path.mkdir, "Is a directory: '{path}'"),
        (lambda path: path.write_bytes(b"\xff"), "codec can't decode"),
    ],
    ids=["closed", "folder", "no text"],
)
def test_a_token_that_cannot_be_read_is_one_line(make, reason, hub, tmp_path):
    path = tmp_path / "token"
    make(path)
    with pytest.raises(
        CheckpointError,
        match=rf"^{NAME}: your token cannot be read \(.*{reason.format(path=path)}.*\); fix or "
        f"remove {path}, or set HF_TOKEN$",
    ):
        as_ordinary_user(lambda: find_checkpoint(NAME))
    assert hub.requests == []


def test_a_full_disk_is_one_line(hub):
    message = r"the Hub's cache cannot be used \(.*File too large\); make room"
    with limited(resource.RLIMIT_FSIZE, 1_000_000), pytest.raises(CheckpointError, match=message):
        find_checkpoint(NAME)
    assert list(Path(constants.HF_HUB_CACHE).iterdir()) == []
    assert find_checkpoint(NAME).read_bytes() == WEIGHTS


def start(count):
    """Let so many processes, copies of this one, look for the weights."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=find_checkpoint, args=(NAME,)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    """Wait for processes, but not for ever; give their exit codes."""
    for process in processes:
        process.join(60)
        process.kill()  # does nothing to one that has ended
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("content", [None, FLIPPED], ids=["empty cache", "damaged file"])
def test_twenty_processes_share_one_cache(content, hub, tmp_path):
    if content is not None:
        find_checkpoint(NAME).resolve().write_bytes(content)
    hub.order(drip(5, lambda: pause(0.02)), "GET")
    assert finish(start(20)) == [0] * 20
    [file] = (tmp_path / "cache").rglob("model.safetensors")
    assert file.read_bytes() == WEIGHTS
    assert find_checkpoint(NAME) == file


def test_a_download_killed_half_way_is_no_hindrance(hub):
    half_sent, killed = threading.Event(), threading.Event()
    waiting = iter([lambda: None, lambda: (half_sent.set(), killed.wait(60))])
    hub.order(drip(2, lambda: next(waiting)()), "GET", times=1)
    [process] = start(1)
    assert half_sent.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    exit_codes = finish([process])
    killed.set()
    assert exit_codes == [-signal.SIGKILL]
    assert find_checkpoint(NAME).read_bytes() == WEIGHTS


@pytest.mark.slow
def test_the_environment_says_which_hub_and_which_cache(hub, run_python, tmp_path):
    hub.repositories[f"somebody/{NAME}"] = hub.repositories.pop(REPOSITORY)
    hub.private.add(f"somebody/{NAME}")
    hub.tokens.add("hf_right")
    code = "import convmixer_hub; print(convmixer_hub.find_checkpoint('convmixer_cifar'))"
    path = run_python(
        code,
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path / "home"),
        HF_TOKEN="hf_right",
        CONVMIXER_HUB_NAMESPACE="somebody",
    )
    assert re.match(rf"{tmp_path}/home/hub/models--somebody--{NAME}/", path)
    assert Path(path).read_bytes() == WEIGHTS

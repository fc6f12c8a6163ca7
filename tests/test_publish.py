"""`convmixer publish` to a Hub on this machine, through the real client."""

import hashlib
import re
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants

from convmixer_hub import CheckpointError, PublishError, find_checkpoint
from convmixer_hub.checkpoints.files import read_model_files, save_model
from convmixer_hub.hub.find import find_embedded
from convmixer_hub.hub.records import RECORDS
from convmixer_hub.load import load_trained
from convmixer_hub.release.golden import write_golden
from convmixer_hub.release.publish import list_uploads, publish

from .conftest import (
    ARCH,
    NAME,
    REVISION,
    as_ordinary_user,
    convmixer,
    no_network,
    offline,
)
from .hub_server import error, headers, ordered, other_body

TARGET = "someone/mine"
OF_THE_RUN = ["README.md", "config.json", "metrics.csv", "model.safetensors"]


@pytest.fixture
def run(untrained) -> str:
    """A run folder with an untrained model, and what must stay in it."""
    (untrained / "README.md").write_text("---\nlicense: mit\n---\n\n# A run\n")
    (untrained / "metrics.csv").write_text("epoch\n1\n")
    for name in ("training_state.pt", ".env", ".saving.png", "letter.txt", "family.png"):
        (untrained / name).write_text("secret")
    (untrained / "checkpoints.png").mkdir()
    return str(untrained)


@pytest.fixture
def writable(hub, monkeypatch):
    """A Hub that lets us write, without xet, which has servers of its own."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.tokens.add("hf_write")
    return hub


def count(hub, method: str, path: str) -> int:
    return sum(r.method == method and re.search(path, r.path) is not None for r in hub.requests)


@pytest.mark.parametrize("lfs_suffixes", [(), (".safetensors", ".png")], ids=["regular", "LFS"])
def test_what_is_published_is_pulled_with_the_same_logits(lfs_suffixes, writable, run, batch):
    writable.lfs_suffixes = lfs_suffixes
    publication = publish(run, TARGET, tag="v1")
    assert publication.changed
    assert [upload.path_in_repo for upload in publication.uploads] == OF_THE_RUN
    assert sorted(writable.repositories[TARGET]["main"]) == OF_THE_RUN
    assert writable.repositories[TARGET]["v1"] == writable.repositories[TARGET]["main"]
    assert count(writable, "POST", "/commit/") == 1
    assert count(writable, "PUT", "/storage/") == (1 if lfs_suffixes else 0)
    pulled = timm.create_model(f"hf-hub:{TARGET}", pretrained=True).eval()
    assert torch.equal(pulled(batch), load_trained(run).eval()(batch))

    writable.requests.clear()
    again = publish(run, TARGET, tag="v1")
    assert (again.changed, again.revision) == (False, publication.revision)
    assert count(writable, "POST", "/commit/") == count(writable, "PUT", "") == 0


def test_a_shipped_model_is_published_whole_and_found_there(writable, monkeypatch):
    folder = find_embedded(RECORDS[NAME]).parent
    result = convmixer("publish", NAME, "--repo-id", f"someone/{NAME}")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert writable.repositories[f"someone/{NAME}"] == {"main": files, REVISION: files}
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    first, second, third = result.output.splitlines()[-3:]
    assert (result.exit_code, first) == (0, f"someone/{NAME}: {len(files)} files, published")
    assert re.fullmatch(rf"revision [0-9a-f]{{40}}, tag {REVISION}", second)
    assert third == f"SHA-256 of model.safetensors {digest}, downloaded again and compared"
    monkeypatch.setenv("CONVMIXER_HUB_NAMESPACE", "someone")
    assert find_checkpoint(NAME, "hub").read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize("name", RECORDS)
def test_nothing_of_a_shipped_folder_is_left_out(name):
    folder = find_embedded(RECORDS[name]).parent
    assert list(read_model_files(folder)) == sorted(file.name for file in folder.iterdir())


def test_a_changed_file_alone_makes_the_next_commit(writable, run):
    publish(run, TARGET)
    writable.repositories[TARGET]["main"]["LICENSE"] = b"theirs"
    Path(run, "README.md").write_text("# Another\n")
    writable.requests.clear()
    assert publish(run, TARGET).changed
    [commit] = [r for r in writable.requests if "/commit/" in r.path and r.method == "POST"]
    assert len(commit.body.splitlines()) == 2  # its header and one file
    assert writable.repositories[TARGET]["main"]["LICENSE"] == b"theirs"


def test_a_second_publication_says_that_nothing_changed(writable, run):
    Path(run, "README.md").unlink()
    first, second = (convmixer("publish", run, "--repo-id", TARGET).output for _ in range(2))
    assert f"{TARGET}: 3 files, published\n" in first
    assert f"{TARGET}: 3 files, nothing changed, all were there before\n" in second
    assert f"there is no model card; `convmixer card {run} --data DIR` writes one\n" in second


def test_a_dry_run_asks_no_network_and_no_token(run, monkeypatch):
    monkeypatch.delattr("socket.socket")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in (run, NAME):
        result = convmixer("publish", name, "--repo-id", TARGET, "--dry-run")
        *lines, last = result.output.splitlines()
        uploads = list_uploads(name)
        assert (result.exit_code, last) == (0, f"{TARGET}: would get these {len(uploads)} files")
        assert [line.split() for line in lines] == [
            [file.path_in_repo, f"{len(data):,}", "bytes", hashlib.sha256(data).hexdigest()]
            for file, data in ((upload, upload.path_or_fileobj) for upload in uploads)
        ]


def test_what_was_checked_is_published_also_if_a_file_changes_meanwhile(writable, run):
    before = Path(run, "README.md").read_bytes()
    writable.order(lambda answer: Path(run, "README.md").write_text("another"), "POST")
    publish(run, TARGET)
    assert writable.repositories[TARGET]["main"]["README.md"] == before


def test_logits_of_other_weights_are_not_published(writable, run):
    write_golden(run)
    assert "golden.json" in [upload.path_in_repo for upload in publish(run, TARGET).uploads]
    save_model(timm.create_model(ARCH), Path(run), {})
    writable.requests.clear()
    for option in ([], ["--dry-run"]):
        result = convmixer("publish", run, "--repo-id", TARGET, *option)
        assert result.exit_code == 1
        assert result.output == (
            f"Error: {run}/golden.json: is of weights with another SHA-256; `convmixer card {run} "
            "--data DIR` writes it\n"
        )
    assert writable.requests == []


def test_a_private_repository_is_made_and_read_back(writable, run):
    assert convmixer("publish", run, "--repo-id", TARGET, "--private").exit_code == 0
    assert writable.private == {TARGET}
    assert not publish(run, TARGET, private=True).changed


def exists_in_public(hub, monkeypatch):
    hub.repositories[TARGET] = {"main": {}}


def tagged_elsewhere(hub, monkeypatch):
    hub.repositories[TARGET] = {"main": {}, "v1": {"other": b"file"}}


def no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def of_another_type(hub, monkeypatch):
    """The name is taken, but there is no model of this name."""
    hub.order(error(404, X_Error_Code="RepoNotFound"), "GET")


def storage_fails(hub, monkeypatch):
    hub.lfs_suffixes = (".safetensors",)
    hub.order(error(403), "PUT")


def bad_card(hub, monkeypatch):
    def refuse(answer):
        answer.status, answer.body = 400, b'{"errors": [{"message": "license is not known"}]}'

    hub.order(lambda answer: answer.body == b"{}" and refuse(answer), "POST")


def other_weights(hub, monkeypatch):
    hub.order(other_body(lambda body: body[:-1] + b"\1" if len(body) > 99_999 else body), "GET")


FAULTS = {
    "no token": (no_token, r"there is no token; log in with `hf auth login`, or set HF_TOKEN to "),
    "wrong token": (wrong_token, r"does not accept your token \(HTTP 401\); renew it with `hf "),
    "403": (
        ordered(error(403), "POST"),
        r"your token may not write there \(HTTP 403\); give it write permission at "
        r"http\S+/settings/tokens, or name a repository of your own$",
    ),
    "403 from storage": (storage_fails, r"your token may not write there \(HTTP 403\); give it "),
    "repository of another type": (
        of_another_type,
        r"is no model repository that your token can see \(HTTP 404\); name another --repo-id, or ",
    ),
    "500": (
        ordered(error(500), "POST"),
        r"http\S+ refuses \(HTTP 500: Internal Server Error\); wait, and give ",
    ),
    "400": (
        ordered(error(400, X_Error_Message="The name is reserved"), "POST"),
        r"http\S+ refuses \(HTTP 400: The name is reserved.*\); correct that, or ",
    ),
    "refused connection": (
        no_network,
        r"cannot be published \(.*Connection refused\); check the network and HF_ENDPOINT, and ",
    ),
    "offline": (offline, "the network may not be used; unset HF_HUB_OFFLINE$"),
    "public": (exists_in_public, "exists and is public; make it private in its settings, or "),
    "tag elsewhere": (
        tagged_elsewhere,
        "the files are there at commit [0-9a-f]{40}, but tag 'v1' is at [0-9a-f]{40}; give another",
    ),
    "bad card": (bad_card, r"Invalid metadata in README.md. - license is not known\); correct "),
    "other bytes": (
        other_weights,
        "model.safetensors came back with SHA-256 [0-9a-f]{64}, but [0-9a-f]{64} was published; ",
    ),
}


@pytest.mark.parametrize(("arrange", "message"), FAULTS.values(), ids=FAULTS)
def test_what_goes_wrong_is_one_line(arrange, message, writable, run, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    arrange(writable, monkeypatch)
    with pytest.raises(PublishError, match=rf"^{TARGET}: .*{message}") as refused:
        publish(run, TARGET, private=arrange is exists_in_public, tag="v1")
    assert "\n" not in str(refused.value)
    assert "hf_" not in str(refused.value)


def test_what_is_pulled_back_is_written_nowhere_else(writable, run, tmp_path):
    writable.order(headers(ETag=f'"{tmp_path}/new"'), "HEAD")
    with pytest.raises(PublishError, match=rf"^{TARGET}: cannot be published \("):
        publish(run, TARGET)
    assert not (tmp_path / "new").exists()


def test_a_tag_that_the_hub_refuses_is_one_line(writable, run):
    result = convmixer("publish", run, "--repo-id", TARGET, "--tag", "v 1")
    assert result.exit_code == 1
    assert re.fullmatch(
        rf"Error: {TARGET}: .* refuses \(HTTP 400: Invalid tag name.*\); correct that, or check "
        "HF_ENDPOINT, and give the same command again\n",
        result.output,
    )


@pytest.mark.parametrize(("path", "mode"), [(".", 0o111), ("metrics.csv", 0), ("golden.json", 0)])
def test_a_folder_that_cannot_be_read_whole_is_one_line(path, mode, writable, run):
    write_golden(run)
    Path(run, path).chmod(mode)
    result = as_ordinary_user(lambda: convmixer("publish", run, "--repo-id", TARGET))
    Path(run).chmod(0o700)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert re.match(
        rf"Error: {run}: cannot be read whole \(.*Permission denied: '{Path(run, path)}'\); make ",
        result.output,
    )
    assert writable.requests == []


def test_a_token_that_cannot_be_read_is_one_line(writable, run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").mkdir()
    with pytest.raises(CheckpointError, match=r"^your token cannot be read \(.*Is a directory: "):
        publish(run, TARGET)


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("mine", "mine: is no model repository; give --repo-id as OWNER/REPO"),
        ("datasets/someone/mine", "is no model repository; give --repo-id as OWNER/REPO"),
        ("some one/mine", r"cannot be published \(Repo id must use alphanumeric .*; correct that"),
    ],
)
def test_a_bad_repository_id_is_one_line(repo_id, message, writable, run):
    with pytest.raises(PublishError, match=message) as refused:
        publish(run, repo_id)
    assert "\n" not in str(refused.value)
    assert writable.requests == []


def test_what_does_not_load_is_not_published(writable, run):
    result = convmixer("publish", "no_such_run", "--repo-id", TARGET)
    unknown = "Error: no file or folder, and no trained weights are named 'no_such_run'"
    assert result.output.startswith(unknown) and result.output.count("\n") == 1
    Path(run, "model.safetensors").write_bytes(b"damaged")
    result = convmixer("publish", run, "--repo-id", TARGET)
    assert "not a whole safetensors file" in result.output and result.output.count("\n") == 1
    assert "; copy it again; pickles are not opened, " in result.output
    assert writable.requests == []

"""From a model's folder to a repository on the Hugging Face Hub, and back, to see what arrived."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

from ..checkpoints.files import read_model_files
from ..checkpoints.resolve import Source, resolve_folder
from ..errors import ConvMixerHubError, PublishError
from ..files import hash_file
from ..hub.records import CARD_FILE, EXAMPLE_REPO_ID, GOLDEN_FILE, WEIGHTS_FILE
from ..hub.repository import explain_upload, read_token
from ..load import load_trained
from .golden import parse_golden


@dataclass(frozen=True)
class Publication:
    """What the Hub has.

    Attributes:
        uploads: The files, each under its own name; downloaded again, each had its digest.
        revision: The commit that they are in.
        changed: False if the Hub had them all before.
        tag: The tag that the commit has.
    """

    uploads: list[CommitOperationAdd] = field(repr=False)
    revision: str
    changed: bool
    tag: str | None = None


def list_uploads(name: str | Source, repo_id: str = EXAMPLE_REPO_ID) -> list[CommitOperationAdd]:
    """List what `publish` uploads. The network is not asked.

    Args:
        name: A trained model's name, for its folder in the package, or a run folder; or what
            `resolve_folder` gave. Of the files in it, those of `hub.records.MODEL_FILES` are
            published.
        repo_id: `OWNER/REPO`, which replaces the placeholder in the card.

    Raises:
        UnknownModelError: If it is neither a trained model's name nor a folder.
        CheckpointError: If the model would not load, a file cannot be read, or `golden.json` is of
            other weights.
    """
    source = name if isinstance(name, Source) else resolve_folder(name)
    if not source.record:  # whose file is verified
        load_trained(source)
    folder = source.folder.resolve()
    # Read once: what is checked is what is uploaded.
    contents = read_model_files(folder)
    if card := contents.get(CARD_FILE):
        contents[CARD_FILE] = card.replace(EXAMPLE_REPO_ID.encode(), repo_id.encode())
    if golden := contents.get(GOLDEN_FILE):
        argument = shlex.quote(source.name.removeprefix("local-dir:"))
        remedy = f"`convmixer card {argument} --data DIR` writes it"
        digest = hashlib.sha256(contents[WEIGHTS_FILE]).hexdigest()
        parse_golden(golden, folder / GOLDEN_FILE, digest, remedy)
    return [CommitOperationAdd(file, data) for file, data in contents.items()]


def publish(name: str, repo_id: str, private: bool = False, tag: str | None = None) -> Publication:
    """Upload a model to the Hub in one commit, and pull it back to compare every byte.

    Files that the Hub has already are not sent again; if it has them all, there is no commit.
    Other files of the repository stay as they are.

    Args:
        name: As in `list_uploads`.
        repo_id: `OWNER/REPO`; made if there is no such model repository.
        private: Let nobody else read it; an existing repository has to be private.
        tag: A tag for the commit; one that exists is never moved. If not given, a model on record
            gets its record's revision, by which the package will ask for it.

    Raises:
        UnknownModelError: If it is neither a trained model's name nor a folder.
        CheckpointError: As in `list_uploads`, or if your token cannot be read.
        PublishError: If the Hub does not take the files, or gives back others.
    """
    if repo_id.count("/") != 1:
        raise PublishError(f"{repo_id}: is no model repository; give --repo-id as OWNER/REPO")
    source = resolve_folder(name)
    uploads = list_uploads(source, repo_id)
    if tag is None and source.record:
        tag = source.record.revision
    message = f"Publish {repo_id.partition('/')[2]}"
    try:
        if read_token() is None:
            raise PublishError(
                f"{repo_id}: there is no token; log in with `hf auth login`, or set HF_TOKEN to "
                "one that may write"
            )
        hub = HfApi()
        hub.create_repo(repo_id, private=private or None, exist_ok=True)
        before = hub.model_info(repo_id)
        if private and not before.private:
            raise PublishError(
                f"{repo_id}: exists and is public; make it private in its settings, or leave out "
                "--private"
            )
        commit = hub.create_commit(repo_id, uploads, commit_message=message).oid
        _pull_back(uploads, repo_id, commit)
        if tag is not None:
            hub.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
            tagged = hub.model_info(repo_id, revision=tag).sha
            if tagged != commit:
                raise PublishError(
                    f"{repo_id}: the files are there at commit {commit}, but tag '{tag}' is at "
                    f"{tagged}; give another --tag"
                )
    except ConvMixerHubError:
        raise
    except Exception as error:  # the client, its HTTP library and the disk each have their own
        raise PublishError(f"{repo_id}: {explain_upload(error)}") from None
    return Publication(uploads, commit, changed=commit != before.sha, tag=tag)


def _pull_back(uploads: Sequence[CommitOperationAdd], repo_id: str, commit: str) -> None:
    # Not through a cache, in which the client writes wherever the server's answers lead to.
    with tempfile.TemporaryDirectory() as empty:
        for upload in uploads:
            name, wanted = upload.path_in_repo, upload.upload_info.sha256.hex()
            file = hf_hub_download(repo_id, name, revision=commit, local_dir=empty, cache_dir=empty)
            digest = hash_file(Path(file))
            if digest != wanted:
                raise PublishError(
                    f"{repo_id}: {name} came back with SHA-256 {digest}, but {wanted} was "
                    f"published; do not use commit {commit}, check HF_ENDPOINT and publish again"
                )

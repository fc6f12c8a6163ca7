"""From the name of a trained model to a file on this machine whose bytes are the right ones.

A file comes from the copy embedded in this package, from the Hugging Face Hub's local cache, or
from the Hub. Wherever it comes from, its SHA-256 has to be the recorded one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from ..errors import CheckpointError, first_line
from ..files import hash_file, replacing
from .records import OWN_COPY_ADVICE, WEIGHTS_FILE, CheckpointRecord, get_record

SOURCES = ("auto", "embedded", "hub")


def _choose_source(source: str | None) -> str:
    source = source or os.environ.get("CONVMIXER_HUB_SOURCE") or "auto"
    if source not in SOURCES:
        raise CheckpointError(
            f"unknown source of weights '{source}'; "
            f"set CONVMIXER_HUB_SOURCE to one of {', '.join(SOURCES)}"
        )
    return source


def find_embedded(record: CheckpointRecord) -> Path | None:
    """Find the copy that came with this package; it need not be intact.

    A wheel carries `weights/` inside the package, a checkout and a torch.hub clone beside it.
    """
    package = Path(__file__).resolve().parents[1]
    for weights in (package / "weights", package.parent / "weights"):
        file = weights / record.name / WEIGHTS_FILE
        if os.path.isfile(file):  # unlike Path.is_file, no error without permission
            return file
    return None


def find_cached(record: CheckpointRecord, cache_dir: str | Path | None = None) -> Path | None:
    """Find the copy in the Hub's cache; it need not be intact. The network is not asked.

    Raises:
        CheckpointError: If the cache cannot be read, or no repository can have this name.
    """
    try:
        cached = try_to_load_from_cache(
            record.repo_id, WEIGHTS_FILE, cache_dir=cache_dir, revision=record.revision
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{record.name}: {record.repository.explain(error, WEIGHTS_FILE)}"
        ) from None
    return Path(cached) if isinstance(cached, str) else None


def locate(record: CheckpointRecord) -> str:
    """Return where `find_checkpoint` would take a model from: `embedded`, `cache` or `hub`.

    Raises:
        CheckpointError: If `CONVMIXER_HUB_SOURCE` is none of the sources, or the Hub's cache cannot
            be read.
    """
    source = _choose_source(None)
    if source == "embedded" or (source == "auto" and find_embedded(record)):
        return "embedded"
    return "cache" if find_cached(record) else "hub"


def find_checkpoint(
    name: str, source: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Find the weights of a trained model on this machine, downloading them if they are not.

    A damaged file in the Hub's cache is downloaded again; a damaged download is tried once more.

    Args:
        name: `arch.tag`, or an arch alone for its first tag.
        source: `embedded`, `hub`, or `auto`: embedded if there is a copy, else the Hub's cache,
            else the Hub. If not given, `CONVMIXER_HUB_SOURCE` decides; its default is `auto`.
        cache_dir: The Hub's cache folder; huggingface_hub's own by default.

    Returns:
        Path of a safetensors file whose SHA-256 is the recorded one.

    Raises:
        UnknownModelError: If no trained model has this name.
        CheckpointError: If the file cannot be found or downloaded, or is not the recorded one.
    """
    record = get_record(name)
    source = _choose_source(source)
    if source != "hub":
        embedded = find_embedded(record)
        if embedded is not None:
            verify_file(embedded, record, "reinstall the package, or set CONVMIXER_HUB_SOURCE=hub")
            return embedded
        if source == "embedded":
            raise CheckpointError(
                f"{record.name}: this installation carries no copy of the weights; "
                "reinstall the package, or set CONVMIXER_HUB_SOURCE=hub"
            )
    file = find_cached(record, cache_dir)
    if file and not _find_fault(file, record):
        return file
    damage = f"the copy in the Hub's cache is damaged ({file}), and " if file else ""
    try:
        return _download(record, Path(cache_dir or constants.HF_HUB_CACHE), file)
    except Exception as error:  # the client, its HTTP library and the disk each have their own
        reason = record.repository.explain(error, WEIGHTS_FILE)
        raise CheckpointError(f"{record.name}: {damage}{reason}") from None


def _download(record: CheckpointRecord, cache: Path, damaged: Path | None) -> Path:
    """Download the weights into the Hub's cache, or into the place of a damaged file there.

    The client writes only to an empty folder: in a cache it writes wherever a server's ETag and
    commit point, which may be anywhere on this machine.
    """
    commit = record.repository.ask_for(WEIGHTS_FILE, retry=True).commit_hash
    assert commit is not None  # as `ask_for` says
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".downloading-") as folder:
        for _ in range(2):  # something on the way may have damaged the first
            file = Path(
                hf_hub_download(
                    record.repo_id,
                    WEIGHTS_FILE,
                    revision=commit,
                    local_dir=folder,
                    cache_dir=folder,
                    force_download=True,
                )
            )
            fault = _find_fault(file, record)
            if not fault and damaged:
                # All snapshots share a blob; but a link of the client's may lead anywhere.
                repository, blob = damaged.parents[2].resolve(), damaged.resolve()
                os.replace(file, blob if repository in blob.parents else damaged)
                return damaged
            if not fault:
                return _put_in_cache(file, record, commit, cache)
    raise CheckpointError(
        f"{record.repository.address} gives another file, so it is not to be trusted "
        f"({fault}); check HF_ENDPOINT and CONVMIXER_HUB_NAMESPACE, or {OWN_COPY_ADVICE}"
    )


def _put_in_cache(file: Path, record: CheckpointRecord, commit: str, cache: Path) -> Path:
    """Move verified weights to where the Hub's client keeps the files of a commit.

    The record's revision then stands for that commit.
    """
    repository = cache / repo_folder_name(repo_id=record.repo_id, repo_type="model")
    reference = repository / "refs" / record.revision
    snapshot = repository / "snapshots" / commit
    for parent in (snapshot, reference.parent):
        parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, snapshot / WEIGHTS_FILE)
    with replacing(reference) as temporary:
        temporary.write_text(commit)
    return snapshot / WEIGHTS_FILE


def verify_file(path: Path, record: CheckpointRecord, remedy: str) -> None:
    """Refuse a file that is not, byte for byte, the recorded one.

    Raises:
        CheckpointError: With the fault and the remedy.
    """
    fault = _find_fault(path, record)
    if fault:
        raise CheckpointError(f"{path}: {fault}; {remedy}")


def _find_fault(path: Path, record: CheckpointRecord) -> str | None:
    """Say in what a file differs from the recorded one."""
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"has {size} bytes, but {record.name} has {record.size}"
        digest = hash_file(path)
    except OSError as error:
        return f"cannot be read ({first_line(error)})"
    if digest != record.sha256:
        return f"its SHA-256 is {digest}, but {record.name} has {record.sha256}"
    return None

"""From the name of a trained model to a file on this machine whose bytes are the right ones.

A file comes from the copy embedded in this package, from the Hugging Face Hub's local cache, or
from the Hub. Wherever it comes from, its SHA-256 has to be the recorded one.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from timm.models import save_for_hf
from torch import Tensor, nn

from .errors import CheckpointError, UnknownModelError, first_line
from .files import replacing
from .model import ConvMixer, name_activation

SOURCES = ("auto", "embedded", "hub")
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GOLDEN_FILE = "golden.json"

# What of a model's folder goes to others; the states of a training run, for one, do not.
MODEL_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    GOLDEN_FILE,
    "README.md",
    "NOTES.md",
    "metrics.csv",
    "*.png",
)

# The user's own images, which are nobody else's business.
MISTAKES_FILE = "mistakes.png"

_OWN_COPY = "reinstall the package and unset CONVMIXER_HUB_SOURCE to use its own copy"


@dataclass(frozen=True)
class CheckpointRecord:
    """What is known of one trained model: where its file is, what it must be, how good it is.

    Attributes:
        name: `arch.tag`.
        sha256: Digest of the safetensors file, in hexadecimal.
        size: Length of the file, in bytes.
        dataset: What the model was trained and measured on.
        top1: Top-1 accuracy on the test images, in percent.
        revision: Tag or commit of the Hub repository.
    """

    name: str
    sha256: str
    size: int
    dataset: str
    top1: float
    revision: str = "v1"

    @property
    def repo_id(self) -> str:
        """The Hub repository; `CONVMIXER_HUB_NAMESPACE` moves it to another owner."""
        return f"{os.environ.get('CONVMIXER_HUB_NAMESPACE') or 'convmixer-hub'}/{self.name}"


RECORDS: dict[str, CheckpointRecord] = {
    record.name: record
    for record in [
        CheckpointRecord(
            name="convmixer_cifar.cifar10",
            sha256="4abed23db23710e2544b10bf464a0794f247987d7361f52ba0d3596173bcae2b",
            size=2620544,
            dataset="CIFAR-10",
            top1=91.11,
        ),
    ]
}


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known names are nearest to this one, or else name them all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"


def get_record(name: str) -> CheckpointRecord:
    """Look up the record of a trained model; a bare arch means its first tag.

    Raises:
        UnknownModelError: If no trained model has this name.
    """
    for record in RECORDS.values():
        if name in (record.name, record.name.partition(".")[0]):
            return record
    raise UnknownModelError(f"no trained weights are named '{name}'; {suggest(name, RECORDS)}")


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
    package = Path(__file__).resolve().parent
    for weights in (package / "weights", package.parent / "weights"):
        file = weights / record.name / WEIGHTS_FILE
        if file.is_file():
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
        raise CheckpointError(f"{record.name}: {explain_hub_error(error, record)}") from None
    return Path(cached) if isinstance(cached, str) else None


def locate(record: CheckpointRecord) -> str:
    """Tell where `find_checkpoint` would take a model from: `embedded`, `cache` or `hub`.

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

    A damaged file in the Hub's cache is downloaded again, once.

    Args:
        name: `arch.tag`, or an arch alone for its first tag.
        source: `embedded`, `hub`, or `auto`: embedded if there is a copy, else the Hub's cache,
            else the Hub. If not given, `CONVMIXER_HUB_SOURCE` decides; its default is `auto`.
        cache_dir: The Hub's cache folder; huggingface_hub's own by default.

    Returns:
        Path of a safetensors file whose SHA-256 is the recorded one.

    Raises:
        UnknownModelError: If no trained model has this name.
        CheckpointError: If the file cannot be had, or is not the recorded one.
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
        reason = explain_hub_error(error, record)
        raise CheckpointError(f"{record.name}: {damage}{reason}") from None


def read_token() -> str | None:
    """Read your token for the Hub; None if there is none.

    Raises:
        CheckpointError: If there may be one, but it cannot be read.
    """
    try:
        return get_token()
    except Exception as error:  # of the disk, or of where else the client looks for it
        raise CheckpointError(
            f"your token cannot be read ({first_line(error)}); mend or remove "
            f"{constants.HF_TOKEN_PATH}, or set HF_TOKEN"
        ) from None


def ask_hub(record: CheckpointRecord, retry: bool = False) -> HfFileMetadata:
    """Ask the Hub about the weights of a model; nothing is downloaded, and nothing written.

    Args:
        record: The model.
        retry: Wait and ask again if the Hub is busy or fails.

    Returns:
        Among others `commit_hash`, the 40 hexadecimal digits of a commit, and `etag`, a word.

    Raises:
        Exception: One that `explain_hub_error` explains.
    """
    read_token()
    url = hf_hub_url(record.repo_id, WEIGHTS_FILE, revision=record.revision)
    offered = get_hf_file_metadata(url, retry_on_errors=retry)
    is_commit = re.fullmatch("[0-9a-f]{40}", offered.commit_hash or "")
    if not is_commit or not re.fullmatch(r"[\w-]{1,128}", offered.etag or ""):
        raise CheckpointError(
            f"{url}: comes without a usable X-Repo-Commit or ETag, so not from a Hub; "
            f"check HF_ENDPOINT, or {_OWN_COPY}"
        )
    return offered


def _download(record: CheckpointRecord, cache: Path, damaged: Path | None) -> Path:
    """Download the weights into the Hub's cache, or into the place of a damaged file there.

    The client is let near an empty folder alone: in a cache it writes wherever the ETag and the
    commit that a server gives lead to, anywhere on this machine.
    """
    commit = ask_hub(record, retry=True).commit_hash
    assert commit is not None  # as `ask_hub` says
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
                return put_in_cache([file], record, commit, cache)
    raise CheckpointError(
        f"{constants.ENDPOINT}/{record.repo_id} gives another file, so it is not to be trusted "
        f"({fault}); check HF_ENDPOINT and CONVMIXER_HUB_NAMESPACE, or {_OWN_COPY}"
    )


def put_in_cache(files: Iterable[Path], record: CheckpointRecord, commit: str, cache: Path) -> Path:
    """Move files of a model to where the Hub's client keeps those of a commit.

    Args:
        files: On the same disk as the cache, the verified weights among them.
        record: The model.
        commit: 40 hexadecimal digits, which the revision of the record then stands for.
        cache: The Hub's cache folder.

    Returns:
        The weights in the cache.
    """
    repository = cache / repo_folder_name(repo_id=record.repo_id, repo_type="model")
    reference = repository / "refs" / record.revision
    snapshot = repository / "snapshots" / commit
    for parent in (snapshot, reference.parent):
        parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        os.replace(file, snapshot / file.name)
    with replacing(reference) as temporary:
        temporary.write_text(commit)
    return snapshot / WEIGHTS_FILE


def explain_hub_error(error: Exception, record: CheckpointRecord) -> str:
    """Say in one line why the Hub did not give the weights of a model, and what to do."""
    if isinstance(error, CheckpointError):
        return str(error)
    if not isinstance(error, HfHubHTTPError):
        # The client wraps what befell its first request into advice that does not say what.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    repository = f"{constants.ENDPOINT}/{record.repo_id}"
    namespace = "check CONVMIXER_HUB_NAMESPACE and HF_ENDPOINT"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            return f"{repository} has no revision '{record.revision}'; {namespace}, or {_OWN_COPY}"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"{repository} has no file '{WEIGHTS_FILE}'; {namespace}, or {_OWN_COPY}"
        if status == 403:
            return (
                f"{repository} is closed to you (HTTP 403); ask its owner for access, or use a "
                f"token that has it, or {_OWN_COPY}"
            )
        if isinstance(error, RepositoryNotFoundError) and status == 401:
            return (
                f"{repository} is missing or private (HTTP 401); {namespace}, or log in with "
                "`hf auth login` or HF_TOKEN"
            )
        if isinstance(error, RepositoryNotFoundError):
            return f"{repository} does not exist; {namespace}, or {_OWN_COPY}"
        if status == 401:
            return (
                f"{constants.ENDPOINT} does not accept your token (HTTP 401); renew it with "
                "`hf auth login`, or do without (`hf auth logout`, and unset HF_TOKEN)"
            )
        reason = f"HTTP {status} {error.response.reason_phrase}"
        remedy = "try again later" if is_passing(status) else namespace
        return f"{repository} cannot be read ({reason}); {remedy}, or {_OWN_COPY}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "the network may not be used (HF_HUB_OFFLINE); unset that, or copy the Hub's cache "
            f"folder from a machine where `convmixer pull {record.name}` was run, or {_OWN_COPY}"
        )
    if isinstance(error, HFValidationError):
        return f"no repository is named {record.repo_id!r}; check CONVMIXER_HUB_NAMESPACE"
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"the Hub's cache cannot be used ({first_line(error)}); make room there, or name "
            "another folder with HF_HOME"
        )
    return (
        f"{repository} cannot be read ({first_line(error)}); check the network and HF_ENDPOINT, "
        f"or {_OWN_COPY}"
    )


def is_passing(status: int) -> bool:
    """Tell whether the same request may do better later, by the HTTP status of the answer."""
    return status in (408, 429) or status >= 500


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
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read ({first_line(error)})"
    if digest != record.sha256:
        return f"its SHA-256 is {digest}, but {record.name} has {record.sha256}"
    return None


def is_model_file(path: PurePath) -> bool:
    """Tell whether a path within a model's folder is that of one of `MODEL_FILES`."""
    is_visible = len(path.parts) == 1 and not path.name.startswith(".")
    return (
        is_visible
        and path.name != MISTAKES_FILE
        and any(path.match(pattern) for pattern in MODEL_FILES)
    )


def read_model_files(folder: Path) -> dict[Path, bytes]:
    """Read the `MODEL_FILES` of a folder, each once, sorted by name.

    Raises:
        CheckpointError: If one cannot be read.
    """
    try:
        files = sorted(f for f in folder.iterdir() if is_model_file(PurePath(f.name)))
        return {file: file.read_bytes() for file in files if file.is_file()}
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read whole ({first_line(error)}); make all in it readable to you"
        ) from None


def check_safetensors(path: Path) -> dict[str, str]:
    """Refuse a file that is not in the safetensors format; a pickle is never opened.

    Returns:
        The metadata of the file.

    Raises:
        CheckpointError: With the fault and the remedy.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        reason, remedy = "no such file", "check the path"
    except (SafetensorError, OSError) as error:
        reason = f"not a whole safetensors file ({first_line(error)})"
        remedy = "copy it again; pickles are not opened, `convmixer convert` rewrites them"
    raise CheckpointError(f"{path}: {reason}; {remedy}")


def check_finite(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state dict with a tensor that holds anything but numbers.

    Args:
        state_dict: What is about to be loaded.
        source: Where the state dict comes from, for the message.

    Raises:
        CheckpointError: Naming the first such tensor, and the remedy.
    """
    for key, tensor in state_dict.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: tensor {key!r} holds NaN or infinite numbers; "
                "use another copy, or a checkpoint of an earlier epoch"
            )


def save_model(model: nn.Module, folder: Path, extra_config: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` as timm and the Hub read them.

    Each file is replaced whole or not at all.

    Args:
        model: A model made by `timm.create_model`.
        folder: Where the two files go; made if missing.
        extra_config: Entries added to `config.json`.
    """
    activation = name_activation(model) if isinstance(model, ConvMixer) else None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving", dir=folder) as temporary:
        save_for_hf(
            model,
            temporary,
            model_config=dict(extra_config),
            model_args={"act_layer": activation} if activation else None,  # a class is no JSON
            safe_serialization=True,
        )
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            Path(temporary, name).chmod(0o644)  # safetensors lets nobody but the writer read
            os.replace(Path(temporary, name), folder / name)

"""Whether models can be loaded on this machine, and what that depends on."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled

from ..errors import CheckpointError, first_line
from ..version import __version__
from .find import find_cached, find_checkpoint, locate, verify_file
from .records import RECORDS, WEIGHTS_FILE, CheckpointRecord, get_record
from .repository import read_token


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: What was looked at.
        result: What was found and, where it is bad, what to do.
        healthy: False if a model cannot be loaded for this reason.
    """

    subject: str
    result: str
    healthy: bool = True


def examine(names: Sequence[str] = ()) -> list[Finding]:
    """Look at everything that loading models depends on; nothing is downloaded or changed.

    Args:
        names: The models, as in `find_checkpoint`; all trained ones if there are none.

    Raises:
        UnknownModelError: If no trained model has one of the names.
    """
    records = [get_record(name) for name in names] or list(RECORDS.values())
    to_download = sum(record.size for record in records if _is_to_be_downloaded(record))
    return [
        Finding("versions", _describe_versions()),
        Finding("endpoint", f"{constants.ENDPOINT} {_ask_endpoint()}"),
        _examine_token(to_download),
        Finding("offline", "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "no"),
        _examine_cache(to_download),
        *[_examine_model(record) for record in records],
    ]


def _describe_versions() -> str:
    packages = ("huggingface_hub", "safetensors", "timm", "torch")
    # Of what is imported, which may be a clone rather than what is installed.
    versions = [f"{package} {import_module(package).__version__}" for package in packages]
    return ", ".join(
        [f"convmixer-hub {__version__}", *versions, f"Python {platform.python_version()}"]
    )


def _ask_endpoint() -> str:
    try:
        response = get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:
        return "is not asked, because HF_HUB_OFFLINE is set"
    except Exception as error:  # the HTTP library's own, or a malformed address
        return f"does not answer ({first_line(error)})"
    return f"answers (HTTP {response.status_code})"


def _examine_token(to_download: int) -> Finding:
    try:
        return Finding("token", "present" if read_token() else "none")
    except CheckpointError as error:
        return Finding("token", str(error), healthy=to_download == 0)


def _is_to_be_downloaded(record: CheckpointRecord) -> bool:
    try:
        return locate(record) == "hub"
    except CheckpointError:  # the line about the model says it
        return False


def _examine_cache(to_download: int) -> Finding:
    """Look at the Hub's cache folder, which matters if so many bytes have to be downloaded."""
    folder = Path(constants.HF_HUB_CACHE)
    existing = next((path for path in [folder, *folder.parents] if os.path.exists(path)), None)
    if existing is None:  # on Windows
        result = f"{folder}, no such drive; name another with HF_HOME"
        return Finding("cache", result, healthy=to_download == 0)
    free = shutil.disk_usage(existing).free
    result, healthy = f"{folder}, {free / 1e9:.1f} GB free", True
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        result, healthy = f"{result}, not writable; name another with HF_HOME", to_download == 0
    elif free < to_download:
        result, healthy = f"{result}; make room, or name another with HF_HOME", False
    return Finding("cache", result, healthy)


def _examine_model(record: CheckpointRecord) -> Finding:
    prefix = ""
    try:
        source = locate(record)
        prefix = f"{source}: "
        cached = find_cached(record) if source == "cache" else None
        if source == "embedded":
            find_checkpoint(record.name, source)
        elif cached is not None:
            when = ", once HF_HUB_OFFLINE is unset" if constants.is_offline_mode() else ""
            verify_file(cached, record, f"`convmixer pull {record.name}` downloads it again{when}")
        else:
            return Finding(record.name, f"hub: {_ask_for(record)}")
    except CheckpointError as error:
        return Finding(record.name, f"{prefix}{error}", healthy=False)
    return Finding(record.name, f"{prefix}its SHA-256 is the recorded one")


def _ask_for(record: CheckpointRecord) -> str:
    """Ask the Hub, without downloading the file, whether it is the recorded one."""
    try:
        offered = record.repository.ask_for(WEIGHTS_FILE)
    except Exception as error:  # the client, its HTTP library and the disk each have their own
        raise CheckpointError(record.repository.explain(error, WEIGHTS_FILE)) from None
    # The Hub names large files by their SHA-256, small ones by git's own digest.
    digest = offered.etag if re.fullmatch("[0-9a-f]{64}", offered.etag or "") else None
    if offered.size not in (None, record.size) or digest not in (None, record.sha256):
        raise CheckpointError(
            f"{record.repository.address}: its {WEIGHTS_FILE} is not the recorded file; "
            "check HF_ENDPOINT and CONVMIXER_HUB_NAMESPACE"
        )
    known = "the Hub names the recorded SHA-256" if digest else "its SHA-256 is checked then"
    return f"to be downloaded, {record.size / 1e6:.1f} MB; {known}"

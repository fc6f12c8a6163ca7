"""From whatever names a checkpoint to its file: a model's name, a folder, a file, a repository."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnknownModelError, first_line
from ..hub.find import find_checkpoint
from ..hub.records import CONFIG_FILE, REPOSITORIES, WEIGHTS_FILE, CheckpointRecord, get_record
from ..hub.repository import PREFIX, Repository

# What OWNER/NAME ends with where it is a path.
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A file of weights, and what is known of it.

    Attributes:
        file: The file.
        name: What timm's `create_model` calls it; empty for a file alone.
        config: The configuration that belongs to it, as in `config.json`.
        record: What it was verified against, if it is on record.
    """

    file: Path
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    record: CheckpointRecord | None = None

    @property
    def folder(self) -> Path:
        """Where the files of the model are."""
        return self.file.parent

    def check_is_whole(self) -> None:
        """Refuse a file alone, of which the classes and other settings of its model are not known.

        Raises:
            CheckpointError: If it is one.
        """
        if not self.name:
            raise CheckpointError(
                f"{self.file}: is weights without their {CONFIG_FILE}; name the folder that holds "
                "both"
            )


def resolve(name: str | Path, embedded: bool = False) -> Source:
    """Find what a name stands for: the one way from a name to a file of weights.

    The name of a trained model always means that model; write `./name` for a folder of that name.
    A path that exists is never taken for a repository.

    Args:
        name: A trained model's name, a folder with `config.json` and `model.safetensors`, such a
            repository of the Hub (`hf-hub:OWNER/NAME[@REVISION]`, or without the prefix), or a
            file of weights. A `Path` is always a path.
        embedded: Of a trained model, take the package's own copy.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If the file cannot be found or downloaded, or its configuration is damaged.
    """
    if isinstance(name, Path):
        name = str(name.absolute())  # which no model and no repository is called
    path, repository = Path(name), Repository.parse(name)
    exists = os.path.exists(path)  # unlike Path.exists, no error without permission
    if name.startswith(PREFIX):
        if repository is None:
            raise UnknownModelError(f"{name}: is no repository; give {PREFIX}OWNER/NAME[@REVISION]")
        return _find_in_repository(repository)
    if repository and not exists and path.suffix not in _SUFFIXES:
        try:
            return _find_in_repository(repository)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: no file or folder, and {error}") from None
    try:
        record = get_record(name)
    except UnknownModelError as error:
        if not exists:
            raise UnknownModelError(f"no file or folder, and {error}") from None
    else:
        return _find_recorded(record, record.name, embedded)
    if path.is_dir():
        file, timm_name = path / WEIGHTS_FILE, f"local-dir:{name}"
    else:
        file, timm_name = path, ""
    config_file = file.with_name(CONFIG_FILE)
    has_config = file.name == WEIGHTS_FILE and os.path.exists(config_file)
    return Source(file, timm_name, _read_config(config_file) if has_config else {})


def resolve_folder(name: str | Path) -> Source:
    """Find the folder of a model that is at hand: a run, or the package's own copy of a model.

    Raises:
        UnknownModelError: If there is no such model or folder.
        CheckpointError: If it is a file or a repository, or as in `resolve`.
    """
    source = resolve(name, embedded=True)
    if not source.name or source.name.startswith(PREFIX):
        raise CheckpointError(
            f"{name}: is no folder of a model; name a run folder, or a model of this package"
        )
    return source


def _find_recorded(record: CheckpointRecord, timm_name: str, embedded: bool = False) -> Source:
    config = {"architecture": record.arch}
    file = find_checkpoint(record.name, "embedded" if embedded else None)
    return Source(file, timm_name, config, record)


def _find_in_repository(repository: Repository) -> Source:
    timm_name = f"{PREFIX}{repository}"
    if known := REPOSITORIES.get(str(repository)):  # so do timm's loads by this name
        return _find_recorded(get_record(known), timm_name)
    file = repository.find_file(WEIGHTS_FILE)
    if file is None:
        raise CheckpointError(
            f"{timm_name}: has no {WEIGHTS_FILE}; pickles are not taken from the Hub, download one "
            "and give its path"
        )
    config_file = repository.find_file(CONFIG_FILE)
    return Source(file, timm_name, _read_config(config_file)) if config_file else Source(file)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8-sig")))
        for part in ("model_args", "training", "pretrained_cfg"):
            if not isinstance(config.get(part) or {}, dict):
                raise TypeError(f"{part} is no object")
        return config
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: is not a model's configuration ({first_line(error)}); "
            "fix it, or move the weights elsewhere"
        ) from None

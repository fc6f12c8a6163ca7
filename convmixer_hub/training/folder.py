"""The folder of a training run, which can be gone on with wherever the run was stopped.

It holds

- `training_state.pt`: all that the next step needs, and what the epochs before it gave;
- `config.json`, `model.safetensors`: the model after the last whole epoch, as timm takes it;
- `metrics.csv`: one line an epoch.

The state is written first and the others follow from it, each replaced whole or not at all.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..checkpoints.files import save_model
from ..errors import CheckpointError, TrainingError, first_line
from ..files import replacing
from .settings import TrainingSettings

STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.csv"


def lock_run(folder: Path) -> IO[str]:
    """Keep other processes out of a run folder for as long as the file that this gives is open.

    Raises:
        TrainingError: If the folder cannot be made or written to, or another process trains in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise TrainingError(
            f"{folder}: cannot be made or written to ({first_line(error)}); name another --output"
        ) from None
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TrainingError(
            f"{folder}: another process trains in it; wait for that, or name another --output"
        ) from None
    except (ImportError, OSError):
        pass  # some file systems of clusters know no locks
    return file


def open_run(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Begin a new run, or read the state of the run that is in a folder.

    Args:
        folder: The run folder, locked by `lock_run`.
        identity: What the run computes: its `settings`, and the `classes` and number of `images`
            of its data.

    Returns:
        The state: `identity`, `epoch` and `step` to go on with, `metrics` of the epochs before.

    Raises:
        TrainingError: If the folder holds anything but this run.
    """
    # Names with a dot are the lock, and what is left over from a process killed while saving.
    if all(file.name.startswith(".") for file in folder.iterdir()):
        return {**identity, "epoch": 0, "step": 0, "metrics": []}
    if not (folder / STATE_FILE).exists():
        raise TrainingError(
            f"{folder}: holds files but no {STATE_FILE}, so it is no run to go on with; "
            "name another --output"
        )
    state = _read_state(folder / STATE_FILE)
    _check_same(folder, state, identity)
    return state


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        # What is missing is younger than the run, see `TrainingSettings`.
        known = asdict(TrainingSettings(state["settings"]["model"]))
        return {**state, "settings": {**known, **state["settings"]}}
    except Exception as error:  # torch.load has no error of its own
        raise TrainingError(f"{file}: damaged ({first_line(error)}); name another run") from None


def _check_same(folder: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    found, wanted = (
        {**run["settings"], "classes": run["classes"], "images": run["images"]}
        for run in (state, identity)
    )
    for name in found:
        if name not in wanted:
            raise TrainingError(
                f"{folder}: holds a run of a version with the setting {name}, which this one "
                "lacks; upgrade convmixer-hub, or name another run folder"
            )
        if found[name] != wanted[name]:
            raise TrainingError(
                f"{folder}: holds a run with {name} {found[name]!r}, not {wanted[name]!r}; "
                "give the same settings and data to resume it, or name another run folder"
            )


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state; wherever this is interrupted, the folder keeps a whole one.

    Raises:
        TrainingError: If it cannot be written, a full disk for one.
    """
    with _naming_failures(folder), replacing(folder / STATE_FILE) as temporary:
        torch.save(state, temporary)


def save_results(folder: Path, model: nn.Module, state: dict[str, Any]) -> None:
    """Write what follows from the state after a whole epoch.

    Args:
        folder: The run folder, with this state in it.
        model: The model to give away.
        state: The state.

    Raises:
        TrainingError: If it cannot be written.
    """
    config = {
        "label_names": state["classes"],
        # Of a folder the name alone: the rest of the path is of this machine.
        "training": {**state["settings"], "model": Path(state["settings"]["model"]).name},
        "machine": state["machine"],
    }
    if "temperature" in state:
        config["temperature"] = state["temperature"]
    with _naming_failures(folder):
        save_model(model, folder, config)
        with replacing(folder / METRICS_FILE) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(state["metrics"][0]))
            writer.writeheader()
            writer.writerows(state["metrics"])


def read_metrics(file: Path) -> dict[str, list[float]]:
    """Read what a run measured, one number an epoch each; nothing if there is no such file.

    Raises:
        CheckpointError: If it cannot be read, or is no such file.
    """
    if not file.exists():
        return {}
    names = ["epoch", "train_loss", "train_top1", "seconds"]
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        if not rows:
            raise ValueError("no epochs")
        if "held_out_top1" in rows[0]:
            names.append("held_out_top1")
        return {name: [float(row[name]) for row in rows] for name in names}
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise CheckpointError(
            f"{file}: not the metrics of a run ({type(error).__name__}: {first_line(error)}); "
            "copy it from its run folder again, or remove it"
        ) from None


@contextmanager
def _naming_failures(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: from torch.save
        raise TrainingError(
            f"{folder}: cannot be written ({first_line(error)}); it keeps what was saved before, "
            "so free some space and give the same command again"
        ) from None

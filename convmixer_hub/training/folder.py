"""The folder of a training run, which can be resumed wherever the run was stopped.

It holds

- `training_state.pt`: all that the next step needs, and what the epochs before it gave;
- `config.json`, `model.safetensors`: the model after the last whole epoch, as timm takes it,
  calibrated at the end if there are images for validation; written at most once a minute on a GPU,
  where epochs are short;
- `metrics.csv`: one line an epoch.

The state is written first and the others follow from it, each replaced whole or not at all.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints.files import save_model
from ..errors import CheckpointError, TrainingError, first_line
from ..files import replacing
from ..hub.repository import Repository
from ..model.config import order_names
from .settings import TrainingSettings

STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.csv"
# How runs are said to differ where their digests do.
_DIGESTS = {"image_digest": "on other images", "start_digest": "from another trained model"}


@dataclass
class RunState:
    """All that the next step of a run needs, and what the epochs before it gave.

    Attributes:
        settings: Those of the run.
        classes: Names of its classes.
        image_digest: What tells its images from others, see `images.RunImages`.
        start_digest: What tells the trained model that it started from, weights and configuration,
            from others; empty if there is none, and in runs of earlier versions.
        readable_images: Number of those that it is trained on, damaged ones left out; 0 before that
            is known.
        epoch: Number of completed epochs.
        step: Number of steps taken in the current epoch.
        sums: Of the current epoch so far: `loss`, `correct`, `seconds`.
        metrics: One dict for each completed epoch: the lines of `metrics.csv`.
        precision: `fp32` or `bf16`, chosen when the run began.
        machine: What computed it, in words.
        model: State dict of the model.
        optimizer: State dict of the optimizer.
        average: State dict of the moving average (EMA), if there is one.
        temperature: What the logits of a finished run are divided by, see
            `evaluate.fit_temperature`.
    """

    settings: dict[str, Any]
    classes: list[str]
    image_digest: str
    start_digest: str = ""
    readable_images: int = 0
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    precision: str = ""
    machine: str = ""
    model: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    average: dict[str, Tensor] | None = None
    temperature: float = 1.0

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for the run to be resumed."""
        digests = {"image_digest": self.image_digest, "start_digest": self.start_digest}
        return {"classes": self.classes, **self.settings, **digests}


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder.

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
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            raise TrainingError(
                f"{folder}: another process trains in it; wait for that, or name another --output"
            ) from None
        try:
            yield
        finally:
            _lock(file, release=True)  # to close it is not enough while a forked worker lives


def _lock(file: IO[str], release: bool = False) -> None:
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_UN if release else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        pass  # some file systems of clusters know no locks


def open_run(folder: Path, new: RunState) -> RunState:
    """Begin a new run, or read the state of the run that is in a folder.

    Args:
        folder: The run folder, locked by `lock_run`.
        new: The state of the run at its beginning.

    Returns:
        That, or the state of the same run as it was saved.

    Raises:
        TrainingError: If the folder holds anything but this run.
    """
    # Names with a dot are the lock, and what is left over from a process killed while saving.
    if all(file.name.startswith(".") for file in folder.iterdir()):
        return new
    if not (folder / STATE_FILE).exists():
        raise TrainingError(
            f"{folder}: holds files but no {STATE_FILE}, so it is no run to resume; "
            "name another --output"
        )
    state = read_state(folder / STATE_FILE)
    _check_same(folder, state.identity, new.identity)
    return state


def read_state(file: Path) -> RunState:
    """Read the state of a run, of an earlier version too.

    Raises:
        TrainingError: If it cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        # A setting that is missing is younger than the run; its default changes nothing.
        plain = asdict(TrainingSettings(content["settings"]["model"]))
        content["settings"] = plain | content["settings"]
        content["classes"] = order_names(content["classes"])
        known = {field.name for field in fields(RunState)}
        return RunState(**{name: content[name] for name in content.keys() & known})
    except Exception as error:  # torch.load has no error of its own
        raise TrainingError(
            f"{file}: cannot be read ({first_line(error)}); name another --output"
        ) from None


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in found:
        if name == "start_digest" and not (found[name] and wanted[name]):
            continue  # a run of an earlier version, or a model that is gone, which the load tells
        if found[name] != wanted.get(name):
            setting = f"with {name} {found[name]!r}, not {wanted.get(name)!r}"
            differs = _DIGESTS.get(name, setting)
            raise TrainingError(
                f"{folder}: holds a run {differs}; "
                "give the same settings and data to resume it, or name another run folder"
            )


def save_state(folder: Path, state: RunState) -> None:
    """Write the state; wherever this is interrupted, the folder keeps a whole one.

    Raises:
        TrainingError: If it cannot be written, a full disk for one.
    """
    with _raising_training_errors(folder), replacing(folder / STATE_FILE) as temporary:
        torch.save(vars(state), temporary)


def save_results(folder: Path, model: nn.Module, state: RunState) -> None:
    """Write what follows from the state after a whole epoch.

    Args:
        folder: The run folder, with this state in it.
        model: The model to save.
        state: The state.

    Raises:
        TrainingError: If it cannot be written.
    """
    config: dict[str, Any] = {
        "label_names": state.classes,
        "training": state.settings
        | {
            "model": _without_path(state.settings["model"]),
            "teacher": ",".join(
                _without_path(name.strip()) for name in state.settings["teacher"].split(",")
            ),
        },
        "machine": state.machine,
    }
    if state.temperature != 1.0:
        config["temperature"] = state.temperature
    with _raising_training_errors(folder):
        save_model(model, folder, config)
        with (
            replacing(folder / METRICS_FILE) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(state.metrics[0]))
            writer.writeheader()
            writer.writerows(state.metrics)


def _without_path(model: str) -> str:
    """Return `./` and the name of a folder: the rest of the path is of this machine."""
    is_path = set("/\\") & set(model) or model in (".", "..")
    if not is_path or (Repository.parse(model) and not os.path.exists(model)):
        return model
    return f"./{os.path.basename(os.path.abspath(model))}"


def read_metrics(file: Path) -> dict[str, list[float]]:
    """Read what a run measured, one number per epoch; nothing if there is no such file.

    Raises:
        CheckpointError: If it cannot be read, or is no such file.
    """
    if not file.exists():
        return {}
    names = ["epoch", "train_loss", "train_top1", "seconds"]
    try:
        with file.open(encoding="utf-8", newline="") as lines:
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
def _raising_training_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: from torch.save
        raise TrainingError(
            f"{folder}: cannot be written ({first_line(error)}); it keeps what was saved before, "
            "so free some space, or close the program that uses it, and give the same command again"
        ) from None

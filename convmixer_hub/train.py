"""Training a model on labelled images, with a run folder that the same command resumes.

A run folder holds

- `training_state.pt`: all that the next epoch needs, and what the epochs before it gave;
- `config.json`, `model.safetensors`: the model as timm and the Hub take it;
- `metrics.csv`: one line an epoch.

The state is written first and the others follow from it, each replaced whole or not at all.
"""

from __future__ import annotations

import csv
import ctypes
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from .checkpoint import save_model, suggest
from .data import (
    eval_transform,
    hold_out,
    load_images,
    make_loader,
    read_batches,
    train_transform,
    with_transform,
)
from .errors import DataError, TrainingError, UnknownModelError, first_line
from .evaluate import evaluate
from .zoo import default_cfgs

STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.csv"
SPLIT_SEED = 0


@dataclass(frozen=True)
class TrainingSettings:
    """What a run computes, given the data, the kind of device and the number of workers.

    Attributes:
        model: Name of an arch in timm's registry.
        epochs: Passes over the training images.
        small_crop_epochs: The first so many epochs see smaller crops, for speed.
        small_crop_size: Side of these crops, in pixels.
        batch_size: Images a step.
        learning_rate: Muon's peak for the 1x1 convolutions, the stem and the head; its AdamW for
            the other parameters has half of it. Both rise from 0 over the first `warmup` of all
            steps, then fall to 0 on a cosine.
        warmup: Share of the steps, between 0 and 1.
        weight_decay: On the weights of convolutions and linear maps alone.
        label_smoothing: Share of the target spread over all classes.
        clip_grad: Largest norm of the gradient.
        held_out: Training images kept back to measure accuracy after each epoch.
        seed: Of the initial weights, the order of the images and their augmentation.
    """

    model: str
    epochs: int = 9
    small_crop_epochs: int = 6
    small_crop_size: int = 24
    batch_size: int = 128
    learning_rate: float = 0.02
    warmup: float = 0.25
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad: float = 1.0
    held_out: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            TrainingError: Naming the setting and what it may be.
        """
        for name, fits, range_ in [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("small_crop_epochs", 0 <= self.small_crop_epochs < self.epochs, "0 to epochs - 1"),
            ("small_crop_size", self.small_crop_size >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("warmup", 0 <= self.warmup < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("clip_grad", self.clip_grad > 0, "above 0"),
            ("held_out", self.held_out >= 0, "at least 0"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2147483647"),
        ]:
            if not fits:
                raise TrainingError(f"{name} is {getattr(self, name)}: give {range_}")


def train(
    settings: TrainingSettings,
    data_dir: str | Path,
    output: str | Path,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Train a model, or go on with a run that was interrupted.

    Args:
        settings: What to compute.
        data_dir: Folder of the data set, see `data.load_images`; its test split is not read.
        output: The run folder. If it holds a run with the same settings, that run is resumed.
        workers: Processes that read and augment images.
        progress: Show progress bars, if there is a terminal, and a line an epoch.

    Returns:
        The run folder, which `timm.create_model("local-dir:…", pretrained=True)` takes as it is.

    Raises:
        UnknownModelError: If timm's registry has no such model.
        TrainingError: If the folder holds another run, or the loss is no longer a number.
        DataError: If the data cannot be read, or is less than one batch.
    """
    run = Path(output)
    if not timm.is_model(settings.model):
        raise UnknownModelError(
            f"no model is named '{settings.model}'; {suggest(settings.model, default_cfgs)}"
        )
    images = load_images(data_dir, "train")
    state = _open_run(run, settings, list(images.classes))
    _keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        _orthogonalise_in_fp32()

    random_seed(settings.seed)
    model = timm.create_model(settings.model, num_classes=len(images.classes)).to(device)
    data_config = resolve_model_data_config(model)
    image_size = data_config["input_size"][-1]
    if settings.small_crop_size > image_size:
        raise TrainingError(
            f"small_crop_size is {settings.small_crop_size}: {settings.model} takes images of "
            f"{image_size} pixels, give at most that"
        )
    kept, held_out = hold_out(len(images), settings.held_out, SPLIT_SEED)
    steps_per_epoch = len(kept) // settings.batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"{data_dir}: {len(kept)} training images are less than one batch of "
            f"{settings.batch_size}; give a smaller --batch-size"
        )
    held_out_loader = make_loader(
        with_transform(images, eval_transform(data_config), held_out), 256, workers
    )

    optimizer = create_optimizer_v2(
        model,
        opt="muon",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fallback_lr_scale=0.5,
    )
    total_steps = settings.epochs * steps_per_epoch
    warmup_steps = int(settings.warmup * total_steps)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup_steps,
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )

    if state["epoch"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _save(run, model, state)
    for epoch in range(state["epoch"], settings.epochs):
        crop_size = settings.small_crop_size if epoch < settings.small_crop_epochs else image_size
        random_seed(settings.seed, epoch)
        loader = make_loader(
            with_transform(images, train_transform(data_config, crop_size), kept),
            settings.batch_size,
            workers,
            training_seed=settings.seed * 10_000 + epoch,
        )
        metrics: dict[str, Any] = {"epoch": epoch + 1, "crop_size": crop_size}
        metrics |= _train_epoch(
            model, loader, optimizer, scheduler, settings, epoch, device, progress
        )
        if held_out:
            result = evaluate(model, held_out_loader, device, progress)
            metrics["held_out_top1"] = round(result.top1, 2)
        state["epoch"] = epoch + 1
        state["model"] = model.state_dict()
        state["optimizer"] = optimizer.state_dict()
        state["metrics"] = [*state["metrics"], metrics]
        _save(run, model, state)
        if progress:
            tqdm.write("  ".join(f"{name} {value}" for name, value in metrics.items()))
    return run


def _train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: CosineLRScheduler,
    settings: TrainingSettings,
    epoch: int,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    """Go once over the training images; return the epoch's loss, accuracy and speed."""
    model.train()
    start = time.perf_counter()
    loss_sum, correct, count = 0.0, 0, 0
    title = f"epoch {epoch + 1}/{settings.epochs}"
    with tqdm(
        read_batches(loader),
        desc=title,
        total=len(loader),
        unit="step",
        leave=False,
        disable=None if progress else True,
    ) as bar:
        for step, (images, labels) in enumerate(bar, start=epoch * len(loader)):
            scheduler.step_update(step)
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {epoch + 1} (finished epochs, which are "
                    f"kept: {epoch}); start a new run with a smaller --lr"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            optimizer.step()

            loss_sum += loss.item() * len(labels)
            correct += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
            speed = count / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"loss {loss_sum / count:.3f}, accuracy {100 * correct / count:.1f} %, "
                f"{speed:.0f} images/s"
            )
    return {
        "train_loss": round(loss_sum / count, 4),
        "train_top1": round(100.0 * correct / count, 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _open_run(run: Path, settings: TrainingSettings, classes: list[str]) -> dict[str, Any]:
    """Make the run folder, or read the state of the run in it; refuse any other folder."""
    state_file = run / STATE_FILE
    identity: dict[str, Any] = {"settings": asdict(settings), "classes": classes}
    try:
        run.mkdir(parents=True, exist_ok=True)
        # Names with a dot are left over from a process that was killed while saving.
        is_new = all(file.name.startswith(".") for file in run.iterdir())
    except OSError as error:
        raise TrainingError(
            f"{run}: cannot be made or read ({first_line(error)}); name another --output"
        ) from None
    if not os.access(run, os.W_OK):
        raise TrainingError(f"{run}: may not be written to; name another --output")
    if is_new:
        return {**identity, "epoch": 0, "metrics": []}
    if not state_file.exists():
        raise TrainingError(
            f"{run}: holds files but no {STATE_FILE}, so it is no run to go on with; "
            "name another --output"
        )
    try:
        state: dict[str, Any] = torch.load(state_file, map_location="cpu", weights_only=True)
        found = {**state["settings"], "classes": state["classes"]}
    except Exception as error:  # torch.load has no error of its own
        raise TrainingError(
            f"{state_file}: damaged ({first_line(error)}); name another --output"
        ) from None
    for name, value in {**identity["settings"], "classes": classes}.items():
        if found.get(name) != value:
            raise TrainingError(
                f"{run}: holds a run with {name} {found.get(name)!r}, not {value!r}; "
                "give the same settings and data to resume it, or name another --output"
            )
    return state


def _save(run: Path, model: nn.Module, state: dict[str, Any]) -> None:
    """Write the run folder; wherever this is interrupted, the folder can be resumed."""
    with _replacing(run / STATE_FILE) as temporary:
        torch.save(state, temporary)
    save_model(model, run, {"label_names": state["classes"], "training": state["settings"]})
    with _replacing(run / METRICS_FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(state["metrics"][0]))
        writer.writeheader()
        writer.writerows(state["metrics"])


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when all went well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of giving their pages back to the kernel.

    By default every tensor over 32 MiB is mapped, zeroed page by page, and unmapped again at each
    step, which is a good part of its time. Elsewhere than on glibc this does nothing.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # never
    mallopt(m_top_pad, 2**28)  # grow in steps of 256 MiB


def _orthogonalise_in_fp32() -> None:
    """Let timm's Muon compute in fp32 rather than bf16, for which few CPUs have instructions.

    Without them its products of 256x256 matrices take longer than the rest of the step.
    """
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)

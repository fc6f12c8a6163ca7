"""Training a model on labeled images, in a run that can be resumed."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, resolve_input_data_config
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..checkpoints.resolve import resolve
from ..data.augment import derive_seed
from ..data.reader import ImageDataset
from ..errors import DataError, TrainingError, UnknownModelError, first_line
from ..evaluate import collect_logits, count_correct, fit_temperature
from ..files import hash_file
from ..hub.records import suggest
from ..machine import count_workers, describe_machine, find_device, refuse_torchrun
from ..model.cpu import choose_precision
from ..zoo import VARIANTS
from .folder import RunState, lock_run, open_run, save_results, save_state
from .images import RunImages, choose_images, load_images, serve_batches
from .muon import fast_muon
from .network import build_network
from .settings import TrainingSettings
from .step import TrainingStep
from .teacher import Teacher

SECONDS_BETWEEN_SAVES = 60.0
STEPS_BETWEEN_READS = 20  # of loss and accuracy, on a GPU


def train(
    settings: TrainingSettings,
    dataset: ImageDataset,
    output: str | Path,
    skip_damaged: bool = False,
) -> Path:
    """Train a model, or resume a run that was interrupted.

    Where bfloat16 is faster, the forward and backward passes and Muon compute in it; otherwise all
    is in fp32. A resumed run keeps the precision that it began with. On a CPU, the C library keeps
    memory that tensors gave back, from here on in this Python process.

    Args:
        settings: What to compute.
        dataset: Its test images are not looked at.
        output: The run folder. If it holds a run with the same settings, that run is resumed.
        skip_damaged: Train without the images that cannot be read, naming them on stderr.

    Returns:
        The run folder, which `timm.create_model("local-dir:…", pretrained=True)` takes as it is.

    Raises:
        UnknownModelError: If no arch of this package has this name.
        TrainingError: If a setting does not fit the model or the data, if the folder holds another
            run, lies among class folders or cannot be written, if the loss is no longer a number,
            if a GPU has too little memory, or under torchrun.
        DataError: If the data cannot be read, or is fewer images than one batch.
        CheckpointError: If trained weights to start or to learn from cannot be found or
            downloaded, are damaged or do not fit.
    """
    folder = Path(output)
    if settings.model not in VARIANTS and not settings.pretrained:
        raise UnknownModelError(
            f"no model is named '{settings.model}'; {suggest(settings.model, VARIANTS)}"
        )
    refuse_torchrun()
    if settings.mixes and settings.batch_size % 2:
        raise TrainingError(
            f"batch_size is {settings.batch_size}: must be even, as images are mixed in pairs"
        )
    if len(dataset.classes) < 2:
        raise DataError(
            f"{dataset.source}: has only one class, {dataset.classes[0]}; add images of another one"
        )
    chosen = choose_images(settings, dataset)
    for place in {split.raw.folder for split in dataset.splits.values()}:
        if place and place.resolve() in folder.resolve().parents:
            raise TrainingError(
                f"{folder}: lies among the class folders in {place}; name another --output"
            )
    start_digest = _hash_start(settings.model) if settings.pretrained else ""
    new = RunState(asdict(settings), dataset.classes, chosen.image_digest, start_digest)
    try:
        with lock_run(folder):
            state = open_run(folder, new)
            run = _Run(settings, folder, state, dataset, chosen, skip_damaged)
            with fast_muon(run.dtype, run.device):
                while state.epoch < settings.epochs:
                    run.train_epoch()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{folder}: the GPU has too little memory ({first_line(error)}); name another --output "
            "and a smaller --batch-size, or hide the GPU with CUDA_VISIBLE_DEVICES=-1"
        ) from None
    return folder


def _hash_start(model: str) -> str:
    """Return a digest of a trained model to start from, weights and configuration; or nothing."""
    source = resolve(model)
    try:
        parts = (hash_file(source.file), source.config)
    except OSError:
        return ""  # the load tells what is wrong
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class _Run:
    """A training run; `state` holds all that a resumed one needs."""

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path,
        state: RunState,
        dataset: ImageDataset,
        images: RunImages,
        skip_damaged: bool,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.state = state
        self.device = device = find_device()

        # The network, in the type that is faster here.
        random_seed(settings.seed)
        self.network = build_network(settings, dataset.classes, device)
        data_config = resolve_input_data_config(self.network.model)
        if state.epoch < settings.epochs:  # a finished run is only written out again
            side = min(data_config["input_size"][1:])
            settings.check_crops(side, self.network.model.patch_emb.patch_size)
            here = f"{describe_machine(device)}, {self._choose_precision(side)}"
            machines = state.machine.split(", then ") if state.machine else []
            if machines[-1:] != [here]:
                state.machine = ", then ".join([*machines, here])

            # The images, and a teacher.
            teacher = None
            if settings.teachers:
                teacher = Teacher(settings.teachers, dataset.classes, data_config, device)
            self.images, self.validation = load_images(settings, images, data_config, skip_damaged)
            self.steps = len(self.images) // settings.batch_size  # of an epoch
            readable = len(self.images)
            if state.readable_images not in (0, readable):
                raise TrainingError(
                    f"{folder}: holds a run on {state.readable_images} training images, now "
                    f"{readable} can be read; give the same ones, or name another run folder"
                )
            state.readable_images = readable
            lost = set(images.training.labels) - set(self.images.labels.tolist())
            if lost:
                raise DataError(
                    f"{dataset.source}: no training image of the class "
                    f"{dataset.classes[min(lost)]} can be read; replace the images, or remove the "
                    "class"
                )

            # The loop, from where it was stopped.
            workers = count_workers() if device.type == "cuda" else 0
            self.batches = serve_batches(settings, self.images, state.epoch, state.step, workers)
            self.take_step = TrainingStep(self.network, settings, self.dtype, device, teacher)
        self.mix = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=len(dataset.classes),
        )
        self.state_saved_at = self.all_saved_at = time.monotonic()
        if state.model is not None:
            self.network.load_state(state)
            if state.step == 0:
                self._save_all()

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of a step computes in."""
        return torch.bfloat16 if self.state.precision == "bf16" else torch.float32

    def _choose_precision(self, side: int) -> str:
        """Name this run's type, which stays the same wherever the run is resumed."""
        state = self.state
        if not state.precision:
            state.precision = self.settings.precision
            if state.precision == "auto":
                state.precision, reason = choose_precision(self.network.model, self.device, side)
                tqdm.write(f"computes in {state.precision}: {reason}")
        return state.precision

    def train_epoch(self) -> None:
        """Train to the end of the epoch, and save the result."""
        settings, state = self.settings, self.state
        # Sums over the epoch so far; they begin anew with it.
        sums = state.sums if state.step else {"loss": 0.0, "correct": 0.0, "seconds": 0.0}
        self.network.module.train()
        if settings.freeze_batch_norm:
            for module in self.network.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        self._take_steps(sums)
        metrics = self._measure(sums)
        state.metrics.append(metrics)
        is_last = state.epoch + 1 == settings.epochs
        self._update_state(state.epoch + 1, 0, {})
        # On a GPU, an epoch may take little longer than saving.
        is_due = time.monotonic() - self.all_saved_at > SECONDS_BETWEEN_SAVES
        if self.device.type == "cpu" or is_last or is_due:
            self._save_all()
        tqdm.write("  ".join(f"{name} {value}" for name, value in metrics.items()))

    def _take_steps(self, sums: dict[str, float]) -> None:
        """Take the steps that are left of the epoch, adding to its sums."""
        settings, state = self.settings, self.state
        epoch, first_step, steps = state.epoch, state.step, self.steps
        start = time.monotonic() - sums["seconds"]
        # Loss, number of correct images, norm of the gradient: added up on the device. To read
        # them means to wait for a GPU, so they are read now and then.
        totals = torch.tensor([sums["loss"], sums["correct"], 0.0], dtype=torch.float64)
        totals = totals.to(self.device)
        interval = 1 if self.device.type == "cpu" else STEPS_BETWEEN_READS
        with tqdm(
            desc=f"epoch {epoch + 1}/{settings.epochs}",
            total=steps,
            initial=first_step,
            unit="step",
            leave=False,
            disable=None,
        ) as bar:
            for step in range(first_step, steps):
                factor = settings.learning_rate_factor(epoch + (step + 0.5) / steps)
                totals += self._train_on_next_batch(epoch, step, factor)
                bar.update()
                if (step + 1) % interval and step + 1 < steps:
                    continue
                loss, correct, norm = totals.tolist()
                if not math.isfinite(loss + norm):
                    raise TrainingError(
                        f"loss or gradient is not finite in epoch {epoch + 1}, by step {step + 1}; "
                        f"{self.folder} keeps what was saved before; start a new run with a "
                        "smaller --lr"
                    )
                sums.update(loss=loss, correct=correct, seconds=time.monotonic() - start)
                count = (step + 1) * settings.batch_size
                bar.set_postfix_str(
                    f"loss {loss / count:.3f}, accuracy {100 * correct / count:.1f} %, "
                    f"{count / max(sums['seconds'], 1e-3):.0f} images/s"
                )
                if time.monotonic() - self.state_saved_at > SECONDS_BETWEEN_SAVES:
                    self._update_state(epoch, step + 1, sums)
                    save_state(self.folder, state)
                    self.state_saved_at = time.monotonic()

    def _measure(self, sums: dict[str, float]) -> dict[str, Any]:
        """Return the metrics of the epoch; after the last one, fit the temperature, too."""
        settings, epoch = self.settings, self.state.epoch
        count = self.steps * settings.batch_size
        crop_size = settings.choose_crop_size(epoch, self.images.image_size)
        metrics: dict[str, Any] = {
            "epoch": epoch + 1,
            "crop_size": "×".join(map(str, crop_size)) if len(set(crop_size)) > 1 else crop_size[0],
            "train_loss": round(sums["loss"] / count, 4),
            "train_top1": round(100.0 * sums["correct"] / count, 2),
            "seconds": round(sums["seconds"], 1),
        }
        if self.validation is not None:
            logits, labels = collect_logits(self.network.result, self.validation)
            metrics["held_out_top1"] = round(count_correct(logits, labels).top1, 2)
            if epoch + 1 == settings.epochs:
                self.state.temperature = fit_temperature(logits, labels)
        return metrics

    def _train_on_next_batch(self, epoch: int, step: int, learning_rate_factor: float) -> Tensor:
        """Take one step; return what `TrainingStep` does."""
        settings = self.settings
        images, labels = (x.to(self.device, non_blocking=True) for x in next(self.batches))
        targets = labels
        if settings.mixes and settings.augments(epoch):
            random_seed(derive_seed(settings.seed, epoch, step, 1) % 2**31)
            images, targets = self.mix(images, labels)  # which smooths the labels, too
        numbers = self.take_step(images, labels, targets, learning_rate_factor)
        if self.network.average is not None:
            self.network.average.update(self.network.model, epoch * self.steps + step + 1)
        return numbers

    def _update_state(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        state = self.state
        state.epoch, state.step, state.sums = epoch, step, sums
        for name, value in self.network.get_state().items():
            setattr(state, name, value)

    def _save_all(self) -> None:
        """Write the whole folder, between two epochs."""
        save_state(self.folder, self.state)
        save_results(self.folder, self._make_result(), self.state)
        self.state_saved_at = self.all_saved_at = time.monotonic()

    def _make_result(self) -> nn.Module:
        """Copy what the run gives, calibrated at its end."""
        model = copy.deepcopy(self.network.result)
        for parameter in model.get_submodule("classification.linear").parameters():
            parameter.data /= self.state.temperature
        return model

"""Training a model on labeled images, alone or in several processes, with a resumable run."""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, resolve_input_data_config
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..data.augment import derive_seed
from ..data.reader import ImageDataset
from ..errors import DataError, TrainingError, UnknownModelError
from ..evaluate import collect_logits, evaluate, fit_temperature
from ..hub.records import CONFIG_FILE, WEIGHTS_FILE, suggest
from ..machine import (
    ask_first_process,
    describe_machine,
    get_rank,
    get_world_size,
    join_processes,
    sum_over_processes,
)
from ..model.cpu import choose_dtype
from ..zoo import default_cfgs
from .folder import RunState, lock_run, open_run, save_results, save_state
from .images import RunImages, choose_images, load_images
from .network import build_network, muon_computing_in
from .settings import TrainingSettings

SECONDS_BETWEEN_SAVES = 60.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(
    settings: TrainingSettings,
    dataset: ImageDataset,
    output: str | Path,
    skip_damaged: bool = False,
    progress: bool = True,
) -> Path:
    """Train a model, or resume a run that was interrupted.

    Under torchrun, all processes share each batch; with the same batch size their number changes
    the result by rounding alone (unless images are mixed, erased or RandAugmented, which each
    process does for itself).

    Where bfloat16 is faster, forward and backward pass compute in it, and Muon; otherwise nothing
    does; a run keeps what it began with. On a CPU, the C library keeps memory that tensors gave
    back, from here on in this Python process.

    Args:
        settings: What to compute.
        dataset: Its test images are not looked at.
        output: The run folder. If it holds a run with the same settings, that run is resumed.
        skip_damaged: Train without the images that cannot be read, naming them on stderr.
        progress: Show progress bars, if there is a terminal, and a line an epoch.

    Returns:
        The run folder, which `timm.create_model("local-dir:…", pretrained=True)` takes as it is.

    Raises:
        UnknownModelError: If no arch of this package has this name.
        TrainingError: If a setting does not fit the model, the data or the processes, if the
            folder holds another run, lies among class folders or cannot be written, or if the loss
            is no longer a number.
        DataError: If the data cannot be read, or is less than one batch.
        CheckpointError: If trained weights to start from cannot be found or downloaded, are
            damaged or do not fit.
    """
    folder = Path(output)
    if settings.model not in default_cfgs and not settings.pretrained:
        raise UnknownModelError(
            f"no model is named '{settings.model}'; {suggest(settings.model, default_cfgs)}"
        )
    # Each process takes an equal share of a batch, and mixing takes images in pairs.
    unit = get_world_size() * (2 if settings.mixes else 1)
    if settings.batch_size % unit:
        raise TrainingError(
            f"batch_size is {settings.batch_size}: give a multiple of {unit} for "
            f"{get_world_size()} processes"
        )
    if len(dataset.classes) < 2:
        raise DataError(
            f"{dataset.source}: has one class alone, {dataset.classes[0]}; there is nothing to "
            "tell apart"
        )
    images, chosen = dataset.get("train"), choose_images(settings, dataset)
    if images.folder and images.folder.resolve() in folder.resolve().parents:
        raise TrainingError(
            f"{folder}: lies among the class folders in {images.folder}; name another --output"
        )

    def begin() -> RunState:
        open_files.enter_context(lock_run(folder))
        new = RunState(asdict(settings), dataset.classes, len(images), chosen.held_out)
        return open_run(folder, new)

    with ExitStack() as open_files, join_processes() as device:
        _check_same_everywhere(dataset, device)
        state = ask_first_process(begin)
        progress = progress and get_rank() == 0
        run = _Run(settings, folder, state, dataset, chosen, device, skip_damaged, progress)
        open_files.enter_context(muon_computing_in(run.dtype))
        while state.epoch < settings.epochs:
            run.train_epoch()
        # Wait until the first has written it all.
        sum_over_processes(torch.zeros(1, device=device)).item()
    return folder


def _check_same_everywhere(dataset: ImageDataset, device: torch.device) -> None:
    """Refuse to train in processes that see different images, which would wait for one another."""
    seen = zlib.crc32(repr((dataset.classes, dataset.get("train").labels)).encode())
    total = sum_over_processes(torch.tensor(float(seen), dtype=torch.float64, device=device))
    if total.item() != float(seen) * get_world_size():
        raise DataError(
            f"{dataset.source}: is not the same for all processes; give each the same images"
        )


class _Run:
    """One process's part in a training run; all of it that lasts is in `state`."""

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path,
        state: RunState,
        dataset: ImageDataset,
        images: RunImages,
        device: torch.device,
        skip_damaged: bool,
        progress: bool,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.state = state
        self.device = device
        self.progress = progress
        random_seed(settings.seed)
        start: str | Path = settings.model
        is_model = all((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))
        if settings.pretrained and state.model is not None and is_model:
            start = folder  # what a run began with may be gone when it is resumed
        self.network = build_network(settings, start, dataset.classes, device)
        data_config = resolve_input_data_config(self.network.model)
        if state.epoch < settings.epochs:  # a finished run is only written out again
            self._check_crops(data_config["input_size"])
            here = f"{describe_machine(device)}, {self._choose_precision(data_config)}"
            before = state.machine or here
            state.machine = before if before.endswith(here) else f"{before}, then {here}"
            self.images, self.validation = load_images(
                settings, images, data_config, device, skip_damaged, progress
            )
        self.mix = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=len(dataset.classes),
        )
        self.erase = RandomErasing(settings.random_erasing, mode="pixel", device=device)
        if state.model is not None:
            self.network.load_state(state)
            if state.step == 0:
                self._save_all()

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of a step computes in."""
        return DTYPES[self.state.precision or "fp32"]

    def _check_crops(self, input_size: tuple[int, int, int]) -> None:
        settings, side = self.settings, min(input_size[1:])
        patch_size = self.network.model.patch_emb.patch_size
        needed = not settings.shows_whole_images(0)
        if needed and not patch_size <= settings.small_crop_size <= side:
            raise TrainingError(
                f"small_crop_size is {settings.small_crop_size}: {settings.model} takes images of "
                f"{side} pixels in patches of {patch_size}; give a number between them"
            )

    def _choose_precision(self, data_config: Mapping[str, Any]) -> str:
        """Name this run's type, which stays the same wherever the run is resumed."""
        state = self.state
        if not state.precision and self.settings.precision != "auto":
            state.precision = self.settings.precision
        if not state.precision:
            side = min(data_config["input_size"][1:])
            dtype, reason = choose_dtype(self.network.model, self.device, side)
            state.precision = "bf16" if dtype is torch.bfloat16 else "fp32"
            if self.progress:
                tqdm.write(f"computes in {reason}")
        return state.precision

    def train_epoch(self) -> None:
        """Go on to the end of the epoch, and save what it gave."""
        settings, state = self.settings, self.state
        epoch, first_step = state.epoch, state.step
        # Sums over the epoch so far; they begin anew with it.
        sums = state.sums if first_step else {"loss": 0.0, "correct": 0.0, "seconds": 0.0}
        crop_size = self.images.image_size  # height, width
        if not settings.shows_whole_images(epoch):
            crop_size = (settings.small_crop_size,) * 2
        steps = len(self.images) // settings.batch_size
        start, saved = time.monotonic() - sums["seconds"], time.monotonic()
        self.network.module.train()
        if settings.freeze_batch_norm:
            for module in self.network.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        with tqdm(
            desc=f"epoch {epoch + 1}/{settings.epochs}",
            total=steps,
            initial=first_step,
            unit="step",
            leave=False,
            disable=None if self.progress else True,
        ) as bar:
            for step in range(first_step, steps):
                factor = settings.learning_rate_factor(epoch + (step + 0.5) / steps)
                loss, correct = self._train_step(epoch, step, crop_size, factor)
                sums["loss"] += loss
                sums["correct"] += correct
                sums["seconds"] = time.monotonic() - start
                count = (step + 1) * settings.batch_size
                bar.set_postfix_str(
                    f"loss {sums['loss'] / count:.3f}, "
                    f"accuracy {100 * sums['correct'] / count:.1f} %, "
                    f"{count / sums['seconds']:.0f} images/s"
                )
                bar.update()
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    self._update_state(epoch, step + 1, sums)
                    if get_rank() == 0:
                        save_state(self.folder, state)
                    saved = time.monotonic()

        count = steps * settings.batch_size
        metrics = {
            "epoch": epoch + 1,
            "crop_size": "×".join(map(str, crop_size)) if len(set(crop_size)) > 1 else crop_size[0],
            "train_loss": round(sums["loss"] / count, 4),
            "train_top1": round(100.0 * sums["correct"] / count, 2),
            "seconds": round(sums["seconds"], 1),
        }
        if self.validation is not None:
            result = evaluate(self.network.result, self.validation, self.device, self.progress)
            metrics["held_out_top1"] = round(result.top1, 2)
            if settings.keep_best and result.top1 >= state.best_top1:
                state.best_top1 = result.top1
                weights = self.network.result.state_dict()
                state.best = {name: value.clone() for name, value in weights.items()}
        state.metrics.append(metrics)
        if self.validation is not None and epoch + 1 == settings.epochs:
            logits, labels = collect_logits(self._make_result(), self.validation, self.progress)
            # On the device: processes on GPUs cannot add up what is elsewhere.
            device = self.device
            state.temperature = fit_temperature(logits.to(device), labels.to(device))
        self._update_state(epoch + 1, 0, {})
        self._save_all()
        if self.progress:
            tqdm.write("  ".join(f"{name} {value}" for name, value in metrics.items()))

    def _train_step(
        self, epoch: int, step: int, crop_size: tuple[int, ...], learning_rate_factor: float
    ) -> tuple[float, int]:
        """Take one step; return the sum of the losses and the number of correct images."""
        settings = self.settings

        # Images: [share of the batch, channels, *crop_size]. The seed of each step is its
        # own, so that a run that is resumed at any step computes what it would have computed.
        random_seed(derive_seed(settings.seed, epoch, step) % 2**31, get_rank())
        augments = settings.augments(epoch)
        share = settings.batch_size // get_world_size()
        images, labels = self.images.read_batch(
            epoch,
            step,
            settings.batch_size,
            crop_size,
            augments,
            slice(get_rank() * share, (get_rank() + 1) * share),
        )
        images, labels = images.to(self.device), labels.to(self.device)
        if augments:
            images = self.erase(images)
        targets, smoothing = labels, settings.label_smoothing
        if augments and settings.mixes:
            images, targets = self.mix(images, labels)  # which smooths the labels, too
            smoothing = 0.0

        # Forward and backward.
        in_bf16 = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_bf16):
            logits = self.network.module(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        correct = (logits.argmax(dim=1) == labels).sum()
        for group in self.network.optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor * group.get("lr_scale", 1.0)
        self.network.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.model.parameters(), settings.clip_grad)

        # Numbers of the whole batch, checked before they reach the weights. They are read at once
        # and only here: a GPU has nothing to do while it is waited for.
        sums = torch.stack([loss.detach().double() * share, correct.double()])
        numbers = torch.cat([sum_over_processes(sums), norm.double().view(1)])
        loss_sum, correct_sum, norm_value = numbers.tolist()
        self._check_finite("loss", loss_sum, epoch, step)
        self._check_finite("norm of the gradient", norm_value, epoch, step)

        # Update of the weights, and of their average.
        self.network.optimizer.step()
        if self.network.average is not None:
            steps = len(self.images) // settings.batch_size
            self.network.average.update(self.network.model, epoch * steps + step + 1)
        return loss_sum, int(correct_sum)

    def _check_finite(self, name: str, value: float, epoch: int, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} in epoch {epoch + 1}, step {step + 1}; {self.folder} "
                "keeps what was saved before; start a new run with a smaller --lr"
            )

    def _update_state(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        state = self.state
        state.epoch, state.step, state.sums = epoch, step, sums
        for name, value in self.network.get_state().items():
            setattr(state, name, value)

    def _save_all(self) -> None:
        """Write the whole folder, between two epochs."""
        if get_rank() == 0:
            save_state(self.folder, self.state)
            save_results(self.folder, self._make_result(), self.state)

    def _make_result(self) -> nn.Module:
        """Copy what the run gives: the last or the best weights, calibrated at its end."""
        model = copy.deepcopy(self.network.result)
        if self.state.best is not None:
            model.load_state_dict(self.state.best)
        for parameter in model.get_submodule("classification.linear").parameters():
            parameter.data /= self.state.temperature
        return model

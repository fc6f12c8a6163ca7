"""Training a model on labeled images, alone or in several processes, with a resumable run."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import Mixup, resolve_input_data_config
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2, muon
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ..data.augment import TrainingImages, derive_seed
from ..data.images import eval_transform
from ..data.reader import ImageDataset, LabeledImages, hold_out, read_images
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
from ..model.convmixer import ConvMixer
from ..model.cpu import choose_dtype, keep_freed_memory, speed_up_on_cpu
from ..model.init import draw_kernels_by_depth
from ..zoo import default_cfgs, load_trained
from .folder import RunState, lock_run, open_run, save_results, save_state
from .settings import OPTIMIZERS, TrainingSettings

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
    images = dataset.get("train")
    if len(dataset.classes) < 2:
        raise DataError(
            f"{dataset.source}: has one class alone, {dataset.classes[0]}; there is nothing to "
            "tell apart"
        )
    if images.folder and images.folder.resolve() in folder.resolve().parents:
        raise TrainingError(
            f"{folder}: lies among the class folders in {images.folder}; name another --output"
        )

    def begin() -> RunState:
        open_files.enter_context(lock_run(folder))
        return open_run(folder, RunState(asdict(settings), dataset.classes, len(images)))

    with ExitStack() as open_files, join_processes() as device:
        state = ask_first_process(begin)
        progress = progress and get_rank() == 0
        run = _Run(settings, folder, state, dataset, device, skip_damaged, progress)
        open_files.enter_context(_muon_computing_in(run.dtype))
        while state.epoch < settings.epochs:
            run.train_epoch()
        # Wait until the first has written it all.
        sum_over_processes(torch.zeros(1, device=device)).item()
    return folder


def choose_validation(settings: TrainingSettings, dataset: ImageDataset) -> LabeledImages:
    """Choose the images by which a run with these settings measures itself after each epoch.

    Args:
        settings: Those of the run.
        dataset: Its data set.

    Returns:
        The images without a transform; none of them if the run does not measure itself.

    Raises:
        DataError: If so many images cannot be held out.
        TrainingError: If the best epoch is to be kept and there is nothing to choose it by.
    """
    if settings.held_out or not settings.keep_best:
        held_out = hold_out(dataset, settings.held_out, settings.seed)[1]
        return dataset.get("train").take(held_out)
    if "validation" not in dataset.splits:
        raise TrainingError(
            f"{dataset.source}: has no validation images to choose the best epoch by; give "
            "--held-out"
        )
    return dataset.get("validation")


@contextmanager
def _muon_computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Let timm's Muon, which has no option for this, compute in another type than bfloat16.

    Where that is slow, it would take longer than the rest of the step.
    """
    in_bf16 = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(in_bf16, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = in_bf16


class _Run:
    """One process's part in a training run; all of it that lasts is in `state`."""

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path,
        state: RunState,
        dataset: ImageDataset,
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
        self._build_model(dataset.classes)
        if state.epoch < settings.epochs:  # a finished run is only written out again
            here = f"{describe_machine(self.device)}, {self._choose_precision()}"
            before = state.machine or here
            state.machine = before if before.endswith(here) else f"{before}, then {here}"
            self._read_images(dataset, skip_damaged)
        self.mix = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=len(dataset.classes),
        )
        self.erase = RandomErasing(settings.random_erasing, mode="pixel", device=device)
        if state.model is not None and state.optimizer is not None:
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
            if self.average is not None and state.average is not None:
                self.average.module.load_state_dict(state.average)
            if state.step == 0:
                self._save_all()

    def _build_model(self, classes: list[str]) -> None:
        settings = self.settings
        if settings.pretrained:
            # What a run began with may be gone when it is resumed.
            begun = self.state.model is not None and all(
                (self.folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)
            )
            model = load_trained(self.folder if begun else settings.model, classes)
        else:
            model = timm.create_model(settings.model, num_classes=len(classes))
        assert isinstance(model, ConvMixer)  # as every arch of this package is
        if settings.covariance_init:
            draw_kernels_by_depth(model)
        self.patch_size = model.patch_emb.patch_size
        model.to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
            speed_up_on_cpu(model)
            plain = any(type(module) is nn.BatchNorm2d for module in model.modules())
            if get_world_size() > 1 and plain and not settings.freeze_batch_norm:
                raise TrainingError(
                    f"{settings.model}: has another activation than GELU, and on CPUs processes "
                    "share the statistics of BatchNorm after GELU alone; give one process, or GPUs"
                )
        elif get_world_size() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.average = (
            ModelEmaV3(model, settings.ema_decay, use_warmup=True) if settings.ema_decay else None
        )
        self.network: nn.Module = model
        if get_world_size() > 1:
            self.network = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,  # gradients of 1x1 weights have strides of their own
            )
        self.optimizer = create_optimizer_v2(
            model,
            opt=settings.optimizer,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
            **OPTIMIZERS[settings.optimizer],
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of a step computes in."""
        return DTYPES[self.state.precision or "fp32"]

    def _choose_precision(self) -> str:
        """Name this run's type, which stays the same wherever the run is resumed."""
        state = self.state
        if not state.precision and self.settings.precision != "auto":
            state.precision = self.settings.precision
        if not state.precision:
            image_size = min(resolve_input_data_config(self.model)["input_size"][1:])
            dtype, reason = choose_dtype(self.model, self.device, image_size)
            state.precision = "bf16" if dtype is torch.bfloat16 else "fp32"
            if self.progress:
                tqdm.write(f"computes in {reason}")
        return state.precision

    def _read_images(self, dataset: ImageDataset, skip_damaged: bool) -> None:
        settings = self.settings
        data_config = resolve_input_data_config(self.model)
        side = min(data_config["input_size"][1:])
        needed = not settings.shows_whole_images(0)
        if needed and not self.patch_size <= settings.small_crop_size <= side:
            raise TrainingError(
                f"small_crop_size is {settings.small_crop_size}: {settings.model} takes images of "
                f"{side} pixels in patches of {self.patch_size}; give a number between them"
            )
        kept, _ = hold_out(dataset, settings.held_out, settings.seed)
        if settings.train_images > len(kept):
            raise TrainingError(
                f"train_images is {settings.train_images}: {len(kept)} are there that are not held "
                "out; give at most that"
            )
        if settings.train_images:
            order = torch.randperm(
                len(kept), generator=torch.Generator().manual_seed(settings.seed)
            )
            kept = [kept[i] for i in sorted(order[: settings.train_images].tolist())]
        self.images = TrainingImages(
            dataset.get("train").take(kept),
            data_config,
            settings.seed,
            settings.rand_augment,
            settings.flip,
            skip_damaged,
            self.device,
            self.progress,
        )
        damaged = self.images.damaged
        validation = choose_validation(settings, dataset)
        self.validation: DataLoader | None = None
        if 0 < len(validation) < get_world_size():
            raise TrainingError(
                f"there are {len(validation)} validation images for {get_world_size()} processes; "
                "give a larger --held-out, or fewer processes"
            )
        if len(validation):
            tensors, labels, skipped = read_images(
                validation, eval_transform(data_config), skip_damaged, self.progress
            )
            share = slice(get_rank(), None, get_world_size())
            self.validation = DataLoader(
                TensorDataset(tensors[share], labels[share]), batch_size=256
            )
            damaged = damaged + skipped
        if self.progress:
            for line in damaged:
                tqdm.write(f"skipped: {line}", file=sys.stderr)
        if len(self.images) < settings.batch_size:
            remedy = "a smaller --batch-size" if len(self.images) > 1 else "more of them"
            raise DataError(
                f"{len(self.images)} training images are less than one batch of "
                f"{settings.batch_size}; give {remedy}"
            )

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
        self.network.train()
        if settings.freeze_batch_norm:
            for module in self.model.modules():
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
            result = evaluate(self._result, self.validation, self.device, self.progress)
            metrics["held_out_top1"] = round(result.top1, 2)
            if settings.keep_best and result.top1 >= state.best_top1:
                state.best_top1 = result.top1
                state.best = {n: value.clone() for n, value in self._result.state_dict().items()}
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
            logits = self.network(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        correct = (logits.argmax(dim=1) == labels).sum()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)

        # Numbers of the whole batch, checked before they reach the weights. They are read at once
        # and only here: a GPU has nothing to do while it is waited for.
        sums = torch.stack([loss.detach().double() * share, correct.double()])
        numbers = torch.cat([sum_over_processes(sums), norm.double().view(1)])
        loss_sum, correct_sum, norm_value = numbers.tolist()
        self._check_finite("loss", loss_sum, epoch, step)
        self._check_finite("norm of the gradient", norm_value, epoch, step)

        # Update of the weights, and of their average.
        self.optimizer.step()
        if self.average is not None:
            steps = len(self.images) // settings.batch_size
            self.average.update(self.model, epoch * steps + step + 1)
        return loss_sum, int(correct_sum)

    def _check_finite(self, name: str, value: float, epoch: int, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} in epoch {epoch + 1}, step {step + 1}; {self.folder} "
                "keeps what was saved before; start a new run with a smaller --lr"
            )

    @property
    def _result(self) -> nn.Module:
        """The model to measure, as it is after the last step."""
        return self.model if self.average is None else self.average.module

    def _update_state(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        state = self.state
        state.epoch, state.step, state.sums = epoch, step, sums
        state.model, state.optimizer = self.model.state_dict(), self.optimizer.state_dict()
        state.average = None if self.average is None else self.average.module.state_dict()

    def _save_all(self) -> None:
        """Write the whole folder, between two epochs."""
        if get_rank() == 0:
            save_state(self.folder, self.state)
            save_results(self.folder, self._make_result(), self.state)

    def _make_result(self) -> nn.Module:
        """Copy what the run gives: the last or the best weights, calibrated at its end."""
        model = copy.deepcopy(self._result)
        if self.state.best is not None:
            model.load_state_dict(self.state.best)
        for parameter in model.get_submodule("classification.linear").parameters():
            parameter.data /= self.state.temperature
        return model

"""The commands `convmixer train` and `convmixer finetune`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..data.augment import FLIPS
from ..machine import get_rank
from ..training.finetune import FINETUNE_OPTIONS, choose_settings, finetune
from ..training.folder import STATE_FILE
from ..training.run import train
from ..training.settings import OPTIMIZERS, PRECISIONS, RECIPE, TrainingSettings
from .options import data_option

_SETTINGS_HELP = {
    "epochs": "",
    "final_share": "Share of the epochs, at the end, with a falling learning rate.",
    "whole_share": "Share of those, at the end, with whole images.",
    "small_crop_size": "Side of the crops before that, in pixels.",
    "batch_size": "",
    "optimizer": "",
    "learning_rate": "Peak learning rate.",
    "warmup_epochs": "In the first so many, the learning rate rises.",
    "weight_decay": "",
    "label_smoothing": "",
    "clip_grad": "Largest norm of the gradient.",
    "rand_augment": "timm's description of one, such as rand-m9-n2-mstd0.5-inc1.",
    "random_erasing": "Probability that a rectangle is filled with noise.",
    "mixup": "Its alpha.",
    "cutmix": "Its alpha.",
    "late_augmentation": "The last four wait until the learning rate falls.",
    "ema_decay": "If above 0, the run gives the moving average of the weights.",
    "held_out": "Training images kept back to measure accuracy after each epoch.",
    "train_images": "Train on so many of those that are not held out; 0 for all.",
    "flip": "Mirror images every other epoch, or by chance.",
    "covariance_init": "Draw kernels smoother and wider the deeper the layer; not if --pretrained.",
    "pretrained": "Start from the trained weights of MODEL, which may be a folder.",
    "layer_decay": "Factor of the learning rate from one layer to the one before it.",
    "freeze_batch_norm": "Keep BatchNorm's means and variances as they are.",
    "precision": "What most of a step computes in; auto: what is faster here.",
    "seed": "",
}

_CHOICES = {
    "optimizer": list(OPTIMIZERS),
    "flip": list(FLIPS),
    "precision": list(PRECISIONS),
}

TRAIN_OPTIONS = tuple(
    name for name in _SETTINGS_HELP if name not in ("layer_decay", "freeze_batch_norm")
)
TRAIN_DEFAULTS = {name: getattr(TrainingSettings, name) for name in TRAIN_OPTIONS} | RECIPE


def _settings_options(
    names: Sequence[str], defaults: Mapping[str, Any]
) -> Callable[[Callable], Callable]:
    """Make an option of each of these training settings; without a default, it gives None."""

    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            default = getattr(TrainingSettings, name)
            options: dict[str, Any] = {"help": _SETTINGS_HELP[name]}
            flag = "--lr" if name == "learning_rate" else f"--{name.replace('_', '-')}"
            if isinstance(default, bool):
                options["is_flag"] = True
                if defaults.get(name):
                    flag = f"{flag}/--no-{flag[2:]}"
            else:
                options["type"] = type(default)
            if name in _CHOICES:
                options["type"] = click.Choice(_CHOICES[name])
            options |= {"default": defaults.get(name), "show_default": name in defaults}
            command = click.option(flag, name, **options)(command)
        return command

    return decorate


_output_option = click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The run folder."
)
_skip_damaged_option = click.option(
    "--skip-damaged", is_flag=True, help="Leave out images that cannot be read."
)


def _as_folder(path: Path) -> str:
    """Write a path such that it is not taken for a model's name."""
    return str(path) if len(path.parts) > 1 else f"./{path}"


@contextmanager
def _stopping_at(run: Path) -> Iterator[None]:
    """Say after Ctrl-C what becomes of a run."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "keeps all but the last minute" if (run / STATE_FILE).exists() else "is empty"
        click.echo(f"\nstopped; {run} {kept}, and the same command goes on from there", err=True)
        sys.exit(130)


@click.command("train")
@click.argument("model")
@data_option
@_output_option
@_settings_options(TRAIN_OPTIONS, TRAIN_DEFAULTS)
@_skip_damaged_option
def train_command(
    model: str, data: Path, output: Path, skip_damaged: bool, **settings: Any
) -> None:
    """Train MODEL by the recipe, unless told otherwise; the same command resumes a stopped run.

    torchrun starts it in several processes or on several GPUs:
    torchrun --nproc-per-node 2 -m convmixer_hub train ...
    """
    settings["covariance_init"] &= not settings["pretrained"]  # which has kernels to begin with
    with _stopping_at(output):
        train(TrainingSettings(model, **settings), data, output, skip_damaged)
    if get_rank() == 0:
        click.echo(
            f"{output}: finished; measure it with: "
            f"convmixer evaluate {_as_folder(output)} --data {data}"
        )


@click.command("finetune")
@click.argument("name")
@data_option
@_output_option
@_settings_options(FINETUNE_OPTIONS, {})
@_skip_damaged_option
def finetune_command(
    name: str, data: Path, output: Path, skip_damaged: bool, **changes: Any
) -> None:
    """Teach NAME (a model or a folder) the classes of other images; resumed by the same command.

    RUN gets the weights of the epoch that did best on the images for validation, a picture of the
    confusions among them, and one of the worst mistakes. Settings that are not given are chosen
    for the data.
    """
    with _stopping_at(output):
        settings = choose_settings(name, data, **changes)
        result = finetune(settings, data, output, skip_damaged)
    if get_rank() == 0:
        click.echo(
            f"{output}: top-1 {result.top1:.2f} % ({result.correct} of {result.count} images for "
            f"validation right); use it with: convmixer predict IMAGE --model {_as_folder(output)}"
        )

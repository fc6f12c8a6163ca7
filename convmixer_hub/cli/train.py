"""The commands `convmixer train` and `convmixer finetune`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..training.finetune import choose_settings, finetune
from ..training.folder import STATE_FILE
from ..training.run import train
from ..training.settings import TrainingSettings, option_name
from .options import OpenData, data_options

# Not options of finetune, which starts from trained weights and sees all images whole.
FIXED = ("pretrained", "covariance_init", "train_images", "small_crop_size", "first_crop_size")
_SETTINGS = {setting.name: setting for setting in fields(TrainingSettings)[1:]}


def _settings_options(names: Sequence[str], with_defaults: bool) -> Callable[[Callable], Callable]:
    """Make an option of each of these training settings; without a default, it gives None."""

    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            setting = _SETTINGS[name]
            default = setting.default if with_defaults else None
            options: dict[str, Any] = {"help": setting.metadata["help"]}
            flag = option_name(name)
            if isinstance(setting.default, bool):
                options["is_flag"] = True
                if default:
                    flag = f"{flag}/--no-{flag[2:]}"
            elif choices := setting.metadata["choices"]:
                options["type"] = click.Choice(choices)
            else:
                options["type"] = type(setting.default)
            command = click.option(flag, name, default=default, **options)(command)
        return command

    return decorate


_output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The run folder."
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
        after = "has nothing yet; the same command begins again"
        if (run / STATE_FILE).exists():
            after = "keeps all but the last minute; the same command resumes it"
        click.echo(f"\nstopped; {run} {after}", err=True)
        sys.exit(130)


@click.command("train")
@click.argument("model")
@data_options
@_output_option
@_settings_options(list(_SETTINGS), with_defaults=True)
@_skip_damaged_option
def train_command(
    model: str, open_data: OpenData, output: Path, skip_damaged: bool, **settings: Any
) -> None:
    """Train a model from scratch; the same command resumes a stopped run.

    By default: 40 epochs, Muon, RandAugment and random erasing.
    """
    with _stopping_at(output):
        plan = TrainingSettings(model, **settings)
        train(plan, open_data(), output, skip_damaged)
    command = ["convmixer", "evaluate", _as_folder(output)]
    params = click.get_current_context().params
    for option in ("data", "config", "label_column"):
        if value := params[option]:
            command += [f"--{option.replace('_', '-')}", value]
    click.echo(f"{output}: finished; measure it with: {shlex.join(command)}")


@click.command("finetune")
@click.argument("name")
@data_options
@_output_option
@_settings_options([n for n in _SETTINGS if n not in FIXED], with_defaults=False)
@_skip_damaged_option
def finetune_command(
    name: str, open_data: OpenData, output: Path, skip_damaged: bool, **changes: Any
) -> None:
    """Fine-tune a trained model on other images; the same command resumes a stopped run.

    The output folder gets the weights, the confusion matrix of the validation images, and a
    picture of the most confident mistakes. Settings that are not given are chosen for the data.
    """
    with _stopping_at(output):
        dataset = open_data()
        settings = choose_settings(name, dataset, **changes)
        result = finetune(settings, dataset, output, skip_damaged)
    click.echo(
        f"{output}: top-1 {result.top1:.2f} % ({result.correct} of {result.count} validation "
        "images correct); use it with: convmixer predict IMAGE --model "
        f"{shlex.quote(_as_folder(output))}"
    )

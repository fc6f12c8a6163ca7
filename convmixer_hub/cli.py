"""The command `convmixer`: it reads arguments, calls the package and prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import __version__
from .checkpoint import locate
from .data import open_image
from .errors import ConvMixerHubError, DataError
from .evaluate import evaluate_on
from .predict import draw_predictions, predict
from .train import STATE_FILE, TrainingSettings, train
from .zoo import list_models, load_trained

DEFAULT_MODEL = "convmixer_cifar"

_SETTINGS = TrainingSettings(DEFAULT_MODEL)
_POSITIVE = click.IntRange(min=1)
_NOT_NEGATIVE = click.IntRange(min=0)


class _Group(click.Group):
    """Prints the package's own errors as one line on stderr, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConvMixerHubError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="convmixer-hub")
def main() -> None:
    """Trained ConvMixers by name."""


@main.command("list")
def list_command() -> None:
    """List the models: size, training data, accuracy, and where the weights come from."""
    header = ["name", "parameters", "input", "data set", "top-1", "source"]
    rows = [header]
    for model in list_models():
        record = model.record
        rows.append(
            [
                model.name,
                f"{model.parameters:,}",
                "×".join(str(side) for side in model.input_size),
                record.dataset if record else "–",
                f"{record.top1:.2f} %" if record else "–",
                locate(record) if record else "untrained",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@main.command("predict")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", "name", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option("--top-k", default=3, show_default=True, type=_POSITIVE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object an image.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw them into this file.")
def predict_command(
    images: tuple[Path, ...], name: str, top_k: int, as_json: bool, figure: Path | None
) -> None:
    """Say what is in IMAGES, of any size and colour mode.

    A file that is no image is named on stderr, the others are still answered, and the exit
    status is 1.
    """
    model = load_trained(name)
    answered, predictions, thumbnails = [], [], []
    for path in images:
        try:
            picture = open_image(path)
        except DataError as error:
            click.echo(f"Error: {error}", err=True)
            continue
        [classes] = predict(model, [picture], top_k)
        answered.append(path)
        predictions.append(classes)
        if figure is not None:
            picture.thumbnail((256, 256))
            thumbnails.append(picture)
        if not as_json:
            words = ", ".join(f"{c.label} {100 * c.probability:.1f} %" for c in classes)
            click.echo(f"{path}: {words}")
    if as_json:
        result = [
            {"image": str(path), "predictions": [asdict(c) for c in classes]}
            for path, classes in zip(answered, predictions)
        ]
        click.echo(json.dumps(result, indent=2))
    if figure is not None and thumbnails:
        draw_predictions(thumbnails, [path.stem for path in answered], predictions, figure)
    if len(answered) < len(images):
        sys.exit(1)


_data_option = click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with parquet files, cifar-10-batches-py, or train/ and test/ class folders.",
)


@main.command("evaluate")
@click.argument("name", default=DEFAULT_MODEL)
@_data_option
@click.option("--batch-size", default=64, show_default=True, type=_POSITIVE)
@click.option("--workers", default=1, show_default=True, type=_NOT_NEGATIVE)
def evaluate_command(name: str, data: Path, batch_size: int, workers: int) -> None:
    """Measure the top-1 accuracy of NAME (a model or a folder) on the test images of a data set."""
    result = evaluate_on(load_trained(name), data, batch_size, workers)
    click.echo(
        f"{name}: top-1 {result.top1:.2f} % ({result.correct} of {result.count} test images right)"
    )


@main.command("train")
@click.argument("model")
@_data_option
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The run folder.")
@click.option("--workers", default=1, show_default=True, type=_NOT_NEGATIVE)
@click.option("--epochs", default=_SETTINGS.epochs, show_default=True)
@click.option(
    "--small-crop-epochs",
    default=_SETTINGS.small_crop_epochs,
    show_default=True,
    help="The first so many epochs see smaller crops, for speed.",
)
@click.option(
    "--small-crop-size",
    default=_SETTINGS.small_crop_size,
    show_default=True,
    help="Side of these crops, in pixels.",
)
@click.option("--batch-size", default=_SETTINGS.batch_size, show_default=True)
@click.option(
    "--lr",
    "learning_rate",
    default=_SETTINGS.learning_rate,
    show_default=True,
    help="Peak learning rate.",
)
@click.option(
    "--warmup",
    default=_SETTINGS.warmup,
    show_default=True,
    help="Share of the steps in which the learning rate rises.",
)
@click.option("--weight-decay", default=_SETTINGS.weight_decay, show_default=True)
@click.option("--label-smoothing", default=_SETTINGS.label_smoothing, show_default=True)
@click.option(
    "--clip-grad",
    default=_SETTINGS.clip_grad,
    show_default=True,
    help="Largest norm of the gradient.",
)
@click.option(
    "--held-out",
    default=_SETTINGS.held_out,
    show_default=True,
    help="Training images kept back to measure accuracy after each epoch.",
)
@click.option("--seed", default=_SETTINGS.seed, show_default=True)
def train_command(model: str, data: Path, output: Path, workers: int, **settings: Any) -> None:
    """Train MODEL from scratch; the same command goes on with an interrupted run."""
    try:
        run = train(TrainingSettings(model, **settings), data, output, workers)
    except KeyboardInterrupt:
        kept = (
            "keeps what the finished epochs gave" if (output / STATE_FILE).exists() else "is empty"
        )
        click.echo(f"\nstopped; {output} {kept}, and the same command goes on from there", err=True)
        sys.exit(130)
    click.echo(f"{run}: finished; measure it with: convmixer evaluate {run} --data {data}")

"""The commands that use a trained model."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import torch
from PIL import Image

from ..checkpoints.info import describe
from ..data.images import open_image
from ..errors import DataError, printable
from ..evaluate import evaluate_on
from ..figures import check_matplotlib, draw_predictions, is_figure
from ..files import write_file
from ..hub.doctor import examine
from ..hub.find import find_checkpoint, locate
from ..hub.records import CARD_FILE, RECORDS, get_record
from ..load import load_trained
from ..machine import describe_machine
from ..predict import Prediction, predict
from ..release.demo import run_demo
from ..release.golden import TOLERANCE, verify
from ..release.space import write_space
from ..zoo import VARIANTS
from .options import (
    DEFAULT_MODEL,
    NOT_NEGATIVE,
    POSITIVE,
    OpenData,
    data_options,
    print_markdown,
    print_table,
)


@click.command("demo")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--port",
    default=7860,
    type=click.IntRange(1, 65535),
    help="Port of the page.",
)
@click.option(
    "--write",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write a Hugging Face Space with this page to a new folder, and serve nothing.",
)
def demo_command(names: tuple[str, ...], port: int, write: Path | None) -> None:
    """Serve a web page to try models on, on localhost only.

    NAME is as in evaluate; all trained models by default. Needs gradio. Ctrl-C ends it.
    """
    names = names or tuple(RECORDS)
    if write:
        write_space(names, write)
        command = shlex.join(["hf", "upload", "OWNER/NAME", str(write), "--repo-type", "space"])
        click.echo(f"{write}: upload it with `{command}`")
    else:
        run_demo(names, port)


@click.command("list")
@click.option("--markdown", is_flag=True, help="Print the table of the README.")
def list_command(markdown: bool) -> None:
    """List the models: dataset, parameters, MACs, top-1, calibration error (ECE)."""
    source = "card" if markdown else "source"
    rows = [["name", "parameters", "MACs", "dataset", "top-1", "ECE", "size", source]]
    for name, record in RECORDS.items():
        variant, num_classes = VARIANTS[record.arch], len(record.dataset.classes)
        card = f"[card](weights/{name}/{CARD_FILE})"
        rows.append(
            [
                f"`{name}`" if markdown else name,
                f"{variant.count_parameters(num_classes):,}",
                f"{variant.count_macs(num_classes) / 1e6:.1f}M",
                record.dataset.name,
                f"{record.top1:.2f} %",
                f"{record.ece:.2f} %",
                f"{record.size / 1e6:.1f} MB",
                card if markdown else locate(record),
            ]
        )
    print_rows = print_markdown if markdown else print_table
    print_rows(rows)


@click.command("predict")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model",
    "name",
    default=DEFAULT_MODEL,
    help="A model, a run folder, a file of weights, or a repository of the Hub.",
)
@click.option("--top-k", default=3, type=POSITIVE, help="Classes printed per image.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per image.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw them into this PNG.")
def predict_command(
    images: tuple[Path, ...], name: str, top_k: int, as_json: bool, figure: Path | None
) -> None:
    """Name the most likely classes of images.

    IMAGES may have any size and color mode.

    Files that are not images are reported on stderr, the others are still classified, and the exit
    status is 1.
    """
    if figure is not None:
        check_matplotlib()
        if figure.suffix.lower() != ".png":
            raise click.UsageError(f"--figure {figure}: is written as PNG; give it a name in .png")
        if os.path.exists(figure) and not is_figure(figure):  # the first of *.png, for one
            raise click.UsageError(
                f"--figure {figure}: exists and is not a figure; name a new file"
            )
    model = load_trained(name)
    answered: list[Path] = []
    thumbnails: list[Image.Image] = []
    predictions: list[list[Prediction]] = []

    def open_images() -> Iterator[Image.Image]:
        for path in images:
            try:
                picture = open_image(path)
            except DataError as error:
                click.echo(f"Error: {printable(error)}", err=True)
                continue
            answered.append(path)
            if figure is not None:
                thumbnails.append(picture.copy())
                thumbnails[-1].thumbnail((256, 256))
            yield picture

    for classes in predict(model, open_images(), top_k):
        if not as_json:
            words = ", ".join(f"{c.label} {100 * c.probability:.1f} %" for c in classes)
            click.echo(printable(f"{answered[len(predictions)]}: {words}"))
        predictions.append(classes)
    if as_json:
        result = [
            {"image": str(path), "predictions": [asdict(c) for c in classes]}
            for path, classes in zip(answered, predictions)
        ]
        click.echo(json.dumps(result, indent=2))
    if figure is not None and thumbnails:
        titles = [printable(path.stem) for path in answered]
        write_file(figure, draw_predictions(thumbnails, titles, predictions))
    if len(answered) < len(images):
        sys.exit(1)


@click.command("evaluate")
@click.argument("name", default=DEFAULT_MODEL)
@data_options
@click.option("--batch-size", default=64, type=POSITIVE, help="Images computed at once.")
@click.option("--workers", default=1, type=NOT_NEGATIVE, help="Processes that read images.")
def evaluate_command(name: str, open_data: OpenData, batch_size: int, workers: int) -> None:
    """Measure the top-1 accuracy of a model on the test images of a dataset.

    NAME is a trained model, a folder, a file of weights, or a repository of the Hub.
    """
    model, dataset = load_trained(name), open_data()
    result = evaluate_on(model, dataset, batch_size, workers)
    click.echo(
        f"{name}: top-1 {result.top1:.2f} % ({result.correct} of {result.count} "
        f"{dataset.test_split} images in {len(dataset.classes)} classes correct)"
    )


@click.command("info")
@click.argument("name")
def info_command(name: str) -> None:
    """Describe a checkpoint.

    NAME is a model, a folder, a file (safetensors, or a .pth, opened with weights_only=True), or a
    repository of the Hub: hf-hub:OWNER/NAME[@REVISION], or without the prefix.
    """
    print_table([list(row) for row in describe(name).items()])


@click.command("doctor")
@click.argument("name", required=False)
def doctor_command(name: str | None) -> None:
    """Check whether models can be loaded on this machine, and if not, why.

    Without NAME, all of them. The exit status is 1 if one cannot.
    """
    findings = examine([name] if name else [])
    print_table([[finding.subject, finding.result] for finding in findings])
    bad = [finding.subject for finding in findings if not finding.healthy]
    click.echo(f"not healthy: {', '.join(bad)}" if bad else "healthy")
    if bad:
        sys.exit(1)


@click.command("verify")
@click.argument("name", default=DEFAULT_MODEL)
def verify_command(name: str) -> None:
    """Compare the logits of a model with reference logits.

    The logits of NAME, a model or a folder, for a fixed input are compared with those recorded
    beside the weights, which `convmixer card` writes. The exit status is 1 if they differ by more
    than the tolerance.
    """
    difference = verify(name)
    holds = difference <= TOLERANCE  # not if it is NaN
    verdict = "its logits match the reference"
    if not holds:
        verdict = (
            "its logits do NOT match the reference (try another version of torch, and report it)"
        )
    click.echo(
        f"{name}: {verdict}; largest difference {difference:.1e} of the largest logit, "
        f"tolerance {TOLERANCE:.0e} (torch {torch.__version__}, "
        f"{describe_machine(torch.device('cpu'))})"
    )
    if not holds:
        sys.exit(1)


@click.command("pull")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def pull_command(names: tuple[str, ...]) -> None:
    """Download weights into the Hub's cache, for later use without network.

    They are used if the package has no copy, or if CONVMIXER_HUB_SOURCE=hub.
    """
    for record in [get_record(name) for name in names]:
        click.echo(f"{record.name}: {find_checkpoint(record.name, 'hub')}")


@click.command(
    "run-script",
    context_settings={"allow_interspersed_args": False},
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def run_script_command(script: Path, arguments: tuple[str, ...]) -> None:
    """Run a Python script, such as timm's validate.py, with the models registered.

    Like `python SCRIPT [ARGUMENTS]...`.
    """
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # where python looks for imports first
    runpy.run_path(str(script), run_name="__main__")

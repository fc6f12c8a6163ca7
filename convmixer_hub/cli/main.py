"""The command `convmixer`: it reads arguments, calls the package and prints."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from ..checkpoints.convert import convert
from ..checkpoints.info import describe
from ..checkpoints.resolve import resolve
from ..data.images import open_image
from ..data.reader import has_split
from ..errors import ConvMixerHubError, DataError
from ..evaluate import evaluate_on
from ..figures import draw_predictions
from ..files import write_file
from ..hub.doctor import examine
from ..hub.find import find_checkpoint, locate
from ..hub.records import WEIGHTS_FILE, get_record
from ..machine import describe_machine, get_rank
from ..model.convmixer import ACTIVATIONS
from ..model.layouts import ALIASES, LAYOUTS
from ..predict import predict
from ..release.card import CARD_FILE, write_card
from ..release.golden import TOLERANCES, verify
from ..release.publish import list_uploads, publish
from ..version import __version__
from ..zoo import list_models, load_trained
from .measure import bench_group
from .options import DEFAULT_MODEL, NOT_NEGATIVE, POSITIVE, data_option, print_table
from .train import finetune_command, train_command


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


main.add_command(bench_group)
main.add_command(train_command)
main.add_command(finetune_command)


@main.command("list")
def list_command() -> None:
    """List the models: data, accuracy, calibration error, size, and where the weights come from."""
    header = ["name", "parameters", "input", "data set", "top-1", "ECE", "size", "source"]
    rows = [header]
    for model in list_models():
        record = model.record
        rows.append(
            [
                model.name,
                f"{model.parameters:,}",
                "×".join(str(side) for side in model.input_size),
                record.dataset.name if record else "–",
                f"{record.top1:.2f} %" if record else "–",
                f"{record.ece:.2f} %" if record else "–",
                f"{record.size / 1e6:.1f} MB" if record else "–",
                locate(record) if record else "untrained",
            ]
        )
    print_table(rows)


@main.command("predict")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", "name", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option("--top-k", default=3, show_default=True, type=POSITIVE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object an image.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw them into this PNG.")
def predict_command(
    images: tuple[Path, ...], name: str, top_k: int, as_json: bool, figure: Path | None
) -> None:
    """Say what is in IMAGES, of any size and colour mode.

    A file that is no image is named on stderr, the others are still answered, and the exit
    status is 1.
    """
    if figure is not None and figure.suffix.lower() != ".png":
        raise click.UsageError(f"--figure {figure}: is written as PNG; give it a name in .png")
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
        titles = [path.stem for path in answered]
        write_file(figure, draw_predictions(thumbnails, titles, predictions))
    if len(answered) < len(images):
        sys.exit(1)


@main.command("evaluate")
@click.argument("name", default=DEFAULT_MODEL)
@data_option
@click.option("--batch-size", default=64, show_default=True, type=POSITIVE)
@click.option("--workers", default=1, show_default=True, type=NOT_NEGATIVE)
def evaluate_command(name: str, data: Path, batch_size: int, workers: int) -> None:
    """Measure the top-1 accuracy of NAME (a model or a folder) on the test images of a data set."""
    result = evaluate_on(load_trained(name), data, batch_size, workers)
    if get_rank() > 0:
        return
    split = "test" if has_split(data, "test") else "validation"
    click.echo(
        f"{name}: top-1 {result.top1:.2f} % "
        f"({result.correct} of {result.count} {split} images right)"
    )


@main.command("card")
@click.argument("name", default=DEFAULT_MODEL)
@data_option
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write to, the model's by default."
)
def card_command(name: str, data: Path, output: Path | None) -> None:
    """Write the model card of NAME (a model or a run folder), with its figures and golden.json.

    All of it comes from the checkpoint, its metrics.csv, and one test on the data set; NOTES.md in
    the model's folder is appended.
    """
    click.echo(write_card(resolve(name, embedded=True).folder, data, output))


@main.command("pull")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def pull_command(names: tuple[str, ...]) -> None:
    """Download the weights of NAME... into the Hub's cache, to be used without network later.

    They are used from there wherever the package carries no copy, or CONVMIXER_HUB_SOURCE=hub.
    """
    for record in [get_record(name) for name in names]:
        click.echo(f"{record.name}: {find_checkpoint(record.name, 'hub')}")


@main.command("doctor")
@click.argument("name", required=False)
def doctor_command(name: str | None) -> None:
    """Say whether NAME, or every model, can be loaded on this machine, and if not, why.

    The exit status is 1 if one cannot.
    """
    findings = examine([name] if name else [])
    print_table([[finding.subject, finding.result] for finding in findings])
    bad = [finding.subject for finding in findings if not finding.healthy]
    click.echo(f"not healthy: {', '.join(bad)}" if bad else "healthy")
    if bad:
        sys.exit(1)


@main.command("convert")
@click.argument("name", metavar="IN")
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--layout", required=True, type=click.Choice([*LAYOUTS, *ALIASES]))
@click.option(
    "--activation",
    type=click.Choice(list(ACTIVATIONS)),
    help="Needed where neither IN nor its architecture tells it.",
)
def convert_command(name: str, output: Path, layout: str, activation: str | None) -> None:
    """Write the ConvMixer IN to the safetensors file OUT, with the keys of another layout.

    IN is a model's name, a folder, a repository of the Hub as in `info`, or a file, in any layout:
    safetensors, or a .pth (opened with weights_only=True; of several state dicts in it, a moving
    average comes first).
    """
    written = convert(name, output, layout, activation)
    part = f" ({written.part} of it)" if written.part else ""
    click.echo(
        f"{output}: {name}{part} in layout {written.layout}, {written.activation}, "
        f"{len(written.tensors)} tensors, {written.parameters:,} parameters"
    )


@main.command("info")
@click.argument("name")
def info_command(name: str) -> None:
    """Say what the checkpoint NAME holds.

    NAME is a model, a folder, a file (safetensors, or a .pth, opened with weights_only=True), or a
    repository of the Hub: hf-hub:OWNER/NAME[@REVISION], or without the prefix.
    """
    print_table([list(row) for row in describe(name).items()])


@main.command("publish")
@click.argument("name", metavar="NAME|RUN")
@click.option("--repo-id", required=True, metavar="OWNER/REPO", help="Made if there is none.")
@click.option("--private", is_flag=True, help="Let nobody else read it.")
@click.option(
    "--tag",
    help="A tag for the commit; of a model on record, its revision by default.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; ask no network.")
def publish_command(name: str, repo_id: str, private: bool, tag: str | None, dry_run: bool) -> None:
    """Upload a model or a run to the Hub, in one commit, and pull it back to check.

    Weights, configuration, card, figures and metrics go there; the states of a run do not.
    """
    if dry_run:
        uploads = list_uploads(name)
        print_table([[u.file.name, f"{u.size:,} bytes", u.sha256] for u in uploads])
        click.echo(f"{repo_id}: would get these {len(uploads)} files")
    else:
        publication = publish(name, repo_id, private, tag)
        uploads = publication.uploads
        done = "published" if publication.changed else "nothing changed, all were there before"
        tagged = f", tag {publication.tag}" if publication.tag else ""
        click.echo(f"{repo_id}: {len(uploads)} files, {done}")
        click.echo(f"revision {publication.revision}{tagged}")
        [digest] = [u.sha256 for u in uploads if u.file.name == WEIGHTS_FILE]
        click.echo(f"SHA-256 of {WEIGHTS_FILE} {digest}, pulled back and checked")
    if CARD_FILE not in [upload.file.name for upload in uploads]:
        click.echo(f"there is no model card; `convmixer card {name} --data DIR` writes one")


@main.command("verify")
@click.argument("name", default=DEFAULT_MODEL)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(list(TOLERANCES)),
    help="What to compute in.",
)
def verify_command(name: str, dtype: str) -> None:
    """Say whether NAME (a model or a folder) computes here what it should.

    Its logits for a fixed input are compared with those recorded beside the weights, which
    `convmixer card` writes. The exit status is 1 if they differ by more than the tolerance.
    """
    result = verify(name, dtype)
    verdict = "computes what it should"
    if not result.holds:
        verdict = "does NOT compute what it should (try another version of torch, and report it)"
    click.echo(
        f"{name}: {verdict}; largest difference {result.difference:.1e} of the largest logit, "
        f"tolerance {result.tolerance:.0e} ({dtype}, torch {torch.__version__}, "
        f"{describe_machine(torch.device('cpu'))})"
    )
    if not result.holds:
        sys.exit(1)


@main.command(
    "run-script",
    context_settings={"allow_interspersed_args": False},
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def run_script_command(script: Path, arguments: tuple[str, ...]) -> None:
    """Run a Python SCRIPT, such as timm's validate.py, that is to know the models of this package.

    Like `python SCRIPT [ARGUMENTS]...`, but with the models registered.
    """
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # where python looks for imports first
    runpy.run_path(str(script), run_name="__main__")

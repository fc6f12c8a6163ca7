"""The commands that make a model fit to share: card, upload, other layouts."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import click

from ..checkpoints.convert import convert
from ..checkpoints.resolve import resolve_folder
from ..hub.records import CARD_FILE, GOLDEN_FILE, WEIGHTS_FILE
from ..model.convmixer import ACTIVATIONS
from ..model.layouts import LAYOUTS
from ..release.card import propose_record, write_card
from ..release.export import RUNTIMES, export
from ..release.publish import list_uploads, publish
from ..zoo import VARIANTS
from .options import DEFAULT_MODEL, OpenData, data_options, print_table


@click.command("card")
@click.argument("name", default=DEFAULT_MODEL)
@data_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write to; by default that of the run, or a new one named like the model.",
)
@click.option("--license", help="The Hub's id of the license, such as mit.")
def card_command(name: str, open_data: OpenData, output: Path | None, license: str | None) -> None:
    """Write a model card with its figures and reference logits.

    NAME is a model or a run folder. Everything in the card comes from the checkpoint, its
    metrics.csv, and one evaluation on the dataset; NOTES.md in the folder is appended. For the
    folder of a new model of the package, its record is printed.
    """
    source = resolve_folder(name)
    folder = source.folder
    if source.record and output is None:
        output = Path(source.record.name)  # the package's own copy stays as it is
    card = write_card(folder, open_data(), output, license=license)
    click.echo(card)
    record = propose_record(card)
    if record and folder.resolve().name.partition(".")[0] in VARIANTS:
        click.echo(f"its record, for convmixer_hub/hub/records.py:\n{record}")


@click.command("publish")
@click.argument("name", metavar="NAME|RUN")
@click.option("--repo-id", required=True, metavar="OWNER/REPO", help="Created if missing.")
@click.option("--private", is_flag=True, help="Create it as a private repository.")
@click.option(
    "--tag",
    help="Tag for the commit; for a model of this package, its recorded revision by default.",
)
@click.option("--dry-run", is_flag=True, help="List the files, without using the network.")
def publish_command(name: str, repo_id: str, private: bool, tag: str | None, dry_run: bool) -> None:
    """Upload a model to the Hub in one commit, and download it again to compare.

    Weights, configuration, card, figures and metrics are uploaded; the state of a run is not.
    """
    if dry_run:
        uploads = list_uploads(name, repo_id)
        infos = {upload.path_in_repo: upload.upload_info for upload in uploads}
        print_table([[k, f"{info.size:,} bytes", info.sha256.hex()] for k, info in infos.items()])
        click.echo(f"{repo_id}: would get these {len(uploads)} files")
    else:
        publication = publish(name, repo_id, private, tag)
        uploads = publication.uploads
        done = "published" if publication.changed else "nothing changed, all were there before"
        tagged = f", tag {publication.tag}" if publication.tag else ""
        click.echo(f"{repo_id}: {len(uploads)} files, {done}")
        click.echo(f"revision {publication.revision}{tagged}")
        [info] = [u.upload_info for u in uploads if u.path_in_repo == WEIGHTS_FILE]
        click.echo(f"SHA-256 of {WEIGHTS_FILE} {info.sha256.hex()}, downloaded again and compared")
    if CARD_FILE not in [upload.path_in_repo for upload in uploads]:
        command = shlex.join(["convmixer", "card", name, "--data", "DIR"])
        click.echo(f"there is no model card; `{command}` writes one")


@click.command("export")
@click.argument("name", default=DEFAULT_MODEL)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the file."
)
@click.option(
    "--format",
    default="onnx",
    type=click.Choice(list(RUNTIMES)),
    help="ONNX, or a program of torch.export.",
)
@click.option(
    "--with-preprocessing",
    is_flag=True,
    help="Take bytes [batch, height, width, channels] instead of normalized floats.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Store the weights in int8, and measure on the test images of --data what that costs.",
)
@click.option(
    "--max-loss",
    default=0.3,
    type=click.FloatRange(min=0),
    help="Percentage points of top-1 that int8 may cost.",
)
@partial(data_options, required=False)
def export_command(
    name: str,
    open_data: OpenData | None,
    output: Path,
    format: str,
    with_preprocessing: bool,
    int8: bool,
    max_loss: float,
) -> None:
    """Write a model for other runtimes, and compare its logits with torch's.

    Before that, torch's own logits are compared with golden.json. NAME is as in evaluate. The file,
    model.onnx, model_int8.onnx or model.pt2, takes batches of any size. An existing file is
    replaced.
    """
    if int8 != (open_data is not None):
        raise click.UsageError("--int8 and --data go together: give both, or none")
    done = export(
        name, output, format, with_preprocessing, open_data() if open_data else None, max_loss
    )
    text = f"{done.file}: {done.file.stat().st_size / 1e6:.2f} MB"
    if done.top1:
        click.echo(
            f"{text}, top-1 {done.top1[1]:.2f} %, in fp32 {done.top1[0]:.2f} % ({done.images})"
        )
    else:
        click.echo(
            f"{text}, largest difference from torch {done.difference:.0e} of the largest logit"
        )
    if not done.verified:
        click.echo(
            f"{name}: has no {GOLDEN_FILE} to compare torch's logits with; `convmixer card` writes "
            "one",
            err=True,
        )


@click.command("convert")
@click.argument("name", metavar="IN")
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    required=True,
    type=click.Choice(list(LAYOUTS)),
    help="Whose names the tensors get; ours are those of labml_nn.",
)
@click.option(
    "--activation",
    type=click.Choice(list(ACTIVATIONS)),
    help="Needed if neither IN nor its architecture tells it.",
)
def convert_command(name: str, output: Path, layout: str, activation: str | None) -> None:
    """Write a checkpoint as safetensors, in the layout of another implementation.

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

"""The command `convmixer`: it reads arguments, calls the package and prints."""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import timm
import torch

from . import __version__
from .bench import VARIANTS, bench_load, bench_train
from .card import CARD_FILE, write_card
from .checkpoint import WEIGHTS_FILE, find_checkpoint, locate
from .convert import convert
from .data import open_image
from .doctor import examine
from .errors import ConvMixerHubError, DataError, UnknownModelError
from .evaluate import evaluate_on
from .figures import draw_predictions
from .files import write_file
from .finetune import FINETUNE_OPTIONS, choose_settings, finetune
from .golden import TOLERANCES, verify
from .info import describe
from .kit import bundle, unbundle
from .layouts import ALIASES, LAYOUTS
from .machine import describe_machine, get_rank
from .model import ACTIVATIONS
from .predict import predict
from .publish import list_uploads, publish
from .recipe import CHANGES, Outcome, compare_changes
from .records import get_record
from .run_folder import STATE_FILE
from .settings import OPTIMIZERS, TrainingSettings
from .train import train
from .training_images import FLIPS
from .transfer import bench_finetune
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
    _print_table(rows)


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@main.command("predict")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", "name", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option("--top-k", default=3, show_default=True, type=_POSITIVE)
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


_data_option = click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with parquet files, cifar-10-batches-py, or class folders in train/, test/, …",
)


@main.command("evaluate")
@click.argument("name", default=DEFAULT_MODEL)
@_data_option
@click.option("--batch-size", default=64, show_default=True, type=_POSITIVE)
@click.option("--workers", default=1, show_default=True, type=_NOT_NEGATIVE)
def evaluate_command(name: str, data: Path, batch_size: int, workers: int) -> None:
    """Measure the top-1 accuracy of NAME (a model or a folder) on the test images of a data set."""
    result = evaluate_on(load_trained(name), data, batch_size, workers)
    if get_rank() > 0:
        return
    click.echo(
        f"{name}: top-1 {result.top1:.2f} % ({result.correct} of {result.count} test images right)"
    )


@main.command("card")
@click.argument("name", default=DEFAULT_MODEL)
@_data_option
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write to, the model's by default."
)
def card_command(name: str, data: Path, output: Path | None) -> None:
    """Write the model card of NAME (a model or a run folder), with its figures and golden.json.

    All of it comes from the checkpoint, its metrics.csv, and one test on the data set; NOTES.md in
    the model's folder is appended.
    """
    try:
        folder = find_checkpoint(name, "embedded").parent
    except UnknownModelError:
        folder = Path(name)
        if not folder.is_dir():
            raise
    click.echo(write_card(folder, data, output))


@main.group("bench")
def bench_group() -> None:
    """Measure on this machine what is claimed: speed, memory, and what choices are worth."""


@bench_group.command("train")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=2))
@click.option("--rounds", default=5, show_default=True, type=_POSITIVE, help="Steps that count.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(list(VARIANTS)),
    help="Only this one; may be repeated.",
)
def bench_train_command(
    model: str, batch_size: int, rounds: int, variants: tuple[str, ...]
) -> None:
    """Time training steps of MODEL and of other implementations of it, in turns.

    timm: its ConvMixer as a user gets it (fp32, NCHW, eager); timm-bf16, timm-compiled: with bf16
    autocast or torch.compile, and channels_last; sequential: the code in the paper's appendix.
    """
    speeds = bench_train(model, variants or tuple(VARIANTS), batch_size, rounds)
    rows = [["variant", "images/s", f"× {speeds[0].variant}", "peak memory"]]
    for speed in speeds:
        ratio = speed.images_per_second / speeds[0].images_per_second
        rows.append(
            [
                speed.variant,
                f"{speed.images_per_second:.1f}",
                f"{ratio:.2f}",
                f"{speed.peak_memory:.0f} MiB",
            ]
        )
    click.echo(
        f"{model}, batch {batch_size}, median of {rounds} steps each in turns, "
        f"{describe_machine()}, torch {torch.__version__}, timm {timm.__version__}"
    )
    _print_table(rows)


@bench_group.command("load")
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--rounds", default=30, show_default=True, type=_POSITIVE)
def bench_load_command(name: str, rounds: int) -> None:
    """Time building NAME without its weights and with them, in turns."""
    without, with_weights = bench_load(name, rounds)
    click.echo(
        f"{name}: {1000 * without:.1f} ms without weights, {1000 * with_weights:.1f} ms with "
        f"them, × {with_weights / without:.2f} (medians of {rounds}), from "
        f"{locate(get_record(name))}, {describe_machine()}"
    )


@bench_group.command("recipe")
@click.argument("model", default=DEFAULT_MODEL)
@_data_option
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for the run folders."
)
@click.option("--epochs", default=3, show_default=True, type=_POSITIVE)
@click.option(
    "--train-images",
    default=20000,
    show_default=True,
    type=_NOT_NEGATIVE,
    help="Train on so many of those that are not held out; 0 for all.",
)
@click.option("--held-out", default=5000, show_default=True, type=_POSITIVE)
@click.option(
    "--change",
    "changes",
    multiple=True,
    type=click.Choice(list(CHANGES)),
    help="Only this one; may be repeated. The others are compared with the first.",
)
def bench_recipe_command(
    model: str, data: Path, output: Path, changes: tuple[str, ...], **common: Any
) -> None:
    """Train MODEL with the recipe of `convmixer train` and with single changes to it.

    The same command goes on where it was interrupted; the table has the runs that are finished.
    """
    outcomes: list[Outcome] = []
    try:
        for outcome in compare_changes(model, data, output, changes or tuple(CHANGES), **common):
            outcomes.append(outcome)
    finally:
        if outcomes and get_rank() == 0:
            _print_outcomes(model, outcomes, common)


def _print_outcomes(model: str, outcomes: Sequence[Outcome], common: Mapping[str, Any]) -> None:
    first = outcomes[0]
    rows = [["run", "what differs", "held-out top-1", f"against {first.change}", "minutes"]]
    for outcome in outcomes:
        differs = ", ".join(f"{name} {value}" for name, value in CHANGES[outcome.change].items())
        rows.append(
            [
                outcome.change,
                differs or "nothing",
                f"{outcome.top1:.2f} %",
                f"{outcome.top1 - first.top1:+.2f}",
                f"{outcome.seconds / 60:.1f}",
            ]
        )
    shared = ", ".join(f"{name} {value}" for name, value in sorted(common.items()))
    click.echo(
        f"{model}, {shared}, seed {_SETTINGS.seed}, "
        f"{describe_machine()}, torch {torch.__version__}, timm {timm.__version__}"
    )
    _print_table(rows)


@bench_group.command("finetune")
@click.argument("name", default=DEFAULT_MODEL)
@_data_option
@click.option("--images-a-class", default=50, show_default=True, type=click.IntRange(min=2))
@click.option("--seeds", default=3, show_default=True, type=_POSITIVE)
def bench_finetune_command(name: str, data: Path, images_a_class: int, seeds: int) -> None:
    """Fine-tune NAME on a few images of each class, and train one like it from scratch on them.

    For as many steps on the same images; top-1 is on the test images of the data set.
    """
    results = list(bench_finetune(name, data, images_a_class, seeds))
    columns = [[r.finetuned for r in results], [r.from_scratch for r in results]]
    columns.append([tuned - scratch for tuned, scratch in zip(*columns)])
    rows = [["seed", *(str(result.seed) for result in results), "mean"]]
    for title, values in zip(["fine-tuned", "from scratch", "gain"], columns):
        rows.append([title, *(f"{value:.2f}" for value in [*values, statistics.mean(values)])])
    click.echo(
        f"{name}, {images_a_class} images a class, top-1 on the test images (%), "
        f"{describe_machine()}, torch {torch.__version__}, timm {timm.__version__}"
    )
    _print_table([list(row) for row in zip(*rows)])


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
    "covariance_init": "Draw the depth-wise kernels smoother and wider the deeper the layer.",
    "layer_decay": "Factor of the learning rate from one layer to the one before it.",
    "freeze_batch_norm": "Keep BatchNorm's means and variances as they are.",
    "seed": "",
}

_CHOICES = {"optimizer": list(OPTIMIZERS), "flip": list(FLIPS)}

TRAIN_OPTIONS = tuple(
    name for name in _SETTINGS_HELP if name not in ("layer_decay", "freeze_batch_norm")
)


def _settings_options(
    names: Sequence[str], with_defaults: bool = True
) -> Callable[[Callable], Callable]:
    """Make an option of each of these training settings; without defaults, it gives None."""

    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            default = getattr(_SETTINGS, name)
            options: dict[str, Any] = {"help": _SETTINGS_HELP[name], "show_default": with_defaults}
            if isinstance(default, bool):
                options["is_flag"] = True
            else:
                options["type"] = type(default)
            if name in _CHOICES:
                options["type"] = click.Choice(_CHOICES[name])
            flag = "lr" if name == "learning_rate" else name.replace("_", "-")
            options["default"] = default if with_defaults else None
            command = click.option(f"--{flag}", name, **options)(command)
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


@main.command("train")
@click.argument("model")
@_data_option
@_output_option
@_settings_options(TRAIN_OPTIONS)
@click.option(
    "--continue-from",
    type=click.Path(path_type=Path),
    help="A shorter run to begin with, from when its learning rate began to fall.",
)
@_skip_damaged_option
def train_command(
    model: str,
    data: Path,
    output: Path,
    continue_from: Path | None,
    skip_damaged: bool,
    **settings: Any,
) -> None:
    """Train MODEL from scratch; the same command goes on with an interrupted run.

    torchrun starts it in several processes or on several GPUs:
    torchrun --nproc-per-node 2 -m convmixer_hub train ...
    """
    with _stopping_at(output):
        train(TrainingSettings(model, **settings), data, output, continue_from, skip_damaged)
    if get_rank() == 0:
        click.echo(
            f"{output}: finished; measure it with: "
            f"convmixer evaluate {_as_folder(output)} --data {data}"
        )


@main.command("finetune")
@click.argument("name")
@_data_option
@_output_option
@_settings_options(FINETUNE_OPTIONS, with_defaults=False)
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
    _print_table([[finding.subject, finding.result] for finding in findings])
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
    """Say what the checkpoint NAME holds, and what happens when it is loaded.

    NAME is a model, a folder, a file (safetensors, or a .pth, opened with weights_only=True), or a
    repository of the Hub: hf-hub:OWNER/NAME[@REVISION], or without the prefix.
    """
    _print_table([list(row) for row in describe(name).items()])


@main.command("publish")
@click.argument("name", metavar="NAME|RUN")
@click.option("--repo-id", required=True, metavar="OWNER/REPO", help="Made if there is none.")
@click.option("--private", is_flag=True, help="Let nobody else read it.")
@click.option("--tag", help="A tag for the commit, such as v1.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; ask no network.")
def publish_command(name: str, repo_id: str, private: bool, tag: str | None, dry_run: bool) -> None:
    """Upload a model or a run to the Hub, in one commit, and pull it back to check.

    Weights, configuration, card, figures and metrics go there; the states of a run do not.
    """
    if dry_run:
        uploads = list_uploads(name)
        _print_table([[u.file.name, f"{u.size:,} bytes", u.sha256] for u in uploads])
        click.echo(f"{repo_id}: would get these {len(uploads)} files")
    else:
        publication = publish(name, repo_id, private, tag)
        uploads = publication.uploads
        done = "published" if publication.changed else "nothing changed, all were there before"
        tagged = f", tag {tag}" if tag else ""
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
        f"{describe_machine()})"
    )
    if not result.holds:
        sys.exit(1)


@main.command("bundle")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The kit.")
def bundle_command(names: tuple[str, ...], output: Path) -> None:
    """Write NAME... into one file, for `convmixer unbundle` on a machine without network."""
    click.echo(f"{output}: {', '.join(bundle(names, output))}")


@main.command("unbundle")
@click.argument("kit", type=click.Path(path_type=Path))
def unbundle_command(kit: Path) -> None:
    """Put the models of KIT into the Hub's cache, as `convmixer pull` would with a network.

    They are used from there wherever the package carries no copy, or CONVMIXER_HUB_SOURCE=hub.
    """
    for name, file in unbundle(kit).items():
        click.echo(f"{name}: {file}")


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

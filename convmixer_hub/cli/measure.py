"""The commands `convmixer bench ...`: benchmarks on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import click
import timm
import torch

from ..bench.inference import VARIANTS as INFERENCE_VARIANTS
from ..bench.inference import bench_inference, explain_absence
from ..bench.training import VARIANTS as TRAINING_VARIANTS
from ..bench.training import bench_train
from ..bench.transfer import bench_finetune
from ..machine import describe_machine, find_device
from .options import DEFAULT_MODEL, POSITIVE, OpenData, data_options, print_table


def _describe_setting() -> str:
    """Say what a figure was measured on and with."""
    return f"{describe_machine(find_device())}, torch {torch.__version__}, timm {timm.__version__}"


def _variant_option(names: Iterable[str]) -> Callable[[Callable], Callable]:
    """Make the option that chooses among variants."""
    return click.option(
        "--variant",
        "variants",
        multiple=True,
        type=click.Choice(list(names)),
        help="Only this one; may be repeated.",
    )


@click.group("bench")
def bench_command() -> None:
    """Run the benchmarks: speed, memory, fine-tuning."""


@bench_command.command("train")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--batch-size",
    default=128,
    type=click.IntRange(min=2),
    help="Images per step.",
)
@click.option("--rounds", default=5, type=POSITIVE, help="Timed steps per variant.")
@_variant_option(TRAINING_VARIANTS)
def bench_train_command(
    model: str, batch_size: int, rounds: int, variants: tuple[str, ...]
) -> None:
    """Time training steps of MODEL and of other implementations of it, in turns.

    timm: its ConvMixer as a user gets it (fp32, NCHW, eager); timm-bf16, timm-compiled,
    timm-bf16-compiled: with bf16 autocast, torch.compile or both, and channels_last; sequential:
    the code in the paper's appendix; ours: as convmixer train prepares it, in bf16 where that is
    faster.
    """
    timings = bench_train(model, variants, batch_size, rounds)
    first = next(iter(timings))
    rows = [["variant", "images/s", f"× {first}", "type", "peak memory"]]
    for variant, timing in timings.items():
        rows.append(
            [
                variant,
                f"{timing.images_per_second:.1f}",
                f"{timing.images_per_second / timings[first].images_per_second:.2f}",
                timing.remark.partition(":")[0],
                f"{timing.peak_memory:.0f} MiB",
            ]
        )
    click.echo(
        f"{model}, batch {batch_size}, median of {rounds} steps each in turns, "
        f"{_describe_setting()}"
    )
    print_table(rows)
    if "ours" in timings:
        click.echo(f"ours computes in {timings['ours'].remark}")


@bench_command.command("inference")
@click.argument("name", default=DEFAULT_MODEL)
@click.option(
    "--batch-size",
    "batch_sizes",
    default=(64, 1),
    multiple=True,
    type=POSITIVE,
    help="Images per call; may be repeated.",
)
@click.option("--rounds", default=7, type=POSITIVE, help="Timed turns per variant.")
@_variant_option(INFERENCE_VARIANTS)
@click.option("--bf16", is_flag=True, help="Compute in bfloat16, by autocast, instead of float32.")
def bench_inference_command(
    name: str, batch_sizes: tuple[int, ...], rounds: int, variants: tuple[str, ...], bf16: bool
) -> None:
    """Time inference with NAME and with timm's ConvMixer of the same weights, in turns.

    On the GPU if there is one. timm: as a user gets it; timm-channels-last and timm-compiled: with
    that memory format, the latter with torch.compile, too; timm-onnxruntime and timm-openvino:
    exported to ONNX; ours: this package's model; prepared: what prepare_for_inference makes of it;
    prepared-cpp: the same with cpp=True; exported, exported-int8: what convmixer export
    writes, in onnxruntime. The difference is that of the logits from timm's in fp32, as a share of
    the largest one.
    """
    rows: list[list[str]] = []
    for batch_size in batch_sizes:
        timings = bench_inference(name, variants, batch_size, rounds, bf16)
        first = next(iter(timings))
        rows = rows or [["batch", "variant", "images/s", f"× {first}", "difference"]]
        for variant, timing in timings.items():
            rows.append(
                [
                    str(batch_size),
                    variant,
                    f"{timing.images_per_second:.0f}",
                    f"{timing.images_per_second / timings[first].images_per_second:.2f}",
                    f"{timing.remark:.0e}",
                ]
            )
    dtype = "bf16" if bf16 else "fp32"
    click.echo(f"{name} in {dtype}, median of {rounds} turns, {_describe_setting()}")
    print_table(rows)
    if not variants:
        for variant in INFERENCE_VARIANTS:
            if absence := explain_absence(variant, bf16):
                click.echo(f"left out: {variant}, which {absence}")


@bench_command.command("finetune")
@click.argument("name", default=DEFAULT_MODEL)
@data_options
@click.option(
    "--images-per-class",
    default=50,
    type=click.IntRange(min=2),
    help="Images of each class to train and validate on.",
)
@click.option(
    "--seeds",
    default=3,
    type=POSITIVE,
    help="Runs, each with other images of the dataset.",
)
def bench_finetune_command(
    name: str, open_data: OpenData, images_per_class: int, seeds: int
) -> None:
    """Fine-tune NAME on a few images of each class, and train one like it from scratch on them.

    For as many steps on the same images; top-1 is on the test images of the dataset, or else on
    those for validation.
    """
    dataset = open_data()
    results = list(bench_finetune(name, dataset, images_per_class, seeds))
    columns = [[r.finetuned for r in results], [r.from_scratch for r in results]]
    columns.append([tuned - scratch for tuned, scratch in zip(*columns)])
    rows = [["seed", *(str(result.seed) for result in results), "mean"]]
    for title, values in zip(["fine-tuned", "from scratch", "gain"], columns):
        rows.append([title, *(f"{value:.2f}" for value in [*values, statistics.mean(values)])])
    click.echo(
        f"{name}, {images_per_class} images per class, top-1 on the {dataset.test_split} images "
        f"(%), {_describe_setting()}"
    )
    print_table([list(row) for row in zip(*rows)])
